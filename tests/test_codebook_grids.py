"""Grids of levels, fixed and fitted: what their papers and the theory of quantizing a Gaussian say of them."""

# O out, I in, G groups of a row.
from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converter.architecture import Tap
from converter.errors import NumericsError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.kmeans import KMeansGrid
from converter.grids.levels import LEVELS, LevelGrid
from converter.methods import Block, Options
from converter.methods.gptq import gptq
from converter.methods.rtn import round_to_nearest
from converter.stats import observe

DTYPES = ("F32", "F16", "BF16")
DOUBLE = LevelGrid(values="seq2", group_size=32, offset=True, scale_bits=4, scale_dtype="BF16")
ALL: list[Grid] = [
    *(LevelGrid(values=values, group_size=size, scale_dtype="BF16") for values in LEVELS for size in (None, 32)),
    *(LevelGrid(values=f"seq{bits}", group_size=32, offset=True, scale_dtype="F16") for bits in (2, 3, 4)),
    *(dataclasses.replace(DOUBLE, scale_bits=bits) for bits in (3, 4, 8)),
    LevelGrid(values="nf4", group_size=64, scale_bits=8, scale_dtype="BF16"),
    *(KMeansGrid(bits=bits, group_size=size, levels_dtype="BF16") for bits in (2, 3, 4) for size in (None, 32)),
]


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def error(grid: Grid, weight: Tensor, importance: Tensor | None = None) -> float:
    """The squared error of encoding, as a share of the weight's square."""
    off = (grid.decode(grid.encode(weight, importance)) - weight).double().square()
    share = torch.ones(weight.shape[1]) if importance is None else importance
    return float((off * share).sum() / (weight.double().square() * share).sum())


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        # The least that so many levels, of such a kind, leave of a Gaussian (Max 1960; Li and Liu 2016 for ternary).
        (KMeansGrid(bits=2), 0.1175),
        (KMeansGrid(bits=3), 0.03454),
        (KMeansGrid(bits=4), 0.009497),
        (LevelGrid(values="seq2"), 0.1188),
        (LevelGrid(values="seq3"), 0.03744),
        (LevelGrid(values="seq4"), 0.01154),
        (LevelGrid(values="ternary"), 0.1902),
    ],
    ids=lambda value: value.name if not isinstance(value, float) else "",
)
def test_rows_of_gaussian_weights_have_the_error_that_theory_gives(grid: Grid, expected: float) -> None:
    # 64 rows of 4096: the mean of squares is known to 0.3 %, and 16 fitted levels of 4096 gain up to 2 x 16 / 4096 of
    # the variance where theory leaves 0.0095.
    assert error(grid, gaussian(64, 4096)) == pytest.approx(expected, rel=0.035)


@pytest.mark.parametrize(("scale_bits", "most", "cosine"), [(4, 2.26, 0.954), (3, 2.2, 0.952)])
def test_two_bits_with_coded_scales_and_offsets_keep_a_cosine_above_095(
    scale_bits: int, most: float, cosine: float
) -> None:
    weight, grid = gaussian(64, 4096), dataclasses.replace(DOUBLE, scale_bits=scale_bits)
    parts = grid.encode(weight, None)
    side = 2 * parts["scale"].numel() * scale_bits + 16 * parts["units"].numel()
    assert 2 + side / weight.numel() <= most
    decoded = grid.decode(parts)
    found = float((decoded.double() * weight).sum() / decoded.double().norm() / weight.double().norm())
    assert found > cosine
    floats = dataclasses.replace(grid, scale_bits=0)
    assert error(grid, weight) < 1.08 * error(floats, weight)  # measured: 1.02 with 4 bits, 1.06 with 3


def test_an_offset_is_worth_its_bits_where_weights_are_not_centred() -> None:
    weight = gaussian(16, 256) + torch.linspace(-2, 2, 8).repeat_interleave(32)
    for bits in (2, 3, 4):
        plain = LevelGrid(values=f"seq{bits}", group_size=32)
        assert error(dataclasses.replace(plain, offset=True), weight) < 0.6 * error(plain, weight)


def test_k_means_is_never_worse_than_levels_of_fixed_places() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(3, (8, 200)).astype("f"))
    importance = torch.rand(200, generator=torch.Generator().manual_seed(1))
    for bits, values in ((2, "seq2"), (2, "ternary"), (3, "seq3"), (3, "log3"), (4, "seq4"), (4, "log4"), (4, "nf4")):
        for size in (None, 40):
            fitted = error(KMeansGrid(bits=bits, group_size=size), weight, importance)
            assert fitted <= error(LevelGrid(values=values, group_size=size), weight, importance) * (1 + 1e-6)
        affine = AffineGrid(bits=bits, granularity="group", group_size=40, symmetric=False)
        assert error(KMeansGrid(bits=bits, group_size=40), weight, importance) <= error(affine, weight, importance)


