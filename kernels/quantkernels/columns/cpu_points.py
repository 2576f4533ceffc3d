"""The loops of cpu.py for codes of eight columns, which name the nearest points of a lattice: see cpu_nearest.

# O out, I in, G groups, B blocks of eight columns, C and R columns and rows of a tile, P points, J and K columns of one
# code.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from quantkernels.columns.cpu_nearest import LANES, ZERO, choose, cost_of
from quantkernels.columns.frame import EIGHT
from quantkernels.columns.points import Grid, Metric, blocks_of, metric_of_root
from quantkernels.columns.reference import WORTH, Floats
from quantkernels.compiling import kernel
from quantkernels.rows import over_rows

INFINITE = np.float32(np.inf)


def solve(
    weight_OI: Floats,
    shares_II: Floats,
    pivots_I: Floats,
    rough_II: torch.Tensor,
    grid: Grid,
    codes_OB: NDArray[np.int32],
    *,
    block: int,
    threads: int,
) -> None:
    """Fills codes_OB; see cpu.solve."""
    rows, columns = weight_OI.shape
    offs = torch.empty(weight_OI.shape, dtype=rough_II.dtype)
    inverse_BJK, metric = metric_of_root(blocks_of(shares_II), pivots_I.reshape(-1, EIGHT))
    for first in range(0, columns, block):
        inside = slice(first, min(first + block, columns))
        left_OC = np.ascontiguousarray(weight_OI[:, inside])
        torch.from_numpy(left_OC).add_(offs[:, :first] @ rough_II[:first, inside])
        shares_CC = np.ascontiguousarray(shares_II[inside, inside])
        off_OC = np.empty_like(left_OC)

        def piece(top: int, bottom: int) -> None:
            some = slice(top, bottom)
            solve_block(
                first,  # noqa: B023 - called before the loop goes on
                weight_OI[some],
                left_OC[some],  # noqa: B023
                shares_CC,  # noqa: B023
                inverse_BJK,
                metric.metric_BJK,
                metric.ratio_BJK,
                metric.weight_BJ,
                grid.scale_OG[some],
                grid.zero_OG[some],
                grid.group_I,
                grid.points.points_PD,
                grid.points.shared_P,
                grid.points.index_P,
                grid.points.signs,
                codes_OB[some],
                off_OC[some],  # noqa: B023
            )

        over_rows(rows, threads, piece)
        offs[:, inside] = torch.from_numpy(off_OC)


def refine(
    first: int,
    slope_OC: Floats,
    off_OI: Floats,
    value_OI: Floats,
    hessian_II: Floats,
    metrics: tuple[Floats, Metric],
    grid: Grid,
    codes_OB: NDArray[np.int32],
    *,
    threads: int,
) -> None:
    """Moves the codes of the block of columns that begins at `first` once, in place, eight columns at a time.

    slope_OC are the slopes of the block's columns; what they become is not seen. metrics: `metric_of_hessian` of the
    blocks of eight of hessian_II.
    """
    inside = slice(first, first + slope_OC.shape[1])
    hessian_CC = np.ascontiguousarray(hessian_II[inside, inside])
    inverse_BJK, metric = metrics

    def piece(top: int, bottom: int) -> None:
        some = slice(top, bottom)
        refine_block(
            first,
            value_OI[some],
            hessian_CC,
            inverse_BJK,
            metric.metric_BJK,
            metric.ratio_BJK,
            metric.weight_BJ,
            grid.scale_OG[some],
            grid.zero_OG[some],
            grid.group_I,
            grid.points.points_PD,
            grid.points.shared_P,
            grid.points.index_P,
            grid.points.signs,
            codes_OB[some],
            slope_OC[some],
            off_OI[some],
        )

    over_rows(len(value_OI), threads, piece)


@kernel
def solve_block(
    first: int,
    weight_OI: Floats,
    left_OC: Floats,
    shares_CC: Floats,
    inverse_BJK: Floats,
    metric_BJK: Floats,
    ratio_BJK: Floats,
    weight_BJ: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    group_I: NDArray[np.int64],
    points_PD: Floats,
    shared_P: NDArray[np.int64],
    index_P: NDArray[np.int64],
    signs: int,
    codes_OB: NDArray[np.int32],
    off_OC: Floats,
) -> None:
    """Rounds the columns from `first` on, as many as off_OC has: fills their codes and off_OC; see cpu.solve_block."""
    rows, columns = off_OC.shape
    tile_CR, weight_CR = np.zeros((columns, LANES), np.float32), np.zeros((columns, LANES), np.float32)
    best_R = np.zeros(LANES, np.float32)
    wanted_JR, chosen_JR = np.zeros((EIGHT, LANES), np.float32), np.zeros((EIGHT, LANES), np.float32)
    state_JKR, cost_JR = np.zeros((EIGHT, EIGHT, LANES), np.float32), np.zeros((EIGHT + 1, LANES), np.float32)
    flip_JR, parity_JR = np.zeros((EIGHT + 1, LANES), np.float32), np.zeros((EIGHT + 1, LANES), np.float32)
    error_R, least_R, off_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    scale_R, zero_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    code_R, choice_R = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    left_RJ, point_RJ = np.zeros((LANES, EIGHT), np.float32), np.zeros((LANES, EIGHT), np.float32)
    error_J, wanted_J = np.zeros(EIGHT, np.float32), np.zeros(EIGHT, np.float32)
    for top in range(0, rows, LANES):
        used = min(LANES, rows - top)
        for r in range(used):
            for i in range(columns):
                tile_CR[i, r] = left_OC[top + r, i]
                weight_CR[i, r] = weight_OI[top + r, first + i]
        for start in range(0, columns, EIGHT):
            b, group = (first + start) // EIGHT, group_I[first + start]
            for r in range(used):
                scale_R[r] = scale_OG[top + r, group]
                zero_R[r] = zero_OG[top + r, group]
            for j in range(EIGHT):
                for r in range(LANES):
                    best_R[r] = weight_CR[start + j, r]
                for k in range(EIGHT):
                    share = inverse_BJK[b, k, j]
                    for r in range(LANES):
                        best_R[r] += (tile_CR[start + k, r] - weight_CR[start + k, r]) * share
                for r in range(LANES):
                    divisor = scale_R[r] if scale_R[r] != ZERO else INFINITE
                    wanted_JR[j, r] = best_R[r] / divisor + zero_R[r]
            choose(
                wanted_JR, chosen_JR, code_R, state_JKR, cost_JR, flip_JR, parity_JR, error_R, least_R, choice_R,
                left_RJ, point_RJ, error_J, wanted_J,
                metric_BJK[b], ratio_BJK[b], weight_BJ[b], points_PD, shared_P, index_P, signs,
            )  # fmt: skip
            for r in range(used):
                codes_OB[top + r, b] = code_R[r]
            for j in range(EIGHT):
                i = start + j
                for r in range(LANES):
                    off_R[r] = weight_CR[i, r] - (chosen_JR[j, r] - zero_R[r]) * scale_R[r]
                for k in range(start + EIGHT, columns):
                    share = shares_CC[i, k]
                    for r in range(LANES):
                        tile_CR[k, r] += off_R[r] * share
                for r in range(used):
                    off_OC[top + r, i] = off_R[r]


@kernel
def refine_block(
    first: int,
    value_OI: Floats,
    hessian_CC: Floats,
    inverse_BJK: Floats,
    metric_BJK: Floats,
    ratio_BJK: Floats,
    weight_BJ: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    group_I: NDArray[np.int64],
    points_PD: Floats,
    shared_P: NDArray[np.int64],
    index_P: NDArray[np.int64],
    signs: int,
    codes_OB: NDArray[np.int32],
    slope_OC: Floats,
    off_OI: Floats,
) -> None:
    """Moves each code from `first` on to where the error is least, if that is less; see cpu.refine_block."""
    rows, columns = slope_OC.shape
    slope_CR = np.zeros((columns, LANES), np.float32)
    wanted_JR, chosen_JR = np.zeros((EIGHT, LANES), np.float32), np.zeros((EIGHT, LANES), np.float32)
    best_JR, change_JR = np.zeros((EIGHT, LANES), np.float32), np.zeros((EIGHT, LANES), np.float32)
    state_JKR, cost_JR = np.zeros((EIGHT, EIGHT, LANES), np.float32), np.zeros((EIGHT + 1, LANES), np.float32)
    flip_JR, parity_JR = np.zeros((EIGHT + 1, LANES), np.float32), np.zeros((EIGHT + 1, LANES), np.float32)
    error_R, best_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    scale_R, zero_R = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    code_R, choice_R = np.zeros(LANES, np.int32), np.zeros(LANES, np.int32)
    left_RJ, point_RJ = np.zeros((LANES, EIGHT), np.float32), np.zeros((LANES, EIGHT), np.float32)
    error_J, wanted_J, old_J = np.zeros(EIGHT, np.float32), np.zeros(EIGHT, np.float32), np.zeros(EIGHT, np.float32)
    for top in range(0, rows, LANES):
        used = min(LANES, rows - top)
        for r in range(used):
            for i in range(columns):
                slope_CR[i, r] = slope_OC[top + r, i]
        for start in range(0, columns, EIGHT):
            b, group = (first + start) // EIGHT, group_I[first + start]
            for r in range(used):
                scale_R[r] = scale_OG[top + r, group]
                zero_R[r] = zero_OG[top + r, group]
            for j in range(EIGHT):
                for r in range(used):
                    best_JR[j, r] = value_OI[top + r, first + start + j]
                for k in range(EIGHT):
                    share = inverse_BJK[b, k, j]
                    for r in range(LANES):
                        best_JR[j, r] -= slope_CR[start + k, r] * share
                for r in range(LANES):
                    divisor = scale_R[r] if scale_R[r] != ZERO else INFINITE
                    wanted_JR[j, r] = best_JR[j, r] / divisor + zero_R[r]
            choose(
                wanted_JR, chosen_JR, code_R, state_JKR, cost_JR, flip_JR, parity_JR, error_R, best_R, choice_R,
                left_RJ, point_RJ, error_J, wanted_J,
                metric_BJK[b], ratio_BJK[b], weight_BJ[b], points_PD, shared_P, index_P, signs,
            )  # fmt: skip
            moved = 0
            for r in range(used):
                for j in range(EIGHT):
                    old_J[j] = value_OI[top + r, first + start + j] - best_JR[j, r]
                    chosen_JR[j, r] = (chosen_JR[j, r] - zero_R[r]) * scale_R[r]
                    error_J[j] = chosen_JR[j, r] - best_JR[j, r]
                better = cost_of(error_J, metric_BJK[b]) < cost_of(old_J, metric_BJK[b]) * WORTH
                moved += better
                for j in range(EIGHT):
                    i = first + start + j
                    change_JR[j, r] = chosen_JR[j, r] - value_OI[top + r, i] if better else ZERO
                    off_OI[top + r, i] += change_JR[j, r]
                    if better:
                        value_OI[top + r, i] = chosen_JR[j, r]
                if better:
                    codes_OB[top + r, b] = code_R[r]
            if moved == 0:
                continue
            for j in range(EIGHT):
                for k in range(columns):
                    share = hessian_CC[start + j, k]
                    for r in range(LANES):
                        slope_CR[k, r] += change_JR[j, r] * share
