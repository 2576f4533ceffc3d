"""TapStats: equal to what the rows say, additive, foldable, storable."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converter.architecture import find
from converter.blocks import Decoder
from converter.calibrate import calibrate_block
from converter.errors import NumericsError
from converter.source import open_folder
from converter.stats import STRIPE_COLUMNS, Collector, RowSums, TapStats, observe, pack, unpack
from quantkernels import gram
from tiny_models import write_llama

EPS = torch.finfo(torch.float32).eps
FIELDS = ("sum_squares", "abs_sum", "abs_max", "minimum", "maximum")


def rows(count: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    column_size = torch.logspace(-2, 2, columns)  # activations have columns of very different size
    return torch.randn(count, columns, generator=generator) * column_size


def assert_gram_close(gram: Tensor | None, expected: Tensor, hidden: Tensor) -> None:
    """Two f32 sums of N products in any order differ by at most 2 N eps times the sum of the products' sizes."""
    assert gram is not None
    size = hidden.double().abs()
    bound = 2 * (len(hidden) + 2) * EPS * (size.T @ size)
    assert bool(((gram.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("columns", [1, 7, STRIPE_COLUMNS, STRIPE_COLUMNS + 1, 2 * STRIPE_COLUMNS + 13])
def test_statistics_are_those_of_the_rows(columns: int) -> None:
    hidden = rows(19, columns)
    stats = observe(hidden, gram=True)
    wide = hidden.double()
    assert stats.rows == 19
    torch.testing.assert_close(stats.sum_squares, wide.square().sum(0), rtol=1e-14, atol=0)  # 19 terms in f64
    torch.testing.assert_close(stats.abs_sum, wide.abs().sum(0), rtol=1e-14, atol=0)
    assert torch.equal(stats.abs_max, hidden.abs().amax(0))
    assert torch.equal(stats.minimum, hidden.amin(0))
    assert torch.equal(stats.maximum, hidden.amax(0))
    assert_gram_close(stats.gram, wide.T @ wide, hidden)


def test_gram_is_symmetric_and_its_diagonal_is_the_sum_of_squares() -> None:
    hidden = rows(33, STRIPE_COLUMNS + 40)
    stats = observe(hidden, gram=True)
    assert stats.gram is not None
    assert torch.equal(stats.gram, stats.gram.T)
    # all terms are positive, so N roundings move the sum by at most N eps of itself
    torch.testing.assert_close(stats.gram.diagonal().double(), stats.sum_squares, rtol=34 * EPS, atol=0)


def test_gram_is_absent_unless_asked_for() -> None:
    assert observe(rows(3, 4), gram=False).gram is None
    assert (observe(rows(3, 4), gram=False) + observe(rows(3, 4), gram=True)).gram is None


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=3, max_size=3), columns=st.integers(1, 12), seed=st.integers(0, 10**6)
)
def test_addition_is_associative_up_to_rounding_and_equals_all_rows_at_once(
    counts: list[int], columns: int, seed: int
) -> None:
    parts = [rows(count, columns, seed + i) for i, count in enumerate(counts)]
    a, b, c = (observe(part, gram=True) for part in parts)
    together = torch.cat(parts)
    whole = observe(together, gram=True)
    for one in ((a + b) + c, a + (b + c), whole):
        assert one.rows == sum(counts)
        for field in ("abs_max", "minimum", "maximum"):
            assert torch.equal(vars(one)[field], vars(whole)[field])
        for field in ("sum_squares", "abs_sum"):  # at most 27 positive terms in f64
            torch.testing.assert_close(vars(one)[field], vars(whole)[field], rtol=28 * 2.3e-16, atol=0)
        assert_gram_close(one.gram, together.double().T @ together.double(), together)


def test_scaled_statistics_are_those_of_the_scaled_rows() -> None:
    hidden = rows(21, 40)
    scale = torch.rand(40, generator=torch.Generator().manual_seed(1)) * 4 + 0.1
    folded = observe(hidden, gram=True).scaled(scale)
    direct = observe(hidden / scale, gram=True)
    for field in FIELDS:  # one rounding of x / s squared and one of the division
        torch.testing.assert_close(vars(folded)[field], vars(direct)[field], rtol=4 * EPS, atol=0)
    wide = (hidden / scale).double()
    assert_gram_close(folded.gram, wide.T @ wide, hidden / scale)


def test_scaled_by_one_changes_no_bit() -> None:
    stats = observe(rows(5, 6), gram=True)
    same = stats.scaled(torch.ones(6))
    for field in (*FIELDS, "gram"):
        assert torch.equal(vars(same)[field], vars(stats)[field])


@pytest.mark.parametrize("gram", [False, True])
def test_packed_statistics_come_back_bit_for_bit(gram: bool) -> None:
    stats = {
        "attention_input": observe(rows(9, STRIPE_COLUMNS + 3), gram),
        "mlp_middle": observe(rows(9, 5, seed=1), False),
    }
    back = unpack(pack(stats))
    assert back.keys() == stats.keys()
    for tap, one in stats.items():
        assert back[tap].rows == one.rows
        for field in FIELDS:
            assert torch.equal(vars(back[tap])[field], vars(one)[field])
        assert (back[tap].gram is None) == (one.gram is None)
        assert one.gram is None or torch.equal(back[tap].gram, one.gram)


def test_gram_matrices_can_be_left_where_they_are() -> None:
    packed = pack({"mlp_middle": observe(rows(9, 5), True)})
    expected = packed["mlp_middle/sum_squares"]
    packed["mlp_middle/gram_upper"] = torch.empty(0)  # it would not come back from this
    back = unpack(packed, large=())["mlp_middle"]
    assert back.gram is None and torch.equal(back.sum_squares, expected)


def test_packed_gram_is_half_a_matrix() -> None:
    assert pack({"tap": observe(rows(4, 10), True)})["tap/gram_upper"].numel() == 55


def test_steps_give_the_same_bits_in_any_order() -> None:
    parts = [rows(17, 3 * STRIPE_COLUMNS + 5, seed) for seed in range(2)]
    results: list[TapStats] = []
    for shuffled in (False, True):
        collector = Collector(columns=parts[0].shape[1], gram=True)
        for part in parts:
            steps = collector.steps(RowSums(part))
            if shuffled:
                random.Random(3).shuffle(steps)
            for step in steps:
                step()
        results.append(collector.stats())
    for field in (*FIELDS, "gram"):
        assert torch.equal(vars(results[0])[field], vars(results[1])[field])


def test_where_linears_multiply_in_bf16_only_the_gram_is_of_rounded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = rows(600, STRIPE_COLUMNS + 40)
    exact = observe(hidden, gram=True)
    for able in (gram.available(), False):
        if not able:
            monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_f": True})
        collector = Collector(columns=hidden.shape[1], gram=True, products=torch.bfloat16)
        collector.add(hidden)
        stats = collector.stats()
        for field in FIELDS:
            assert torch.equal(vars(stats)[field], vars(exact)[field])
        assert stats.gram is not None and exact.gram is not None
        assert torch.equal(stats.gram, stats.gram.T)
        assert torch.equal(stats.gram, exact.gram) == (not able)
        read = hidden.bfloat16().double() if able else hidden.double()
        assert_gram_close(stats.gram, read.T @ read, hidden.bfloat16() * 1.01)
        torch.testing.assert_close(stats.gram.diagonal().double(), stats.sum_squares, rtol=2**-7, atol=0)


def test_steps_of_rounded_rows_give_the_same_bits_in_any_order() -> None:
    hidden = rows(100, 3 * STRIPE_COLUMNS + 5)
    grams = []
    for backwards in (False, True):
        collector = Collector(columns=hidden.shape[1], gram=True, products=torch.bfloat16)
        steps = collector.steps(RowSums(hidden))
        for step in reversed(steps) if backwards else steps:
            step()
        grams.append(collector.stats().gram)
    assert grams[0] is not None and grams[1] is not None and torch.equal(*grams)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    hidden = rows(5, 8)
    hidden[2, 3] = value
    with pytest.raises(NumericsError, match="1 of 8 columns"):
        observe(hidden, gram=False)


def test_half_precision_rows_are_summed_in_wide_types() -> None:
    hidden = torch.full((70_000, 1), 300.0, dtype=torch.float16)  # the square overflows f16, the count its integers
    stats = observe(hidden, gram=True)
    assert stats.sum_squares.item() == 70_000 * 90_000
    assert stats.abs_sum.item() == 70_000 * 300


def drifted(hidden: Tensor, seed: int = 9) -> Tensor:
    """The original's rows [N, I] in the places of hidden, which lie a little apart."""
    return hidden + 0.1 * rows(len(hidden), hidden.shape[1], seed)


def with_drift(hidden: Tensor, original: Tensor) -> TapStats:
    collector = Collector(columns=hidden.shape[1], gram=True, drift=True)
    collector.add(hidden, original)
    return collector.stats()


@pytest.mark.parametrize("columns", [1, 7, STRIPE_COLUMNS + 1])
def test_gram_and_drift_are_the_original_rows_times_the_chains(columns: int) -> None:
    hidden = rows(19, columns)
    original = drifted(hidden)
    stats = with_drift(hidden, original)
    assert stats.drift is not None and stats.gram is not None
    expected = original.double().T @ hidden.double()
    size = (original.double().abs() + hidden.double().abs()).T @ hidden.double().abs()
    assert bool(((stats.gram.double() + stats.drift.double() - expected).abs() <= 2 * 22 * EPS * size).all())


def test_rows_like_the_originals_do_not_drift() -> None:
    hidden = rows(19, 40)
    assert torch.equal(with_drift(hidden, hidden.clone()).drift, torch.zeros(40, 40))  # type: ignore[arg-type]


def test_drifts_add_up_and_are_lost_when_one_is_missing() -> None:
    hidden, original = rows(20, 6), drifted(rows(20, 6))
    whole = with_drift(hidden, original)
    parts = with_drift(hidden[:7], original[:7]) + with_drift(hidden[7:], original[7:])
    assert whole.drift is not None and parts.drift is not None
    bound = 2 * 22 * EPS * ((original - hidden).double().abs().T @ hidden.double().abs())
    assert bool(((whole.drift - parts.drift).double().abs() <= bound).all())
    assert (whole + observe(hidden, gram=True)).drift is None


def test_a_scaled_drift_is_that_of_the_scaled_rows() -> None:
    hidden, original = rows(21, 40), drifted(rows(21, 40))
    scale = torch.rand(40, generator=torch.Generator().manual_seed(1)) * 4 + 0.1
    folded, direct = with_drift(hidden, original).scaled(scale), with_drift(hidden / scale, original / scale)
    size = ((original.abs() + hidden.abs()) / scale).double().T @ (hidden.abs() / scale).double()
    assert folded.drift is not None and direct.drift is not None
    assert bool(((folded.drift - direct.drift).double().abs() <= 2 * 24 * EPS * size).all())


def test_a_packed_drift_comes_back_bit_for_bit_or_stays_where_it_is() -> None:
    packed = pack({"tap": with_drift(rows(9, 5), drifted(rows(9, 5)))})
    assert torch.equal(unpack(packed)["tap"].drift, packed["tap/drift"])  # type: ignore[arg-type]
    assert unpack(packed, large=())["tap"].drift is None


def test_two_runs_over_parts_of_the_rows_sum_to_one_over_all(tmp_path: Path) -> None:
    write_llama(tmp_path, torch.float32)
    snapshot = open_folder(tmp_path, "test")
    architecture = find(snapshot.config, "test").fitted(snapshot.config, snapshot.tensors, "test")
    decoder = Decoder(tmp_path, architecture, "test", stored=snapshot.tensors)
    tensors = {name.removeprefix("model.layers.0."): snapshot.read(name) for name in snapshot.tensors if ".0." in name}
    hidden = rows(5 * 24, 128).reshape(5, 24, 128)
    asked = {
        "gram_for": frozenset(tap.name for tap in architecture.taps),
        "counted_for": {"attention_input": "tap", "mlp_middle": "column"},
        "watch_cache": True,
    }
    seen: dict[str, list[Tensor]] = {}

    def remember(n: int, found: Mapping[str, Tensor]) -> None:
        for tap, one in found.items():
            seen.setdefault(tap, []).append(one)

    decoder.run_block(0, tensors, hidden, remember)
    whole = calibrate_block(decoder, 0, tensors, hidden, **asked).stats  # type: ignore[arg-type]
    first, second = (calibrate_block(decoder, 0, tensors, part, **asked).stats for part in (hidden[:2], hidden[2:]))  # type: ignore[arg-type]
    assert first.keys() == second.keys() == whole.keys()
    for tap, one in whole.items():
        both = first[tap] + second[tap]
        assert both.rows == one.rows == 5 * 24
        for field in ("abs_max", "minimum", "maximum", "histogram"):  # of the same rows, bit for bit
            assert (vars(both)[field] is None) == (vars(one)[field] is None)
            assert vars(one)[field] is None or torch.equal(vars(both)[field], vars(one)[field])
        for field in ("sum_squares", "abs_sum"):  # 120 terms in f64, none negative
            torch.testing.assert_close(vars(both)[field], vars(one)[field], rtol=121 * 2.3e-16, atol=0)
        if one.gram is not None:
            together = torch.cat(seen[tap])
            assert_gram_close(both.gram, one.gram.double(), together)
