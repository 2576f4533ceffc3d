"""The name llama.cpp has for a pre-tokenizer, found from its definition.

llama.cpp's converter finds the name by a hash of what one vocabulary makes of one text, so every fine-tune that adds a
token fails until somebody lists it. Here the definition itself is compared with a table. What is written in another
way, and what llama.cpp itself only comes near, is run beside the candidates on a hard text: the one that cuts it alike
has the name, and otherwise the nearest is told with what it does differently, for a wrong name gives a file that loads
and mumbles.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import models

from converter.containers.gguf.vocabulary.difference import Difference, compare, encode, normalised, small, splitter
from converter.containers.gguf.vocabulary.splittings import (
    AFTER_BYTES,
    CONTRACTIONS,
    DIGIT,
    DIGITS,
    GPT2,
    PUNCTUATION,
    SPLITTINGS,
    Splitting,
)
from converter.containers.gguf.vocabulary.tokens import normalizers_of, pairs, pre_tokenizers_of, shorten

SPELLINGS = {
    "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": CONTRACTIONS,
    "(?:'[sS]|'[tT]|'[mM]|'[dD]|'[lL][lL]|'[vV][eE]|'[rR][eE])": CONTRACTIONS,
}
COVERS_ALL = r"\s+(?!\S)|\s+"  # how patterns end that leave no text between their matches
# HF's normalizers that change nothing in text as it is usually written, which llama.cpp's own converter accepts too.
HARMLESS_NORMALIZERS = ("NFC",)


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A name for `tokenizer.ggml.pre`, and what readers that find it do otherwise; see Reading."""

    name: str
    notes: tuple[str, ...] = ()
    objections: tuple[str, ...] = ()


def recognise(tokenizer: Mapping[str, Any], cleans: bool, family: str = "", accepted: str | None = None) -> Recognised:
    """The name of the pre-tokenizer in `tokenizer`, the content of tokenizer.json.

    cleans: whether tokenizer_config.json asks for cleaned up spaces; family: the model type; both only decide between
    names that split alike. accepted: a name to be taken whatever it does.
    """
    steps = splits(tokenizer)
    whole_words = bool(tokenizer["model"].get("ignore_merges", False))
    alike = [row for row in SPLITTINGS if row.steps == steps]
    if accepted is not None:
        given = [row for row in SPLITTINGS if row.name == accepted]
        if not given:
            unknown = f"tokenizer.ggml.pre is '{accepted}', of which nothing is known here: it was not compared"
            return Recognised(name=accepted, objections=(unknown,))
        alike = [row for row in alike if row in given] or given
    exact = [row for row in alike if row.exact and row.whole_words == whole_words and row.steps == steps]
    if exact:
        best, difference = min(exact, key=lambda row: fit(row, cleans, family)), Difference()
    else:
        best, difference = nearest(tokenizer, alike or SPLITTINGS, lambda row: fit(row, cleans, family))
    notes, objections = judge(best, difference, known=best.steps == steps)
    stranded = unreachable(tokenizer) if best.whole_words != whole_words else None
    if stranded is not None:
        what = "takes whole words before merging" if whole_words else "merges even where the whole word is a token"
        objections += (
            f"the tokenizer splits like '{best.name}' but {what}, and its merges do not lead to the token '{stranded}'",
        )
    return Recognised(name=best.name, notes=notes, objections=objections)


def fit(row: Splitting, cleans: bool, family: str) -> tuple[bool, bool]:
    """What decides between names that split alike, smallest first: the family's own name, then the same cleaning."""
    return family not in row.families, row.cleans != cleans or bool(row.families and family not in row.families)


