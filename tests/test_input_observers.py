"""Observers of inputs: each against its own definition, computed from the rows themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from converter.activations import fixed_levels, fixed_range, fixed_scale, quantize_inputs
from converter.grids.input_observers import ALIKE, OBSERVERS, input_range, squared_error
from converter.histogram import Distribution
from converter.schemes import COMPRESSED_TENSORS_SCHEMES, Activations
from converter.stats import TapStats, observe

BIN = 1 / 32  # how wide a bin of the histogram is, as a share of where it lies


def activations(scheme: str) -> Activations:
    found = COMPRESSED_TENSORS_SCHEMES[scheme].activations
    assert found is not None
    return found


INT8, INT8_ASYM, FP8 = activations("W8A8_STATIC"), activations("W8A8_STATIC_ASYM"), activations("FP8")
KINDS = {"int8": INT8, "int8 asym": INT8_ASYM, "fp8": FP8}


def inputs(kind: str) -> Tensor:
    torch.manual_seed(7)
    normal = torch.randn(1500, 40)
    if kind == "outliers":
        normal[0, :3] = torch.tensor([90.0, -130.0, 200.0])
    if kind == "gated":
        return torch.nn.functional.silu(3 * normal)
    if kind == "heavy":
        return normal / torch.rand(1500, 1).sqrt()
    return normal


def seen(hidden: Tensor) -> TapStats:
    return observe(hidden, gram=False, counted="tap")


def error(hidden: Tensor, how: Activations, lowest: float, largest: float) -> float:
    return float((quantize_inputs(hidden, replace(how, lowest=lowest, largest=largest)) - hidden).square().sum())


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_range_holds_zero_and_nothing_that_was_not_seen(observer: str, how: Activations) -> None:
    hidden = inputs("gated")
    lowest, largest = input_range(seen(hidden), how, observer)  # type: ignore[arg-type]
    assert lowest <= 0 < largest <= float(hidden.max())
    assert lowest == -largest if how.symmetric else lowest >= float(hidden.min())


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_tap_that_stayed_dark_has_a_range_without_extent_that_gives_zeros(observer: str, how: Activations) -> None:
    dark = torch.zeros(10, 8)
    lowest, largest = input_range(seen(dark), how, observer)  # type: ignore[arg-type]
    assert (lowest, largest) == (0.0, 0.0)
    assert torch.equal(quantize_inputs(dark, replace(how, lowest=lowest, largest=largest)), dark)


def test_minmax_is_the_range_of_the_rows_themselves() -> None:
    hidden = inputs("gated")
    stats = observe(hidden, gram=False)  # it reads no histogram
    assert input_range(stats, INT8_ASYM, "minmax") == (float(hidden.min()), float(hidden.max()))
    assert input_range(stats, INT8, "minmax") == (-float(hidden.max()), float(hidden.max()))


@pytest.mark.parametrize("kind", ["normal", "outliers", "gated", "heavy"])
def test_percentile_is_numpys_to_within_a_bin(kind: str) -> None:
    hidden = inputs(kind)
    values = hidden.double().numpy()
    _, largest = input_range(seen(hidden), INT8, "percentile")
    assert largest == pytest.approx(np.quantile(np.abs(values), 0.9999), rel=BIN)
    lowest, largest = input_range(seen(hidden), INT8_ASYM, "percentile")
    assert largest == pytest.approx(np.quantile(values, 0.9999), rel=BIN)
    assert lowest == pytest.approx(np.quantile(values, 0.0001), rel=BIN)


@pytest.mark.parametrize("how", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("kind", ["normal", "outliers", "gated", "heavy"])
def test_mse_has_the_least_error_that_brute_force_over_the_rows_finds(kind: str, how: Activations) -> None:
    hidden = inputs(kind)[:400]
    largest = float(hidden.abs().max())
    tried = [largest * 0.95**step for step in range(100)]
    least = min(error(hidden, how, -one, one) for one in tried)
    chosen = error(hidden, how, *input_range(seen(hidden), how, "mse"))
    # ALIKE is what it gives away to clip less; the even spread of values in bins, half a bin for a lone outlier, makes
    # up to as much again.
    assert chosen <= (2 * ALIKE - 1 + BIN) * least


@pytest.mark.parametrize("kind", ["normal", "outliers", "gated"])
def test_mse_finds_both_ends_of_an_asymmetric_range(kind: str) -> None:
    hidden = inputs(kind)[:400]
    lowest, largest = float(hidden.min()), float(hidden.max())
    shares = [0.9**step for step in range(14)]
    least = min(error(hidden, INT8_ASYM, lowest * a, largest * b) for a in shares for b in shares)
    chosen = error(hidden, INT8_ASYM, *input_range(seen(hidden), INT8_ASYM, "mse"))
    assert chosen <= (2 * ALIKE - 1 + BIN) * least
    assert chosen <= error(hidden, INT8_ASYM, lowest, largest)


def test_the_error_of_even_values_is_a_twelfth_of_the_squared_step() -> None:
    evenly = Distribution(
        edges_E=torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64),
        counts_B=torch.tensor([750.0, 250.0], dtype=torch.float64),
    )
    levels = torch.arange(-8, 9, dtype=torch.float64) / 8
    assert squared_error(evenly, levels) == pytest.approx(1000 / (12 * 64), rel=1e-12)
    clipped = torch.zeros(1, dtype=torch.float64)  # one level: everything is its own square
    assert squared_error(evenly, clipped) == pytest.approx(1000 / 3, rel=1e-12)


def naive_divergence(hidden: Tensor, how: Activations, largest: float, top: float) -> float:
    """Migacz's measure bin by bin, from the rows: 2048 bins of the range, each belonging to the nearest level."""
    counts, edges = np.histogram(hidden.numpy(), bins=2048, range=(-top, top))
    middles = (edges[1:] + edges[:-1]) / 2
    levels = fixed_levels(replace(how, lowest=-largest, largest=largest)).numpy()
    borders = (levels[1:] + levels[:-1]) / 2
    first, last = levels[0] - (borders[0] - levels[0]), levels[-1] + (levels[-1] - borders[-1])
    inside = [k for k in range(2048) if first <= middles[k] < last]
    p = {k: float(counts[k]) for k in inside}
    held = [k for k in inside if counts[k]]
    p[held[0]] += counts[: inside[0]].sum()
    p[held[-1]] += counts[inside[-1] + 1 :].sum()
    groups: dict[int, list[int]] = {}
    for k in inside:
        groups.setdefault(int(np.searchsorted(borders, middles[k])), []).append(k)
    q: dict[int, float] = {}
    for bins in groups.values():
        full = [k for k in bins if counts[k]]
        for k in full:
            q[k] = counts[bins].sum() / len(full)
    total_p, total_q = sum(p.values()), sum(q.values())
    return sum(p[k] / total_p * math.log(p[k] / total_p / (q[k] / total_q)) for k in inside if p[k] and k in q)


