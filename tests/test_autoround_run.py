"""Whole runs with learned rounding: same bytes every time, after a kill, on Ray; what a plan says; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, Qwen3MoeConfig

from converter import manifest as manifests
from converter.errors import ManifestError
from jobs.convert import Run, convert, plan
from jobs.show import plan_json
from small_run import TOKENIZER, write_manifest, write_model
from test_chain_run import Watch, sums
from tiny_families import few

STEPS = "method: autoround, iterations: 12, batch_size: 2"
TARGETS = {
    "w2": f"{{format: compressed-tensors, scheme: W2A16, group_size: 32, {STEPS}}}",
    "w2-chain": f"{{format: auto-round, scheme: W2A16, group_size: 32, {STEPS}, propagate: quantized}}",
    "w8a8": "{format: compressed-tensors, scheme: W8A8, method: [smoothquant, autoround], iterations: 2}",
    "q4-0": f"{{format: gguf, type: Q4_0, {STEPS}}}",
    "rtn": "{format: compressed-tensors, scheme: W2A16, group_size: 32, imatrix: true}",
}
GPTQ = "{format: compressed-tensors, scheme: W2A16, group_size: 32, method: gptq, imatrix: true}"


def a_run(place: Path, out: Path, executor: str = "inprocess") -> Run:
    return Run(manifest=manifests.load(place / "small.yaml"), out=out, executor=executor)  # type: ignore[arg-type]


def artifacts(run: Run) -> dict[str, dict[str, Any]]:
    """The rows of comparison.json by target."""
    comparison = json.loads((run.store.run / "comparison.json").read_text("utf-8"))
    return {row["target"]: row for row in comparison["artifacts"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    write_model(folder / "model", layers=3)
    write_manifest(folder, TARGETS)
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Run, Watch]:
    run = a_run(place, place / "out")
    watch = Watch(run.store)
    assert convert(run, watch).failures == ()
    return run, watch


def test_learned_rounding_is_nearer_to_the_original(finished: tuple[Run, Watch]) -> None:
    rows = artifacts(finished[0])
    assert {row["status"] for row in rows.values()} == {"done"}
    for name in ("w2", "w2-chain"):
        assert rows[name]["output"]["kl_mean"] < rows["rtn"]["output"]["kl_mean"]


def test_at_most_two_blocks_of_statistics_lie_on_disk(finished: tuple[Run, Watch]) -> None:
    assert finished[1].most["calibrate"] == 2


@pytest.mark.parametrize("after", few([7, 16], (7,)))
def test_a_run_that_was_cut_ends_with_the_same_bytes(
    place: Path, finished: tuple[Run, Watch], after: int, tmp_path: Path
) -> None:
    run = a_run(place, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        convert(run, Watch(run.store, after))
    assert convert(run, Watch(run.store)).exit_code == 0
    assert sums(run.store.run) == sums(finished[0].store.run)


@pytest.mark.slow
@pytest.mark.ray
def test_ray_writes_the_same_bytes(place: Path, finished: tuple[Run, Watch], tmp_path: Path) -> None:
    run = a_run(place, tmp_path, "ray")
    assert convert(run, Watch(run.store)).exit_code == 0
    assert sums(run.store.run) == sums(finished[0].store.run)


@pytest.mark.slow
def test_the_name_of_a_target_changes_no_weight(place: Path, finished: tuple[Run, Watch], tmp_path: Path) -> None:
    shutil.copytree(place / "model", tmp_path / "model")
    write_manifest(tmp_path, {"other": TARGETS["w2"]})
    run = a_run(tmp_path, tmp_path / "out")
    assert convert(run, Watch(run.store)).exit_code == 0
    weights = "model.safetensors"
    assert (run.store.run / "model" / "other" / weights).read_bytes() == (
        finished[0].store.run / "model" / "w2" / weights
    ).read_bytes()


def test_the_plan_tells_the_price_and_other_settings_are_other_tasks(place: Path, tmp_path: Path) -> None:
    run = a_run(place, tmp_path)
    jobs = {job["job"]: job["notes"] for job in plan_json(run, plan(run))["jobs"]}
    assert "autoround takes 6 passes forward and back for each of 3 blocks" in jobs["model/w2"]
    shutil.copytree(place / "model", tmp_path / "model")
    keys = []
    for rate in ("", ", learning_rate: 0.01"):
        write_manifest(tmp_path, {"w2": TARGETS["w2"].replace("}", f"{rate}}}")})
        graph = plan(a_run(tmp_path, tmp_path / "out")).prepared.plan.graph
        keys.append({task.key for task in graph.tasks.values() if task.kind == "quantize" and task.block is not None})
    assert not keys[0] & keys[1]


@pytest.mark.slow
def test_experts_are_learned_and_those_that_no_row_reached_are_as_they_were(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=5, num_experts_per_tok=2,
        bos_token_id=None, eos_token_id=0, max_position_embeddings=256, mlp_only_layers=[], decoder_sparse_step=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    gate = model.model.layers[1].mlp.gate.weight.data
    gate[[0, 1, 2, 4]] = torch.tensor([2.0, 4.0, -1.0, -2.0], dtype=gate.dtype)[:, None] * gate[3]  # always two above 3
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, tmp_path / "model" / name)
    write_manifest(tmp_path, {"w2": TARGETS["w2"], "gptq": GPTQ})
    run = a_run(tmp_path, tmp_path / "out")
    assert convert(run, Watch(run.store)).exit_code == 0
    learned, start = (load_file(run.store.run / "model" / name / "model.safetensors") for name in ("w2", "gptq"))
    same = {name for name in learned if name.endswith("packed") and torch.equal(learned[name], start[name])}
    assert same == {name for name in learned if ".layers.1.mlp.experts.3." in name and name.endswith("packed")}


@pytest.mark.slow
def test_an_encoder_is_learned_too(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path / "model" / name)
    write_manifest(
        tmp_path, {"w2": TARGETS["w2"].replace("iterations: 12", "iterations: 40, learning_rate: 0.01"), "gptq": GPTQ}
    )
    run = a_run(tmp_path, tmp_path / "out")
    assert convert(run, Watch(run.store)).exit_code == 0
    rows = artifacts(run)
    assert rows["w2"]["output"]["hidden_relative_mse"] < rows["gptq"]["output"]["hidden_relative_mse"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("{format: compressed-tensors, scheme: FP8_DYNAMIC, method: autoround}", "no codes to learn"),
        ("{format: compressed-tensors, scheme: MXFP8, method: autoround}", "no codes to learn"),
        ("{format: parquet, scheme: INT8, iterations: 20}", "iterations has no effect without autoround"),
        ("{format: parquet, scheme: INT8, method: autoround, learning_rate: 0}", "learning_rate"),
        ("{format: parquet, scheme: INT8, method: [autoround, gptq]}", "has 2 rounders"),
    ],
)
def test_what_cannot_be_learned_is_refused(target: str, said: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, {"mine": target})
    with pytest.raises(ManifestError, match=said):
        manifests.load(tmp_path / "small.yaml")
