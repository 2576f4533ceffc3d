"""The quickstart model is a real, trained, complete hub folder, and the built-in texts are what they claim to be."""
# B rows, T tokens of a row, V vocabulary

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import struct
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from manifests.quickstart import train

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "manifests" / "quickstart" / "model"
TEXTS = ROOT / "converter" / "texts"
TEXT_NAMES = ("calibration.txt", "evaluation.txt")
KINDS = {
    "C": r"(?m)^#include <",
    "Go": r"(?m)^func \w+\(",
    "HTML": r"</\w+>",
    "JavaScript": r"=> [\w({]",
    "JSON": r'(?m)^  [{"]',
    "mathematics": r"\$[^$]+\$",
    "Python": r"(?m)^def \w+\(",
    "Rust": r"pub fn \w+\(",
    "shell": r"(?m)^#!/",
    "SQL": r"(?i)create table",
    "table": r"(?m)^\|.*\|$",
    "YAML": r"(?m)^\w+:\n  \w+:",
}


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return dict(json.loads((MODEL / "training.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return dict(json.loads((MODEL / "config.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    """The safetensors header, read by hand: eight bytes of length, then JSON."""
    with (MODEL / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = dict(json.loads(file.read(length)))
    entries.pop("__metadata__", None)
    return entries


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def read_text(name: str) -> str:
    return (TEXTS / name).read_bytes().decode("utf-8")


# --- the model folder


def test_folder_is_complete_and_at_most_ten_megabytes() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert names == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 10_000_000


def test_parameter_count_is_recorded_and_between_three_and_five_million(
    header: dict[str, Any], record: dict[str, Any]
) -> None:
    parameters = sum(math.prod(entry["shape"]) for entry in header.values())
    assert parameters == record["parameters"]
    assert 3_000_000 <= parameters <= 5_000_000


def test_every_matrix_is_bf16_with_rows_divisible_by_256(header: dict[str, Any]) -> None:
    matrices = {name: entry for name, entry in header.items() if len(entry["shape"]) == 2}
    assert len(matrices) > 20
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    assert [name for name, entry in matrices.items() if entry["shape"][1] % 256] == []


def test_attention_is_grouped_and_embeddings_are_tied(config: dict[str, Any], header: dict[str, Any]) -> None:
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in header


def test_weights_are_finite_and_learned(model: Any) -> None:
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all(), name
        if weight.ndim == 1:  # norms start at one everywhere; training spreads them
            assert weight.std() > 0.01, name


def test_perplexity_is_below_a_third_of_the_unigram_models(record: dict[str, Any]) -> None:
    for text in ("held_out", "evaluation", "evaluation_slice"):
        assert record[text]["model"] * 3 < record[text]["unigram"], text
    assert record["held_out"]["tokens"] > 20_000


def test_recorded_perplexity_is_what_transformers_measures(model: Any, tokenizer: Any, record: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    stream = train.encode_stream(tokenizer, train.read_built_in(TEXTS / "evaluation.txt"))
    cut = torch.from_numpy(stream[: train.SLICE_ROWS * train.SLICE_LENGTH].astype("int64"))
    rows_BT = cut.reshape(train.SLICE_ROWS, train.SLICE_LENGTH)
    with torch.no_grad():
        loss = model(input_ids=rows_BT, labels=rows_BT).loss.item()
    # Another order of f32 sums moves a loss near 5 by some 256 * 2**-24 of itself, below 1e-4 in perplexity.
    assert math.exp(loss) == pytest.approx(record["evaluation_slice"]["model"], rel=1e-3)


def test_record_names_versions_and_no_path(record: dict[str, Any]) -> None:
    assert set(record["versions"]) == {"python", "torch", "transformers", "tokenizers"}
    assert record["tokens_seen"] > 1_000_000
    assert not re.search(r'"/|\\\\|/home|/root|/tmp|/work', json.dumps(record))


def test_model_card_has_front_matter_and_the_recorded_figures(record: dict[str, Any]) -> None:
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    _, front_matter, body = card.split("---\n", 2)
    fields = yaml.safe_load(front_matter)
    assert fields["license"] == "apache-2.0"
    assert fields["pipeline_tag"] == "text-generation"
    assert {"en", "de", "zh"} <= set(fields["language"])
    assert "{{" not in card
    assert f"{record['held_out']['model']:,.1f}" in body
    assert f"{record['held_out']['unigram']:,.1f}" in body


# --- the tokenizer


def test_tokenizer_reads_back_every_built_in_document(tokenizer: Any) -> None:
    for name in TEXT_NAMES:
        for document in read_text(name).split(train.SEPARATOR):
            assert tokenizer.decode(tokenizer(document)["input_ids"]) == document


def test_marks_are_one_token_each_and_the_vocabulary_fits_the_model(tokenizer: Any, config: dict[str, Any]) -> None:
    assert len(tokenizer) == config["vocab_size"] == 4096
    for mark in (train.END_OF_TEXT, train.TURN_START, train.TURN_END):
        assert len(tokenizer(mark)["input_ids"]) == 1
    assert tokenizer.eos_token_id == config["eos_token_id"]
    generation = GenerationConfig.from_pretrained(MODEL)
    assert config["eos_token_id"] in generation.eos_token_id


def test_tokenizer_splits_exactly_as_qwen2_does() -> None:
    stored = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored["normalizer"] == {"type": "NFC"}
    split, byte_level = stored["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"]["Regex"] == train.QWEN2_PATTERN
    assert (split["behavior"], split["invert"]) == ("Isolated", False)
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, False)


def test_chat_template_renders_turns_and_the_prompt(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_training_writes_dialogues_as_the_chat_template_does(tokenizer: Any) -> None:
    document = "User: One\ntwo\nAssistant: Three\n\n    four\nUser: Five"
    messages = [
        {"role": "user", "content": "One\ntwo"},
        {"role": "assistant", "content": "Three\n\n    four"},
        {"role": "user", "content": "Five"},
    ]
    assert train.as_chat(document) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert train.as_chat("plain\nUser: text") == "plain\nUser: text"


# --- training


def test_evaluation_and_held_out_documents_are_never_trained_on() -> None:
    corpus = train.read_corpus()
    kept_back = set(corpus.held_out) | set(train.read_built_in(TEXTS / "evaluation.txt"))
    assert len(kept_back) > 80
    assert kept_back.isdisjoint(corpus.training)


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [train.learning_rate(step, 1000, train.HIDDEN) for step in range(1000)]
    assert max(rates) == train.PEAK_LEARNING_RATE
    assert rates[: train.WARMUP_STEPS] == sorted(rates[: train.WARMUP_STEPS])
    assert rates[train.WARMUP_STEPS :] == sorted(rates[train.WARMUP_STEPS :], reverse=True)
    assert rates[-1] < 0.03 * train.PEAK_LEARNING_RATE
    assert train.learning_rate(500, 1000, 4 * train.HIDDEN) == pytest.approx(rates[500] / 2)


@pytest.mark.slow
def test_training_again_gives_the_same_tokenizer(tmp_path: Path, record: dict[str, Any]) -> None:
    if record["versions"]["python"] != platform.python_version():
        pytest.skip("the training text is the standard library of another Python version")
    retrained = train.train_tokenizer(train.read_corpus().training)
    retrained.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


# --- the built-in texts


def test_texts_have_the_recorded_sha256() -> None:
    recorded = dict(line.split("  ")[::-1] for line in read_text("SHA256SUMS").splitlines())
    assert set(recorded) == set(TEXT_NAMES)
    for name, digest in recorded.items():
        assert hashlib.sha256((TEXTS / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_text_is_long_clean_and_made_of_documents(name: str) -> None:
    text = read_text(name)
    assert len(text.encode()) >= 55_000
    assert "\r" not in text
    assert unicodedata.is_normalized("NFC", text)
    documents = text.removesuffix("\n").split(train.SEPARATOR)
    assert len(documents) >= 70
    assert all(document == document.strip("\n") and len(document) > 100 for document in documents)
    assert len(set(documents)) == len(documents)


@pytest.mark.parametrize("name", TEXT_NAMES)
def test_text_is_varied(name: str) -> None:
    text = read_text(name)
    scripts = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "DEVANAGARI", "HANGUL", "HIRAGANA", "CJK")
    letters = [unicodedata.name(character, "") for character in set(text) if character.isalpha()]
    for script in scripts:
        assert sum(letter.startswith(script) for letter in letters) >= 20, script
    for kind, pattern in KINDS.items():
        assert re.search(pattern, text), kind
    assert text.count("User: ") >= 10


def test_texts_share_no_passage() -> None:
    calibration, evaluation = (" ".join(read_text(name).split()) for name in TEXT_NAMES)

    def windows_of_characters(text: str) -> set[str]:
        return {text[start : start + 40] for start in range(len(text) - 39)}

    def windows_of_words(text: str) -> set[tuple[str, ...]]:
        words = text.split(" ")
        return {tuple(words[start : start + 8]) for start in range(len(words) - 7)}

    assert windows_of_characters(calibration).isdisjoint(windows_of_characters(evaluation))
    assert windows_of_words(calibration).isdisjoint(windows_of_words(evaluation))


def test_texts_are_long_enough_for_the_default_runs(tokenizer: Any) -> None:
    calibration, evaluation = (
        len(train.encode_stream(tokenizer, train.read_built_in(TEXTS / name))) for name in TEXT_NAMES
    )
    assert calibration >= 128 * 256
    assert evaluation >= 64 * 256
