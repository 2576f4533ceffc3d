"""The transform in numba: sixteen rows at a time, one in each SIMD lane.

Sixteen rows are turned so that a column of them is contiguous; every step is then the same addition in all lanes, and
nothing is summed across lanes. Rows by themselves would have the first four steps inside one vector.

# N rows, D columns, L lanes, P a power of two, F width of the factor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel

Floats = NDArray[np.float32]
LANES = 16
LINE = 16  # values of a cache line
TOGETHER = 4  # blocks that are added up at a time: each pass over the sums is a load and a store


@compiled
def _butterflies(values_DL: Floats, start: int, size: int) -> None:
    """Sylvester's transform, without its scale, of `size` columns from `start` on; two steps in one pass."""
    step = 1
    while 2 * step < size:
        for block in range(start, start + size, 4 * step):
            for first in range(block, block + step):
                for lane in range(LANES):
                    a, b = values_DL[first, lane], values_DL[first + step, lane]
                    c, d = values_DL[first + 2 * step, lane], values_DL[first + 3 * step, lane]
                    ab, cd, a_b, c_d = a + b, c + d, a - b, c - d
                    values_DL[first, lane], values_DL[first + step, lane] = ab + cd, a_b + c_d
                    values_DL[first + 2 * step, lane], values_DL[first + 3 * step, lane] = ab - cd, a_b - c_d
        step *= 4
    if step < size:
        for first in range(start, start + step):
            for lane in range(LANES):
                a, b = values_DL[first, lane], values_DL[first + step, lane]
                values_DL[first, lane], values_DL[first + step, lane] = a + b, a - b


@compiled
def _mix(values_DL: Floats, factor_FF: Floats, size: int, mixed_DL: Floats) -> None:
    """Blocks of `size` columns, mixed as the factor says."""
    width = factor_FF.shape[0]
    whole = width - width % TOGETHER
    mixed_DL[:] = 0
    for out in range(width):
        sums_DL = mixed_DL[out * size : (out + 1) * size]
        for given in range(0, whole, TOGETHER):
            a, b = factor_FF[given, out], factor_FF[given + 1, out]
            c, d = factor_FF[given + 2, out], factor_FF[given + 3, out]
            for at in range(size):
                first = given * size + at
                for lane in range(LANES):
                    low = a * values_DL[first, lane] + b * values_DL[first + size, lane]
                    high = c * values_DL[first + 2 * size, lane] + d * values_DL[first + 3 * size, lane]
                    sums_DL[at, lane] += low + high
        for given in range(whole, width):
            share = factor_FF[given, out]
            for at in range(size):
                for lane in range(LANES):
                    sums_DL[at, lane] += share * values_DL[given * size + at, lane]


@compiled
def _turn_in(rows_LD: Floats, values_DL: Floats) -> None:
    """The rows with a lane each, a cache line of every row at a time: rows a power of two apart share few places."""
    lanes, columns = rows_LD.shape
    for start in range(0, columns, LINE):
        for lane in range(lanes):
            for column in range(start, min(start + LINE, columns)):
                values_DL[column, lane] = rows_LD[lane, column]


@compiled
def _turn_out(values_DL: Floats, rows_LD: Floats) -> None:
    lanes, columns = rows_LD.shape
    for start in range(0, columns, LINE):
        for lane in range(lanes):
            for column in range(start, min(start + LINE, columns)):
                rows_LD[lane, column] = values_DL[column, lane]


@kernel
def spread(rows_ND: Floats, factor_FF: Floats, out_ND: Floats) -> None:
    """Fills out_ND with the rows times the matrix; factor_FF is divided by the root of D / F already."""
    count, columns = rows_ND.shape
    size = columns // factor_FF.shape[0]
    values_DL = np.zeros((columns, LANES), np.float32)
    mixed_DL = np.zeros((columns, LANES), np.float32)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        _turn_in(rows_ND[first : first + lanes], values_DL)
        for start in range(0, columns, size):
            _butterflies(values_DL, start, size)
        _mix(values_DL, factor_FF, size, mixed_DL)
        _turn_out(mixed_DL, out_ND[first : first + lanes])