@pytest.mark.parametrize("kind", ["normal", "outliers", "heavy"])
def test_kl_is_as_good_as_a_naive_count_of_the_rows_finds(kind: str) -> None:
    hidden = inputs(kind)
    top = float(hidden.abs().max())
    tried = {share: naive_divergence(hidden, INT8, top * share / 2048, top) for share in range(2048, 127, -128)}
    _, chosen = input_range(seen(hidden), INT8, "kl")
    found = naive_divergence(hidden, INT8, chosen, top)
    # A histogram of 60 000 values is noisy: about half a value for each of 2048 bins, in nats of one value.
    assert found <= min(tried.values()) + 2048 / 2 / hidden.numel()


def test_kl_keeps_all_of_a_distribution_that_is_even() -> None:
    evenly = torch.linspace(-3, 3, 200_000)[:, None]
    assert input_range(seen(evenly), INT8, "kl")[1] == pytest.approx(3.0, rel=2 * BIN)


def test_outliers_are_cut_by_every_observer_that_looks_at_how_many_there_are() -> None:
    hidden = inputs("outliers")
    ranges = {observer: input_range(seen(hidden), INT8, observer)[1] for observer in OBSERVERS}
    assert ranges["minmax"] == 200
    assert ranges["percentile"] < ranges["kl"] < ranges["mse"] < 200
    # Floats have as many codes for the small as for the large: nothing to be gained.
    assert input_range(seen(hidden), FP8, "mse")[1] == pytest.approx(200, rel=BIN)


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
def test_a_scale_and_zero_point_say_the_range_that_they_came_from(how: Activations) -> None:
    how = replace(how, lowest=-6.0 if how.symmetric else -1.5, largest=6.0)
    scale, zero = fixed_scale(how)
    again = fixed_range(how, scale, zero)
    assert fixed_scale(again) == pytest.approx((scale, zero), rel=2**-22)  # two roundings of f32
    assert again.largest == pytest.approx(6.0, rel=1 / 255)
    levels = fixed_levels(how)
    assert bool((levels.diff() > 0).all()) and 0.0 in levels.tolist()
    hidden = torch.linspace(-8, 8, 999)
    nearest = levels[(hidden.double()[:, None] - levels).abs().argmin(1)]
    torch.testing.assert_close(quantize_inputs(hidden, how).double(), nearest, rtol=2**-20, atol=0)
