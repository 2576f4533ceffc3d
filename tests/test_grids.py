"""Grids: what the integer grids promise, for every observer and granularity."""

# O out, I in, G groups of a row.
from __future__ import annotations

import dataclasses
from itertools import product
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converter.errors import NumericsError, UnsupportedError
from converter.grids import Coded, Grid, observers
from converter.grids.affine import AffineGrid, per_row
from converter.grids.codebook import CodebookGrid
from converter.grids.floats import KINDS, TYPES, Fp8Grid
from converter.grids.micro import LEVELS, MicroGrid
from converter.grids.plain import DTYPES
from quantkernels import scales

GRANULARITIES = [("tensor", None), ("channel", None), ("group", 32)]


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(grid: Grid, weight: Tensor) -> float:
    """The squared error of encoding, as a share of the weight's square."""
    off = (grid.decode(grid.encode(weight, None)) - weight).double().square()
    return float(off.sum() / weight.double().square().sum())


def weighted_error(grid: AffineGrid, weight: Tensor, importance: Tensor) -> float:
    """The error of encoding as the search weighs it."""
    scale_OG, zero_OG = per_row(grid.encode(weight, importance), len(weight))
    size = grid.columns_per_scale(weight.shape[1])
    bounds = {"group_size": size, "low": grid.low, "high": grid.high}
    return float(scales.errors(weight, importance, scale_OG, zero_OG, **bounds, backend="reference").sum())


@pytest.mark.parametrize(
    ("grid", "bound"),
    [
        (AffineGrid(bits=4, granularity="group", group_size=128, signed_scale=True), 0.0097),
        (AffineGrid(bits=4, granularity="group", group_size=128, symmetric=False), 0.0093),
        (AffineGrid(bits=4, granularity="group", group_size=128), 0.0107),
        (AffineGrid(bits=4), 0.0124),
        (AffineGrid(bits=3, granularity="group", group_size=64), 0.0323),
        (AffineGrid(bits=2, granularity="group", group_size=32), 0.1145),
        (AffineGrid(bits=2, signed_scale=False), 0.1580),
        (AffineGrid(bits=2), 0.1552),
        (AffineGrid(bits=8), 7.5e-5),
        (AffineGrid(bits=8, granularity="tensor"), 9.5e-5),
    ],
    ids=lambda value: value.name if isinstance(value, AffineGrid) else str(value),
)
def test_the_search_reaches_the_known_error_on_gaussian_weights(grid: AffineGrid, bound: float) -> None:
    assert error(grid, gaussian(128, 4096)) <= bound


@pytest.mark.parametrize(
    ("grid", "expected"), [(4, 0.0123), (8, None)], ids=["int4 g128 as published", "int8 against the formula"]
)
def test_minmax_is_the_formula_that_readers_publish(grid: int, expected: float | None) -> None:
    weight = gaussian(64, 1024)
    chosen = AffineGrid(bits=grid, granularity="group", group_size=128, observer="minmax")
    torch.testing.assert_close(
        chosen.fit(weight, None)["scale"], weight.unflatten(1, (-1, 128)).abs().amax(2) / ((2**grid - 1) / 2)
    )
    assert expected is None or error(chosen, weight) == pytest.approx(expected, rel=0.03)


weights = st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=40).map(lambda row: torch.tensor([row]))


@settings(max_examples=150, deadline=None)
@given(weight=weights, bits=st.integers(2, 8), symmetric=st.booleans(), dtype=st.sampled_from(list(DTYPES)))
def test_minmax_moves_no_weight_by_more_than_half_a_step(
    weight: Tensor, bits: int, symmetric: bool, dtype: str
) -> None:
    grid = AffineGrid(
        bits=bits, symmetric=symmetric, observer="minmax", scale_dtype=dtype, granularity="group", group_size=16
    )
    parts = grid.encode(weight, None)
    decoded = grid.decode(parts)
    limits, steps = torch.finfo(DTYPES[dtype]), 2**bits - 1
    # The range is `steps` wide, and rounding the scale for storage moves its ends: by eps / 2 of each step while the
    # scale is normal, by half the smallest number of the dtype below that. f32 arithmetic adds three roundings.
    step = parts["scale"].double().repeat_interleave(16, 1)[:, : weight.shape[1]]
    bound = step * (0.5 + steps * limits.eps / 2) + steps * limits.tiny * limits.eps + 3 * 2**-24 * weight.abs()
    assert bool(((decoded - weight).abs() <= bound).all())
    assert bool((decoded[weight == 0] == 0).all())


