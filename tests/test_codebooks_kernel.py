"""The codebook kernels: against their plain reference, against every other choice, and against what is published."""

# O out, I in, G groups of a row, L levels, M clusterings, N weights.
from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkernels import codebooks

SEQ = (-1.5, -0.5, 0.5, 1.5)
TERNARY = (-1.0, 0.0, 1.0)
LOG = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
UNEVEN = (-1.0, -0.6, -0.2, 0.0, 0.3, 0.7, 1.3)
BACKENDS: tuple[codebooks.Backend, ...] = ("cpu", "reference")


def heavy(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights, one row of zeros and one of few values, and importance with dark columns."""
    random = np.random.default_rng(seed)
    weight = torch.from_numpy(random.standard_t(3, (rows, columns)).astype("f"))
    weight[0], weight[1] = 0, weight[1].sign() * 0.5
    importance = random.random(columns) * (random.random(columns) > 0.2)
    return weight, torch.from_numpy(importance.astype("f"))


def squared(weight: Tensor, importance: Tensor | None, levels_OGL: Tensor, group_size: int) -> Tensor:
    """The weighted squared error f64 of each row to the nearest of its group's levels."""
    share = torch.ones(weight.shape[1]) if importance is None else importance
    level_OIL = levels_OGL.double()[:, torch.arange(weight.shape[1]) // group_size]
    return ((weight.double()[..., None] - level_OIL).square().amin(2) * share).sum(1)


@pytest.mark.parametrize("group_size", [29, 16, 10, 3, 1])
@pytest.mark.parametrize("importance", [True, False])
def test_the_kernels_have_the_errors_of_their_reference(group_size: int, importance: bool) -> None:
    weight, share = heavy(4, 29)
    share_I = share if importance else None
    for count in (2, 4, 7):
        found = [
            codebooks.levels(weight, share_I, count=count, group_size=group_size, backend=backend)
            for backend in BACKENDS
        ]
        errors = [squared(weight, share_I, levels_OGL, group_size) for levels_OGL in found]
        # The sums of the two run in different orders, in f64; levels are rounded to f32, which errors feel squared.
        torch.testing.assert_close(errors[0], errors[1], rtol=1e-9, atol=1e-12)
        pair = [
            codebooks.offsets(weight, share_I, count=count, group_size=group_size, backend=backend)
            for backend in BACKENDS
        ]
        assert torch.equal(pair[0][1], pair[1][1]) and torch.equal(pair[0][0], pair[1][0])
    for table in (SEQ, TERNARY, LOG, UNEVEN):
        fitted = [
            codebooks.scales(weight, share_I, table, group_size=group_size, backend=backend) for backend in BACKENDS
        ]
        none = torch.zeros_like(fitted[0])
        ends = [
            codebooks.errors(weight, share_I, table, scale_OG, none, group_size=group_size, backend=backend)
            for scale_OG in fitted
            for backend in BACKENDS
        ]
        for other in ends[1:]:
            torch.testing.assert_close(ends[0], other, rtol=1e-6, atol=1e-12)  # f32 values of two near scales


small = st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(row=small, count=st.integers(1, 4), seed=st.integers(0, 99))
def test_no_other_clustering_has_less_error_than_k_means(row: list[float], count: int, seed: int) -> None:
    weight = torch.tensor([row])
    share = torch.from_numpy(np.random.default_rng(seed).random(len(row)).astype("f")) + 0.1
    found = float(squared(weight, share, codebooks.levels(weight, share, count=count, group_size=99), 99))
    x, p = weight[0].double().numpy(), share.double().numpy()
    own_MLN = np.array(list(itertools.product(range(count), repeat=len(row))))[:, None] == np.arange(count)[:, None]
    total_ML, first_ML, second_ML = ((own_MLN * p * x**power).sum(2) for power in range(3))
    costs_M = (second_ML - first_ML**2 / np.where(total_ML > 0, total_ML, 1)).sum(1)
    least = float(costs_M.min())
    # f32 levels, and f64 sums of squares up to 1e4 each.
    assert found == pytest.approx(least, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(row=small, table=st.sampled_from([SEQ, TERNARY, LOG, UNEVEN]))
def test_no_other_scale_has_less_error(row: list[float], table: tuple[float, ...]) -> None:
    weight = torch.tensor([row])
    none = torch.zeros(1, 1)

    def error(scale: Tensor) -> float:
        return float(codebooks.errors(weight, None, table, scale, none, group_size=99))

    found = error(codebooks.scales(weight, None, table, group_size=99))
    largest = float(weight.abs().max())
    for share in np.linspace(0.01, 4, 200):
        assert found <= error(torch.tensor([[largest * share]])) * (1 + 1e-5) + 1e-6 * largest**2


def test_ternary_scales_are_those_of_the_paper() -> None:
    """Li and Liu 2016, equation 6: the threshold that makes (sum of the magnitudes above it)^2 / their number largest,
    and their mean as the scale; it beats the absolute mean of BitNet and the rule of thumb of 0.7 times it."""
    weight, _ = heavy(4, 64)
    weight = weight[2:]
    found = codebooks.scales(weight, None, TERNARY, group_size=64)[:, 0]
    for row, scale in zip(weight.abs().double(), found, strict=True):
        falling = row.sort(descending=True).values
        gains = falling.cumsum(0).square() / torch.arange(1, 65)
        kept = int(gains.argmax()) + 1
        assert float(scale) == pytest.approx(float(falling[:kept].mean()), rel=1e-6)
    none = torch.zeros(len(weight), 1)

    def error(scale_O: Tensor) -> Tensor:
        return codebooks.errors(weight, None, TERNARY, scale_O[:, None], none, group_size=64)

    mean = weight.abs().mean(1)
    thumb = torch.stack([row[row > 0.7 * row.mean()].mean() for row in weight.abs()])
    assert bool((error(found) <= error(mean)).all() and (error(found) <= error(thumb)).all())


@pytest.mark.parametrize(("count", "expected"), [(2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497)])
def test_k_means_of_gaussian_weights_is_the_lloyd_max_quantizer(count: int, expected: float) -> None:
    """Max 1960, table I. Fitted to 65536 weights, so a little below: by about 2 x 16 parameters' share of them."""
    weight = torch.randn(1, 65536, generator=torch.Generator().manual_seed(0))
    levels_OGL = codebooks.levels(weight, None, count=count, group_size=65536)
    found = float(squared(weight, None, levels_OGL, 65536)[0] / weight.double().square().sum())
    assert found == pytest.approx(expected, rel=0.02)


def test_threads_change_no_bit() -> None:
    weight, share = heavy(7, 96)
    for call in (
        lambda threads: (codebooks.levels(weight, share, count=4, group_size=32, threads=threads),),
        lambda threads: (codebooks.scales(weight, share, LOG, group_size=32, threads=threads),),
        lambda threads: codebooks.offsets(weight, share, count=4, group_size=32, threads=threads),
    ):
        assert all(torch.equal(one, three) for one, three in zip(call(1), call(3), strict=True))
