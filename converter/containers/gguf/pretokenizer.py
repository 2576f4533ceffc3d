"""The name llama.cpp has for a pre-tokenizer, found from its definition.

A byte-level BPE splits text before it merges, and a GGUF file names the way of splitting (`tokenizer.ggml.pre`) instead
of describing it. llama.cpp's converter finds the name by a hash of what one vocabulary makes of one text, so every
fine-tune that adds a token fails until somebody lists it. Here the definition itself is compared: normalizer, the
sequence of splits, and whether whole words skip the merges. What is not in the table is refused with its pattern, for a
wrong name gives a file that loads and mumbles.

Source of the table: llama.cpp, src/llama-vocab.cpp; each row is checked against it in tests/test_gguf_consumer.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from converter.errors import UnsupportedError

ELSEWHERE = "Choose format: compressed-tensors or parquet for this model"

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CONTRACTIONS_SPELLED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SLASH_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{REST}"
LLAMA3 = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{REST}"
QWEN35 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = rf"{CASED[0]}|{CASED[1]}|\p{{N}}|{SLASH_REST}"
GPT4O = rf"{CASED[0]}{CONTRACTIONS}?|{CASED[1]}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{SLASH_REST}"
SEED_CODER = rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
# HF's normalizers that change nothing in text as it is usually written, which llama.cpp's own converter accepts too.
HARMLESS_NORMALIZERS = ("NFC",)


@dataclass(frozen=True, kw_only=True)
class Splitting:
    """How a reader that finds `name` splits text: patterns applied in turn, each match a piece of its own.

    whole_words: a piece that is a token is taken as it is, without merging. cleans: detokenizing removes the space
    before punctuation. exact is False where llama.cpp only comes near: it takes every letter but a-z for upper case,
    so it does not split "ПриВет", and splits before combining marks.
    """

    name: str
    steps: tuple[str, ...]
    whole_words: bool = False
    cleans: bool = False
    exact: bool = True


SPLITTINGS = (
    Splitting(name="qwen2", steps=(QWEN2,)),
    Splitting(name="stablelm2", steps=(QWEN2,), cleans=True),
    Splitting(name="qwen35", steps=(QWEN35,)),
    Splitting(name="llama-bpe", steps=(LLAMA3,), whole_words=True, cleans=True),
    Splitting(name="smaug-bpe", steps=(LLAMA3,), cleans=True),
    Splitting(name="gpt-2", steps=(GPT2,), cleans=True),
    Splitting(name="trillion", steps=(GPT2,)),
    Splitting(name="smollm", steps=(r"\p{N}", GPT2)),
    Splitting(name="starcoder", steps=(r"\p{N}", GPT2), cleans=True),
    Splitting(name="tekken", steps=(TEKKEN,), whole_words=True, exact=False),
    Splitting(name="gpt-4o", steps=(GPT4O,), exact=False),
    Splitting(name="seed-coder", steps=(SEED_CODER,)),
    Splitting(name="deepseek-v3", steps=DEEPSEEK3),
    Splitting(name="deepseek-coder", steps=DEEPSEEK_CODER),
)


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json splits into bytes written as letters, as GPT-2 does."""
    return any(step.get("type") == "ByteLevel" for step in flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def recognise(tokenizer: Mapping[str, Any], cleans: bool, where: str) -> str:
    """The name of the pre-tokenizer in `tokenizer`, the content of tokenizer.json.

    cleans: whether tokenizer_config.json asks for cleaned up spaces; it only decides between names that split alike.
    Raises UnsupportedError, with the pattern and the nearest known name, when llama.cpp has no such splitting.
    """
    for normalizer in flatten(tokenizer.get("normalizer"), "normalizers"):
        if normalizer.get("type") not in HARMLESS_NORMALIZERS:
            what = f"the tokenizer normalizes text ({normalizer.get('type')}), which readers of GGUF do not"
            raise UnsupportedError(where, what, ELSEWHERE)
    steps = splits(tokenizer, where)
    model = tokenizer["model"]
    whole_words = bool(model.get("ignore_merges", False))
    alike = [row for row in SPLITTINGS if row.steps == steps]
    if not alike:
        raise _unknown(steps, where)
    same = [row for row in alike if row.whole_words == whole_words]
    stranded = None if same else unreachable(model)
    if stranded is not None:
        what = (
            f"the tokenizer splits like '{alike[0].name}' but {'takes' if whole_words else 'does not take'} whole "
            f"words before merging, and its merges do not lead to the token '{stranded}'"
        )
        raise UnsupportedError(where, what, ELSEWHERE)
    return min(same or alike, key=lambda row: row.cleans != cleans).name


def differences(tokenizer: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """What readers do otherwise than transformers with text that `tokenizer`, recognised as `name`, is for."""
    found: list[str] = []
    if any(row.name == name and not row.exact for row in SPLITTINGS):
        found.append(
            f"llama.cpp's splitting '{name}' only comes near the tokenizer's: it takes every letter but a to z for "
            "upper case and splits before combining marks, so such words get other tokens than in transformers"
        )
    if steps := flatten(tokenizer.get("normalizer"), "normalizers"):
        found.append(
            f"readers of GGUF do not normalise text ({', '.join(step['type'] for step in steps)}), so letters written "
            "with combining marks get other tokens than in transformers"
        )
    return tuple(found)


def splits(tokenizer: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The patterns that the pre-tokenizer splits by, in turn, each in its canonical spelling."""
    found: list[str] = []
    for step in flatten(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "Split" and _isolates(step):
            found.append(_canonical(step["pattern"]))
        elif kind == "Digits":
            found.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            if step.get("use_regex", True):
                found.append(GPT2)
        else:
            what = f"the pre-tokenizer has a step that readers of GGUF do not know: {shorten(step)}"
            raise UnsupportedError(where, what, ELSEWHERE)
    return tuple(found)


def _isolates(step: Mapping[str, Any]) -> bool:
    # "Removed" and inverted keeps the matches and drops the rest, of which these patterns leave none.
    behaviour = (step.get("behavior"), bool(step.get("invert")))
    return behaviour in (("Isolated", False), ("Isolated", True), ("Removed", True))


def _canonical(pattern: Mapping[str, str]) -> str:
    text = pattern.get("Regex")
    if text is None:
        return pattern["String"]
    return text.replace(CONTRACTIONS_SPELLED, CONTRACTIONS)


def flatten(part: Mapping[str, Any] | None, children: str) -> Sequence[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, those of nested sequences (under `children`) in line."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for child in part[children] for step in flatten(child, children)]
    return [part]


def shorten(value: object, limit: int = 200) -> str:
    """`value` as text of at most `limit` letters."""
    text = str(value)
    return text if len(text) <= limit else text[:limit] + "…"


def _unknown(steps: tuple[str, ...], where: str) -> UnsupportedError:
    table = {" then ".join(row.steps): row.name for row in reversed(SPLITTINGS)}
    asked = " then ".join(steps)
    near = difflib.get_close_matches(asked, table, n=1, cutoff=0)
    what = (
        f"the tokenizer splits text by a pattern that llama.cpp has no name for: {shorten(asked, 400)}; "
        f"the nearest is '{table[near[0]]}': {shorten(near[0], 400)}"
    )
    return UnsupportedError(where, what, ELSEWHERE)


def pairs(merges: Sequence[str | Sequence[str]]) -> list[tuple[str, str]]:
    """The merges of tokenizer.json, which has them as "a b" or as [a, b]."""
    split = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return [(left, right) for left, right in split]


def unreachable(model: Mapping[str, Any]) -> str | None:
    """A token that merging its own letters does not give, None when there is none.

    Only then does it matter whether a reader looks whole words up before it merges.
    """
    ranks = {pair: rank for rank, pair in enumerate(pairs(model["merges"]))}
    for token in model["vocab"]:
        pieces = list(token)
        while len(pieces) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(pieces)))
            if rank == len(ranks):
                return str(token)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return None