@settings(max_examples=100, deadline=None)
@given(
    weight=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40).map(
        lambda row: torch.tensor([row])
    ),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    granularity=st.sampled_from(GRANULARITIES),
    signed=st.booleans(),
)
def test_any_finite_weight_gives_finite_parts_and_keeps_zeros(
    weight: Tensor, bits: int, symmetric: bool, dtype: str, granularity: tuple[str, int | None], signed: bool
) -> None:
    grid = AffineGrid(
        bits=bits, symmetric=symmetric, scale_dtype=dtype, granularity=granularity[0], group_size=granularity[1],
        signed_scale=signed,
    )  # fmt: skip
    parts = grid.encode(weight, None)
    assert bool(torch.isfinite(parts["scale"]).all()) and parts["scale"].dtype == DTYPES[dtype]
    assert int(parts["codes"].min()) >= grid.low and int(parts["codes"].max()) <= grid.high
    decoded = grid.decode(parts)
    assert not bool(decoded.isnan().any()) and bool((decoded[weight == 0] == 0).all())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    granularity=st.sampled_from(GRANULARITIES),
)
def test_the_search_is_never_worse_than_minmax_by_weighted_error(
    seed: int, bits: int, symmetric: bool, dtype: str, granularity: tuple[str, int | None]
) -> None:
    random = np.random.default_rng(seed)
    weight = torch.from_numpy(random.standard_t(2, (3, 50)).astype("f"))
    importance = torch.from_numpy((random.random(50) * (random.random(50) > 0.3)).astype("f"))
    grid = AffineGrid(
        bits=bits, symmetric=symmetric, scale_dtype=dtype, granularity=granularity[0], group_size=granularity[1]
    )
    minmax = dataclasses.replace(grid, observer="minmax")
    # 1e-6: the same codes and scales decoded and summed here in another order.
    assert weighted_error(grid, weight, importance) <= weighted_error(minmax, weight, importance) * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_comes_near_the_least_error_of_all_scales(bits: int) -> None:
    weight, importance = gaussian(8, 128), torch.rand(128, generator=torch.Generator().manual_seed(1))
    grid = AffineGrid(bits=bits, signed_scale=False)
    largest_O = weight.abs().amax(1, keepdim=True)
    size = (weight.square() + (weight.square() * importance).sum(1, keepdim=True) / importance.sum()).sqrt()
    least_O = torch.full((8,), torch.inf)
    for inverse in torch.linspace(0.5, 2.5, 20000) * (2**bits - 1) / 2:
        scale_O1 = largest_O / inverse
        off = (weight / scale_O1).round().clamp(grid.low, grid.high) * scale_O1 - weight
        least_O = torch.minimum(least_O, (off.square() * size * importance).sum(1))
    assert weighted_error(grid, weight, importance) <= float(least_O.sum()) * 1.003


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_narrows_the_step_and_clips_at_most_its_share(symmetric: bool) -> None:
    weight = gaussian(4, 50000)
    grid = AffineGrid(bits=8, symmetric=symmetric, observer="percentile")
    plain = dataclasses.replace(grid, observer="minmax").fit(weight, None)["scale"]
    parts = grid.encode(weight, None)
    assert bool((parts["scale"] < plain).all())
    outside = (grid.decode(parts) - weight).abs() > parts["scale"]
    assert 0 < int(outside.sum(1).max()) <= (1 if symmetric else 2) * 5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_kl_is_never_worse_than_minmax_by_divergence(bits: int, symmetric: bool) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(4, (8, 4096)).astype("f"))
    histogram = observers.histogram(weight)
    found = {}
    for observer in ("kl", "minmax"):
        grid = AffineGrid(bits=bits, symmetric=symmetric, observer=observer)
        found[observer] = observers.divergence(histogram, grid.borders(grid.fit(weight, None)))
    assert bool((found["kl"] <= found["minmax"]).all()) and bool((found["kl"] < found["minmax"]).any())


