"""Gram matrices of rows in bfloat16, summed in float32: x^T x in half the time of a product in float32.

Where linears multiply in bf16, a row rounded to bf16 is what they read, and a product of two such values is exact in
f32: only the sums round. The processor must add such products up in f32 (AVX512_BF16); torch's own product of bf16
tensors gives its sums back in bf16, eight bits of a sum over thousands of rows. Of the symmetric matrix the upper
triangle is computed, in tiles so small that little lies below the diagonal.

# N rows, I columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantkernels import processor
from quantkernels.gram import reference

Backend = Literal["cpu", "reference"]


def available() -> bool:
    """Whether the backend "cpu" runs on this machine, and is compiled for it."""
    if not processor.has("avx512_bf16"):
        return False
    from quantkernels.gram import cpu  # here: numba is half a second and 110 MB, and plans do without

    return cpu.is_compiled_for_it()


def add(gram: Tensor, rows: Tensor, first: int = 0, last: int | None = None, *, backend: Backend = "cpu") -> None:
    """Add the sum of x x^T to rows `first` to `last` of gram's upper triangle, for x the rows rounded to bf16.

    gram [I, I] f32, contiguous, changed in place; rows [N, I] f32, finite. Entries below the diagonal may change as
    well and mean nothing. Calls for other rows of gram may run at the same time, and how gram is cut changes no bit.
    A sum is made in f32, pair by pair over 512 rows at a time. AVX512_BF16 takes values below 2^-126 for zero, and how
    it rounds within a pair of rows is the processor's.
    Raises ValueError for tensors of another kind, and unless `available()` for the backend "cpu".
    """
    columns = len(gram)
    last = columns if last is None else last
    if gram.shape != (columns, columns) or gram.dtype != torch.float32 or not gram.is_contiguous():
        raise ValueError(f"gram is [I, I] of f32, contiguous, not {list(gram.shape)} of {gram.dtype}")
    if rows.ndim != 2 or rows.shape[1] != columns or rows.dtype != torch.float32:
        raise ValueError(f"rows are [N, {columns}] of f32, not {list(rows.shape)} of {rows.dtype}")
    if not 0 <= first <= last <= columns:
        raise ValueError(f"{first} to {last} are no rows of {columns}")
    if backend == "reference":
        reference.add(gram.numpy(), rows.bfloat16().double().numpy(), first, last)
        return
    if not available():
        raise ValueError("this processor does not multiply in bf16 (AVX512_BF16)")
    from quantkernels.gram import cpu

    cpu.add(gram.numpy(), rows.contiguous().numpy(), first, last)