def judge(row: Splitting, difference: Difference, known: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes and objections for a reader that splits as `row`; known: the tokenizer is of those the row stands for."""
    if not difference.share:
        said = f"the tokenizer's way of splitting is written otherwise than '{row.name}', and cuts a hard text alike"
        return () if known else (said,), ()
    if known and not row.exact:
        said = f"llama.cpp's splitting '{row.name}' only comes near the tokenizer's; it cuts otherwise"
        return (f"{said} {difference}",), ()
    if difference.spaces:
        said = f"the tokenizer splits like '{row.name}' but for runs of spaces and newlines; otherwise are"
        return (f"{said} {difference}",), ()
    said = "the tokenizer splits text in a way that llama.cpp has no name for; the nearest"
    return (), (f"{said}, '{row.name}', cuts otherwise {difference}",)


def nearest(
    tokenizer: Mapping[str, Any], rows: Sequence[Splitting], order: Callable[[Splitting], tuple[bool, bool]]
) -> tuple[Splitting, Difference]:
    """The row that cuts the hard text most like `tokenizer`, among equals the first by `order`."""
    other = small(tokenizer, {"pre_tokenizer": without_prefix(tokenizer.get("pre_tokenizer"))})
    own = encode(other)
    found: dict[tuple[tuple[str, ...], bool], Difference] = {}
    for row in rows:
        way = (row.reads or row.steps, row.whole_words)
        if way not in found:
            other.pre_tokenizer, other.model.ignore_merges = splitter(way[0]), row.whole_words
            found[way] = compare(own, encode(other))
    whole = bool(tokenizer["model"].get("ignore_merges", False))

    def rank(row: Splitting) -> tuple[float, bool, bool, bool]:
        return found[row.reads or row.steps, row.whole_words].share, row.whole_words != whole, *order(row)

    best = min(rows, key=rank)
    return best, found[best.reads or best.steps, best.whole_words]


def splits(tokenizer: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The patterns that the pre-tokenizer splits by, in turn, canonically spelled; None when it has other steps."""
    found: list[str] = []
    behind = ""
    for step in pre_tokenizers_of(tokenizer):
        kind = step.get("type")
        if kind == "Split" and isolates(step):
            found.append(behind + canonical(step["pattern"]))
        elif kind == "Digits":
            found.append(behind + (DIGIT if step.get("individual_digits") else DIGITS))
        elif kind == "Punctuation" and step.get("behavior", "Isolated") in ("Isolated", "Contiguous"):
            found.append(behind + PUNCTUATION + ("+" if step.get("behavior") == "Contiguous" else ""))
        elif kind == "ByteLevel" and not behind:
            found += [GPT2] if step.get("use_regex", True) else []
            behind = AFTER_BYTES
        else:
            return None
    return tuple(found)


def isolates(step: Mapping[str, Any]) -> bool:
    """Whether each match is a piece, and nothing is lost between them."""
    if step.get("behavior") == "Removed" and step.get("invert"):
        return str(step["pattern"].get("Regex", "")).endswith(COVERS_ALL)
    return step.get("behavior") == "Isolated"


def canonical(pattern: Mapping[str, str]) -> str:
    text = pattern.get("Regex")
    if text is None:
        return pattern["String"]
    for spelled, short in SPELLINGS.items():
        text = text.replace(spelled, short)
    return text


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json splits into bytes written as letters, as GPT-2 does."""
    return any(step.get("type") == "ByteLevel" for step in pre_tokenizers_of(tokenizer))


def puts_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a space is put before text that does not begin with one."""
    return any(
        step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in pre_tokenizers_of(tokenizer)
    )


def without_prefix(part: Any) -> Any:
    """A pre-tokenizer without the spaces that it puts before text."""
    if isinstance(part, dict):
        return {key: False if key == "add_prefix_space" else without_prefix(value) for key, value in part.items()}
    return [without_prefix(value) for value in part] if isinstance(part, list) else part


def normalisation(tokenizer: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes and objections for readers that leave text as it is, as those of byte-level BPE do."""
    steps = normalizers_of(tokenizer)
    if not steps:
        return (), ()
    names = ", ".join(str(step.get("type")) for step in steps)
    if all(step.get("type") in HARMLESS_NORMALIZERS for step in steps):
        said = "so letters written with combining marks get other tokens than in transformers"
        return (f"readers of GGUF do not normalise text ({names}), {said}",), ()
    changed = normalised(json.dumps(tokenizer["normalizer"], sort_keys=True))
    if not changed:
        return (f"readers of GGUF do not normalise text ({names}), which leaves even a hard text as it is",), ()
    shown = "; ".join(f"{shorten(word, 24)!r} to {shorten(made, 24)!r}" for word, made in changed[:3])
    return (), (f"the tokenizer normalises text ({names}), such as {shown}, which readers of GGUF do not",)


def unreachable(tokenizer: Mapping[str, Any]) -> str | None:
    """A token that merging its own letters does not give, None when there is none.

    Only then does it matter whether a reader looks whole words up before it merges. Added tokens never come to merging.
    """
    model = tokenizer["model"]
    merge = models.BPE(vocab=dict(model["vocab"]), merges=pairs(model["merges"]), cache_capacity=0)
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    candidates: Iterable[str] = (token for token in model["vocab"] if len(token) > 1 and token not in added)
    return next((token for token in candidates if len(merge.tokenize(token)) != 1), None)
