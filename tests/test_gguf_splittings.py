"""The table of splittings holds for llama.cpp itself, row by row; what is not in it is compared and told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from converter.containers.gguf.header import boolean, i32s, string, strings
from converter.containers.gguf.vocabulary.difference import splitter
from converter.containers.gguf.vocabulary.hard_text import HARD_TEXT
from converter.containers.gguf.vocabulary.recognise import Recognised, recognise, splits
from converter.containers.gguf.vocabulary.splittings import (
    AFTER_BYTES,
    GPT2,
    GPT4O,
    LLAMA3,
    PUNCTUATION,
    QWEN2,
    SPLITTINGS,
    TEKKEN,
    Splitting,
)
from tokenizer_models import crossing, load, mixed_texts, split_by
from vocab_peer import Vocabularies

TEXTS = (*HARD_TEXT, *mixed_texts(40))


@pytest.fixture(scope="module")
def reader() -> Iterator[Vocabularies]:
    with Vocabularies() as vocabularies:
        yield vocabularies


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    return crossing(TEXTS, size=4000)


def cut(merging: Tokenizer, steps: tuple[str, ...], whole_words: bool = False) -> list[list[int]]:
    merging.pre_tokenizer, merging.model.ignore_merges = splitter(steps), whole_words
    return [encoding.ids for encoding in merging.encode_batch_fast(TEXTS)]


@pytest.mark.parametrize("row", SPLITTINGS, ids=lambda row: row.name)
def test_llama_cpp_splits_as_every_row_says(
    row: Splitting, reader: Vocabularies, merging: Tokenizer, tmp_path: Path
) -> None:
    model = json.loads(merging.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    fields = {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string(row.name),
        "tokenizer.ggml.tokens": strings(tokens),
        "tokenizer.ggml.token_type": i32s([1] * len(tokens)),
        "tokenizer.ggml.merges": strings([" ".join(pair) for pair in model["merges"]]),
        "tokenizer.ggml.add_bos_token": boolean(False),
    }
    load(reader, fields, tmp_path / "vocabulary.gguf")
    expected = cut(merging, row.reads or row.steps, row.whole_words)
    different = [text for text, ids in zip(TEXTS, expected, strict=True) if reader.tokenize(text) != ids]
    assert not different


def test_these_texts_and_merges_tell_all_ways_of_splitting_apart(merging: Tokenizer) -> None:
    # Otherwise the agreement above would prove nothing. BAILING is QWEN2 written in another way, and so is one row.
    ways = {row.reads or row.steps for row in SPLITTINGS}
    results = {way: json.dumps(cut(merging, way)) for way in ways}
    same = [{name for name, way in names() if results[way] == result} for result in set(results.values())]
    mixed = [group for group in same if len({way for name, way in names() if name in group}) > 1]
    assert [sorted(group & {"qwen2", "bailingmoe", "gpt-4o"}) for group in mixed] == [["bailingmoe", "qwen2"]]


def names() -> list[tuple[str, tuple[str, ...]]]:
    return [(row.name, row.reads or row.steps) for row in SPLITTINGS]


def definition(*steps: dict[str, Any], **model: Any) -> dict[str, Any]:
    start = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}, "model": start | model}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def trained(steps: tuple[str, ...], written: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """The tokenizer.json of a BPE that was trained on what `steps` leave together, its pre-tokenizer as `written`."""
    content: dict[str, Any] = json.loads(split_by(steps, **options).to_str())
    return content | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": written}}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2_BYTES = BYTES | {"use_regex": True}
DIGITS_ALONE = {"type": "Digits", "individual_digits": True}
PUNCTUATION_RUNS = {"type": "Punctuation", "behavior": "Contiguous"}


def named(name: str, *notes: str) -> Recognised:
    return Recognised(name=name, notes=notes)


def test_a_pre_tokenizer_is_recognised_however_it_is_written() -> None:
    spelled = LLAMA3.replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    )
    assert spelled != LLAMA3
    for written in (split(LLAMA3), split(spelled), split(LLAMA3, "Removed", True)):
        assert recognise(definition(written, BYTES, ignore_merges=True), True) == named("llama-bpe")
    assert recognise({**definition(), "pre_tokenizer": GPT2_BYTES}, True) == named("gpt-2")
    assert recognise(definition(DIGITS_ALONE, GPT2_BYTES), False) == named("smollm")
    assert splits(definition(split(QWEN2), GPT2_BYTES)) == (QWEN2, GPT2)
    falcon = definition(PUNCTUATION_RUNS, GPT2_BYTES, {"type": "Digits"}, split("[0-9][0-9][0-9]"))
    expected = (f"{PUNCTUATION}+", GPT2, rf"{AFTER_BYTES}\p{{N}}+", AFTER_BYTES + "[0-9][0-9][0-9]")
    assert splits(falcon) == expected


@pytest.mark.parametrize(
    ("family", "cleans", "name"),
    [
        ("qwen2", False, "qwen2"),
        ("stablelm", True, "stablelm2"),
        ("hunyuan_v1_moe", False, "hunyuan"),
        ("", True, "qwen2"),
    ],
)
def test_among_equals_the_familys_own_name_is_taken(family: str, cleans: bool, name: str) -> None:
    assert recognise(definition(split(QWEN2), BYTES), cleans, family).name == name


CL100K = (  # as tiktoken writes it, but for {1,3}+, which is no possessive here
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s"
)


@pytest.mark.parametrize(
    ("steps", "written", "name"),
    [
        ((CL100K,), [split(CL100K), BYTES], "dbrx"),
        ((LLAMA3,), [split(LLAMA3.replace(r"\s*[\r\n]+", r"\s*[\r\n]")), BYTES], "dbrx"),
        ((QWEN2,), [split(QWEN2.replace("'s|'t|'re|'ve|'m|'ll|'d", "'d|'ll|'m|'re|'s|'t|'ve")), BYTES], "qwen2"),
    ],
)
def test_an_unknown_pattern_that_cuts_alike_has_the_name_with_a_note(
    steps: tuple[str, ...], written: list[dict[str, Any]], name: str
) -> None:
    found = recognise(trained(steps, written), False)
    assert not found.objections and found.name == name
    assert ["cuts a hard text alike" in note for note in found.notes] == [True]


def test_what_llama_cpp_only_comes_near_is_told_with_examples() -> None:
    found = recognise(trained((TEKKEN,), [split(TEKKEN), BYTES], ignore_merges=True), False)
    (said,) = found.notes
    assert found.name == "tekken" and not found.objections
    assert "only comes near" in said and "%" in said and " and would be " in said


def test_the_nearest_of_several_that_come_near_is_taken() -> None:
    # Both are llama.cpp's for this pattern; only the second keeps combining marks with their letters.
    found = recognise(trained((GPT4O,), [split(GPT4O), BYTES]), False, "gpt_oss")
    assert found.name == "granite-embed-multi-97m" and not found.objections


PAIRS = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,2}|")  # digits two by two, which no name stands for


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ([split(PAIRS), BYTES], r"the nearest, '[\w-]+'.*\d\d"),
        ([{"type": "WhitespaceSplit"}, BYTES], "the nearest"),
    ],
)
def test_an_unknown_way_of_splitting_is_told_with_the_nearest_name(written: list[dict[str, Any]], words: str) -> None:
    found = recognise(trained((PAIRS,), written), False)
    (said,) = found.objections
    assert re.search(words, said) and "% of the tokens" in said


def test_a_name_that_the_manifest_accepts_is_compared_and_kept() -> None:
    content = trained((LLAMA3,), [split(LLAMA3), BYTES], ignore_merges=True)
    assert recognise(content, False, accepted="llama-bpe") == named("llama-bpe")
    (said,) = recognise(content, False, accepted="qwen2").objections
    assert "'qwen2', cuts otherwise" in said
    (said,) = recognise(content, False, accepted="unheard-of").objections
    assert "not compared" in said


def test_skipping_merges_decides_only_when_merges_do_not_reach_a_token() -> None:
    assert recognise(definition(split(QWEN2), BYTES, ignore_merges=True), False) == named("qwen2")
    stranded = definition(split(QWEN2), BYTES, ignore_merges=True, vocab={"a": 0, "b": 1, "ba": 2, "ab": 3})
    (said,) = recognise(stranded, False).objections
    assert "'ba'" in said
    added = {"added_tokens": [{"id": 2, "content": "ba", "special": True}]}
    assert recognise(stranded | added, False) == named("qwen2")
