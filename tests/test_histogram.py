"""Histograms of taps: bins that need no range, counts that add up exactly, columns that follow a scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converter import histogram
from converter.histogram import BINS, HALF, bins_of, distribution, edges, magnitudes
from converter.stats import LARGE, STRIPE_COLUMNS, Collector, Counted, RowSums, TapStats, observe, pack, unpack

WIDTH = 1 / 32  # of a bin, as a share of its lower edge, at most


def rows(count: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator) * torch.logspace(-2, 2, columns)


def counted(hidden: Tensor, how: Counted = "tap") -> Tensor:
    found = observe(hidden, gram=False, counted=how).histogram
    assert found is not None
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_a_value_is_between_the_edges_of_its_bin(values: list[float]) -> None:
    value = torch.tensor(values)
    start, stop = edges()[bins_of(value).long()], edges()[bins_of(value).long() + 1]
    inside = (start <= value) & (value <= stop)
    beyond = value.abs() >= 2.0**histogram.LARGEST_POWER  # the outermost bins have whatever is further out
    assert bool((inside | beyond).all())


def test_no_bin_is_wider_than_a_thirty_second_of_its_lower_edge() -> None:
    positive = edges()[HALF + 1 :]
    assert len(edges()) == BINS + 1 and bool((edges().diff() > 0).all())
    assert float((positive.diff() / positive[:-1]).max()) <= WIDTH


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 39), min_size=0, max_size=4, unique=True),
    order=st.randoms(use_true_random=False),
    how=st.sampled_from(["tap", "column"]),
)
def test_counts_of_shards_add_up_exactly_in_any_order(cuts: list[int], order: object, how: Counted) -> None:
    hidden = rows(40, STRIPE_COLUMNS + 3)
    shards = [piece for piece in torch.tensor_split(hidden, sorted(cuts)) if len(piece)]
    order.shuffle(shards)  # type: ignore[attr-defined]
    total: TapStats | None = None
    for shard in shards:
        found = observe(shard, gram=False, counted=how)
        total = found if total is None else total + found
    assert total is not None and total.rows == 40
    assert torch.equal(total.histogram, counted(hidden, how))  # type: ignore[arg-type]


def test_every_value_is_counted_once() -> None:
    hidden = rows(17, 2 * STRIPE_COLUMNS + 9)
    assert int(counted(hidden).sum()) == hidden.numel()
    by_column = counted(hidden, "column")
    assert by_column.shape == (hidden.shape[1], BINS)
    assert bool((by_column.sum(1) == 17).all())
    assert torch.equal(by_column.sum(0, keepdim=True), counted(hidden))


def test_steps_that_run_at_once_count_each_in_a_row_of_its_own() -> None:
    hidden = rows(9, 3 * STRIPE_COLUMNS)
    collector = Collector(columns=hidden.shape[1], gram=False, counted="tap")
    for step in reversed(collector.steps(RowSums(hidden))):
        step()
    assert bool((collector.counts.sum(1) == 9 * STRIPE_COLUMNS).all())
    assert torch.equal(collector.stats().histogram, counted(hidden))  # type: ignore[arg-type]


def test_counts_of_columns_follow_a_scale_to_within_a_bin() -> None:
    hidden = rows(300, 12)
    scale = torch.logspace(-1.3, 1.7, 12)
    folded = observe(hidden, gram=False, counted="column").scaled(scale).histogram
    assert folded is not None and bool((folded.sum(1) == 300).all())
    moved = distribution(folded, -torch.inf, torch.inf)
    true = (hidden.double() / scale.double()).flatten()
    below = torch.nn.functional.pad(moved.counts_B.cumsum(0), (1, 0))[1:-1]
    for edge, found in zip(edges()[1:-1].tolist(), below.tolist(), strict=True):
        nearer, further = sorted((edge * (1 - WIDTH), edge * (1 + WIDTH)))
        assert int((true < nearer).sum()) <= found <= int((true < further).sum())


def test_counts_of_a_whole_tap_are_dropped_rather_than_wrong_after_a_scale() -> None:
    stats = observe(rows(8, 5), gram=False, counted="tap")
    assert stats.scaled(torch.tensor([1.0, 2, 1, 1, 1])).histogram is None
    assert torch.equal(stats.scaled(torch.ones(5)).histogram, stats.histogram)  # type: ignore[arg-type]


def test_packed_counts_come_back_or_stay_where_they_are() -> None:
    stats = observe(rows(8, 5), gram=True, counted="column")
    packed = pack({"tap": stats})
    assert torch.equal(unpack(packed)["tap"].histogram, stats.histogram)  # type: ignore[arg-type]
    left = unpack(packed, large=["gram"])["tap"]
    assert left.histogram is None and left.gram is not None
    assert set(LARGE) == {"gram", "drift", "histogram"}


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.99, 0.9999])
def test_quantiles_are_those_of_the_values_to_within_a_bin(share: float) -> None:
    hidden = rows(2000, 16)
    found = distribution(counted(hidden), float(hidden.min()), float(hidden.max()))
    expected = float(torch.quantile(hidden.double().flatten(), share))
    assert found.quantile(share) == pytest.approx(expected, rel=WIDTH)
    of_sizes = magnitudes(counted(hidden), float(hidden.abs().max()))
    expected = float(torch.quantile(hidden.double().abs().flatten(), share))
    assert of_sizes.quantile(share) == pytest.approx(expected, rel=WIDTH)


def test_the_ends_of_a_distribution_are_exact_also_beyond_the_last_bin() -> None:
    hidden = torch.tensor([[-3e9, -1.0, 0.0, 1e-30, 2.0, 5e7]])
    found = distribution(counted(hidden), -3e9, 5e7)
    assert (found.quantile(0.0), found.quantile(1.0)) == (-3e9, 5e7)
    points = torch.tensor([-4e9, -2.0, 1.0, 3.0, 6e7], dtype=torch.float64)
    assert found.below(points).tolist() == pytest.approx([0, 1, 4, 5, 6], abs=1e-6)
    assert magnitudes(counted(hidden), 3e9).quantile(1.0) == 3e9