def test_a_histogram_counts_each_weight_once_in_its_bin() -> None:
    weight = torch.zeros(2, 2048 * 16)
    weight[0, :4] = torch.tensor([0.0, 2048.0, 1024.2, 1024.9])
    weight[1] = 5
    found = observers.histogram(weight)
    counts, filled = found.below_OE.diff(dim=1), found.filled_OE.diff(dim=1)
    assert counts.sum(1).tolist() == [2048 * 16] * 2 and torch.equal(filled, (counts > 0).long())
    assert [int(counts[0, k]) for k in (0, 1024, 2047)] == [2048 * 16 - 3, 2, 1]
    assert float(found.edges_OE[0, 1024]) == 1024


@pytest.mark.parametrize("seed", range(5))
def test_divergence_is_that_of_the_two_distributions_written_out(seed: int) -> None:
    random = np.random.default_rng(seed)
    weight = torch.from_numpy(random.standard_t(3, (1, 480)).astype("f"))
    borders = torch.tensor([sorted(random.normal(size=6))], dtype=torch.float32)
    found = observers.histogram(weight)
    edges, counts = found.edges_OE[0].double(), found.below_OE[0].diff().double()
    code = torch.searchsorted(borders[0], ((edges[1:] + edges[:-1]) / 2).float(), right=True) - 1
    inside = (code >= 0) & (code < 5)
    before, after = torch.where(inside, counts, 0.0), torch.zeros(len(counts), dtype=torch.float64)
    held = (before > 0).nonzero()[:, 0]
    for c in range(5):
        bins = held[code[held] == c]
        after[bins] = before[bins].sum() / max(1, len(bins))
    before[held[0]] += counts[: int(held[0])].sum()
    before[held[-1]] += counts[int(held[-1]) + 1 :].sum()
    before, after = before[held] / before.sum(), after[held] / after.sum()
    expected = float((before * (before / after).log()).sum())
    assert float(observers.divergence(found, borders)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bits", [2, 4])
def test_kl_clips_a_far_outlier_and_little_of_a_gaussian(bits: int) -> None:
    weight = gaussian(2, 65536)
    clean = AffineGrid(bits=bits, observer="kl").fit(weight, None)["scale"]
    weight[:, 0] = 12
    grid = AffineGrid(bits=bits, observer="kl")
    minmax = error(dataclasses.replace(grid, observer="minmax"), weight)
    assert error(grid, weight) < minmax
    assert bool((grid.fit(weight, None)["scale"] < 2 * clean).all())


def test_kl_on_groups_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match="observer mse"):
        AffineGrid(bits=4, granularity="group", group_size=128, observer="kl")


