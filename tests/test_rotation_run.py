"""Whole runs with a rotation: files that readers load and compute the original with, measured in its own basis."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, PretrainedConfig

from command import Command, hubmill
from converter import manifest as manifests
from converter.adapt import adapt
from converter.architecture import find
from converter.blocks import Decoder
from converter.containers.tables import CONTAINERS
from converter.source import open_folder
from jobs.convert import Run, convert
from jobs.store import Store
from llama_peer import Llama
from small_run import TOKENIZER, write_manifest, write_model
from test_run import Quiet

__all__ = ["hubmill"]  # a fixture

PROMPT = list(range(300, 364))
TARGETS = {
    "f32": "{format: gguf, type: F32, method: [rotation, rtn]}",
    "w8a8": "{format: compressed-tensors, scheme: W8A8, method: [rotation, gptq]}",
    "chain": "{format: parquet, scheme: INT8, method: [rotation, gptq], propagate: quantized}",
    "q4-0": "{format: gguf, type: Q4_0, method: rotation, imatrix: true, output_type: Q8_0}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("turned")
    write_model(folder / "model")
    path, random = folder / "model" / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(path)
    for name, values in tensors.items():
        if values.ndim == 1:  # a head whose norm has no gains would be the embedding again
            tensors[name] = values + 0.3 * torch.randn(values.shape, generator=random).bfloat16()
    save_file(tensors, path, {"format": "pt"})
    write_manifest(folder, TARGETS)
    run = Run(manifest=manifests.load(folder / "small.yaml"), out=folder, executor="inprocess")
    assert convert(run, Quiet()).exit_code == 0
    return folder


def rows(place: Path) -> dict[str, dict[str, Any]]:
    return {row["target"]: row for row in json.loads((place / "small" / "comparison.json").read_text())["artifacts"]}


def measured(place: Path, target: str) -> dict[str, Any]:
    """What the evaluate task of a target recorded."""
    store = Store(run=place / "small")
    records = [store.record(key) for key in store.done() if key.startswith("evaluate-")]
    size = rows(place)[target]["weight"]
    return next(record for record in records if record["weight"] == size)


def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([PROMPT])).logits
    return logits[0]


def test_llama_cpp_computes_the_original_from_a_turned_file(place: Path) -> None:
    expected = logits_of(place / "model")[-1].log_softmax(-1)
    with Llama(next((place / "small" / "model" / "f32").glob("*.gguf"))) as reader:
        found = reader.next_logprobs(PROMPT, count=20)
    # As in test_architectures: 33 roundings of 2^-20 of the logits' size, doubled for weights turned in f32.
    bound = 2 * 4 * (33**0.5) * 2**-20 * float(logits_of(place / "model")[-1].std())
    assert max(abs(value - float(expected[token])) for token, value in found.items()) < bound


def test_nothing_is_lost_where_nothing_is_rounded(place: Path) -> None:
    record = measured(place, "f32")
    assert record["output"]["kl_mean"] < 1e-6
    assert all(block["relative_mse"] < 1e-9 for block in record["blocks"])
    assert all(tensor["relative_mse"] < 1e-9 for tensor in record["tensors"])


def test_transformers_runs_what_was_measured(place: Path) -> None:
    """The artifact, its head apart from the embedding, against our own decoder on the same files."""
    folder = place / "small" / "model" / "w8a8"
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    stored = load_file(folder / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert all(bool((one == 1).all()) for name, one in stored.items() if name.endswith("layernorm.weight"))
    snapshot = open_folder(folder, "test")
    snapshot, architecture = adapt(snapshot, find(snapshot.config, "test"), "test")
    opened = CONTAINERS["compressed-tensors"].open(folder, architecture)
    decoder = Decoder(folder, architecture, "test", stored=snapshot.tensors)
    hidden = decoder.embed(torch.tensor([PROMPT]), {name: opened.read(name) for name in decoder.input_names})
    for b in range(decoder.blocks):
        prefix = architecture.prefix(b)
        names = [name for name in opened.names if name.startswith(prefix)]
        inputs = {name.removeprefix(prefix).removesuffix(".weight"): opened.activations(name) for name in names}
        hidden = decoder.run_block(
            b,
            {name.removeprefix(prefix): opened.read(name) for name in names},
            hidden,
            activations={module: how for module, how in inputs.items() if how},
        )
    ours = decoder.logits(hidden, {name: opened.read(name) for name in decoder.output_names})[0]
    theirs = logits_of(folder)
    # transformers multiplies codes and scales in bf16, 2^-9 of each weight, and rounds inputs that lie on a boundary
    # to the other side: 2^-8 of a row's largest value. Independent over 14 linears, they add in squares.
    assert float((ours - theirs).norm()) < 4 * 14**0.5 * 2**-8 * float(ours.norm())
    assert float((theirs - logits_of(place / "model")).norm()) < 0.1 * float(ours.norm())


def test_a_chain_is_corrected_in_the_basis_that_it_runs_in(place: Path) -> None:
    record = measured(place, "chain")
    # int8 of whole rows errs by 1 % of a weight; in another basis it would be all of it.
    assert all(block["relative_mse"] < 1e-3 for block in record["blocks"])
    assert all(tensor["output_relative_mse"] < 1e-3 for tensor in record["tensors"] if tensor["output_relative_mse"])


def test_the_head_is_counted_as_stored_and_not_as_a_parameter(place: Path) -> None:
    own, parameters = rows(place), 4096 * 64 + 2 * (3 * 64 * 128 + 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 + 2 * 16) + 64
    for target in TARGETS:
        assert own[target]["bits_per_weight"] == pytest.approx(8 * own[target]["size_bytes"] / parameters)
        assert any("head is stored by itself" in note for note in own[target]["warnings"])


def test_the_plan_knows_the_size_of_a_head_of_its_own(place: Path) -> None:
    for target in TARGETS:
        folder = place / "small" / "model" / target
        found = sum(
            path.stat().st_size for path in folder.iterdir() if path.suffix in (".gguf", ".safetensors", ".parquet")
        )
        assert found == rows(place)[target]["size_bytes"]


def write_other(folder: Path, config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)


SHAPE: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("config", "why"), [(CohereConfig, "subtract a mean"), (Gemma2Config, "norms behind attention")]
)
def test_a_family_whose_stream_is_fixed_is_refused_in_the_plan(
    config: type[PretrainedConfig], why: str, tmp_path: Path, hubmill: Command
) -> None:
    write_other(tmp_path / "model", config(**SHAPE))
    write_manifest(tmp_path, {"w8a8": TARGETS["w8a8"]})
    answer = hubmill("plan", tmp_path / "small.yaml", "--out", tmp_path / "out")
    assert answer.code == 3
    assert re.search(rf"small\.yaml:5: model/w8a8: the residual stream cannot be turned: .*{why}", answer.errors)


def test_an_unknown_family_cannot_be_turned(tmp_path: Path, hubmill: Command) -> None:
    write_model(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text()) | {"architectures": ["NobodyForCausalLM"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    write_manifest(tmp_path, {"int8": "{format: parquet, scheme: INT8, method: rotation}"})
    answer = hubmill("plan", tmp_path / "small.yaml", "--out", tmp_path / "out")
    assert answer.code == 3 and "NobodyForCausalLM" in answer.errors and "small.yaml:5" in answer.errors


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            "{format: compressed-tensors, scheme: W8A8, method: [smoothquant, rotation, gptq]}",
            "smoothquant reads the size",
        ),
        ("{format: compressed-tensors, scheme: W4A16, method: [rotation, awq]}", "awq reads the size"),
        ("{format: compressed-tensors, scheme: W8A8_STATIC, method: rotation}", "fixed range of inputs"),
        (
            "{format: compressed-tensors, scheme: FP8, method: rotation, activation_observer: percentile}",
            "fixed range of inputs",
        ),
        ("{format: compressed-tensors, scheme: W8A8, method: rotation, kv_cache: INT8}", "fixed range of values"),
        ("{format: gguf, type: Q4_0, method: rotation, imatrix: x.gguf}", "imatrix file is of the model's own"),
    ],
)
def test_what_a_rotation_does_not_go_with_is_refused_with_its_line(
    target: str, said: str, tmp_path: Path, hubmill: Command
) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "x.gguf").write_bytes(b"")
    write_manifest(tmp_path, {"x": target})
    answer = hubmill("plan", tmp_path / "small.yaml", "--out", tmp_path / "out")
    assert answer.code == 2 and re.search(rf"small\.yaml:5:\d+: .*{said}", answer.errors)
