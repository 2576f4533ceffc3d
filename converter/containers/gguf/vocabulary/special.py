"""Special tokens: their ids, which of them readers put around a text, and where generation ends.

What transformers puts around a text is decided by the post-processor, unless tokenizer_config.json asks otherwise.
Readers can put one token before a text, `bos`, and one after it, `eos`, whatever transformers calls those.

Source: llama.cpp's vocabulary loader, which finds the tokens for turns and for filling in by their texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.containers.gguf.header import Field, boolean, u32
from converter.containers.gguf.vocabulary.files import Files
from converter.containers.gguf.vocabulary.sentencepiece import FAIRSEQ
from converter.containers.gguf.vocabulary.tokens import Kind, Vocabulary, flatten
from converter.errors import SourceError

KEYS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "sep": "tokenizer.ggml.seperator_token_id",  # so they spell it
    "pad": "tokenizer.ggml.padding_token_id",
    "cls": "tokenizer.ggml.cls_token_id",
    "mask": "tokenizer.ggml.mask_token_id",
}
# Where several are there, llama.cpp takes any one; the first of these is the one that ends a turn.
BY_TEXT = {
    "eot": (
        "<|eot_id|>",
        "<|im_end|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
    ),
    "eom": ("<|eom_id|>",),
    "fim_pre": (
        "<|fim_prefix|>",
        "<fim-prefix>",
        "<fim_prefix>",
        "<｜fim▁begin｜>",
        "<PRE>",
        "▁<PRE>",
        "<|code_prefix|>",
    ),
    "fim_suf": (
        "<|fim_suffix|>",
        "<fim-suffix>",
        "<fim_suffix>",
        "<｜fim▁hole｜>",
        "<SUF>",
        "▁<SUF>",
        "<|code_suffix|>",
    ),
    "fim_mid": (
        "<|fim_middle|>",
        "<fim-middle>",
        "<fim_middle>",
        "<｜fim▁end｜>",
        "<MID>",
        "▁<MID>",
        "<|code_middle|>",
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Texts at which readers end generation without being told.
ENDS = frozenset((*BY_TEXT["eot"], "<|eom_id|>", "<|return|>", "<|call|>", "</s>", "[EOS]", "<eos>", "[e~["))


@dataclass(frozen=True, kw_only=True)
class Around:
    """The tokens put before and after one text, and whether any stand between two; pair is None when not known."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    between: bool | None = None


def special_fields(files: Files, vocabulary: Vocabulary, model: str, where: str) -> tuple[dict[str, Field], list[str]]:
    """Metadata of the special tokens, and notes on what readers cannot do; model: GGUF's name for the kind.

    Raises SourceError when the tokenizer's settings name a token that there is not.
    """
    ids = vocabulary.ids()
    found = named(files, ids, len(vocabulary.tokens), where)
    around = around_text(files.tokenizer.get("post_processor"))
    notes: list[str] = []
    adds = {"bos": bool(around.before), "eos": bool(around.after)}
    for role, stand, word in (("bos", around.before, "before"), ("eos", around.after, "after")):
        wished = files.settings.get(f"add_{role}_token")
        if wished is not None and bool(wished) != adds[role]:
            adds[role] = bool(wished) and role in found
        elif len(stand) > 1:
            notes.append(
                f"transformers puts {' '.join(stand)} {word} a text, and readers of GGUF can put one token only"
            )
            adds[role] = False
        elif stand and stand[0] in ids:
            if role == "eos" and found.get("eos", ids[stand[0]]) != ids[stand[0]]:
                found.setdefault("eot", found["eos"])  # generation still ends there
            found[role] = ids[stand[0]]
    if model == "bert":
        notes += wordpiece_ends(found, around)
    told: dict[str, Any] = dict(adds)
    # SentencePiece says nothing of it, so readers' defaults hold.
    if files.bare and not files.tokenizer.get("post_processor"):
        told = {role: files.settings.get(f"add_{role}_token") for role in adds}
    fields = {KEYS[role]: u32(number) for role, number in found.items() if role in KEYS}
    fields |= {f"tokenizer.ggml.add_{role}_token": boolean(value) for role, value in told.items() if value is not None}
    if around.between is not None and (model == "bert" or around.before):
        fields["tokenizer.ggml.add_sep_token"] = boolean(around.between)
    turns = by_text(vocabulary, ids) | {role: number for role, number in found.items() if role not in KEYS}
    turns |= other_ends(files, vocabulary, found, turns)
    return fields | {f"tokenizer.ggml.{role}_token_id": u32(number) for role, number in turns.items()}, notes


