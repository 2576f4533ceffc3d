"""The column kernel: the numba backend against the plain loop, and the loop against the algebra."""

# O out, I in, G groups of a row.
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkernels import columns

SHAPES = [(1, 1), (3, 127), (33, 128), (70, 129), (37, 333)]


def problem(rows: int, width: int, group_size: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """A weight with a well-conditioned Hessian's factor, scales, zero points and groups in shuffled order."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=random, dtype=torch.float64) * 0.3 + torch.eye(width)
    hessian = mix @ mix.T + 0.1 * torch.eye(width)
    groups = -(-width // group_size)
    return {
        "weight": torch.randn(rows, width, generator=random),
        "factor": torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float(),
        "scale_OG": torch.rand(rows, groups, generator=random) * 0.2 + 0.1,
        "zero_OG": torch.randint(-8, 8, (rows, groups), generator=random),
        "group_I": (torch.arange(width) // group_size)[torch.randperm(width, generator=random)],
    }


def decoded(given: dict[str, Tensor], codes: Tensor) -> Tensor:
    group = given["group_I"]
    return (codes - given["zero_OG"][:, group]) * given["scale_OG"][:, group]


@pytest.mark.parametrize(("rows", "width"), SHAPES[:3])
def test_one_block_has_the_bits_of_the_reference(rows: int, width: int) -> None:
    given = problem(rows, width)
    expected, expected_error = columns.solve(**given, low=-8, high=7, backend="reference")
    codes, error = columns.solve(**given, low=-8, high=7)
    assert torch.equal(codes, expected) and torch.equal(error, expected_error)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_several_blocks_equal_the_reference_where_arithmetic_is_exact(rows: int, width: int, threads: int) -> None:
    """Weights are multiples of 1/16, scales powers of two and factors -1, 0 or 1 with a unit diagonal: every sum is a
    multiple of 1/16 far below 2**20, exact in f32 in any order, so nothing may differ."""
    random = torch.Generator().manual_seed(width)
    sparse = torch.randint(-1, 2, (width, width), generator=random) * (
        torch.rand(width, width, generator=random) < 2 / width
    )
    given = problem(rows, width) | {
        "weight": torch.randint(-160, 160, (rows, width), generator=random) / 16,
        "factor": (sparse.triu(1) + torch.eye(width)).float(),
        "scale_OG": 2.0 ** torch.randint(-1, 2, problem(rows, width)["scale_OG"].shape, generator=random),
    }
    expected, expected_error = columns.solve(**given, low=-8, high=7, backend="reference")
    codes, error = columns.solve(**given, low=-8, high=7, threads=threads)
    assert torch.equal(codes, expected) and torch.equal(error, expected_error)
    assert (
        not torch.equal(codes, columns.solve(**given | {"factor": torch.eye(width)}, low=-8, high=7)[0]) or width == 1
    )


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_error_is_the_quadratic_form_of_the_hessian(rows: int, width: int, backend: columns.Backend) -> None:
    given = problem(rows, width)
    codes, error = columns.solve(**given, low=-8, high=7, backend=backend)
    inverse = torch.linalg.inv(given["factor"].double())
    expected = ((given["weight"] - decoded(given, codes)).double() @ inverse).square().sum(1)
    # f32 corrections, one rounding per column and weight: width * 2**-24, and once more for squaring.
    torch.testing.assert_close(error, expected, rtol=2 * width * 2**-24 + 1e-6, atol=1e-12)


def test_a_diagonal_factor_rounds_every_weight_to_nearest() -> None:
    given = problem(9, 200) | {"factor": torch.rand(200).add(0.5).diag()}
    codes, _ = columns.solve(**given, low=-8, high=7)
    group = given["group_I"]
    steps = (given["weight"] / given["scale_OG"][:, group]).round() + given["zero_OG"][:, group]
    assert torch.equal(codes, steps.clamp(-8, 7).to(torch.int8))


def test_a_scale_of_zero_means_zero_and_passes_its_error_on() -> None:
    given = problem(4, 64)
    given["scale_OG"][1] = 0
    given["scale_OG"][2, 0] = 0
    for backend in ("cpu", "reference"):
        codes, error = columns.solve(**given, low=-8, high=7, backend=backend)
        assert bool((decoded(given, codes)[1] == 0).all()) and bool(torch.isfinite(error).all())


def test_the_weight_is_left_as_it_was() -> None:
    given = problem(5, 40)
    before = given["weight"].clone()
    columns.solve(**given, low=-8, high=7)
    assert torch.equal(given["weight"], before)
