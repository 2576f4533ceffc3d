"""WordPiece, GGUF's "bert" model: words are cut into the longest known pieces, from the left.

GGUF writes the pieces that begin a word with U+2581 before them and the others bare, where BERT writes ## before the
others. Readers always do as BERT's own code did: control characters go, words end at spaces and punctuation, ideographs
are words; lower case and accents are two switches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.containers.gguf.header import boolean, string, strings
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
MARKS_LOST = (
    "where BERT takes accents off, readers of GGUF drop every combining mark and all but the first letter of a Korean "
    "syllable, so Korean and the scripts of India get other tokens than in transformers"
)
NO_LIMIT = 1_000_000  # letters in a word


def read_wordpiece(tokenizer: Mapping[str, Any], vocabulary: Vocabulary) -> Reading:
    """See Reading."""
    prefix = tokenizer["model"].get("continuing_subword_prefix", "##")
    lower, strips, strange = switches(tokenizer)
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    normalizer |= {"strip_accents": strips, "lowercase": lower}
    longest = tokenizer["model"].get("max_input_chars_per_word", NO_LIMIT)
    notes: tuple[str, ...] = (MARKS_LOST,) if strips else ()
    if longest < NO_LIMIT:
        notes += (f"words of more than {longest} letters are unknown in transformers, and readers of GGUF cut them",)
    objections: tuple[str, ...] = ()
    if strange:
        model = tokenizer["model"] | {"max_input_chars_per_word": NO_LIMIT}
        changes = {"normalizer": normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"}, "model": model}
        reader = small(tokenizer, changes)
        difference = compare(encode(small(tokenizer)), encode(reader))
        said = f"the tokenizer prepares text otherwise than BERT ({'; '.join(shorten(step, 120) for step in strange)})"
        if difference.share:
            objections += (f"{said}; readers of GGUF cut otherwise {difference}",)
        else:
            notes += (f"{said}, but cuts a hard text alike",)
    return Reading(
        name=PRE,
        fields={
            "tokenizer.ggml.model": string("bert"),
            "tokenizer.ggml.pre": string(PRE),
            "tokenizer.ggml.normalizer.lowercase": boolean(lower),
            "tokenizer.ggml.normalizer.strip_accents": boolean(strips),
            "tokenizer.ggml.tokens": strings(
                [phantom(*entry, prefix) for entry in zip(vocabulary.tokens, vocabulary.kinds, strict=True)]
            ),
        },
        notes=notes,
        objections=objections,
    )


def phantom(token: str, kind: Kind, prefix: str) -> str:
    """A token as readers look it up."""
    if kind != Kind.NORMAL:
        return token
    inner = token.removeprefix(prefix)
    return inner if inner and inner != token else SPACE + token


def switches(tokenizer: Mapping[str, Any]) -> tuple[bool, bool, list[Mapping[str, Any]]]:
    """Whether letters are made small, whether accents are taken off, and the steps that BERT does not have."""
    lower = strips = False
    strange: list[Mapping[str, Any]] = []
    steps = normalizers_of(tokenizer)
    for step in steps:
        kind = step.get("type")
        if kind == "BertNormalizer":
            lower = bool(step.get("lowercase", True))
            strips = lower if step.get("strip_accents") is None else bool(step["strip_accents"])
            if not step.get("clean_text", True) or not step.get("handle_chinese_chars", True):
                strange.append(step)
        else:
            lower, strips = lower or kind == "Lowercase", strips or kind == "StripAccents"
            strange.append(step)
    if not steps:
        strange.append({"type": "no normalizer"})
    strange += [step for step in pre_tokenizers_of(tokenizer) if step.get("type") != "BertPreTokenizer"]
    return lower, strips, strange
