"""Packing a symmetric matrix: there and back bit for bit, by both backends, at widths around a tile's."""

# I columns, P entries of the upper triangle.
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkernels import symmetric

BACKENDS: tuple[symmetric.Backend, ...] = ("cpu", "reference")


def matrix(columns: int) -> Tensor:
    """With everything that a copy might lose: both zeros, infinities, a value below the smallest normal one."""
    values = torch.randn(columns, columns, generator=torch.Generator().manual_seed(columns))
    some = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-42])
    values.flatten()[: len(some)] = some[: values.numel()]
    return values


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 64, 100, 513, 1030])
def test_there_and_back(columns: int, backend: symmetric.Backend) -> None:
    whole = matrix(columns)
    upper = symmetric.pack(whole, backend=backend)
    rows, places = torch.triu_indices(columns, columns)
    assert torch.equal(upper.view(torch.int32), whole[rows, places].view(torch.int32))
    expected = whole.clone()
    expected[places, rows] = expected[rows, places]
    back = symmetric.unpack(upper, columns, backend=backend)
    assert torch.equal(back.view(torch.int32), expected.view(torch.int32))
    symmetric.mirror(whole, backend=backend)
    assert torch.equal(whole, back)


def test_a_view_is_packed_as_its_copy() -> None:
    whole = matrix(70)
    assert torch.equal(symmetric.pack(whole.T), symmetric.pack(whole.T.contiguous()))
    assert torch.equal(symmetric.unpack(symmetric.pack(whole).repeat_interleave(2)[::2], 70).triu(), whole.triu())


def test_other_tensors_are_refused() -> None:
    for wrong in (torch.zeros(3), torch.zeros(3, 4), torch.zeros(3, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="a matrix is"):
            symmetric.pack(wrong)
    with pytest.raises(ValueError, match="contiguous"):
        symmetric.mirror(matrix(3).T)
    for upper, columns in ((torch.zeros(6), 4), (torch.zeros(6, dtype=torch.float64), 3)):
        with pytest.raises(ValueError, match="upper triangle"):
            symmetric.unpack(upper, columns)
