"""Unigram, GGUF's "t5" model: the cut whose tokens' scores add up highest, over the whole text.

Readers normalise by SentencePiece's own table (`precompiled_charsmap`), collapse runs of spaces and put one before the
text, as told. They have no byte fallback: text that no token covers is unknown to them. Bytes that are letters by
themselves, such as the newline, can be stored as letters, and are.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer

from converter.containers.gguf.header import Field, boolean, f32s, string, strings, u8s
from converter.containers.gguf.vocabulary.difference import compare, encode, small
from converter.containers.gguf.vocabulary.tokens import (
    SPACE,
    Kind,
    Reading,
    Vocabulary,
    normalizers_of,
    pre_tokenizers_of,
    shorten,
)

PRE = "default"
COLLAPSES = {"Regex": " {2,}"}


def read_unigram(tokenizer: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[Reading, tuple[Kind, ...]]:
    """See Reading; and the tokens' kinds, for bytes that are stored as letters are no bytes any more."""
    charsmap, collapses, prefix, strange = preparation(tokenizer)
    letters = byte_letters(vocabulary) if tokenizer["model"].get("byte_fallback") else {}
    normal = [score for score, kind in zip(vocabulary.scores, vocabulary.kinds, strict=True) if kind == Kind.NORMAL]
    lowest = min(normal, default=0.0)
    tokens = [letters.get(number, token) for number, token in enumerate(vocabulary.tokens)]
    scores = [lowest if number in letters else score for number, score in enumerate(vocabulary.scores)]
    kinds = tuple(Kind.NORMAL if number in letters else kind for number, kind in enumerate(vocabulary.kinds))
    fields: dict[str, Field] = {
        "tokenizer.ggml.model": string("t5"),
        "tokenizer.ggml.pre": string(PRE),
        "tokenizer.ggml.add_space_prefix": boolean(prefix),
        "tokenizer.ggml.remove_extra_whitespaces": boolean(collapses),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.scores": f32s(scores),
    }
    if charsmap:
        fields["tokenizer.ggml.precompiled_charsmap"] = u8s(base64.b64decode(charsmap))
    names = {text: vocabulary.tokens[number] for number, text in letters.items()}
    difference = compare(
        encode(small(tokenizer)), encode(reader_of(tokenizer, charsmap, collapses, prefix, names)), names
    )
    notes: tuple[str, ...] = ()
    objections: tuple[str, ...] = ()
    if strange and difference.share:
        steps = "; ".join(shorten(step, 120) for step in strange)
        objections += (
            f"the tokenizer prepares text by steps that readers of GGUF do not know ({steps}); they cut otherwise "
            f"{difference}",
        )
    elif tokenizer["model"].get("byte_fallback") and difference.share:
        notes += (
            "readers of GGUF have no byte fallback for Unigram, so characters without a token are unknown to them: "
            f"otherwise are {difference}",
        )
    elif difference.share:
        notes += (f"readers of GGUF cut otherwise {difference}",)
    return Reading(name=PRE, fields=fields, notes=notes, objections=objections), kinds


def preparation(tokenizer: Mapping[str, Any]) -> tuple[str, bool, bool, list[Mapping[str, Any]]]:
    """SentencePiece's table in base64, whether spaces are collapsed, whether one is put first, and any other steps."""
    charsmap, collapses, prefix = "", False, False
    strange: list[Mapping[str, Any]] = []
    for step in normalizers_of(tokenizer):
        kind = step.get("type")
        if kind == "Precompiled" and not charsmap:
            charsmap = step.get("precompiled_charsmap") or ""
        elif kind == "Replace" and step.get("pattern") == COLLAPSES and step.get("content") in (" ", SPACE):
            collapses = True
        elif kind == "Prepend" and step.get("prepend") in (" ", SPACE):
            prefix = True
        elif kind != "Strip" and not (kind == "Replace" and step.get("pattern") == {"String": " "}):
            strange.append(step)
    for step in pre_tokenizers_of(tokenizer):
        kind = step.get("type")
        if kind == "WhitespaceSplit":
            collapses = True
        elif kind == "Metaspace":
            prefix = prefix or step.get("prepend_scheme", "always") != "never"
        else:
            strange.append(step)
    return charsmap, collapses, prefix, strange


def reader_of(
    tokenizer: Mapping[str, Any], charsmap: str, collapses: bool, prefix: bool, names: Mapping[str, str]
) -> Tokenizer:
    """What readers make of it, as a tokenizer; names: bytes stored as letters, and their tokens."""
    steps: list[dict[str, Any]] = []
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if collapses:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    scheme = "always" if prefix else "never"
    splits = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    model = tokenizer["model"] | {"byte_fallback": False}
    if names:
        letters = {token: text for text, token in names.items()}
        lowest = min(score for _, score in model["vocab"])
        model["vocab"] = [
            [letters[token], lowest] if token in letters else [token, score] for token, score in model["vocab"]
        ]
    normalizer = {"type": "Sequence", "normalizers": steps}
    return small(tokenizer, {"normalizer": normalizer, "pre_tokenizer": splits, "model": model})


def byte_letters(vocabulary: Vocabulary) -> dict[int, str]:
    """The ids of byte tokens that are letters by themselves and have no other token, and those letters."""
    known = set(vocabulary.tokens)
    found = {}
    for number, token in enumerate(vocabulary.tokens):
        if vocabulary.kinds[number] == Kind.BYTE:
            text = chr(int(token[3:5], 16))
            if text.isascii() and text not in known and text not in (" ", "\0"):
                found[number] = text
    return found
