"""The truth for codes of eight columns: every point tried for every row, one column after the other.

What a choice of points costs is what GPTQ would make of it; see cpu_nearest.py, which gives the same codes faster.

# O out, I in, G groups of a row, B blocks of eight columns, J and K columns of a code.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.columns.frame import EIGHT, INDEX_BITS, SIGNS_AT
from quantkernels.columns.points import EVEN, NONE, Grid, Metric, blocks_of, metric_of_hessian, metric_of_root
from quantkernels.columns.reference import WORTH, Floats

Codes = NDArray[np.int32]


def solve(weight_OI: Floats, shares_II: Floats, pivots_I: Floats, grid: Grid, codes_OB: Codes) -> None:
    """Fills codes_OB.

    left_OI is what each column would make up for by itself; what the eight of a code make up for together follows from
    the inverse of their shares.
    """
    inverse_BJK, metric = metric_of_root(blocks_of(shares_II), pivots_I.reshape(-1, EIGHT))
    left_OI = weight_OI.copy()
    for b in range(codes_OB.shape[1]):
        inside = slice(b * EIGHT, (b + 1) * EIGHT)
        best_OJ = weight_OI[:, inside].copy()
        for k in range(EIGHT):
            best_OJ += (left_OI[:, inside.start + k] - weight_OI[:, inside.start + k])[:, None] * inverse_BJK[b, k]
        codes_OB[:, b], value_OJ = nearest(best_OJ, metric, grid, b)
        for j in range(EIGHT):
            off_O = weight_OI[:, inside.start + j] - value_OJ[:, j]
            left_OI[:, inside.stop :] += np.outer(off_O, shares_II[inside.start + j, inside.stop :])


def refine(
    first: int, slope_OC: Floats, off_OI: Floats, value_OI: Floats, hessian_II: Floats, grid: Grid, codes_OB: Codes
) -> None:
    """Moves the codes of as many columns as slope_OC has, from `first` on, once; see reference.refine."""
    inverse_BJK, metric = metric_of_hessian(blocks_of(hessian_II))
    whole = slice(first, first + slope_OC.shape[1])
    for b in range(whole.start // EIGHT, whole.stop // EIGHT):
        inside = slice(b * EIGHT, (b + 1) * EIGHT)
        best_OJ = value_OI[:, inside].copy()
        for k in range(EIGHT):
            best_OJ -= slope_OC[:, inside.start - first + k, None] * inverse_BJK[b, k]
        code_O, new_OJ = nearest(best_OJ, metric, grid, b)
        before_O, after_O = (
            _cost(value_OJ - best_OJ, metric.metric_BJK[b]) for value_OJ in (value_OI[:, inside], new_OJ)
        )
        moves_O = after_O < before_O * WORTH
        change_OJ = np.where(moves_O[:, None], new_OJ - value_OI[:, inside], np.float32(0))
        codes_OB[:, b] = np.where(moves_O, code_O, codes_OB[:, b])
        value_OI[:, inside] = np.where(moves_O[:, None], new_OJ, value_OI[:, inside])
        off_OI[:, inside] += change_OJ
        for j in range(EIGHT):
            slope_OC += np.outer(change_OJ[:, j], hessian_II[inside.start + j, whole])


def nearest(wanted_OJ: Floats, metric: Metric, grid: Grid, b: int) -> tuple[Codes, Floats]:
    """The codes [O] whose values [O, 8] are nearest to wanted_OJ by the metric of block b, and those values."""
    group = grid.group_I[b * EIGHT]
    scale_O1, zero_O1 = grid.scale_OG[:, group, None], grid.zero_OG[:, group, None]
    units_OJ = wanted_OJ / np.where(scale_O1 == 0, np.float32(np.inf), scale_O1) + zero_O1
    code_O = np.zeros(len(wanted_OJ), np.int32)
    chosen_OJ = np.zeros_like(units_OJ)
    for row, units_J in enumerate(units_OJ):
        code_O[row], chosen_OJ[row] = _nearest_points(units_J.copy(), metric, grid, b)
    return code_O, ((chosen_OJ - zero_O1) * scale_O1).astype(np.float32)


def _nearest_points(units_J: Floats, metric: Metric, grid: Grid, b: int) -> tuple[int, Floats]:
    """The code and the signed points for what is wanted of eight columns in units of the scale."""
    points, ratio_JK, weight_J = grid.points, metric.ratio_BJK[b], metric.weight_BJ[b]
    dimensions = points.points_PD.shape[1]
    left_J, point_J = units_J.copy(), np.zeros(EIGHT, np.float32)
    code = 0
    for at in range(0, EIGHT, dimensions):
        best, least = 0, float("inf")
        for p, point_D in enumerate(points.points_PD):
            cost = _cost_of_point(left_J[at : at + dimensions].copy(), point_D, ratio_JK, weight_J, at, points.signs)
            if cost < least:
                best, least = p, cost
        code |= int(points.index_P[best]) << (INDEX_BITS * (at // dimensions))
        for j in range(at, at + dimensions):
            negative = points.signs != NONE and left_J[j] < 0
            point_J[j] = points.points_PD[best, j - at] * np.float32(-1 if negative else 1)
            left_J[j + 1 :] -= (left_J[j] - point_J[j]) * ratio_JK[j, j + 1 :]
    if points.signs == EVEN and (point_J < 0).sum() % 2:
        slope_J = np.zeros(EIGHT, np.float32)
        for k in range(EIGHT):
            slope_J += metric.metric_BJK[b, :, k] * (units_J[k] - point_J[k])
        rise_J = np.float32(4) * point_J * (slope_J + point_J * np.diagonal(metric.metric_BJK[b]))
        point_J[np.argmin(rise_J)] *= -1
    if points.signs != NONE:
        code |= int(((point_J < 0) << np.arange(EIGHT)).sum()) << SIGNS_AT
    return code, point_J


def _cost_of_point(left_D: Floats, point_D: Floats, ratio_JK: Floats, weight_J: Floats, at: int, signs: int) -> float:
    """What a point costs with the nearer sign at every step; with an odd count of minuses, at least a flip more."""
    cost, flip, minuses = np.float32(0), np.float32(np.inf), 0
    for j, coordinate in enumerate(point_D):
        negative = signs != NONE and left_D[j] < 0
        error = left_D[j] - (-coordinate if negative else coordinate)
        cost = cost + error * error * weight_J[at + j]
        flip = min(flip, abs(left_D[j]) * (np.float32(4) * coordinate * weight_J[at + j]))
        minuses += negative
        left_D[j + 1 :] -= error * ratio_JK[at + j, at + j + 1 : at + len(point_D)]
    return float(cost + flip if signs == EVEN and len(point_D) == EIGHT and minuses % 2 else cost)


def _cost(error_OJ: Floats, metric_JK: Floats) -> Floats:
    """error metric error^T, summed in the order of the kernel."""
    total_O = np.zeros(len(error_OJ), np.float32)
    for j in range(EIGHT):
        slope_O = np.zeros(len(error_OJ), np.float32)
        for k in range(EIGHT):
            slope_O += metric_JK[j, k] * error_OJ[:, k]
        total_O += slope_O * error_OJ[:, j]
    return total_O
