"""Scales chosen by a group's block of the Gram matrix: never worse on its exact output error, and codes nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from converter.grids.affine import AffineGrid
from converter.grids.micro import MicroGrid
from converter.methods.fit import fit_to_gram
from converter.stats import observe


def correlated(columns: int, rows: int = 600) -> tuple[Tensor, Tensor]:
    """Inputs of few directions [N, I], and a weight [O, I] that lies in them, as trained ones do."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(columns // 8, columns, generator=random)
    inputs = torch.randn(rows, columns // 8, generator=random) @ directions
    inputs += 0.1 * torch.randn(rows, columns, generator=random)
    return inputs, torch.randn(24, columns // 8, generator=random) @ directions / columns


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_group_has_no_more_output_error_and_nearest_codes(bits: int, symmetric: bool) -> None:
    inputs, weight = correlated(128)
    grid = AffineGrid(bits=bits, granularity="group", group_size=32, symmetric=symmetric, scale_dtype="BF16")
    stats = observe(inputs, gram=True)
    assert stats.gram is not None
    before = grid.encode(weight, (stats.sum_squares / stats.rows).float())
    after = fit_to_gram(weight, grid, before, stats.gram)
    errors = []
    for parts in (before, after):
        off = grid.decode(parts) - weight
        groups = [(inputs[:, at : at + 32] @ off[:, at : at + 32].T).square().sum(0) for at in range(0, 128, 32)]
        errors.append(torch.stack(groups, 1))
    assert (errors[1] <= errors[0] * (1 + 1e-4)).all()
    assert errors[1].sum() < 0.97 * errors[0].sum()
    assert torch.equal(grid.round(weight, after), after["codes"])


def test_what_has_no_free_scales_stays(bits: int = 4) -> None:
    inputs, weight = correlated(64)
    gram = observe(inputs, gram=True).gram
    assert gram is not None
    for grid in (MicroGrid(values="nvfp4"), AffineGrid(bits=bits, granularity="tensor")):
        parts = grid.encode(weight, None)
        assert fit_to_gram(weight, grid, parts, gram) is parts
