"""Experts that few rows reached: what they get of their layer, exactly, and that it helps where it is said to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from converter import manifest as manifests
from converter.architecture import EXPERT_INPUT, EXPERT_MIDDLE, Tap
from converter.containers.safetensors_file import read_headers, read_tensor
from converter.grids.affine import AffineGrid
from converter.methods import Block, Options
from converter.methods.gptq import gptq
from converter.methods.rtn import round_to_nearest
from converter.progress import JsonLines
from converter.rare_experts import ROWS_PER_COLUMN, blended
from converter.stats import TapStats, observe
from jobs.convert import Run, convert
from small_run import TOKENIZER, write_manifest

COLUMNS = 64
ENOUGH = {kind: int(share * COLUMNS) for kind, share in ROWS_PER_COLUMN.items()}
EPS = torch.finfo(torch.float32).eps


def taps(kind: str, experts: int) -> list[Tap]:
    return [Tap(name=f"{kind}.{e}", linears=(f"experts.{e}.linear",)) for e in range(experts)]


def hidden(rows: int, seed: int = 0, columns: int = COLUMNS) -> Tensor:
    """Rows as a hidden state has them: a few directions hold most of it."""
    mixed = (
        torch.randn(columns // 4, columns, generator=torch.Generator().manual_seed(42))
        * torch.logspace(0, -1, columns // 4)[:, None]
    )
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns // 4, generator=generator) @ mixed + 0.1 * torch.randn(
        rows, columns, generator=generator
    )


def seen(counts: dict[int, int], kind: str, gram: bool = True) -> dict[str, TapStats]:
    return {f"{kind}.{e}": observe(hidden(rows, e), gram, counted="tap") for e, rows in counts.items()}


@pytest.mark.parametrize("kind", ROWS_PER_COLUMN)
def test_experts_with_enough_rows_keep_every_bit(kind: str) -> None:
    stats = seen({0: ENOUGH[kind], 1: ENOUGH[kind] + 1, 2: 500, 3: 1}, kind)
    found, notes = blended(stats, taps(kind, 4))
    assert all(found[f"{kind}.{e}"] is stats[f"{kind}.{e}"] for e in (0, 1, 2))
    assert list(notes) == [f"{kind}.3"] and "few calibration rows reached it" in notes[f"{kind}.3"]


def test_dense_taps_and_kinds_that_nothing_was_seen_of_stay_as_they_are() -> None:
    stats = {"mlp_input": observe(hidden(3), True)}
    found, notes = blended(stats, [Tap(name="mlp_input", linears=("mlp.up_proj",)), *taps(EXPERT_INPUT, 3)])
    assert found == stats and not notes


def test_an_input_is_filled_up_with_rows_like_those_of_all_experts() -> None:
    stats = seen({0: 900, 1: 300, 2: 5}, EXPERT_INPUT)
    found, notes = blended(stats, taps(EXPERT_INPUT, 4))
    rows = torch.cat([hidden(count, e) for e, count in ((0, 900), (1, 300), (2, 5))]).double()
    for expert, own_rows in ((2, hidden(5, 2).double()), (3, torch.zeros(0, COLUMNS).double())):
        one = found[f"{EXPERT_INPUT}.{expert}"]
        share = (ENOUGH[EXPERT_INPUT] - len(own_rows)) / len(rows)
        expected = own_rows.T @ own_rows + share * (rows.T @ rows)
        assert one.rows == ENOUGH[EXPERT_INPUT] and one.gram is not None
        # sums of some 1200 products in f32, each at most its own rounding away
        bound = 2 * 1300 * EPS * (own_rows.abs().T @ own_rows.abs() + share * (rows.abs().T @ rows.abs()))
        assert bool(((one.gram.double() - expected).abs() <= bound).all())
        torch.testing.assert_close(one.sum_squares, expected.diagonal(), rtol=1e-6, atol=0)
        torch.testing.assert_close(one.abs_sum, own_rows.abs().sum(0) + share * rows.abs().sum(0), rtol=1e-6, atol=0)
        assert torch.equal(one.abs_max, rows.abs().amax(0).float())
        assert torch.equal(one.minimum, rows.amin(0).float()) and torch.equal(one.maximum, rows.amax(0).float())
    assert set(notes) == {f"{EXPERT_INPUT}.2", f"{EXPERT_INPUT}.3"}


def test_a_middle_gets_the_layers_mean_square_and_no_direction() -> None:
    stats = seen({0: 900, 1: 4}, EXPERT_MIDDLE)
    one = blended(stats, taps(EXPERT_MIDDLE, 2))[0][f"{EXPERT_MIDDLE}.1"]
    own = stats[f"{EXPERT_MIDDLE}.1"]
    mean_square = torch.cat([hidden(900, 0), hidden(4, 1)]).double().square().mean()
    missing = ENOUGH[EXPERT_MIDDLE] - 4
    assert one.gram is not None and own.gram is not None
    torch.testing.assert_close(
        one.gram - own.gram, (missing * mean_square * torch.eye(COLUMNS)).float(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        one.sum_squares - own.sum_squares, (missing * mean_square).expand(COLUMNS), rtol=1e-6, atol=0
    )
    assert len(set(one.abs_max.tolist())) == 1 and float(one.abs_max[0]) == float(
        torch.cat([hidden(900, 0), hidden(4, 1)]).abs().max()
    )


def test_one_row_less_than_enough_changes_next_to_nothing() -> None:
    stats = seen({0: 900, 1: ENOUGH[EXPERT_INPUT] - 1}, EXPERT_INPUT)
    one = blended(stats, taps(EXPERT_INPUT, 2))[0][f"{EXPERT_INPUT}.1"]
    own = stats[f"{EXPERT_INPUT}.1"]
    assert float((one.sum_squares - own.sum_squares).sum() / own.sum_squares.sum()) < 2 / ENOUGH[EXPERT_INPUT]


def test_statistics_without_gram_or_counts_are_filled_up_without() -> None:
    stats = {name: replace(one, histogram=None) for name, one in seen({0: 200, 1: 2}, EXPERT_INPUT, gram=False).items()}
    one = blended(stats, taps(EXPERT_INPUT, 2))[0][f"{EXPERT_INPUT}.1"]
    assert one.gram is None and one.histogram is None and one.rows == ENOUGH[EXPERT_INPUT]


def output_error(weight: Tensor, decoded: Tensor, rows: Tensor) -> float:
    away = rows @ (decoded - weight).T
    return float(away.square().sum() / (rows @ weight.T).square().sum())


@pytest.mark.parametrize("rows", [2, 8, 24])
def test_gptq_on_a_rare_expert_errs_less_on_rows_that_it_was_not_shown(rows: int) -> None:
    stats = seen({e: 400 for e in range(1, 5)} | {0: rows}, EXPERT_INPUT)
    weight = torch.randn(48, COLUMNS, generator=torch.Generator().manual_seed(1))
    grid = AffineGrid(bits=3, granularity="group", group_size=32)
    held_out = hidden(2000, 99)
    errors = {}
    for name, own in (("raw", stats), ("blended", blended(stats, taps(EXPERT_INPUT, 5))[0])):
        block = Block(
            where="t", tensors={"experts.0.linear.weight": weight}, stats=own, taps=tuple(taps(EXPERT_INPUT, 5))
        )
        grids = {"experts.0.linear.weight": grid}
        solved = gptq(block, grids, Options()).coded["experts.0.linear.weight"].decode()
        errors[name] = output_error(weight, solved, held_out)
    nearest = round_to_nearest(replace(block, stats={}), grids, Options()).coded["experts.0.linear.weight"].decode()
    assert errors["blended"] < 0.8 * errors["raw"]
    assert errors["blended"] < 0.5 * output_error(weight, nearest, held_out)


def write_moe(folder: Path) -> Path:
    """A random mixture of 8 experts whose router never asks for the last of block 0."""
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[7] = router[:7].float().mean(0).to(router.dtype)  # never the largest two
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def test_a_run_says_how_many_rows_reached_an_expert_and_fails_for_none(tmp_path: Path) -> None:
    write_moe(tmp_path / "model")
    targets = {
        "gptq": "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 32}",
        "fp8": "{format: compressed-tensors, scheme: FP8}",
        "int8": "{format: compressed-tensors, scheme: W8A8_STATIC}",
    }
    write_manifest(tmp_path, targets)
    run = Run(manifest=manifests.load(tmp_path / "small.yaml"), out=tmp_path / "out", executor="inprocess")
    result = convert(run, JsonLines())
    assert result.exit_code == 0, result.failures
    for row in result.rows:
        notes = row["notes"]
        assert notes["model.layers.0.mlp.experts.7.up_proj.weight"] == (
            "no calibration row reached it: statistics filled up to 64 with its layer's"
        )
        assert "filled up to 16 " in notes["model.layers.0.mlp.experts.7.down_proj.weight"]
        assert not any("self_attn" in name for name in notes)
    table = pyarrow.parquet.read_table(run.store.run / "tensors.parquet").to_pylist()
    own = {row["name"]: row["calibration_rows"] for row in table if row["target"] == "gptq"}
    inputs = [own[f"model.layers.0.mlp.experts.{e}.gate_proj.weight"] for e in range(8)]
    assert sum(inputs) == 2 * 4 * 64 and inputs[7] == 0  # each of the tokens reaches two
    assert own["model.layers.0.self_attn.o_proj.weight"] == 4 * 64 and own["model.embed_tokens.weight"] is None
    # Its range is the layer's: of inputs that of all experts, which read one hidden state.
    folder = run.store.run / "model" / "fp8"
    scales = [
        float(read_tensor(folder, read_headers(folder)[f"model.layers.0.mlp.experts.{e}.up_proj.input_scale"]))
        for e in range(8)
    ]
    assert scales[7] == max(scales)
