"""HQQ: the identities of its paper, and what it moves."""

# O out, I in.
from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.levels import LevelGrid
from converter.methods import Block, Options
from converter.methods.hqq import POWER, PRICE, hqq, move_offsets, shrink
from converter.methods.rtn import round_to_nearest

OFFSETS = [LevelGrid(values=f"seq{bits}", group_size=32, offset=True, scale_dtype="BF16") for bits in (2, 3, 4)]
DOUBLE = LevelGrid(values="seq2", group_size=32, offset=True, scale_bits=4, scale_dtype="BF16")
MOVABLE = [*OFFSETS, DOUBLE, LevelGrid(values="seq3", offset=True, scale_dtype="BF16")]


def heavy(rows: int = 24, columns: int = 150) -> Tensor:
    """Weights with outliers; the last group of a row is short."""
    return torch.from_numpy(np.random.default_rng(0).standard_t(3, (rows, columns)).astype("f"))


def norms(grid: Grid, parts: Mapping[str, Tensor], weight: Tensor, power: float = POWER) -> Tensor:
    """The sum [O, G] of errors to the power, in units of the scale."""
    framed = grid.framed(parts)
    assert framed is not None
    frame = framed.frame
    group = torch.arange(weight.shape[1]) // frame.group_size
    error = ((grid.decode(parts) - weight) / frame.scale_OG[:, group]).double().abs().pow(power)
    return torch.zeros(frame.scale_OG.shape, dtype=torch.float64).index_add_(1, group, error)


def test_shrinking_solves_its_half_of_the_problem() -> None:
    errors = torch.linspace(-2, 2, 81)
    tried = torch.linspace(-2.5, 2.5, 20001, dtype=torch.float64)[:, None]
    for price in (2.0, 10.0):
        costs = tried.abs() + price / 2 * (tried - errors).square()
        # Power 1 is soft thresholding, known exactly; the grid of trials is 2.5e-4 wide.
        torch.testing.assert_close(shrink(errors, price, 1.0).double(), tried[costs.argmin(0), 0], atol=2e-4, rtol=0)
    # Below 1 the formula takes the slope of the norm at the error itself. At the price that the steps begin with,
    # errors of half a step and more end within 4 % of the least cost.
    found, size = shrink(errors, PRICE).double(), errors.abs()
    cost = found.abs().pow(POWER) / POWER + PRICE / 2 * (found - errors).square()
    least = (tried.abs().pow(POWER) / POWER + PRICE / 2 * (tried - errors).square()).amin(0)
    assert bool((cost[size > 0.5] <= 1.04 * least[size > 0.5]).all())
    assert bool((found.abs() <= size).all() and (found * errors >= 0).all())
    assert bool((found[size < PRICE ** (1 / (POWER - 2)) * 0.99] == 0).all())


@pytest.mark.parametrize("grid", MOVABLE, ids=lambda grid: f"{grid.name}")
def test_the_error_does_not_rise_with_the_steps_and_falls_over_all(grid: Grid) -> None:
    weight = heavy()
    start = grid.encode(weight, None)
    framed = grid.framed(start)
    assert framed is not None
    before = norms(grid, start, weight)
    last = before
    for times in (0, 1, 2, 5, 20):
        now = norms(grid, move_offsets(weight, framed, None, times), weight)
        # A group is judged in f32 and summed here in f64. No group gets worse, and all together fall from step to step.
        assert bool((now <= before * (1 + 1e-5)).all()), times
        assert float(now.sum()) <= float(last.sum())
        last = now
    assert float(last.sum()) < float(before.sum())


def test_from_the_range_of_a_group_both_errors_fall_as_published() -> None:
    """The paper's own start. With whole offsets the p-norm falls by several percent, and squares fall beside it."""
    weight = heavy(64, 256)
    low, high = weight.unflatten(1, (-1, 32)).aminmax(dim=2)
    for grid, least in zip(OFFSETS, (0.93, 0.96, 0.98), strict=True):
        exact = dataclasses.replace(grid, scale_dtype="F32")
        side = {"scale": (high - low) / (len(grid.levels) - 1), "offset": (high + low) / 2}
        codes = torch.zeros(weight.shape, dtype=torch.int8)
        framed = exact.framed({"codes": codes, **side})
        starts, ends = (move_offsets(weight, framed, None, times) for times in (0, 20))
        assert float(norms(exact, ends, weight).sum()) < least * float(norms(exact, starts, weight).sum())
        assert float(norms(exact, ends, weight, 2).sum()) < float(norms(exact, starts, weight, 2).sum())


def test_outliers_move_an_offset_less_than_squares_would() -> None:
    weight = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) * 0.1
    clean, grid = weight.clone(), LevelGrid(values="seq4", group_size=32, offset=True)
    weight[:, 0] = 1.5
    fixed = {"scale": torch.full((200, 1), 0.04), "offset": torch.zeros(200, 1)}
    framed = grid.framed({"codes": torch.zeros(200, 32, dtype=torch.int8), **fixed})
    moved = move_offsets(weight, framed, None)
    assert float(moved["offset"].abs().mean()) < 0.02  # half a step; the mean of the rest after clipping would be 0.04
    inside = grid.decode(moved)[:, 1:] - clean[:, 1:]
    assert float(inside.square().mean()) < 1.3 * 0.04**2 / 12  # of even rounding


@pytest.mark.parametrize("grid", MOVABLE, ids=lambda grid: f"{grid.name}")
def test_what_is_stored_is_what_was_chosen_and_pieces_change_no_bit(
    grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = heavy()
    block = Block(where="here", tensors={"a.weight": weight, "norm": torch.ones(4)}, stats={})
    chosen: dict[str, Grid] = {"a.weight": grid, "norm": AffineGrid(bits=8)}
    coded = hqq(block, chosen, Options()).coded["a.weight"]
    start = grid.encode(weight, None)
    assert coded.parts.keys() == start.keys() and torch.equal(coded.parts["scale"], start["scale"])
    assert all(coded.parts[part].dtype == start[part].dtype for part in start)
    framed = grid.framed(coded.parts)
    assert framed is not None and torch.equal(framed.frame.decode(coded.parts["codes"]), coded.decode())
    monkeypatch.setattr("converter.grids.parts.CHUNK_WEIGHTS", 300)
    again = hqq(block, chosen, Options()).coded["a.weight"]
    assert all(torch.equal(again.parts[part], coded.parts[part]) for part in coded.parts)


def test_grids_without_offsets_are_rounded_to_nearest_and_noted() -> None:
    weight = heavy(4, 64)
    block = Block(where="here", tensors={"a.weight": weight}, stats={})
    for grid in (
        AffineGrid(bits=4),
        AffineGrid(bits=4, symmetric=False, granularity="tensor"),
        LevelGrid(values="nf4"),
    ):
        found, plain = (rounder(block, {"a.weight": grid}, Options()) for rounder in (hqq, round_to_nearest))
        assert "no offsets to move" in found.notes["a.weight"]
        assert torch.equal(found.coded["a.weight"].decode(), plain.coded["a.weight"].decode())
