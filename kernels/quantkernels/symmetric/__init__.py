"""Symmetric matrices, packed into their upper triangle and back: one pass, where torch makes an operation a row.

# I columns, P = I (I + 1) / 2 entries of the upper triangle, row by row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantkernels.symmetric import reference

Backend = Literal["cpu", "reference"]


def pack(matrix_II: Tensor, *, backend: Backend = "cpu") -> Tensor:
    """The upper triangle [P] of a matrix [I, I] f32. One on a GPU takes the reference, here as below."""
    columns = _columns(matrix_II)
    upper_P = matrix_II.new_empty(columns * (columns + 1) // 2)
    if _is_reference(matrix_II, backend):
        reference.pack(matrix_II, upper_P)
    else:
        from quantkernels.symmetric import cpu  # here: numba is half a second and 110 MB, and plans do without

        cpu.pack(matrix_II.contiguous().numpy(), upper_P.numpy())
    return upper_P


def unpack(upper_P: Tensor, columns: int, *, backend: Backend = "cpu") -> Tensor:
    """The symmetric matrix [I, I] f32 that `pack` packed, bit for bit."""
    if upper_P.shape != (columns * (columns + 1) // 2,) or upper_P.dtype != torch.float32:
        raise ValueError(f"{list(upper_P.shape)} of {upper_P.dtype} is no upper triangle of {columns} columns in f32")
    matrix_II = upper_P.new_empty(columns, columns)
    if _is_reference(upper_P, backend):
        reference.unpack(upper_P, matrix_II)
    else:
        from quantkernels.symmetric import cpu

        cpu.unpack(upper_P.contiguous().numpy(), matrix_II.numpy())
    return matrix_II


def mirror(matrix_II: Tensor, *, backend: Backend = "cpu") -> None:
    """Make a matrix [I, I] f32, contiguous, symmetric in its place: below the diagonal it becomes what it is above."""
    _columns(matrix_II)
    if not matrix_II.is_contiguous():
        raise ValueError("only a contiguous matrix is mirrored in its place")
    if _is_reference(matrix_II, backend):
        reference.mirror(matrix_II)
    else:
        from quantkernels.symmetric import cpu

        cpu.mirror(matrix_II.numpy())


def _columns(matrix_II: Tensor) -> int:
    if matrix_II.ndim != 2 or matrix_II.shape[0] != matrix_II.shape[1] or matrix_II.dtype != torch.float32:
        raise ValueError(f"a matrix is [I, I] of f32, not {list(matrix_II.shape)} of {matrix_II.dtype}")
    return len(matrix_II)


def _is_reference(tensor: Tensor, backend: Backend) -> bool:
    return backend == "reference" or tensor.device.type != "cpu"
