"""Byte-level BPE, GGUF's "gpt2" model: tokens are bytes written as letters, and merges travel as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.containers.gguf.header import string, strings
from converter.containers.gguf.vocabulary.recognise import normalisation, puts_space, recognise
from converter.containers.gguf.vocabulary.tokens import Reading, Vocabulary, pairs


def read_byte_level(
    tokenizer: Mapping[str, Any], vocabulary: Vocabulary, cleans: bool, family: str, accepted: str | None
) -> Reading:
    """See Reading; for the arguments see recognise()."""
    found = recognise(tokenizer, cleans, family, accepted)
    notes, objections = normalisation(tokenizer)
    if puts_space(tokenizer):
        said = "the tokenizer puts a space before text that begins with none (add_prefix_space), which readers of GGUF"
        objections += (f"{said} do not",)
    merges = pairs(tokenizer["model"]["merges"])
    return Reading(
        name=found.name,
        fields={
            "tokenizer.ggml.model": string("gpt2"),
            "tokenizer.ggml.pre": string(found.name),
            "tokenizer.ggml.merges": strings([f"{left} {right}" for left, right in merges]),
            "tokenizer.ggml.tokens": strings(vocabulary.tokens),
        },
        notes=found.notes + notes,
        objections=found.objections + objections,
    )
