"""Calibration that goes wrong half-way: what is decided then stands in the comparison, the report and the card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from converter import manifest as manifests
from converter.manifest import Calibration, Evaluation
from converter.progress import JsonLines
from jobs.convert import Run, convert
from jobs.texts import text_rows
from small_run import TOKENIZER, write_manifest, write_model

GPTQ = "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 32}"
KEPT = GPTQ.replace("}", ", rules: {'layers.0.mlp.(gate|up)_proj': BF16}}")  # the poisoned weights as they are
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def change(folder: Path, what: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    what(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def converted(place: Path, targets: Mapping[str, str], calibration: str = "") -> tuple[Path, dict[str, dict[str, Any]]]:
    """The run's folder and its rows by target."""
    path = write_manifest(place, targets)
    if calibration:
        lines = [
            f"calibration: {calibration}" if line.startswith("calibration") else line
            for line in path.read_text().split("\n")
        ]
        path.write_text("\n".join(lines))
    run = Run(manifest=manifests.load(path), out=place / "out", executor="inprocess")
    return run.store.run, {row["target"]: row for row in convert(run, JsonLines()).rows}


def assert_visible(run: Path, target: str, said: str) -> None:
    """What was decided is in the comparison, in the report and on the card."""
    rows = json.loads((run / "comparison.json").read_text())["artifacts"]
    [row] = [row for row in rows if row["target"] == target]
    assert said in json.dumps(row)
    assert said in (run / "report.html").read_text()
    assert said in (run / "model" / target / "README.md").read_text().replace("\\", "")


def poisoned(place: Path) -> None:
    """A model that overflows for one token, which one calibration row holds and no evaluation row."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        mlp_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = place / "model"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, model / name)
    calibration = text_rows(Calibration(sequences=4, length=64), model, "model", place)
    evaluation = text_rows(Evaluation(sequences=2, length=64), model, "model", place)
    token = next(
        token
        for token in calibration.unique().tolist()
        if int((calibration == token).any(1).sum()) == 1 and not bool((evaluation == token).any())
    )

    def poison(tensors: dict[str, Tensor]) -> None:
        # One neuron of block 0 looks for the token's embedding, whose normed length is 8; no other comes to 6 of it.
        towards = torch.nn.functional.normalize(tensors["model.embed_tokens.weight"][token].float(), dim=0)
        tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
        for name in ("gate", "up"):
            tensors[f"model.layers.0.mlp.{name}_proj.weight"][0] = (1e20 * towards).to(torch.bfloat16)
        tensors["model.layers.0.mlp.gate_proj.bias"][0] = -6e20

    change(model, poison)


def test_rows_of_nan_fail_the_model_and_say_how_to_go_on(tmp_path: Path) -> None:
    poisoned(tmp_path)
    _, rows = converted(tmp_path, {"gptq": KEPT})
    assert rows["gptq"]["status"] == "failed"
    assert "the hidden state is not finite in 1 of 4 sequences. Set calibration.skip_bad_rows" in rows["gptq"]["error"]


@pytest.mark.parametrize("target", [KEPT, KEPT.replace("BF16}", "BF16}, propagate: quantized")])
def test_rows_of_nan_are_left_out_when_asked_and_counted_everywhere(target: str, tmp_path: Path) -> None:
    poisoned(tmp_path)
    run, rows = converted(tmp_path, {"gptq": target}, "{sequences: 4, length: 64, skip_bad_rows: true}")
    assert rows["gptq"]["status"] == "done", rows["gptq"]
    assert_visible(run, "gptq", "1 of 4 calibration rows overflowed and were left out")


def test_a_hessian_that_is_not_positive_definite_is_damped_further_and_the_comparison_says_so(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    # 64 rows for the 128 columns of the middle: half of the directions are never seen, and f32 leaves them below zero.
    targets = {"gptq": GPTQ.replace("}", ", damping: 0.00000000001}")}
    run, rows = converted(tmp_path, targets, "{sequences: 1, length: 64}")
    assert rows["gptq"]["status"] == "done", rows["gptq"]
    note = rows["gptq"]["notes"][DOWN]
    assert note == "the Hessian is not positive definite: damping raised to 0.01"
    assert_visible(run, "gptq", note)
    table = pyarrow.parquet.read_table(run / "tensors.parquet").to_pylist()
    assert {row["note"] for row in table if row["name"] == DOWN} == {note}


def test_columns_that_stayed_dark_are_counted_and_their_weights_are_rounded_to_nearest(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    change(tmp_path / "model", lambda tensors: tensors[UP][:5].zero_())  # five neurons that give nothing
    targets = {
        "gptq": GPTQ,
        "q4": "{format: gguf, type: Q4_0, imatrix: true}",
        "awq": "{format: compressed-tensors, scheme: W4A16, method: [awq, rtn], group_size: 32}",
        "rtn": "{format: parquet, scheme: INT4}",
    }
    run, rows = converted(tmp_path, targets)
    said = "5 of 128 input columns stayed dark in calibration: rounded to nearest"
    for target in ("gptq", "q4", "awq"):
        assert rows[target]["status"] == "done", rows[target]
        assert rows[target]["notes"][DOWN] == said
        assert said not in rows[target]["notes"].get(UP, "")
        assert_visible(run, target, said)
    assert rows["rtn"]["notes"] == {}  # it looks at no statistics