def named(files: Files, ids: Mapping[str, int], count: int, where: str) -> dict[str, int]:
    """The ids of the tokens that tokenizer_config.json names, or else config.json, or else SentencePiece's file."""
    found: dict[str, int] = {}
    for role in KEYS:
        given = files.settings.get(f"{role}_token")
        content = given.get("content") if isinstance(given, dict) else given
        if content is not None and content not in ids:
            what = f"tokenizer_config.json names the {role}_token '{content}', which the tokenizer does not have"
            raise SourceError(where, what, "Save the tokenizer again")
        declared = files.config.get(f"{role}_token_id")
        declared = declared[0] if isinstance(declared, list) and declared else declared
        if content is not None:
            found[role] = ids[content]
        elif isinstance(declared, int) and not isinstance(declared, bool) and 0 <= declared < count:
            found[role] = declared
        elif files.bare and files.pieces is not None and files.family not in FAIRSEQ and role in files.pieces.roles:
            found[role] = files.pieces.roles[role]
    return found


def wordpiece_ends(found: dict[str, int], around: Around) -> list[str]:
    """Make readers put cls and sep around a text, as they always do for WordPiece; notes when transformers does not."""
    for role, stands_for in (("bos", "cls"), ("eos", "sep")):
        if role not in found and stands_for in found:
            found[role] = found[stands_for]
    if "sep" not in found and "eos" in found:
        found["sep"] = found["eos"]
    if around.before and around.after:
        return []
    return [
        "readers of GGUF put a token before and after every text of a WordPiece model, and transformers does not here"
    ]


def around_text(processor: Mapping[str, Any] | None) -> Around:
    """What a post-processor of tokenizer.json puts around texts."""
    for part in flatten(processor, "processors"):
        kind = part.get("type")
        if kind in ("RobertaProcessing", "BertProcessing"):
            return Around(before=(part["cls"][0],), after=(part["sep"][0],), between=True)
        if kind == "TemplateProcessing":
            single, pair = part.get("single") or [], part.get("pair") or []
            place = next((number for number, piece in enumerate(single) if "Sequence" in piece), len(single))
            between = None
            if len([piece for piece in pair if "Sequence" in piece]) == 2:
                first, second = (number for number, piece in enumerate(pair) if "Sequence" in piece)
                between = second - first > 1
            return Around(before=texts(single[:place], part), after=texts(single[place + 1 :], part), between=between)
    return Around()


def texts(pieces: Sequence[Mapping[str, Any]], template: Mapping[str, Any]) -> tuple[str, ...]:
    """The tokens that a template's special pieces stand for."""
    known = template.get("special_tokens") or {}
    found: list[str] = []
    for piece in pieces:
        name = piece["SpecialToken"]["id"]
        found += known.get(name, {}).get("tokens", [name])
    return tuple(found)


def by_text(vocabulary: Vocabulary, ids: Mapping[str, int]) -> dict[str, int]:
    """Tokens that readers know by their texts, said so that all readers take the same."""
    added = (Kind.CONTROL, Kind.USER_DEFINED)
    known = {role: [ids[text] for text in texts if text in ids] for role, texts in BY_TEXT.items()}
    chosen = {
        role: [number for number in numbers if vocabulary.kinds[number] in added] for role, numbers in known.items()
    }
    return {role: numbers[0] for role, numbers in chosen.items() if numbers}


def other_ends(
    files: Files, vocabulary: Vocabulary, found: Mapping[str, int], turns: Mapping[str, int]
) -> dict[str, int]:
    """Ids at which generation ends too, by config.json or generation_config.json, and which readers do not know."""
    listed: list[int] = []
    for given in (files.config.get("eos_token_id"), files.generation.get("eos_token_id")):
        listed += given if isinstance(given, list) else [given] if isinstance(given, int) else []
    ends = [
        number
        for number in dict.fromkeys(listed)
        if isinstance(number, int)
        and 0 <= number < len(vocabulary.tokens)
        and number not in (found.get("eos"), *turns.values())
        and vocabulary.tokens[number] not in ENDS
    ]
    # An eot that readers know by its text ends generation anyway, so its place can be had too.
    free = [role for role in ("eot", "eom") if role not in turns]
    free += [role for role in ("eom", "eot") if role in turns and vocabulary.tokens[turns[role]] in ENDS]
    return dict(zip(free, ends, strict=False))
