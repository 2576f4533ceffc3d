"""The column loop in numba: 32 rows at a time, one row per SIMD lane.

Within a block of columns the operations and their order are those of `reference.py`, lane by lane, so a weight of at
most 128 columns gets its very bits. Behind a block the corrections of its 128 columns are summed by a matrix product
before they are subtracted, which rounds differently: codes may then differ where a value lies within about 1e-6 steps
of a tie.

# O out, I in, G groups of a row, C columns of the block, R rows of a tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantkernels.compiling import kernel
from quantkernels.rows import over_rows

Floats = NDArray[np.float32]
LANES = 32
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to nearest even, up to 2**22
ZERO, INFINITE = np.float32(0), np.float32(np.inf)


def solve(
    left_OI: Floats,
    factor_II: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    group_I: NDArray[np.int64],
    low: int,
    high: int,
    codes_OI: NDArray[np.int8],
    error_O: NDArray[np.float64],
    *,
    block: int,
    threads: int,
) -> None:
    """Fills codes_OI and error_O; left_OI, the weights still to be rounded, is corrected in place."""
    rows, columns = left_OI.shape
    left, factor = torch.from_numpy(left_OI), torch.from_numpy(factor_II)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        push_OC = np.empty((rows, last - first), np.float32)
        inside = slice(first, last)
        _solve_rows(
            threads,
            first,
            left_OI,
            np.ascontiguousarray(factor_II[inside, inside]),
            scale_OG,
            zero_OG,
            group_I[inside],
            low,
            high,
            codes_OI,
            push_OC,
            error_O,
        )
        left[:, last:].addmm_(torch.from_numpy(push_OC), factor[inside, last:], alpha=-1)


def _solve_rows(
    threads: int,
    first: int,
    left_OI: Floats,
    factor_CC: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    group_C: NDArray[np.int64],
    low: int,
    high: int,
    codes_OI: NDArray[np.int8],
    push_OC: Floats,
    error_O: NDArray[np.float64],
) -> None:
    def piece(top: int, bottom: int) -> None:
        rows = slice(top, bottom)
        grid = (scale_OG[rows], zero_OG[rows], group_C, np.float32(low), np.float32(high))
        solve_block(first, left_OI[rows], factor_CC, *grid, codes_OI[rows], push_OC[rows], error_O[rows])

    over_rows(left_OI.shape[0], threads, piece)


@kernel
def solve_block(
    first: int,
    left_OI: Floats,
    factor_CC: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    group_C: NDArray[np.int64],
    low: Any,
    high: Any,
    codes_OI: NDArray[np.int8],
    push_OC: Floats,
    error_O: NDArray[np.float64],
) -> None:
    """Rounds the block of columns that begins at `first`: fills its codes and push_OC, and adds to error_O.

    Takes whole rows: a slice of columns is contiguous or not by its width, which would be two types of one kernel.
    """
    rows, columns = push_OC.shape
    tile_CR = np.zeros((columns, LANES), np.float32)
    scale_R, zero_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    push_R, steps_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for top in range(0, rows, LANES):
        used = min(LANES, rows - top)
        for r in range(used):
            for i in range(columns):
                tile_CR[i, r] = left_OI[top + r, first + i]
        for i in range(columns):
            for r in range(used):
                scale_R[r] = scale_OG[top + r, group_C[i]]
                zero_R[r] = zero_OG[top + r, group_C[i]]
            diagonal = factor_CC[i, i]
            for r in range(LANES):
                value = tile_CR[i, r]
                steps = value / (scale_R[r] if scale_R[r] != ZERO else INFINITE)
                lowest, highest = low - zero_R[r], high - zero_R[r]
                steps = lowest if steps < lowest else steps
                steps = highest if steps > highest else steps
                steps = (steps + ROUND) - ROUND
                steps_R[r] = steps
                push_R[r] = (value - steps * scale_R[r]) / diagonal
            for j in range(i + 1, columns):
                share = factor_CC[i, j]
                for r in range(LANES):
                    tile_CR[j, r] -= push_R[r] * share
            for r in range(used):
                codes_OI[top + r, first + i] = np.int8(steps_R[r] + zero_R[r])
                push_OC[top + r, i] = push_R[r]
                error_O[top + r] += np.float64(push_R[r]) * np.float64(push_R[r])