@pytest.mark.parametrize("observer", ["minmax", "percentile", "kl", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_observer_survives_the_odd_weights(observer: str, symmetric: bool, granularity: str) -> None:
    odd = {
        "zeros": torch.zeros(3, 40),
        "one value": torch.full((3, 40), 0.37),
        "negative": torch.full((2, 7), -2.5),
        "outlier": torch.cat([torch.full((2, 39), 1e-3), torch.full((2, 1), 1e30)], 1),
        "subnormal": torch.full((2, 40), 1e-41),
        "one column": torch.tensor([[3.0], [-3.0], [0.0]]),
        "a vector": torch.linspace(-1, 1, 9),
    }
    for name, weight in odd.items():
        grid = AffineGrid(bits=4, symmetric=symmetric, observer=observer, granularity=granularity)
        coded = Coded(grid=grid, shape=tuple(weight.shape), parts=grid.encode(weight, None))
        assert coded.decode().shape == weight.shape, name
        assert bool(torch.isfinite(coded.decode()).all()), name
        if name == "zeros":
            assert bool((coded.decode() == 0).all())


def test_a_group_of_one_value_is_met_to_the_precision_of_its_scale() -> None:
    weight = torch.full((1, 64), 0.37)
    # f32: the rounding of sums over 64 weights; the others: half a unit in the last place of the stored scale.
    for dtype, precision in {"F32": 64 * 2**-24, "F16": 2**-11, "BF16": 2**-8}.items():
        assert error(AffineGrid(bits=2, scale_dtype=dtype), weight) <= precision**2


def test_f16_scales_neither_vanish_nor_overflow() -> None:
    grid = AffineGrid(bits=4, scale_dtype="F16")
    small, large = torch.full((1, 8), 1e-8), torch.full((1, 8), 1e9)
    # 2**-24 is the smallest f16; 1e-8 rounds to 0 of its steps, 5e-8 to one of them.
    assert float(grid.fit(small, None)["scale"].abs()) == 2**-24
    assert float(grid.decode(grid.encode(torch.full((1, 8), 5e-8), None))[0, 0]) == 2**-24
    assert float(grid.decode(grid.encode(large, None))[0, 0]) == 7 * 65504.0


def test_unimportant_columns_do_not_widen_the_scale() -> None:
    weight = gaussian(4, 64)
    importance = torch.ones(64)
    importance[::8] = 0
    outliers = weight.clone()
    outliers[:, ::8] = 1e4
    grid = AffineGrid(bits=4)
    kept = importance > 0
    assert torch.equal(grid.decode(grid.encode(outliers, importance))[:, kept],
                       grid.decode(grid.encode(weight, importance))[:, kept])  # fmt: skip


def test_constant_or_absent_importance_is_the_same() -> None:
    weight = gaussian(5, 96)
    grid = AffineGrid(bits=3, granularity="group", group_size=32)
    expected = grid.encode(weight, None)
    for importance in (torch.full((96,), 123.4), torch.zeros(96), torch.full((96,), 1e-38)):
        parts = grid.encode(weight, importance)
        assert all(torch.equal(parts[name], expected[name]) for name in expected)


def test_a_short_last_group_has_a_scale_of_its_own() -> None:
    weight = gaussian(3, 70)
    weight[:, 64:] *= 100
    grid = AffineGrid(bits=4, granularity="group", group_size=32, symmetric=False)
    parts = grid.encode(weight, None)
    assert parts["scale"].shape == (3, 3)
    alone = dataclasses.replace(grid, granularity="channel", group_size=None)
    assert torch.equal(grid.decode(parts)[:, 64:], alone.decode(alone.encode(weight[:, 64:], None)))


def test_weights_in_several_chunks_equal_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(9, 64)
    for observer in ("mse", "kl", "percentile"):
        grid = AffineGrid(bits=4, observer=observer, symmetric=False)
        whole = grid.encode(weight, None)
        monkeypatch.setattr("converter.grids.parts.CHUNK_WEIGHTS", 128)
        pieces = grid.encode(weight, None)
        assert all(torch.equal(whole[name], pieces[name]) for name in whole)
        assert torch.equal(grid.decode(whole), grid.decode(pieces))
        monkeypatch.undo()


def test_a_weight_that_is_not_finite_is_refused() -> None:
    for bad in (torch.nan, torch.inf):
        with pytest.raises(NumericsError, match="1 of its 6 values"):
            AffineGrid(bits=4).encode(torch.tensor([[1.0, 2.0, bad], [1.0, 1.0, 1.0]]), None)


def test_one_scale_for_the_tensor_serves_every_row() -> None:
    grid = AffineGrid(bits=8, granularity="tensor", symmetric=False, observer="minmax")
    parts = grid.encode(gaussian(5, 33), None)
    assert parts["scale"].shape == parts["zero_point"].shape == (1, 1)
    scale, zero = per_row(parts, 5)
    assert torch.equal(grid.decode(parts), (parts["codes"] - zero) * scale)


@pytest.mark.parametrize(("rows", "columns", "group_size"), [(5, 96, 32), (3, 70, 32), (2, 130, 130), (4, 1, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("symmetric", "signed"), [(True, False), (True, True), (False, False)])
def test_the_scale_kernel_has_the_bits_of_its_reference(
    rows: int, columns: int, group_size: int, bits: int, symmetric: bool, signed: bool
) -> None:
    random = np.random.default_rng(columns + bits)
    weight = torch.from_numpy(random.standard_t(3, (rows, columns)).astype("f"))
    weight[0] = 0
    importance = torch.from_numpy((random.random(columns) * (random.random(columns) > 0.2)).astype("f"))
    bounds = {"group_size": group_size, "low": -(2 ** (bits - 1)), "high": 2 ** (bits - 1) - 1}
    for share, by_size in product((None, importance), (True, False)):
        shape = {"symmetric": symmetric, "signed": signed, "by_size": by_size}
        expected = scales.search(weight, share, **bounds, **shape, backend="reference")
        for threads in (1, 3):
            found = scales.search(weight, share, **bounds, **shape, threads=threads)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        exact = scales.errors(weight, share, *expected, **bounds, by_size=by_size, backend="reference")
        off = scales.errors(weight, share, *expected, **bounds, by_size=by_size)
        # f64 sums of at most 130 terms in another order: 130 * 2**-53.
        torch.testing.assert_close(off, exact, rtol=2e-14, atol=0)


@pytest.mark.parametrize(
    "grid",
    [AffineGrid(bits=3, granularity="group", group_size=64), MicroGrid(values="nvfp4"), CodebookGrid(double=False)],
    ids=lambda grid: grid.name,
)
def test_scales_are_for_squares_alone_where_the_size_of_a_weight_does_not_count(grid: Grid) -> None:
    weight = gaussian(64, 256)
    plain = dataclasses.replace(grid, by_size=False)
    off, off_by_size = (one.decode(one.encode(weight, None)) - weight for one in (plain, grid))
    assert float(off.square().sum()) < 0.999 * float(off_by_size.square().sum())
    large = weight.abs() > 2
    assert float(off[large].square().sum()) > float(off_by_size[large].square().sum())


FP8_SHAPES = [(5, 96, 1, 96), (7, 70, 3, 32), (4, 1, 1, 1), (130, 200, 128, 128), (2, 4096, 1, 4096)]


@pytest.mark.parametrize(("rows", "columns", "height", "width"), FP8_SHAPES)
@pytest.mark.parametrize("values", list(TYPES))
def test_the_search_for_scales_of_floats_has_the_bits_of_its_reference(
    rows: int, columns: int, height: int, width: int, values: str
) -> None:
    random = np.random.default_rng(columns)
    weight = torch.from_numpy(random.standard_t(3, (rows, columns)).astype("f"))
    weight[:height] *= torch.tensor([0.0, 1e-6])[random.integers(0, 2, (1, columns))]
    importance = torch.from_numpy((random.random(columns) * (random.random(columns) > 0.2)).astype("f"))
    for share in (None, importance, torch.zeros(columns)):
        given = (weight, share, KINDS[values])
        expected = scales.search_floats(*given, height=height, width=width, backend="reference")
        for threads in (1, 3):
            assert torch.equal(scales.search_floats(*given, height=height, width=width, threads=threads), expected)


def largest_to_largest(grid: Fp8Grid, weight: Tensor) -> float:
    """The squared error with the usual scale, as a share of the weight's square."""
    top = torch.finfo(TYPES[grid.values]).max
    scale_O1 = weight.abs().amax(1, keepdim=True) / top
    off = (weight / scale_O1).clamp(-top, top).to(TYPES[grid.values]).float() * scale_O1 - weight
    return float(off.double().square().sum() / weight.double().square().sum())


@pytest.mark.parametrize(("columns", "share"), [(256, 0.84), (1024, 0.92), (4096, 0.96)])
@pytest.mark.parametrize("values", list(TYPES))
def test_the_search_for_scales_of_floats_takes_errors_off(values: str, columns: int, share: float) -> None:
    weight, grid = gaussian(64, columns), Fp8Grid(values=values, scale_dtype="BF16")
    assert error(grid, weight) <= largest_to_largest(grid, weight) * share


def test_the_search_for_scales_of_floats_heeds_importance() -> None:
    weight, importance = gaussian(64, 256), (torch.arange(256) < 32).float() + 1e-3
    grid = Fp8Grid()
    off, plain = (
        ((grid.decode(grid.encode(weight, one)) - weight).square() * importance).sum() for one in (importance, None)
    )
    assert float(off) < 0.85 * float(plain)


def test_floats_of_zeros_and_of_the_smallest_weights_stay_what_they_are() -> None:
    weight = torch.zeros(3, 4)
    weight[1, 2], weight[2] = 1e-44, 3e38
    for grid in (Fp8Grid(), Fp8Grid(granularity="tensor"), Fp8Grid(granularity="block", block=(2, 2))):
        parts = grid.encode(weight, None)
        decoded = grid.decode(parts)
        assert bool(decoded.isfinite().all()) and bool((parts["scale"] > 0).all())
        assert bool((decoded[0] == 0).all()) and float(decoded[2, 0]) == pytest.approx(3e38, rel=0.07)


@pytest.mark.parametrize(("values", "width", "candidates"), [("mxfp4", 32, 3), ("mxfp8", 32, 3), ("nvfp4", 16, 11)])
def test_the_choice_among_coded_scales_has_the_bits_of_its_reference_and_the_least_error(
    values: Literal["mxfp4", "mxfp8", "nvfp4"], width: int, candidates: int
) -> None:
    random = np.random.default_rng(width + candidates)
    weight = torch.from_numpy(random.standard_t(3, (9, 4 * width)).astype("f"))
    weight[0], weight[1, :width] = 0, 0
    importance = torch.from_numpy((random.random(4 * width) * (random.random(4 * width) > 0.4)).astype("f"))
    importance[:width] = 0
    largest_OG = weight.reshape(9, 4, width).abs().amax(2)
    given = largest_OG[:, :, None] / 6 * torch.linspace(0.3, 1.5, candidates)
    kind, fourth = scales.E4M3 if values == "mxfp8" else scales.E2M1, values != "nvfp4"
    for share, by_size in product((None, importance), (True, False)):
        how = {"fourth": fourth, "by_size": by_size}
        expected = scales.choose_float(weight, share, given, kind, **how, backend="reference")
        for threads in (1, 3):
            found = scales.choose_float(weight, share, given, kind, **how, threads=threads)
            assert torch.equal(found, expected)
        heavy = torch.ones(4 * width) if share is None else torch.where(torch.arange(4 * width) < width, 1.0, share)
        groups = weight.reshape(9, 4, 1, width).double()
        heavy_GN = heavy.reshape(4, 1, width).double()
        mean = (groups.square() * heavy_GN).sum(3, keepdim=True) / heavy_GN.sum(2, keepdim=True)
        scale = given[:, :, :, None].double()
        levels = nearest_level(groups / torch.where(scale == 0, torch.inf, scale), values)
        powers = (levels * scale - groups) ** (4 if fourth else 2)
        errors = (powers * heavy_GN * ((groups.square() + mean).sqrt() if by_size else 1.0)).sum(3)
        # f32 sums of 32 terms choose among equals
        assert bool((errors.gather(2, expected[:, :, None])[:, :, 0] <= errors.amin(2) * (1 + 1e-5)).all())


def nearest_level(steps: Tensor, values: str) -> Tensor:
    """The levels nearest to steps, f64."""
    if values == "mxfp8":
        return steps.clamp(-448, 448).to(torch.float8_e4m3fn).double()
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    return levels[(steps[..., None] - levels).abs().argmin(-1)]


def test_a_weight_halfway_between_two_levels_takes_the_even_one() -> None:
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    ends = torch.tensor([6.0, -6.0])
    weight = torch.cat([halfway, -halfway, ends]).repeat(2)[None]
    grid = MicroGrid(values="mxfp4")
    assert torch.equal(grid.decode(grid.encode(weight, None)), torch.cat([even, -even, ends]).repeat(2)[None])
