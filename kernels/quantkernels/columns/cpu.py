"""The column loops in numba: 32 rows at a time, one row per SIMD lane.

Within a block of columns the operations and their order are those of `reference.py`, lane by lane, so a weight of at
most 128 columns gets its very bits. Beyond a block the corrections of its 128 columns are summed by a matrix product
before they are subtracted, which rounds differently: codes may then differ where a value lies within about 1e-6 steps
of a tie.

# O out, I in, G groups of a row, C columns of the block, R rows of a tile, L levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantkernels.columns.reference import WORTH, Codes, Floats, Grid
from quantkernels.compiling import compiled, kernel
from quantkernels.rows import over_rows

LANES = 32
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to nearest even, up to 2**22
ZERO, HALF, INFINITE = np.float32(0), np.float32(0.5), np.float32(np.inf)


def solve(
    left_OI: Floats,
    factor_II: Floats,
    grid: Grid,
    codes_OI: Codes,
    error_O: NDArray[np.float64],
    *,
    block: int,
    threads: int,
) -> None:
    """Fills codes_OI and error_O; left_OI, the weights still to be rounded, is corrected in place."""
    rows, columns = left_OI.shape
    left, factor = torch.from_numpy(left_OI), torch.from_numpy(factor_II)
    for first in range(0, columns, block):
        inside = slice(first, min(first + block, columns))
        factor_CC = np.ascontiguousarray(factor_II[inside, inside])
        push_OC = np.empty((rows, inside.stop - first), np.float32)

        def piece(top: int, bottom: int) -> None:
            some = slice(top, bottom)
            solve_block(
                first,  # noqa: B023 - called before the loop goes on
                left_OI[some],
                factor_CC,  # noqa: B023
                grid.scale_OG[some],
                grid.zero_OG[some],
                grid.offset_OG[some],
                grid.group_I,
                np.float32(grid.low),
                np.float32(grid.high),
                _of_rows(grid.levels_OGL, some),
                codes_OI[some],
                push_OC[some],  # noqa: B023
                error_O[some],
            )

        over_rows(rows, threads, piece)
        left[:, inside.stop :].addmm_(torch.from_numpy(push_OC), factor[inside, inside.stop :], alpha=-1)


def refine(
    first: int,
    slope_OC: Floats,
    off_OI: Floats,
    value_OI: Floats,
    hessian_II: Floats,
    grid: Grid,
    codes_OI: Codes,
    *,
    threads: int,
) -> None:
    """Moves the codes of the block of columns that begins at `first` once; see `reference.refine`, here in place, too.

    slope_OC are the slopes of the block's columns; what they become is not seen.
    """
    inside = slice(first, first + slope_OC.shape[1])
    hessian_CC = np.ascontiguousarray(hessian_II[inside, inside])

    def piece(top: int, bottom: int) -> None:
        some = slice(top, bottom)
        refine_block(
            first,
            value_OI[some],
            hessian_CC,
            grid.scale_OG[some],
            grid.zero_OG[some],
            grid.offset_OG[some],
            grid.group_I,
            np.float32(grid.low),
            np.float32(grid.high),
            _of_rows(grid.levels_OGL, some),
            codes_OI[some],
            slope_OC[some],
            off_OI[some],
        )

    over_rows(len(value_OI), threads, piece)


def _of_rows(levels_OGL: Floats, rows: slice) -> Floats:
    """The levels of these rows; all share the one table that there may be."""
    return levels_OGL if len(levels_OGL) == 1 else levels_OGL[rows]


@compiled
def load_levels(levels_OGL: Floats, top: int, used: int, group: int, levels_LR: Floats) -> None:
    """Fills levels_LR with the levels of `group` in the tile of rows that begins at `top`."""
    many, grouped = levels_OGL.shape[0] > 1, levels_OGL.shape[1] > 1
    for r in range(used):
        for k in range(levels_OGL.shape[2]):
            levels_LR[k, r] = levels_OGL[top + r if many else 0, group if grouped else 0, k]


@compiled
def to_levels(steps_R: Floats, zero_R: Floats, low: Any, high: Any, levels_LR: Floats, level_R: Floats) -> None:
    """Replaces steps_R, wanted values less the offset in units of the scale, by the nearest that a code can mean.

    level_R is scratch.
    """
    if len(levels_LR) == 0:
        for r in range(LANES):
            steps = steps_R[r]
            lowest, highest = low - zero_R[r], high - zero_R[r]
            steps = lowest if steps < lowest else steps
            steps = highest if steps > highest else steps
            steps_R[r] = (steps + ROUND) - ROUND
        return
    for r in range(LANES):
        steps_R[r] += zero_R[r]
        level_R[r] = levels_LR[0, r]
    for k in range(len(levels_LR) - 1):
        for r in range(LANES):
            below, above = levels_LR[k, r], levels_LR[k + 1, r]
            level_R[r] = above if steps_R[r] > (below + above) * HALF else level_R[r]
    for r in range(LANES):
        steps_R[r] = level_R[r] - zero_R[r]


@compiled
def code_of(steps: Any, zero: Any, levels_LR: Floats, r: int) -> Any:
    """The code of a level as to_levels gives it, in row r of the tile; the first of equal levels."""
    if len(levels_LR) == 0:
        return np.int8(steps + zero)
    level = steps + zero
    code = 0
    for k in range(len(levels_LR) - 1):
        code += (levels_LR[k, r] + levels_LR[k + 1, r]) * HALF < level
    return np.int8(code)


@kernel
def solve_block(
    first: int,
    left_OI: Floats,
    factor_CC: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    offset_OG: Floats,
    group_I: NDArray[np.int64],
    low: Any,
    high: Any,
    levels_OGL: Floats,
    codes_OI: Codes,
    push_OC: Floats,
    error_O: NDArray[np.float64],
) -> None:
    """Rounds the block of columns that begins at `first`: fills its codes and push_OC, and adds to error_O.

    Takes whole rows: a slice of columns is contiguous or not by its width, which would be two types of one kernel.
    """
    rows, columns = push_OC.shape
    tile_CR = np.zeros((columns, LANES), np.float32)
    scale_R, zero_R, offset_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    push_R, steps_R, level_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    levels_LR = np.zeros((levels_OGL.shape[2], LANES), np.float32)
    for top in range(0, rows, LANES):
        used, loaded = min(LANES, rows - top), -1
        for r in range(used):
            for i in range(columns):
                tile_CR[i, r] = left_OI[top + r, first + i]
        for i in range(columns):
            group = group_I[first + i]
            if group != loaded:
                load_levels(levels_OGL, top, used, group, levels_LR)
                loaded = group
            for r in range(used):
                scale_R[r] = scale_OG[top + r, group]
                zero_R[r] = zero_OG[top + r, group]
                offset_R[r] = offset_OG[top + r, group]
            for r in range(LANES):
                steps_R[r] = (tile_CR[i, r] - offset_R[r]) / (scale_R[r] if scale_R[r] != ZERO else INFINITE)
            to_levels(steps_R, zero_R, low, high, levels_LR, level_R)
            diagonal = factor_CC[i, i]
            for r in range(LANES):
                push_R[r] = (tile_CR[i, r] - (steps_R[r] * scale_R[r] + offset_R[r])) / diagonal
            for j in range(i + 1, columns):
                share = factor_CC[i, j]
                for r in range(LANES):
                    tile_CR[j, r] -= push_R[r] * share
            for r in range(used):
                codes_OI[top + r, first + i] = code_of(steps_R[r], zero_R[r], levels_LR, r)
                push_OC[top + r, i] = push_R[r]
                error_O[top + r] += np.float64(push_R[r]) * np.float64(push_R[r])


@kernel
def refine_block(
    first: int,
    value_OI: Floats,
    hessian_CC: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    offset_OG: Floats,
    group_I: NDArray[np.int64],
    low: Any,
    high: Any,
    levels_OGL: Floats,
    codes_OI: Codes,
    slope_OC: Floats,
    off_OI: Floats,
) -> None:
    """Moves each code of the block that begins at `first` to where the error is least, the others held.

    slope_OC holds the slopes inside the block; they are kept up to date in a tile.
    """
    rows, columns = slope_OC.shape
    slope_CR = np.zeros((columns, LANES), np.float32)
    scale_R, zero_R, offset_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    best_R, steps_R, change_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    value_R, level_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    levels_LR = np.zeros((levels_OGL.shape[2], LANES), np.float32)
    for top in range(0, rows, LANES):
        used, loaded = min(LANES, rows - top), -1
        for r in range(used):
            for i in range(columns):
                slope_CR[i, r] = slope_OC[top + r, i]
        for i in range(columns):
            group = group_I[first + i]
            if group != loaded:
                load_levels(levels_OGL, top, used, group, levels_LR)
                loaded = group
            for r in range(used):
                scale_R[r] = scale_OG[top + r, group]
                zero_R[r] = zero_OG[top + r, group]
                offset_R[r] = offset_OG[top + r, group]
                value_R[r] = value_OI[top + r, first + i]
            diagonal = hessian_CC[i, i]
            for r in range(LANES):
                best_R[r] = value_R[r] - slope_CR[i, r] / diagonal
                steps_R[r] = (best_R[r] - offset_R[r]) / (scale_R[r] if scale_R[r] != ZERO else INFINITE)
            to_levels(steps_R, zero_R, low, high, levels_LR, level_R)
            for r in range(LANES):
                value = steps_R[r] * scale_R[r] + offset_R[r]
                better = abs(value - best_R[r]) < abs(value_R[r] - best_R[r]) * WORTH
                change_R[r] = value - value_R[r] if better else ZERO
                value_R[r] = value if better else value_R[r]
            moved = 0
            for r in range(used):
                if change_R[r] != ZERO:
                    off_OI[top + r, first + i] += change_R[r]
                    value_OI[top + r, first + i] = value_R[r]
                    codes_OI[top + r, first + i] = code_of(steps_R[r], zero_R[r], levels_LR, r)
                    moved += 1
            if moved == 0:
                continue
            for j in range(columns):
                share = hessian_CC[i, j]
                for r in range(LANES):
                    slope_CR[j, r] += change_R[r] * share
