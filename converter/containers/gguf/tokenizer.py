"""A model's tokenizer as GGUF metadata: tokens, types, merges or scores, special ids, chat templates.

Everything is read from the small files beside the weights (tokenizer.json and its companions), so an unusable tokenizer
fails in the plan. Two kinds are stored: byte-level BPE as GGUF's "gpt2" model, with its merges, and BPE over characters
with byte fallback (Llama 2, Mistral) as GGUF's "llama" model, with scores in place of merges. The alternative, asking
transformers for every token, would need the library, and gives ids but not the definition that readers follow.

Sources: tokenizers' tokenizer.json; llama.cpp's vocabulary loader and SentencePiece's byte-pair rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from converter.containers.gguf.header import Field, boolean, f32s, i32s, string, strings, u32
from converter.containers.gguf.pretokenizer import (
    ELSEWHERE,
    differences,
    flatten,
    is_byte_level,
    pairs,
    recognise,
    shorten,
)
from converter.errors import SourceError, UnsupportedError

SPACE = "\u2581"  # how SentencePiece writes a space
# Readers treat these as control tokens whatever the file says, and warn about it.
LOOKS_SPECIAL = re.compile(
    r"<\|.*\|>|<｜.*｜>|<(unused\d+|pad|mask|start_of_turn|end_of_turn)>|\[/?(INST|PAD|CLS|SEP)\]"
)
SPECIAL_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


class Kind(IntEnum):
    """What a token is, as `tokenizer.ggml.token_type` numbers it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Files:
    """The small files that define a tokenizer, parsed; `templates` are chat templates by name ("default" first)."""

    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    config: Mapping[str, Any]
    templates: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Described:
    """A tokenizer as GGUF's `tokenizer.*` metadata; notes: what readers do otherwise than transformers."""

    fields: Mapping[str, Field]
    notes: tuple[str, ...]


