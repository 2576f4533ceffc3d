"""The kernels of calibration: a triangle of products in bf16 against f64 and f32, and the sums of columns."""

# N rows, I columns.
from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from quantkernels import gram, sums

EPS = torch.finfo(torch.float32).eps
needs_instruction = pytest.mark.skipif(not gram.available(), reason="the processor has no AVX512_BF16")


def rows(count: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator) * torch.logspace(-2, 2, columns)


def bound(hidden: Tensor) -> Tensor:
    """What N + 1 roundings to f32, by half an EPS of the largest sum each, can move a sum of N products by, doubled."""
    size = hidden.bfloat16().double().abs()
    return (len(hidden) + 1) * EPS * (size.T @ size)


@needs_instruction
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 40, 100, 129])
@pytest.mark.parametrize("count", [1, 2, 3, 37, 513, 1030])  # 512 rows are a piece
def test_the_triangle_is_that_of_rounded_rows(count: int, columns: int) -> None:
    hidden, before = rows(count, columns), rows(columns, columns, seed=1).abs()
    found, expected = before.clone(), before.clone()
    gram.add(found, hidden)
    gram.add(expected, hidden, backend="reference")
    plain = before + hidden.bfloat16().float().T @ hidden.bfloat16().float()
    limit = bound(hidden) + EPS * 2 * (before + plain.abs())  # adding rounds, once for each piece
    for other in (expected, plain):
        assert bool(((found - other).triu().double().abs() <= limit).all())


@needs_instruction
def test_rows_are_rounded_as_torch_rounds_them() -> None:
    """One row times one: each entry of the first row is exact, and so tells the rounded value."""
    values = torch.randn(2000, generator=torch.Generator().manual_seed(2)) * torch.logspace(-30, 30, 2000)
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, -0.0])
    hidden = torch.cat([torch.ones(1), values, ties])[None]
    found = torch.zeros(hidden.shape[1], hidden.shape[1])
    gram.add(found, hidden, 0, 1)
    assert torch.equal(found[0], hidden[0].bfloat16().float())


@needs_instruction
@pytest.mark.parametrize("columns", [70, 256])
def test_neither_cuts_nor_threads_change_a_bit_or_touch_other_rows(columns: int) -> None:
    hidden = rows(600, columns)
    whole = torch.zeros(columns, columns)
    gram.add(whole, hidden)
    ends = [0, 5, 32, 45, 64, columns]
    for threads in (1, 4):
        cut = torch.zeros(columns, columns)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda first, last, to=cut: gram.add(to, hidden, first, last), ends[:-1], ends[1:]))
        assert torch.equal(cut.triu(), whole.triu())
    some = torch.full((columns, columns), torch.nan)
    some[5:32] = 0
    gram.add(some, hidden, 5, 32)
    assert torch.equal(some[5:32].triu(5), whole[5:32].triu(5))
    assert bool(some[:5].isnan().all()) and bool(some[32:].isnan().all())


def test_other_tensors_and_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    square, hidden = torch.zeros(8, 8), rows(3, 8)
    for given in (square.double(), square[:, :7], torch.zeros(8, 16)[:, ::2]):
        with pytest.raises(ValueError, match="gram is"):
            gram.add(given, hidden)
    for other in (hidden.double(), hidden[:, :7], hidden[0]):
        with pytest.raises(ValueError, match="rows are"):
            gram.add(square, other)
    with pytest.raises(ValueError, match="4 to 9 are no rows of 8"):
        gram.add(square, hidden, 4, 9)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_f": True})
    assert not gram.available()
    with pytest.raises(ValueError, match="does not multiply in bf16"):
        gram.add(square, hidden)


def test_it_is_not_used_where_numba_compiles_for_an_older_processor() -> None:
    """LLVM would end the process over an instruction that its target lacks."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "", "PYTHONPATH": "kernels"}
    code = "from quantkernels import gram; print(gram.available())"
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).strip() == "False"


@pytest.mark.parametrize("columns", [1, 7, 512, 700])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_sums_of_columns_are_those_of_the_reference(count: int, columns: int) -> None:
    hidden = rows(count, columns)
    found, expected = sums.of_columns(hidden), sums.of_columns(hidden, backend="reference")
    for one, other in zip(found[:2], expected[:2], strict=True):  # 50 terms in f64, none negative
        torch.testing.assert_close(one, other, rtol=51 * 2.3e-16, atol=0)
    assert torch.equal(found[2], expected[2]) and torch.equal(found[3], expected[3])


def test_sums_of_rows_that_lie_in_another_order_are_the_same() -> None:
    hidden = rows(50, 40)
    for one, other in zip(sums.of_columns(hidden), sums.of_columns(hidden.T.contiguous().T), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3.4e38])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_sum_of_squares_tells_what_is_not_finite(value: float, backend: sums.Backend) -> None:
    hidden = rows(6, 20)
    hidden[3, 17] = value
    squares = sums.of_columns(hidden, backend=backend)[0]
    assert torch.equal(torch.isfinite(squares), torch.isfinite(hidden).all(0))


def test_sums_take_rows_of_f32_only() -> None:
    with pytest.raises(ValueError, match="rows are"):
        sums.of_columns(rows(3, 4).double())
