"""The Hadamard kernel: the loop against the dense matrix, and the matrices against what makes them of use."""

# N rows, D columns.
from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantkernels.hadamard import factors, reference, spread

# Powers of two, widths of models (Qwen 0.5B, Phi 3 heads, gpt-oss, Gemma), odd ones and primes.
WIDTHS = [1, 2, 4, 64, 128, 12, 20, 28, 36, 96, 896, 720, 1152, 576, 6, 9, 17, 30, 100, 250]
MODEL_WIDTHS = [576, 896, 960, 1152, 1536, 2048, 2304, 2560, 2816, 2880, 3072, 3584, 4096, 4608, 5120, 5376, 6144, 6656]
MODEL_WIDTHS += [7168, 8192, 12288, 16384]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 37])
def test_the_loop_is_the_dense_matrix(width: int, inverse: bool, rows: int) -> None:
    given = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    expected = spread(given, inverse=inverse, backend="reference")
    found = spread(given, inverse=inverse)
    # An entry is the sum of D products of about 1 / root of D, added in fewer than D + 8 roundings of f32 each.
    bound = (len(factors.factor(width)) + 8 + math.log2(width)) * 2**-24 * float(given.norm(dim=1).max())
    assert float((found - expected).abs().max()) <= bound


@pytest.mark.parametrize("width", WIDTHS)
def test_the_inverse_gives_back_what_was_there(width: int) -> None:
    given = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    back = spread(spread(given), inverse=True)
    bound = 2 * (len(factors.factor(width)) + 8 + math.log2(width)) * 2**-24 * float(given.norm(dim=1).max())
    assert float((back - given).abs().max()) <= bound


@pytest.mark.parametrize("width", WIDTHS)
def test_the_matrix_is_orthogonal_and_has_no_large_entry(width: int) -> None:
    dense = reference.matrix(width, factors.factor(width))
    assert np.abs(dense @ dense.T - np.eye(width)).max() < 1e-12
    assert np.abs(dense).max() <= math.sqrt(2 / width) + 1e-12


@pytest.mark.parametrize("width", MODEL_WIDTHS)
def test_widths_of_models_have_a_hadamard_matrix(width: int) -> None:
    small = factors.factor(width) * math.sqrt(len(factors.factor(width)))
    assert len(small) <= factors.LARGEST
    assert set(np.unique(small.round(12))) <= {-1.0, 1.0}
    assert np.abs(small @ small.T - len(small) * np.eye(len(small))).max() < 1e-9


@pytest.mark.parametrize("order", [12, 20, 28, 36, 44, 60, 68, 84, 104, 180])
def test_paley_matrices_are_hadamard_matrices(order: int) -> None:
    found = factors.paley(order)
    assert found is not None
    assert set(np.unique(found)) == {-1.0, 1.0}
    assert np.array_equal(found @ found.T, order * np.eye(order))


def test_an_outlier_is_spread_over_all_columns() -> None:
    given = torch.zeros(1, 5120)
    given[0, 77] = 1000
    assert float(spread(given).abs().max()) == pytest.approx(1000 / math.sqrt(5120), rel=1e-5)


def test_threads_change_no_bit() -> None:
    given = torch.randn(75, 896, generator=torch.Generator().manual_seed(1))
    assert torch.equal(spread(given, threads=4), spread(given))


def test_rows_of_another_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="f32"):
        spread(torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        spread(torch.zeros(4))
