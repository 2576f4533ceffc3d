"""The tokens of a vocabulary by id, and what each of them is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from converter.containers.gguf.header import Field
from converter.errors import SourceError

SPACE = "\u2581"  # how SentencePiece writes a space
# Readers treat these as control tokens whatever the file says, and warn about it.
LOOKS_SPECIAL = re.compile(
    r"<\|.*\|>|<｜.*｜>|<(unused\d+|pad|mask|2mass|start_of_turn|end_of_turn)>|\[/?(INST|PAD|CLS|SEP)\]|\[@BOS@\]"
)
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
ELSEWHERE = "Choose format: compressed-tensors or parquet for this model"


class Kind(IntEnum):
    """What a token is, as `tokenizer.ggml.token_type` numbers it, and SentencePiece too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens and their kinds by id, one for each row of the embedding; `scores` where the tokenizer has them."""

    tokens: tuple[str, ...]
    kinds: tuple[Kind, ...]
    scores: tuple[float, ...] = ()

    def ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How readers will use a tokenizer: metadata, and where they do otherwise than transformers.

    notes: differences that one can live with. objections: those that change what a model is told in ordinary text,
    which are refused unless the manifest accepts `name`, the value of `tokenizer.ggml.pre`.
    """

    name: str
    fields: Mapping[str, Field]
    notes: tuple[str, ...] = ()
    objections: tuple[str, ...] = ()


def entries(model: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """The vocabulary of tokenizer.json's model as token, id and score: {token: id}, or for Unigram [[token, score]]."""
    listed = model["vocab"]
    if isinstance(listed, Mapping):
        return [(token, int(number), 0.0) for token, number in listed.items()]
    return [(token, number, float(score)) for number, (token, score) in enumerate(listed)]


def unknown_token(model: Mapping[str, Any]) -> str | None:
    """The token that stands for text that no other token covers."""
    number, listed = model.get("unk_id"), model["vocab"]
    if isinstance(number, int) and not isinstance(listed, Mapping):
        return str(listed[number][0])
    return model.get("unk_token")


def vocabulary_of(tokenizer: Mapping[str, Any], rows: int, where: str) -> Vocabulary:
    """The vocabulary of tokenizer.json, with added tokens in their places and ids that nothing uses padded.

    Raises SourceError when it has more tokens than the embedding has `rows`.
    """
    listed = entries(tokenizer["model"])
    by_id = {number: token for token, number, _ in listed}
    scores = {} if isinstance(tokenizer["model"]["vocab"], Mapping) else {number: score for _, number, score in listed}
    kinds: dict[int, Kind] = {}
    if tokenizer["model"].get("byte_fallback"):
        kinds = {number: Kind.BYTE for number, token in by_id.items() if BYTE.fullmatch(token)}
    for added in tokenizer.get("added_tokens") or []:
        number, content = int(added["id"]), str(added["content"])
        if number >= rows and number not in by_id:
            continue  # see without_row
        by_id[number] = content
        special = added.get("special") or LOOKS_SPECIAL.fullmatch(content)
        kinds[number] = Kind.CONTROL if special else Kind.USER_DEFINED
    unknown = unknown_token(tokenizer["model"])
    kinds |= {number: Kind.UNKNOWN for number, token in by_id.items() if token == unknown}
    if max(by_id) >= rows:
        what = f"the tokenizer has {max(by_id) + 1} tokens, and the embedding {rows} rows"
        raise SourceError(where, what, "Tokenizer and weights are of different models: fetch both again")
    return Vocabulary(
        tokens=tuple(by_id.get(number, f"[PAD{number}]") for number in range(rows)),
        kinds=tuple(kinds.get(number, Kind.NORMAL if number in by_id else Kind.UNUSED) for number in range(rows)),
        scores=tuple(scores.get(number, 0.0) for number in range(rows)) if scores else (),
    )


def check_distinct(tokens: Sequence[str], where: str) -> None:
    """Raise SourceError when two ids have one token, for which readers end themselves; they read up to a NUL."""
    read = [token.partition("\0")[0] for token in tokens]
    if len(set(read)) != len(read):
        twice = next(token for token, count in Counter(read).items() if count > 1)
        raise SourceError(where, f"the tokenizer gives two ids to the token '{twice}'", "Remove one of them")


def without_row(tokenizer: Mapping[str, Any], rows: int) -> list[str]:
    """Added tokens beyond the embedding's `rows`, such as the picture tokens in tokenizers of Gemma 3's text models."""
    beyond = [str(token["content"]) for token in tokenizer.get("added_tokens") or [] if rows <= token["id"]]
    known = {token for token, _, _ in entries(tokenizer["model"])} if beyond else set()
    return [token for token in beyond if token not in known]


def greedy(tokenizer: Mapping[str, Any]) -> list[str]:
    """Added tokens that take the spaces beside them, or count only as words of their own: readers know neither."""
    added = tokenizer.get("added_tokens") or []
    return [
        str(token["content"])
        for token in added
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word")
    ]


def flatten(part: Mapping[str, Any] | None, children: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of nested sequences (under `children`) in line."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for child in part[children] for step in flatten(child, children)]
    return [part]


def normalizers_of(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return flatten(tokenizer.get("normalizer"), "normalizers")


def pre_tokenizers_of(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return flatten(tokenizer.get("pre_tokenizer"), "pretokenizers")


def pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    """The merges of tokenizer.json, which has them as "a b" or as [a, b]."""
    split: Iterable[Sequence[str]] = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(left, right) for left, right in split]


def shorten(value: object, limit: int = 200) -> str:
    """`value` as text of at most `limit` letters."""
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "…"