def describe_tokenizer(folder: Path, config: Mapping[str, Any], rows: int, where: str) -> Described:
    """The tokenizer of the model in `folder`, padded to `rows` tokens, the rows of its embedding.

    Raises SourceError when the tokenizer is missing, broken or larger than the embedding, UnsupportedError when readers
    of GGUF have no way to split text as it does.
    """
    files = read_files(folder, config, where)
    try:
        return describe(files, rows, where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # of JSON laid out in another way
        what = f"tokenizer.json is not laid out as the tokenizers library does: {type(error).__name__}: {error}"
        raise SourceError(where, what, "Save the tokenizer again") from error


def describe(files: Files, rows: int, where: str) -> Described:
    """See describe_tokenizer."""
    model = files.tokenizer["model"]
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        what = f"the tokenizer's model is {model.get('type')}, and only plain BPE is stored in GGUF"
        raise UnsupportedError(where, what, ELSEWHERE)
    tokens, kinds = vocabulary(files, rows, where)
    fields: dict[str, Field] = {}
    notes: list[str] = []
    if homeless := without_row(files, rows):
        notes.append(f"tokens that have no row in the embedding are left out: {shorten(', '.join(homeless))}")
    if is_byte_level(files.tokenizer):
        cleans = bool(files.settings.get("clean_up_tokenization_spaces", False))
        name = recognise(files.tokenizer, cleans, where)
        notes += differences(files.tokenizer, name)
        fields["tokenizer.ggml.model"] = string("gpt2")
        fields["tokenizer.ggml.pre"] = string(name)
        fields["tokenizer.ggml.merges"] = strings([f"{left} {right}" for left, right in pairs(model["merges"])])
    elif model.get("byte_fallback"):
        fields["tokenizer.ggml.model"] = string("llama")
        fields["tokenizer.ggml.pre"] = string("default")
        fields["tokenizer.ggml.add_space_prefix"] = boolean(space_prefix(files.tokenizer, where))
        fields["tokenizer.ggml.scores"] = f32s(scores(model, tokens, kinds, where))
        for number, token in enumerate(tokens):
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                kinds[number] = Kind.BYTE
            if kinds[number] == Kind.USER_DEFINED:
                tokens[number] = token.replace(SPACE, " ")
    else:
        what = "the tokenizer is BPE neither over bytes nor with byte fallback, which readers of GGUF do not know"
        raise UnsupportedError(where, what, ELSEWHERE)
    fields["tokenizer.ggml.tokens"] = strings(tokens)
    fields["tokenizer.ggml.token_type"] = i32s([int(kind) for kind in kinds])
    fields |= special_fields(files, tokens, where) | template_fields(files)
    return Described(fields=fields, notes=tuple(notes))


def read_files(folder: Path, config: Mapping[str, Any], where: str) -> Files:
    """The tokenizer's files. Raises SourceError when tokenizer.json is missing or is not what it should be."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        what = "the model has no tokenizer.json, without which a GGUF file is of no use"
        remedy = "Save it beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        if (folder / "tokenizer.model").is_file():
            what += " (tokenizer.model alone is not read)"
        raise SourceError(where, what, remedy)
    tokenizer = read_json(path, where)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise SourceError(where, "tokenizer.json holds no vocabulary", "Save the tokenizer again")
    settings = read_json(folder / "special_tokens_map.json", where) | read_json(folder / "tokenizer_config.json", where)
    return Files(
        tokenizer=tokenizer, settings=settings, config=config, templates=read_templates(folder, settings, where)
    )


def read_json(path: Path, where: str) -> dict[str, Any]:
    """The JSON object in a file, {} when there is no such file; raises SourceError when it is broken."""
    if not path.is_file():
        return {}
    try:
        parsed = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(where, f"{path.name} is broken: {error}", "Mend the file, or fetch it again") from error
    if not isinstance(parsed, dict):
        raise SourceError(where, f"{path.name} is no JSON object", "Mend the file, or fetch it again")
    return parsed


def read_templates(folder: Path, settings: Mapping[str, Any], where: str) -> dict[str, str]:
    """Chat templates by name; those in files of their own win over those in tokenizer_config.json."""
    found: dict[str, str] = {}
    for given in (settings.get("chat_template"), read_json(folder / "chat_template.json", where).get("chat_template")):
        if isinstance(given, str):
            found["default"] = given
        elif isinstance(given, list):
            found |= {entry["name"]: entry["template"] for entry in given if {"name", "template"} <= set(entry)}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = (folder / "chat_template.jinja").read_text("utf-8")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text("utf-8")
    return found


def without_row(files: Files, rows: int) -> list[str]:
    """Added tokens beyond the embedding's `rows`, such as the picture tokens in tokenizers of Gemma 3's text models."""
    vocabulary = files.tokenizer["model"]["vocab"]
    added = files.tokenizer.get("added_tokens") or []
    return [str(token["content"]) for token in added if rows <= token["id"] and token["content"] not in vocabulary]


def vocabulary(files: Files, rows: int, where: str) -> tuple[list[str], list[Kind]]:
    """Tokens and their kinds by id, one for each of the embedding's `rows`; ids that nothing uses are padded."""
    by_id: dict[int, str] = {int(number): token for token, number in files.tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(by_id, Kind.NORMAL)
    unknown = files.tokenizer["model"].get("unk_token")
    for added in files.tokenizer.get("added_tokens") or []:
        number, content = int(added["id"]), str(added["content"])
        if number >= rows and number not in by_id:
            continue  # see without_row
        by_id[number] = content
        special = added.get("special") or LOOKS_SPECIAL.fullmatch(content)
        kinds[number] = Kind.CONTROL if special else Kind.USER_DEFINED
    kinds |= {number: Kind.UNKNOWN for number, token in by_id.items() if token == unknown}
    if max(by_id) >= rows:
        what = f"the tokenizer has {max(by_id) + 1} tokens, and the embedding {rows} rows"
        raise SourceError(where, what, "Tokenizer and weights are of different models: fetch both again")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(rows)]
    if len(set(tokens)) != rows:
        twice = next(token for number, token in enumerate(tokens) if token in tokens[:number])
        raise SourceError(where, f"the tokenizer gives two ids to the token '{twice}'", "Remove one in tokenizer.json")
    return tokens, [kinds.get(number, Kind.UNUSED) for number in range(rows)]


def space_prefix(tokenizer: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put before the text; raises UnsupportedError for what SentencePiece does not do.

    Spaces become U+2581, by a normalizer (Replace, after which a Split at spaces finds none) or by Metaspace.
    """
    steps = [*flatten(tokenizer.get("normalizer"), "normalizers")]
    steps += flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")
    replaces = prefix = False
    for step in steps:
        kind, at_spaces = step.get("type"), step.get("pattern") == {"String": " "}
        if kind == "Metaspace" and step.get("replacement", SPACE) == SPACE:
            replaces = True
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
            if step.get("split", True):
                check_no_inner_spaces(tokenizer["model"]["vocab"], where)
        elif kind == "Replace" and at_spaces and step.get("content") == SPACE:
            replaces = True
        elif kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif not (kind == "Split" and at_spaces and replaces):
            what = f"the tokenizer prepares text by a step that readers of GGUF do not know: {shorten(step)}"
            raise UnsupportedError(where, what, ELSEWHERE)
    if not replaces:
        what = "the tokenizer has byte fallback but keeps spaces as they are, which readers of GGUF do not"
        raise UnsupportedError(where, what, ELSEWHERE)
    return prefix


def check_no_inner_spaces(vocabulary: Iterable[str], where: str) -> None:
    """Raise UnsupportedError when a token spans words: the tokenizer never makes it, but readers of GGUF would."""
    for token in vocabulary:
        if SPACE in token[1:]:
            what = f"the tokenizer splits at every space but has the token '{token}', which readers of GGUF would use"
            raise UnsupportedError(where, what, ELSEWHERE)


def scores(model: Mapping[str, Any], tokens: list[str], kinds: list[Kind], where: str) -> list[float]:
    """Scores that make SentencePiece's rule, join the pair whose token scores highest, follow the merges.

    The rule knows tokens only, so it is the same exactly when every pair that makes a token is a merge and all merges
    that make a token stand together. User-defined tokens are cut out of the text before it and take no part. A token
    that no merge makes is scored by its id, as SentencePiece does: conversions of Llama's tokenizer lost the merge of
    the one token whose score was zero, and its own reader has it.
    Raises UnsupportedError when a merge list says otherwise.
    """
    merges = pairs(model["merges"])
    apart = {token for token, kind in zip(tokens, kinds, strict=True) if kind == Kind.USER_DEFINED}
    made: dict[str, int] = {}
    last = ""
    for left, right in merges:
        token = left + right
        if token in apart:
            continue
        if token != last and token in made:
            what = f"the merges that make '{token}' do not stand together, and GGUF stores one score for a token"
            raise UnsupportedError(where, what, ELSEWHERE)
        made.setdefault(token, len(made))
        last = token
    ids = {token: number for number, token in enumerate(tokens)}
    by_id = all(ids[first] < ids[second] for first, second in pairwise(made))
    known, listed = set(model["vocab"]) - apart, set(merges)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind != Kind.NORMAL or (by_id and token not in made):
            continue
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in known and pair[1] in known and pair not in listed:
                what = f"'{pair[0]}' and '{pair[1]}' are never merged to '{token}', but readers of GGUF would"
                raise UnsupportedError(where, what, ELSEWHERE)
    ranks = ids if by_id else made
    return [
        float(-ranks[token]) if kind == Kind.NORMAL and token in ranks else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def special_fields(files: Files, tokens: list[str], where: str) -> dict[str, Field]:
    """Ids of the special tokens, and whether they are put around a text."""
    ids = {token: number for number, token in enumerate(tokens)}
    fields: dict[str, Field] = {}
    found: dict[str, int] = {}
    for role, key in SPECIAL_ROLES.items():
        given = files.settings.get(key)
        content = given.get("content") if isinstance(given, dict) else given
        number = ids.get(content) if content is not None else None
        if content is not None and number is None:
            what = f"tokenizer_config.json names the {key} '{content}', which tokenizer.json does not have"
            raise SourceError(where, what, "Save the tokenizer again")
        if number is None:
            declared = files.config.get(key + "_id")
            declared = declared[0] if isinstance(declared, list) and declared else declared
            number = declared if isinstance(declared, int) and 0 <= declared < len(tokens) else None
        if number is not None:
            found[role] = number
            fields[f"tokenizer.ggml.{role}_token_id"] = u32(number)
    first, last = template_ends(files.tokenizer.get("post_processor"))
    for role, end in (("bos", first), ("eos", last)):
        given = files.settings.get(f"add_{role}_token")
        adds = bool(given) if given is not None else role in found and tokens[found[role]] == end
        fields[f"tokenizer.ggml.add_{role}_token"] = boolean(adds and role in found)
    return fields


def template_ends(processor: Mapping[str, Any] | None) -> tuple[str, str]:
    """The special tokens that the post-processor puts before and after a single text; empty when none."""
    if processor is None:
        return "", ""
    if processor.get("type") == "Sequence":
        ends = [template_ends(part) for part in processor["processors"]]
        return next((end for end in ends if any(end)), ("", ""))
    pieces = processor.get("single") if processor.get("type") == "TemplateProcessing" else None
    if not pieces:
        return "", ""
    first, last = (piece.get("SpecialToken", {}).get("id", "") for piece in (pieces[0], pieces[-1]))
    return first, last


def template_fields(files: Files) -> dict[str, Field]:
    """Chat templates, the default one under the plain key."""
    fields: dict[str, Field] = {}
    others = {name: text for name, text in files.templates.items() if name != "default"}
    if "default" in files.templates:
        fields["tokenizer.chat_template"] = string(files.templates["default"])
    for name, text in others.items():
        fields[f"tokenizer.chat_template.{name}"] = string(text)
    if others:
        fields["tokenizer.chat_templates"] = strings(list(others))
    return fields
