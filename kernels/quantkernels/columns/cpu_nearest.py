"""The points of a lattice nearest to eight wanted columns under a metric, for 32 rows at a time.

A choice of points costs what GPTQ would make of it: columns in turn, each error pushed onto the next, with the sign
that is nearer at every step. All points are tried, in lexicographic order, so that points with the same first
coordinates share the work on these; states of every depth are kept for that. The alternative, ggml's lists of
neighbours, knows no Hessian and misses points that are near under it.

Where the count of minuses must be even, an odd choice costs at least the cheapest flip of a sign; the points are chosen
by that bound, and then the sign whose flip costs least, exactly.

# R rows of a tile, P points, D dimensions, J and K columns of a code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkernels.columns.frame import EIGHT, INDEX_BITS, SIGNS_AT
from quantkernels.columns.points import EVEN, NONE
from quantkernels.columns.reference import Floats
from quantkernels.compiling import compiled

LANES = 32
ZERO, ONE, FOUR = np.float32(0), np.float32(1), np.float32(4)
HUGE = np.float32(3e38)


@compiled
def search(
    state_JKR: Floats,
    cost_JR: Floats,
    flip_JR: Floats,
    parity_JR: Floats,
    error_R: Floats,
    best_R: Floats,
    choice_R: NDArray[np.int32],
    at: int,
    ratio_JK: Floats,
    weight_J: Floats,
    points_PD: Floats,
    shared_P: NDArray[np.int64],
    signs: int,
) -> None:
    """The point of least cost for each row, into choice_R; state_JKR[0] holds what is wanted of columns from `at` on.

    The other buffers are scratch.
    """
    dimensions = points_PD.shape[1]
    for r in range(LANES):
        best_R[r] = HUGE
        choice_R[r] = 0
        cost_JR[0, r] = ZERO
        flip_JR[0, r] = HUGE
        parity_JR[0, r] = ONE
    even = signs == EVEN and dimensions == EIGHT
    for p in range(len(points_PD)):
        for j in range(shared_P[p], dimensions):
            point, weight = points_PD[p, j], weight_J[at + j]
            if signs == NONE:
                for r in range(LANES):
                    error_R[r] = state_JKR[j, j, r] - point
                    cost_JR[j + 1, r] = cost_JR[j, r] + error_R[r] * error_R[r] * weight
            else:
                for r in range(LANES):
                    wanted = state_JKR[j, j, r]
                    error = abs(wanted) - point
                    cost_JR[j + 1, r] = cost_JR[j, r] + error * error * weight
                    error_R[r] = error if wanted >= ZERO else -error
            if even:
                fourfold = FOUR * point * weight
                for r in range(LANES):
                    wanted = state_JKR[j, j, r]
                    price = abs(wanted) * fourfold
                    flip_JR[j + 1, r] = price if price < flip_JR[j, r] else flip_JR[j, r]
                    parity_JR[j + 1, r] = parity_JR[j, r] if wanted >= ZERO else -parity_JR[j, r]
            for k in range(j + 1, dimensions):
                ratio = ratio_JK[at + j, at + k]
                for r in range(LANES):
                    state_JKR[j + 1, k, r] = state_JKR[j, k, r] - error_R[r] * ratio
        for r in range(LANES):
            cost = cost_JR[dimensions, r]
            if even:
                cost += flip_JR[dimensions, r] if parity_JR[dimensions, r] < ZERO else ZERO
            choice_R[r] = p if cost < best_R[r] else choice_R[r]
            best_R[r] = cost if cost < best_R[r] else best_R[r]


@compiled
def sign_and_push(left_J: Floats, point_J: Floats, at: int, dimensions: int, ratio_JK: Floats, signs: int) -> None:
    """Gives the coordinates in point_J, from `at` on, the signs nearer to what is wanted, pushing errors along left_J,
    up to its end."""
    for j in range(at, at + dimensions):
        if signs != NONE and left_J[j] < ZERO:
            point_J[j] = -point_J[j]
        error = left_J[j] - point_J[j]
        for k in range(j + 1, EIGHT):
            left_J[k] -= error * ratio_JK[j, k]


@compiled
def cost_of(error_J: Floats, metric_JK: Floats) -> Any:
    """error metric error^T."""
    total = ZERO
    for j in range(EIGHT):
        slope = ZERO
        for k in range(EIGHT):
            slope += metric_JK[j, k] * error_J[k]
        total += slope * error_J[j]
    return total


@compiled
def make_even(wanted_J: Floats, point_J: Floats, error_J: Floats, metric_JK: Floats) -> None:
    """Flips the sign that costs least when the number of minuses in point_J is odd; error_J is scratch."""
    odd = False
    for j in range(EIGHT):
        error_J[j] = wanted_J[j] - point_J[j]
        odd ^= point_J[j] < ZERO
    if not odd:
        return
    least, flipped = HUGE, 0
    for j in range(EIGHT):
        slope = ZERO
        for k in range(EIGHT):
            slope += metric_JK[j, k] * error_J[k]
        rise = FOUR * point_J[j] * (slope + point_J[j] * metric_JK[j, j])
        if rise < least:
            least, flipped = rise, j
    point_J[flipped] = -point_J[flipped]


@compiled
def choose(
    wanted_JR: Floats,
    chosen_JR: Floats,
    code_R: NDArray[np.int32],
    state_JKR: Floats,
    cost_JR: Floats,
    flip_JR: Floats,
    parity_JR: Floats,
    error_R: Floats,
    best_R: Floats,
    choice_R: NDArray[np.int32],
    left_RJ: Floats,
    point_RJ: Floats,
    error_J: Floats,
    wanted_J: Floats,
    metric_JK: Floats,
    ratio_JK: Floats,
    weight_J: Floats,
    points_PD: Floats,
    shared_P: NDArray[np.int64],
    index_P: NDArray[np.int64],
    signs: int,
) -> None:
    """For eight wanted columns in units of the scale, the points chosen (signs included) and their codes, row by row.

    What lies between code_R and metric_JK is scratch.
    """
    dimensions = points_PD.shape[1]
    for r in range(LANES):
        code_R[r] = 0
        for j in range(EIGHT):
            left_RJ[r, j] = wanted_JR[j, r]
    for at in range(0, EIGHT, dimensions):
        for j in range(dimensions):
            for r in range(LANES):
                state_JKR[0, j, r] = left_RJ[r, at + j]
        search(
            state_JKR,
            cost_JR,
            flip_JR,
            parity_JR,
            error_R,
            best_R,
            choice_R,
            at,
            ratio_JK,
            weight_J,
            points_PD,
            shared_P,
            signs,
        )
        for r in range(LANES):
            for j in range(dimensions):
                point_RJ[r, at + j] = points_PD[choice_R[r], j]
            code_R[r] |= np.int32(index_P[choice_R[r]] << (INDEX_BITS * (at // dimensions)))
            sign_and_push(left_RJ[r], point_RJ[r], at, dimensions, ratio_JK, signs)
    for r in range(LANES):
        if signs == EVEN:
            for j in range(EIGHT):
                wanted_J[j] = wanted_JR[j, r]
            make_even(wanted_J, point_RJ[r], error_J, metric_JK)
        for j in range(EIGHT):
            chosen_JR[j, r] = point_RJ[r, j]
            if signs != NONE and point_RJ[r, j] < ZERO:
                code_R[r] |= np.int32(1 << (SIGNS_AT + j))
