"""Sums and errors over the levels of a type: whole numbers, the table of IQ4, the four-bit floats of FP4.

A grid is (kind, low, high); low and high are the first and the last whole number and mean nothing for the other kinds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled
from quantkernels.ggml.cpu import iq4 as cpu_iq4
from quantkernels.ggml.cpu.search import ZERO, bounded_codes, extreme_of
from quantkernels.ggml.thorough.cpu_search import inverse_of
from quantkernels.lanes import WIDTH, Lanes, load, magnitude, select, spread

Floats = NDArray[np.float32]

WHOLE = 0
TABLE = 1
FLOAT4 = 2
FLOAT4_STEPS = tuple(np.float32(value) for value in (1, 1, 1, 1, 2, 2, 4))
FLOAT4_MIDDLES = tuple(np.float32(value) for value in (0.5, 1.5, 2.5, 3.5, 5, 7, 10))

table_level = cpu_iq4.nearest_level
table_code = cpu_iq4.nearest_code


@compiled
def nearest_level(value: Lanes, grid: tuple[int, np.float32, np.float32]) -> Lanes:
    """The level nearest to `value`."""
    if grid[0] == WHOLE:
        return bounded_codes(value, grid[1], grid[2])
    if grid[0] == TABLE:
        return table_level(value)
    size = magnitude(value)
    level = spread(ZERO)
    for k in range(7):
        level += select(size > FLOAT4_MIDDLES[k], FLOAT4_STEPS[k], ZERO)
    return select(value < ZERO, -level, level)


@compiled
def nearest_code(value: Lanes, grid: tuple[int, np.float32, np.float32]) -> Lanes:
    """The code, from 0 on, of the level nearest to `value`; never that of -0."""
    if grid[0] == WHOLE:
        return bounded_codes(value, grid[1], grid[2]) - grid[1]
    if grid[0] == TABLE:
        return table_code(value)
    size = magnitude(value)
    code = spread(ZERO)
    for k in range(7):
        code += select(size > FLOAT4_MIDDLES[k], np.float32(1), ZERO)
    return select((value < ZERO) & (code > ZERO), code + np.float32(8), code)


@compiled
def level_sums(
    x: Floats, weight: Floats, at: int, count: int, inverse: Lanes, grid: tuple[int, np.float32, np.float32]
) -> tuple[Lanes, Lanes]:
    """Weighted sums of x * level and level * level, for the levels nearest to x * inverse."""
    sum_xl = spread(ZERO)
    sum_l2 = spread(ZERO)
    for i in range(at, at + count):
        value = load(x, i * WIDTH)
        level = nearest_level(value * inverse, grid)
        weighted = load(weight, i * WIDTH) * level
        sum_xl += weighted * value
        sum_l2 += weighted * level
    return sum_xl, sum_l2


@compiled
def level_error(
    x: Floats, weight: Floats, at: int, count: int, scale: Lanes, grid: tuple[int, np.float32, np.float32]
) -> Lanes:
    """The weighted square error of scale * level with the nearest levels."""
    inverse = inverse_of(scale)
    total = spread(ZERO)
    for i in range(at, at + count):
        value = load(x, i * WIDTH)
        error = value - scale * nearest_level(value * inverse, grid)
        total += load(weight, i * WIDTH) * (error * error)
    return total


@compiled
def fit_scale(
    x: Floats,
    weight: Floats,
    at: int,
    count: int,
    grid: tuple[int, np.float32, np.float32],
    end: np.float32,
    beyond: Floats,
) -> tuple[Lanes, Lanes]:
    """The best least-squares scale that brings the extreme weight to `end` or past it, and the error it takes away."""
    extreme = extreme_of(x, at, count)
    best = spread(ZERO)
    scale = extreme / end
    for r in range(len(beyond)):
        reach = end + beyond[r] if end > ZERO else end - beyond[r]
        sum_xl, sum_l2 = level_sums(x, weight, at, count, reach / extreme, grid)
        trial = sum_xl / sum_l2
        gain = trial * sum_xl
        better = gain > best
        best = select(better, gain, best)
        scale = select(better, trial, scale)
    return scale, best
