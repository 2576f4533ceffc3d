"""A model's tokenizer as GGUF metadata: tokens, types, merges or scores, special ids, chat templates.

Everything is read from the small files beside the weights, so an unusable tokenizer fails in the plan. GGUF knows four
kinds: byte-level BPE ("gpt2"), BPE over characters with byte fallback ("llama"), WordPiece ("bert") and Unigram ("t5").
Readers prepare text in ways of their own; where those are not the tokenizer's the plan says what differs, and where
that touches ordinary text it refuses until the manifest accepts it. The alternative, asking transformers for every
token, would need the library, and gives ids but not the definition that readers follow.

Sources: tokenizers' tokenizer.json; llama.cpp's vocabulary loader.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from converter.containers.gguf.header import Field, i32s, string, strings
from converter.containers.gguf.vocabulary.byte_level import read_byte_level
from converter.containers.gguf.vocabulary.characters import read_characters
from converter.containers.gguf.vocabulary.files import Files, read_files
from converter.containers.gguf.vocabulary.recognise import is_byte_level
from converter.containers.gguf.vocabulary.special import special_fields
from converter.containers.gguf.vocabulary.tokens import (
    ELSEWHERE,
    Reading,
    Vocabulary,
    check_distinct,
    greedy,
    shorten,
    vocabulary_of,
    without_row,
)
from converter.containers.gguf.vocabulary.unigram import read_unigram
from converter.containers.gguf.vocabulary.wordpiece import read_wordpiece
from converter.errors import HubmillError, SourceError, UnsupportedError

PRE_KEY = "tokenizer.ggml.pre"
SOMEWHERE = "\0where\0"  # stands in errors for what describes the same tokenizer another time


@dataclass(frozen=True, kw_only=True)
class Described:
    """A tokenizer as GGUF's `tokenizer.*` metadata; notes: what readers do otherwise than transformers."""

    fields: Mapping[str, Field]
    notes: tuple[str, ...]


def describe_tokenizer(
    folder: Path, config: Mapping[str, Any], rows: int, where: str, accepted: object = None
) -> Described:
    """The tokenizer of the model in `folder`, padded to `rows` tokens, the rows of its embedding.

    accepted: the manifest's own `tokenizer.ggml.pre`, by which it takes the differences that are refused otherwise.
    Raises SourceError when the tokenizer is missing, broken, contradictory or larger than the embedding,
    UnsupportedError when readers of GGUF have no way to split text as it does.
    """
    name = accepted if isinstance(accepted, str) else None
    files = [(file.name, file.stat()) for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    stamps = tuple(sorted((name, state.st_size, state.st_mtime_ns) for name, state in files))
    try:
        return _described(folder, stamps, json.dumps(dict(config)), rows, name)
    except HubmillError as error:
        raise type(error)(error.where.replace(SOMEWHERE, where), error.what, error.remedy) from error.__cause__
    except Exception as error:  # of JSON laid out in another way, for which tokenizers has no narrower kind
        what = f"the tokenizer's files are not laid out as the tokenizers library does: {type(error).__name__}: {error}"
        raise SourceError(where, what, "Save the tokenizer again") from error


@lru_cache(4)  # a model has many targets, and a vocabulary takes longer to read than all the rest of them
def _described(
    folder: Path, stamps: tuple[tuple[str, int, int], ...], config: str, rows: int, accepted: str | None
) -> Described:
    """See describe_tokenizer; stamps: names, sizes and times of the files, by which they are known to be the same."""
    return describe(read_files(folder, json.loads(config), SOMEWHERE), rows, SOMEWHERE, accepted)


def describe(files: Files, rows: int, where: str, accepted: str | None) -> Described:
    """See describe_tokenizer."""
    vocabulary = vocabulary_of(files.tokenizer, rows, where)
    reading, vocabulary = read(files, vocabulary, accepted, where)
    if reading.objections and accepted is None:
        remedy = f"To accept that, give the target metadata: {{{PRE_KEY}: {reading.name}}}; or {ELSEWHERE[0].lower()}"
        raise UnsupportedError(where, "; ".join(reading.objections), remedy + ELSEWHERE[1:])
    check_distinct(reading.fields["tokenizer.ggml.tokens"].value, where)
    notes = [
        *files.notes,
        *reading.notes,
        *(f"accepted by the manifest: {objection}" for objection in reading.objections),
    ]
    if homeless := without_row(files.tokenizer, rows):
        notes.append(f"tokens that have no row in the embedding are left out: {shorten(', '.join(homeless))}")
    if taking := greedy(files.tokenizer):
        said = (
            "take in the spaces beside them, or count as whole words only, in transformers and not in readers of GGUF"
        )
        notes.append(f"these added tokens {said}: {shorten(', '.join(taking))}")
    special, said_of_special = special_fields(files, vocabulary, reading.fields["tokenizer.ggml.model"].value, where)
    fields = dict(reading.fields)
    fields["tokenizer.ggml.token_type"] = i32s([int(kind) for kind in vocabulary.kinds])
    fields |= special | template_fields(files.templates)
    return Described(fields=fields, notes=(*notes, *said_of_special))


def read(files: Files, vocabulary: Vocabulary, accepted: str | None, where: str) -> tuple[Reading, Vocabulary]:
    """How readers will use the tokenizer, by its kind; and its vocabulary, in which kinds of tokens may change."""
    model = files.tokenizer["model"]
    kind = model.get("type") or ("WordPiece" if "max_input_chars_per_word" in model else "BPE")
    if kind == "WordPiece":
        return read_wordpiece(files.tokenizer, vocabulary), vocabulary
    if kind == "Unigram":
        reading, kinds = read_unigram(files.tokenizer, vocabulary)
        return reading, Vocabulary(tokens=vocabulary.tokens, kinds=kinds, scores=vocabulary.scores)
    affixes = model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")
    if kind == "BPE" and not affixes and is_byte_level(files.tokenizer):
        cleans = bool(files.settings.get("clean_up_tokenization_spaces", False))
        return read_byte_level(files.tokenizer, vocabulary, cleans, files.family, accepted), vocabulary
    if kind == "BPE" and not affixes and model.get("byte_fallback"):
        return read_characters(files.tokenizer, vocabulary, files.pieces, where), vocabulary
    what = f"the tokenizer's model is {kind}, which readers of GGUF do not know"
    if kind == "BPE":
        what = "the tokenizer is BPE neither over bytes nor with byte fallback, which readers of GGUF do not know"
    raise UnsupportedError(where, what, ELSEWHERE)


def template_fields(templates: Mapping[str, str]) -> dict[str, Field]:
    """Chat templates, the default one under the plain key."""
    fields: dict[str, Field] = {}
    others = {name: text for name, text in templates.items() if name != "default"}
    if "default" in templates:
        fields["tokenizer.chat_template"] = string(templates["default"])
    for name, text in others.items():
        fields[f"tokenizer.chat_template.{name}"] = string(text)
    if others:
        fields["tokenizer.chat_templates"] = strings(list(others))
    return fields
