"""Whole runs of schemes that fix the range of inputs: what lies in the file is what the observer says of the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from converter import manifest as manifests
from converter.activations import fixed_scale
from converter.compare.evaluation import block_tensors
from converter.containers.safetensors_file import read_headers, read_tensor
from converter.grids.input_observers import input_range
from converter.progress import JsonLines
from converter.schemes import COMPRESSED_TENSORS_SCHEMES, Activations, Observer
from converter.stats import observe
from jobs.attempt import Attempt, decoder_of, original_of, rows_of
from jobs.convert import Run, convert, plan
from jobs.planner import Plan
from jobs.work import Work
from small_run import write_manifest, write_model

TARGETS = {
    "percentile": "{format: compressed-tensors, scheme: W8A8_STATIC_ASYM, activation_observer: percentile}",
    "folded": "{format: compressed-tensors, scheme: W8A8_STATIC, method: [smoothquant, rtn], activation_observer: mse}",
    "chained": "{format: compressed-tensors, scheme: FP8, method: gptq, propagate: quantized, activation_observer: kl}",
    "groups": "{format: compressed-tensors, scheme: NVFP4, activation_observer: percentile}",
    "dynamic": "{format: compressed-tensors, scheme: W8A8}",
}
TAP = {"attention_input": "self_attn.q_proj", "mlp_middle": "mlp.down_proj"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Plan]:
    folder = tmp_path_factory.mktemp("static")
    write_model(folder / "model")
    write_manifest(folder, TARGETS)
    run = Run(manifest=manifests.load(folder / "small.yaml"), out=folder / "out", executor="inprocess")
    prepared = plan(run).prepared.plan
    assert convert(run, JsonLines()).exit_code == 0
    return run, prepared


def rows_of_tap(finished: tuple[Run, Plan], tap: str) -> Tensor:
    """The calibration rows as the tap of the original's first block sees them."""
    run, prepared = finished
    task = next(task for task in prepared.graph.tasks.values() if task.kind == "calibrate")
    assert isinstance(task.work, Work)
    attempt = Attempt(
        task=task,
        work=task.work,
        store=run.store,
        folder=run.out,
        record={},
        threads=1,
        report=lambda fraction: None,
        tell=lambda text: None,
    )
    model = task.work.model
    decoder, original = decoder_of(attempt, model), original_of(attempt, model)
    found: list[Tensor] = []
    hidden = decoder.embed(
        rows_of(attempt, model, run.manifest.calibration), {name: original.read(name) for name in decoder.input_names}
    )
    decoder.run_block(0, block_tensors(original, 0), hidden, lambda n, seen: found.append(seen[tap]))
    return torch.cat(found)


def stored(run: Run, target: str, name: str) -> Tensor:
    folder = run.store.run / "model" / target
    return read_tensor(folder, read_headers(folder)[f"model.layers.0.{name}"]).float()


def expected(hidden: Tensor, scheme: str, observer: Observer) -> tuple[Activations, tuple[float, float]]:
    how = COMPRESSED_TENSORS_SCHEMES[scheme].activations
    assert how is not None
    return how, input_range(observe(hidden, gram=False, counted="tap"), how, observer)


@pytest.mark.parametrize("tap", TAP)
def test_scale_and_zero_point_are_those_of_the_rows(tap: str, finished: tuple[Run, Plan]) -> None:
    how, (lowest, largest) = expected(rows_of_tap(finished, tap), "W8A8_STATIC_ASYM", "percentile")
    scale = (largest - lowest) / 255
    found = stored(finished[0], "percentile", f"{TAP[tap]}.input_scale")
    assert float(found) == pytest.approx(scale, rel=2**-8)  # stored in bf16
    zero = stored(finished[0], "percentile", f"{TAP[tap]}.input_zero_point")
    assert float(zero) == round(-128 - lowest / float(found))
    assert how.static and not how.symmetric


def test_a_range_follows_what_smoothquant_folds(finished: tuple[Run, Plan]) -> None:
    run, hidden = finished[0], rows_of_tap(finished, "attention_input")
    before = run.manifest.models[0].folder
    assert before is not None
    norm = read_tensor(before, read_headers(before)["model.layers.0.input_layernorm.weight"]).float()
    folded = hidden * (stored(run, "folded", "input_layernorm.weight") / norm)
    _, (_, own) = expected(folded, "W8A8_STATIC", "mse")
    _, (_, unfolded) = expected(hidden, "W8A8_STATIC", "mse")
    found = 127.5 * float(stored(run, "folded", "self_attn.q_proj.input_scale"))
    # Values that moved by up to a bin, 3 %, and ranges that are tried 2 % apart.
    assert found == pytest.approx(own, rel=0.055)
    assert abs(found - unfolded) > 0.1 * own


def test_every_linear_that_reads_one_hidden_state_has_one_range(finished: tuple[Run, Plan]) -> None:
    for target in ("percentile", "folded", "chained"):
        scales = [stored(finished[0], target, f"self_attn.{one}_proj.input_scale") for one in "qkv"]
        assert torch.equal(scales[0], scales[1]) and torch.equal(scales[0], scales[2])


def test_only_what_a_target_asks_for_is_counted(finished: tuple[Run, Plan]) -> None:
    tasks = finished[1].graph.tasks.values()
    of = {task.kind: task.work.counted for task in tasks if isinstance(task.work, Work) and task.block == 0}
    assert of["calibrate"] == {  # smoothquant scales the columns of two taps
        "attention_input": "column",
        "mlp_input": "column",
        "attention_output": "tap",
        "mlp_middle": "tap",
    }
    assert set(of["propagate"].values()) == {"tap"}


def test_a_narrower_range_clips_the_largest_inputs(finished: tuple[Run, Plan]) -> None:
    hidden = rows_of_tap(finished, "mlp_middle")
    unit = float(stored(finished[0], "groups", "mlp.down_proj.input_global_scale"))
    assert 6 * 448 / unit < float(hidden.abs().max())
    how, (_, largest) = expected(hidden, "FP8", "kl")
    assert fixed_scale(how)[0] >= 0
    chained = 448 * float(stored(finished[0], "chained", "mlp.down_proj.input_scale"))
    assert 0 < chained <= float(hidden.abs().max()) * 1.1 and largest > 0
