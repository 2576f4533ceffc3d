"""Tokenizers as transformers builds and saves them today: every family is recognised, and llama.cpp gives its ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from converter.containers.gguf.vocabulary.difference import byte_level
from converter.containers.gguf.vocabulary.hard_text import HARD_TEXT
from converter.containers.gguf.vocabulary.splittings import (
    BLOOM,
    DEEPSEEK3,
    DEEPSEEK_CODER,
    DEEPSEEK_LLM,
    DIGIT,
    GPT2,
    GPT4O,
    LLAMA3,
    QWEN2,
    QWEN35,
    SEED_CODER,
    TEKKEN,
)
from tokenizer_models import byte_trainer, describe, load, split_by, values
from vocab_peer import Vocabularies


@dataclass(frozen=True, kw_only=True)
class Family:
    """A class of transformers, what its vocabulary is trained with, and the name that is to be found."""

    made_by: str
    steps: tuple[str, ...]
    name: str


CLASSES = {
    "gpt2": Family(made_by="GPT2Tokenizer", steps=(GPT2,), name="gpt-2"),
    "starcoder2": Family(made_by="GPT2Tokenizer", steps=(GPT2,), name="trillion"),
    "gpt_neox": Family(made_by="GPTNeoXTokenizer", steps=(GPT2,), name="gpt-2"),
    "olmo": Family(made_by="GPTNeoXTokenizer", steps=(GPT2,), name="olmo"),
    "mamba": Family(made_by="GPTNeoXTokenizer", steps=(GPT2,), name="trillion"),
    "cohere": Family(made_by="CohereTokenizer", steps=(DIGIT, GPT2), name="command-r"),
    "qwen2": Family(made_by="Qwen2Tokenizer", steps=(QWEN2,), name="qwen2"),
    "qwen3_5": Family(made_by="Qwen3_5Tokenizer", steps=(QWEN35,), name="qwen35"),
    "roberta": Family(made_by="RobertaTokenizer", steps=(GPT2,), name="roberta-bpe"),
}


@pytest.fixture(scope="module")
def reader() -> Iterator[Vocabularies]:
    with Vocabularies() as vocabularies:
        yield vocabularies


def different(reader: Vocabularies, tokenizer: Any) -> list[str]:
    """Hard texts of which llama.cpp makes other ids; text that normalisation changes is left out."""
    composed = normalizers.NFC()
    texts = [text for text in HARD_TEXT if composed.normalize_str(text) == text]
    return [
        text
        for text in texts
        if reader.tokenize(text, special=False) != tokenizer.encode(text, add_special_tokens=False)
    ]


@pytest.mark.parametrize("family", CLASSES)
def test_a_class_of_transformers_is_recognised(family: str, reader: Vocabularies, tmp_path: Path) -> None:
    known = CLASSES[family]
    model = json.loads(split_by(known.steps).to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = getattr(transformers, known.made_by)(vocab=model["vocab"], merges=merges)
    tokenizer.save_pretrained(tmp_path)
    described = describe(tmp_path, 1000, model_type=family)
    assert values(described)["pre"] == known.name
    load(reader, described.fields, tmp_path / "v.gguf")
    assert not different(reader, tokenizer)


def sequence(*steps: str | PreTokenizer) -> PreTokenizer:
    """Patterns, each match a piece of its own, and other steps; bytes last where no other step writes them."""
    parts = [pre_tokenizers.Split(Regex(step), "isolated") if isinstance(step, str) else step for step in steps]
    return pre_tokenizers.Sequence(parts if "ByteLevel" in str(parts) else [*parts, byte_level()])


def digits() -> PreTokenizer:
    return pre_tokenizers.Digits(individual_digits=True)


def gpt2() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


# tokenizer.json of models whose class is the general one, as their owners wrote it.
WRITTEN: Mapping[str, tuple[Callable[[], PreTokenizer], bool, str]] = {
    "llama": (lambda: sequence(LLAMA3), True, "llama-bpe"),
    "lfm2": (lambda: sequence(LLAMA3), True, "lfm2"),
    "glm4": (lambda: sequence(LLAMA3), True, "glm4"),
    "glm": (lambda: sequence(LLAMA3), False, "chatglm-bpe"),
    "olmo2": (lambda: sequence(LLAMA3), False, "dbrx"),
    "granite": (lambda: sequence(digits(), gpt2()), False, "refact"),
    "exaone": (lambda: sequence(digits(), gpt2()), False, "exaone"),
    "smollm": (lambda: sequence(digits(), gpt2()), False, "smollm"),
    "nemotron": (lambda: sequence(TEKKEN), True, "tekken"),
    "apertus": (lambda: sequence(TEKKEN), True, "tekken"),
    "gpt_oss": (lambda: sequence(GPT4O), False, "granite-embed-multi-97m"),
    "deepseek_v3": (lambda: sequence(*DEEPSEEK3), False, "deepseek-v3"),
    "hunyuan_v1_dense": (lambda: sequence(*DEEPSEEK3), False, "hunyuan-dense"),
    "deepseek coder": (lambda: sequence(*DEEPSEEK_CODER[:-1], digits()), False, "deepseek-coder"),
    "deepseek llm": (lambda: sequence(*DEEPSEEK_LLM, digits()), False, "deepseek-llm"),
    "seed_oss": (lambda: sequence(SEED_CODER), False, "seed-coder"),
    "bloom": (lambda: sequence(BLOOM), False, "poro-chat"),
    "viking": (lambda: sequence(BLOOM, digits()), False, "viking"),
    "falcon": (
        lambda: sequence(
            pre_tokenizers.Punctuation("contiguous"),
            gpt2(),
            pre_tokenizers.Digits(),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ),
        False,
        "falcon",
    ),
}
# Where llama.cpp splits otherwise: letters of other alphabets by case, and combining marks.
NEAR = ("nemotron", "apertus", "gpt_oss", "falcon")


@pytest.mark.parametrize("family", WRITTEN)
def test_a_tokenizer_json_of_the_general_class_is_recognised(family: str, reader: Vocabularies, tmp_path: Path) -> None:
    pre_tokenizer, whole_words, name = WRITTEN[family]
    tokenizer = Tokenizer(split_by((GPT2,), size=300, ignore_merges=whole_words).model)
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.train_from_iterator(HARD_TEXT, byte_trainer(700))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.save_pretrained(tmp_path)
    described = describe(tmp_path, 1000, model_type=family)
    assert values(described)["pre"] == name
    load(reader, described.fields, tmp_path / "v.gguf")
    wrong = different(reader, fast)
    assert not [text for text in wrong if family not in NEAR or text.isascii()]
    assert not wrong or described.notes