def test_logarithmic_levels_are_powers() -> None:
    for values, base in (("log3", 2.0), ("log4", 2**0.5)):
        positive = torch.tensor([level for level in LEVELS[values] if level > 0])
        assert float(positive[-1]) == 1
        torch.testing.assert_close(positive[1:] / positive[:-1], torch.full((len(positive) - 1,), base))
        assert [-level for level in reversed(LEVELS[values])] == list(LEVELS[values])


weights = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70)


@settings(max_examples=200, deadline=None)
@given(row=weights, grid=st.sampled_from(ALL), shrink=st.sampled_from([1.0, 1e-30]))
def test_any_finite_weight_gives_finite_parts_within_their_bounds(row: list[float], grid: Grid, shrink: float) -> None:
    weight = torch.tensor([row, [0.0] * len(row)]) * shrink
    parts = grid.encode(weight, None)
    assert all(bool(values.float().isfinite().all()) for values in parts.values())
    decoded = grid.decode(parts)
    assert decoded.shape == weight.shape and not bool(decoded.isnan().any())
    assert bool((decoded[1] == 0).all()), "a row of zeros stays so"


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: f"{grid.name}")
def test_codes_are_nearest_and_frames_say_what_parts_say(grid: Grid) -> None:
    weight, importance = gaussian(6, 80), torch.rand(80, generator=torch.Generator().manual_seed(1))
    parts = grid.encode(weight, importance)
    framed = grid.framed(parts)
    assert framed is not None
    decoded = grid.decode(parts)
    assert torch.equal(framed.frame.decode(parts["codes"]), decoded)
    again = framed.with_frame(framed.frame, parts["codes"])
    assert set(again) == set(parts) and all(torch.equal(again[part], parts[part]) for part in parts)
    for code in range(framed.frame.high + 1):
        other = grid.decode({**parts, "codes": torch.full_like(parts["codes"], code)})
        # Half a unit in the last place of the middle between two levels may decide either way.
        assert bool(((decoded - weight).abs() <= (other - weight).abs() * (1 + 1e-5) + 1e-6).all())


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: f"{grid.name}")
def test_gptq_errs_less_than_rounding_to_nearest(grid: Grid) -> None:
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=random) * 0.4 + torch.eye(64)
    rows = torch.randn(400, 64, generator=random) @ mix * torch.logspace(-1, 0.5, 64)
    weight, stats = gaussian(24, 64), observe(rows, True)
    assert stats.gram is not None
    taps = (Tap(name="tap", linears=("a",)),)
    block = Block(where="here", tensors={"a.weight": weight}, stats={"tap": stats}, taps=taps)
    ends = []
    for rounder in (round_to_nearest, gptq):
        coded = rounder(block, {"a.weight": grid}, Options(importance=True)).coded["a.weight"]
        off = (coded.decode() - weight).double()
        ends.append(float((off @ stats.gram.double() * off).sum()))
        stored = grid.framed(coded.parts)
        assert stored is not None and torch.equal(stored.frame.decode(coded.parts["codes"]), coded.decode())
    assert ends[1] < 0.85 * ends[0]


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: f"{grid.name}")
def test_pieces_and_threads_change_no_bit(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = gaussian(9, 96), torch.rand(96, generator=torch.Generator().manual_seed(1))
    whole = grid.encode(weight, importance)
    threads = torch.get_num_threads()
    monkeypatch.setattr("converter.grids.parts.CHUNK_WEIGHTS", 200)
    torch.set_num_threads(3)
    try:
        pieces = grid.encode(weight, importance)
        assert all(torch.equal(whole[part], pieces[part]) for part in whole)
        assert torch.equal(grid.decode(whole), grid.decode(pieces))
    finally:
        torch.set_num_threads(threads)
    alone = [grid.encode(weight[row : row + 1], importance) for row in range(9)]
    assert all(torch.equal(torch.cat([one[part] for one in alone]), whole[part]) for part in whole)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    for grid, bad in itertools.product((DOUBLE, KMeansGrid(bits=2)), (torch.nan, torch.inf)):
        with pytest.raises(NumericsError, match="1 of its 3 values"):
            grid.encode(torch.tensor([[1.0, 2.0, bad]]), None)
