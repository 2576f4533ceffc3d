"""What every lattice point of IQ3_XXS or IQ3_S gains for a group of four weights, at one scale or at sixteen.

See `thorough/reference/iq3.py`. A super-block's sums lie in one flat array of three parts, [64, P] each: the linear
terms, those with one sign turned, and the squares. They take up to 384 KiB and stay in the second cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, inlined
from quantkernels.ggml.cpu.iq3 import largest_of
from quantkernels.ggml.cpu.iq3_search import TWO, item
from quantkernels.ggml.cpu.search import ONE, ZERO
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import WIDTH, Lanes, load, magnitude, select, spread, store

Floats = NDArray[np.float32]

FOUR = np.float32(4)
LEAST = np.float32(-np.inf)
SMALLEST = np.float32(1 / 32)
GROUPS = 64
LINEAR, TURNED, SQUARE = 0, 1, 2  # the parts of `sums`


@inlined
def fill_magnitudes(
    rows: Floats, start: int, importance: Floats, importance_start: int, block: Floats, largest: Floats
) -> None:
    """Fill `block` with 256 magnitudes, weights and their products, `largest` as in `_Problem`."""
    most = ZERO
    for j in range(8):
        top = spread(ZERO)
        for half in range(2):
            at = 32 * j + half * WIDTH
            x = magnitude(load(rows, start + at))
            weight = spread(ONE)
            if len(importance) > 0:
                weight = load(importance, importance_start + at)
            top = select((x > top) & (weight > ZERO), x, top)
            store(block, at, x)
            store(block, SUPER_BLOCK + at, weight)
            store(block, 2 * SUPER_BLOCK + at, weight * x)
        largest[j] = largest_of(top)
        most = max(most, largest[j])
    for j in range(8):
        largest[j] = max(largest[j], most * SMALLEST)


@compiled
def fill_sums(block: Floats, group: int, values: Floats, points: int, with_turned: bool, sums: Floats) -> None:
    """The sums of `_Problem` for one group and all points."""
    at = 4 * group
    for p in range(0, points, WIDTH):
        value = load(values, p), load(values, points + p), load(values, 2 * points + p), load(values, 3 * points + p)
        term = item(block, 2 * SUPER_BLOCK + at) * value[0]
        total = term
        least = term
        squares = item(block, SUPER_BLOCK + at) * (value[0] * value[0])
        term = item(block, 2 * SUPER_BLOCK + at + 1) * value[1]
        total = total + term
        least = select(term < least, term, least)
        squares = squares + item(block, SUPER_BLOCK + at + 1) * (value[1] * value[1])
        term = item(block, 2 * SUPER_BLOCK + at + 2) * value[2]
        total = total + term
        least = select(term < least, term, least)
        squares = squares + item(block, SUPER_BLOCK + at + 2) * (value[2] * value[2])
        term = item(block, 2 * SUPER_BLOCK + at + 3) * value[3]
        total = TWO * (total + term)
        least = select(term < least, term, least)
        squares = squares + item(block, SUPER_BLOCK + at + 3) * (value[3] * value[3])
        at_point = group * points + p
        store(sums, LINEAR * GROUPS * points + at_point, total)
        store(sums, SQUARE * GROUPS * points + at_point, squares)
        if with_turned:
            store(sums, TURNED * GROUPS * points + at_point, total - FOUR * least)


@inlined
def curve(sums: Floats, kind: int, group: int, points: int, scale: Lanes) -> Lanes:
    """The most that any point gains for the group, divided by the scale, at sixteen scales."""
    at, square = (kind * GROUPS + group) * points, (SQUARE * GROUPS + group) * points
    best, other = spread(LEAST), spread(LEAST)
    for p in range(0, points, 2):
        gain = item(sums, at + p) - scale * item(sums, square + p)
        best = select(gain > best, gain, best)
        gain = item(sums, at + p + 1) - scale * item(sums, square + p + 1)
        other = select(gain > other, gain, other)
    return select(other > best, other, best)


@compiled
def draw_curve(j: int, points: int, odd: int, sums: Floats, scale: Lanes) -> Lanes:
    """The gain of sub-block j at sixteen scales; bit i of odd says whether eight weights need a turned point."""
    total = spread(ZERO)
    for octet in range(4 * j, 4 * j + 4):
        first = curve(sums, LINEAR, 2 * octet, points, scale)
        second = curve(sums, LINEAR, 2 * octet + 1, points, scale)
        own = first + second
        if (odd >> octet) & 1:
            left = curve(sums, TURNED, 2 * octet, points, scale) + second
            own = first + curve(sums, TURNED, 2 * octet + 1, points, scale)
            own = select(own > left, own, left)
        total = own if octet == 4 * j else total + own
    return scale * total


@inlined
def top_gain(sums: Floats, kind: int, group: int, points: int, scale: np.float32) -> np.float32:
    """The most that any point gains for the group, divided by the scale."""
    at, square = (kind * GROUPS + group) * points, (SQUARE * GROUPS + group) * points
    best, other = spread(LEAST), spread(LEAST)
    for p in range(0, points, 2 * WIDTH):
        gain = load(sums, at + p) - scale * load(sums, square + p)
        best = select(gain > best, gain, best)
        gain = load(sums, at + p + WIDTH) - scale * load(sums, square + p + WIDTH)
        other = select(gain > other, gain, other)
    most: np.float32 = largest_of(select(other > best, other, best))
    return most


@inlined
def top_point(sums: Floats, kind: int, group: int, points: int, scale: np.float32, numbers: Floats) -> int:
    """The point that gains most for the group, the first of equals."""
    at, square = (kind * GROUPS + group) * points, (SQUARE * GROUPS + group) * points
    best, where = spread(LEAST), spread(ZERO)
    for p in range(0, points, WIDTH):
        gain = load(sums, at + p) - scale * load(sums, square + p)
        better = gain > best
        best = select(better, gain, best)
        where = select(better, np.float32(p), where)
    where = where + load(numbers, 0)
    return int(-largest_of(select(best == spread(largest_of(best)), -where, np.float32(1 - points))))


@compiled
def gain_of(j: int, points: int, odd: int, sums: Floats, scale: np.float32) -> np.float32:
    """The gain of sub-block j at a scale."""
    total = ZERO
    for octet in range(4 * j, 4 * j + 4):
        first = top_gain(sums, LINEAR, 2 * octet, points, scale)
        second = top_gain(sums, LINEAR, 2 * octet + 1, points, scale)
        own = first + second
        if (odd >> octet) & 1:
            left = top_gain(sums, TURNED, 2 * octet, points, scale) + second
            own = first + top_gain(sums, TURNED, 2 * octet + 1, points, scale)
            own = own if own > left else left
        total = own if octet == 4 * j else total + own
    return scale * total
