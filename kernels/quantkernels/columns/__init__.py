"""Columns: GPTQ's loop, which rounds one column after the other and corrects those not yet rounded.

Blocks of 128 columns are solved in a kernel, then one matrix product corrects all columns behind the block. The
alternative, the same loop in torch, launches some ten operations per column: 5 times the time and more on a CPU.

# O out, I in, G groups of a row.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkernels.columns import cpu, reference

Backend = Literal["cpu", "reference"]
BLOCK = 128  # columns per kernel call: a tile of 128 x 32 weights stays in the first-level cache


def solve(
    weight: Tensor,
    factor: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    group_I: Tensor,
    *,
    low: int,
    high: int,
    threads: int = 1,
    backend: Backend = "cpu",
) -> tuple[Tensor, Tensor]:
    """The codes [O, I] i8, and each row's error [O] f64.

    weight [O, I] f32, finite, columns in the order to round them; factor [I, I] f32 is upper triangular with
    factor^T factor = the inverse of the Hessian (in the same order); scale_OG f32 and zero_OG give the grid, group_I
    the group of each column; low and high bound the codes. A code of scale 0 means 0. A row's error is
    (w - w') H (w - w')^T, with w' what its codes mean.
    Rows do not depend on each other, so results do not depend on `threads`; the product behind a block runs on torch's
    own threads.
    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1.
    """
    left = np.array(weight.detach().numpy(), np.float32, order="C")  # a copy: it is corrected in place
    upper = _floats(factor)
    scales, zeros = _floats(scale_OG), _floats(zero_OG)
    groups = np.ascontiguousarray(group_I.numpy(), np.int64)
    codes = np.zeros(left.shape, np.int8)
    error = np.zeros(left.shape[0], np.float64)
    if backend == "reference":
        reference.solve(left, upper, scales, zeros, groups, low, high, codes, error)
    else:
        cpu.solve(left, upper, scales, zeros, groups, low, high, codes, error, block=BLOCK, threads=threads)
    return torch.from_numpy(codes), torch.from_numpy(error)


def _floats(values: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(values.detach().to(torch.float32).numpy())
