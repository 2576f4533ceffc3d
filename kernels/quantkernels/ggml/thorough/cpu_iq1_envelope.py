"""Which lattice points are ever the best for a group of eight weights, whatever its scale.

With q the point plus a shift, the error less the error of zeros is s^2 sum(w q q) - 2 s sum(w x q): a parabola in the
scale s. The points that are best for some s form the lower envelope; it is found by asking for the best point at both
ends of the range and then where neighbours on the envelope cross, until nothing lies below a crossing.

Asking for one scale looks at all 2048 points without visiting them: a point is two halves of four levels, 81 each, and
a first half whose own sum plus the best second half is no better than the best point so far is passed over whole.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numpy.typing import NDArray

from quantkernels.compiling import compiled, inlined, instruction
from quantkernels.ggml.cpu.lanes_lattice import first_least, one_of
from quantkernels.ggml.cpu.search import ONE, ZERO
from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import WIDTH, Lanes, bits_of, lanes_type, load, mask_type, select, spread, store

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

HALF_POINTS = 81
LINES = 6  # of sixteen lanes, for 81 halves
MOST = 24  # parabolas kept of an envelope; seven is usual
SHIFT = np.float32(0.125)
TWO = np.float32(2)
HIGH = np.float32(3e38)
EMPTY = np.float32(1e30)  # the sum of squares of the halves that fill up the last line
FINE = np.float32(0.003)  # of the group's sum(w x x): what an envelope may be off by between two known scales
NOISE = np.float32(1e-3)  # of that share: a point less than this below a crossing is rounding


class Halves(NamedTuple):
    """levels f32 [4 * 96]: -1, 0, 1 of each half point, level by level; 0 past the 81st.

    partners i64 [81 * 6]: for each first half sixteen bits a line, set where a second half makes it a point. index_of
    i64 [81 * 81]: the point of a first half and, 81 times, a second half.
    """

    levels: Floats
    partners: Integers
    index_of: Integers


class Envelopes(NamedTuple):
    """For 32 groups and shifts plus, minus: counts i64 [64] of parabolas, and of each, [64 * MOST], its point i64,
    its slope sum(w x q), its square sum(w q q) and a scale at which it is the best, f32."""

    counts: Integers
    points: Integers
    slopes: Floats
    squares: Floats
    scales: Floats


@cache
def halves() -> Halves:
    """The tables, made once in a process."""
    known = lattice("IQ1")
    digits = known.points.astype(np.int64) + 1
    powers = 3 ** np.arange(4)
    first, second = digits[:, :4] @ powers, digits[:, 4:] @ powers
    index_of = np.full((HALF_POINTS, HALF_POINTS), -1, np.int64)
    index_of[second, first] = np.arange(len(digits))
    joined = np.zeros((HALF_POINTS, LINES * WIDTH), np.int64)
    joined[first, second] = 1
    partners = (joined.reshape(HALF_POINTS, LINES, WIDTH) << np.arange(WIDTH)).sum(axis=2)
    levels = np.zeros((4, LINES * WIDTH), np.float32)
    levels[:, :HALF_POINTS] = np.arange(HALF_POINTS) // powers[:, None] % 3 - 1
    return Halves(levels.reshape(-1), partners.reshape(-1), index_of.reshape(-1))


@instruction
def mask_of(typing_context: Any, bits: Any) -> Any:
    """The mask whose lane 0 is the lowest bit."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.bitcast(builder.trunc(values[0], ir.IntType(WIDTH)), ir.VectorType(ir.IntType(1), WIDTH))

    return mask_type(types.int64), emit


@instruction
def lowest_bit(typing_context: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.cttz(values[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), emit


@instruction
def least_of(typing_context: Any, value: Any) -> Any:
    """The smallest of sixteen values, none of them NaN."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        least = values[0]
        for width in (8, 4, 2, 1):
            vector = ir.VectorType(ir.IntType(32), width)
            low, high = (
                builder.shuffle_vector(
                    least, ir.Constant(least.type, ir.Undefined), ir.Constant(vector, list(range(start, start + width)))
                )
                for start in (0, width)
            )
            least = builder.select(builder.fcmp_ordered("<", low, high), low, high)
        return builder.extract_element(least, ir.Constant(ir.IntType(32), 0))

    return types.float32(lanes_type), emit


@inlined
def lowest(found: Envelopes, which: int, scale: Lanes) -> Lanes:
    """The least error of one envelope for sixteen scales."""
    best = spread(ZERO)
    first = which * MOST
    for vertex in range(first, first + found.counts[which]):
        error = scale * (scale * found.squares[vertex] - TWO * found.slopes[vertex])
        best = error if vertex == first else select(error < best, error, best)
    return best


@compiled
def sum_halves(known: Halves, x: Floats, weight: Floats, at: int, sums: Floats) -> None:
    """Sums over each half point for four weights: of w x q, w q and w q q without a shift, six lines each."""
    for line in range(LINES):
        slope, level_sum, square = spread(ZERO), spread(ZERO), spread(ZERO)
        for i in range(4):
            level = load(known.levels, (i * LINES + line) * WIDTH)
            weighted = level * weight[at + i]
            slope += weighted * x[at + i]
            level_sum += weighted
            square += weighted * level
        store(sums, line * WIDTH, slope)
        store(sums, (LINES + line) * WIDTH, level_sum)
        store(sums, (2 * LINES + line) * WIDTH, square)


@compiled
def shift_halves(x: Floats, weight: Floats, at: int, shift: np.float32, sums: Floats, shifted: Floats) -> None:
    """Slopes and squares of the half points plus a shift, six lines each, from sums without one."""
    sum_wx, sum_w = ZERO, ZERO
    for i in range(at, at + 4):
        sum_wx += weight[i] * x[i]
        sum_w += weight[i]
    for line in range(LINES):
        store(shifted, line * WIDTH, load(sums, line * WIDTH) + shift * sum_wx)
        square = load(sums, (2 * LINES + line) * WIDTH) + TWO * shift * load(sums, (LINES + line) * WIDTH)
        store(shifted, (LINES + line) * WIDTH, square + shift * shift * sum_w)
    for k in range(HALF_POINTS, LINES * WIDTH):
        shifted[k] = ZERO
        shifted[LINES * WIDTH + k] = EMPTY


@inlined
def errors_at(shifted: Floats, scale: np.float32, errors: Floats) -> np.float32:
    """The errors of the half points at a scale, six lines; gives the least."""
    least = spread(HIGH)
    for line in range(LINES):
        slope, square = load(shifted, line * WIDTH), load(shifted, (LINES + line) * WIDTH)
        error = (square * scale - slope * TWO) * scale
        store(errors, line * WIDTH, error)
        least = select(error < least, error, least)
    found: np.float32 = least_of(least)
    return found


@inlined
def try_first(
    known: Halves, first: int, errors: Floats, seconds: Floats, best: Lanes, where: Lanes
) -> tuple[Lanes, Lanes]:
    """The best errors and the lines they came from after all points that begin with one first half."""
    for line in range(LINES):
        error = load(seconds, line * WIDTH) + errors[first]
        better = mask_of(known.partners[first * LINES + line]) & (error < best)
        best = select(better, error, best)
        where = select(better, np.float32(first * LINES + line), where)
    return best, where


@inlined
def best_point(
    known: Halves, first: Floats, second: Floats, scale: np.float32, bound: np.float32, errors: Floats, seconds: Floats
) -> int:
    """The best point at a scale, as its first half plus 96 times its second; -1 where no error is below `bound`."""
    least = errors_at(first, scale, errors)
    least_second = errors_at(second, scale, seconds)
    best, where = spread(bound), spread(ZERO)
    limit = bound
    if not bound < HIGH:  # begin with the best first half, so that few others have to be looked at
        for line in range(LINES):
            here = bits_of(load(errors, line * WIDTH) == spread(least))
            if here != 0:
                best, where = try_first(known, line * WIDTH + lowest_bit(here), errors, seconds, best, where)
                limit = least_of(best)
                break
    for part in range(0, LINES, 3):
        left = bits_of(load(errors, part * WIDTH) + least_second < spread(limit))
        left |= bits_of(load(errors, (part + 1) * WIDTH) + least_second < spread(limit)) << WIDTH
        left |= bits_of(load(errors, (part + 2) * WIDTH) + least_second < spread(limit)) << (2 * WIDTH)
        while left != 0:
            here = part * WIDTH + lowest_bit(left)
            left &= left - 1
            if errors[here] + least_second < limit:
                best, where = try_first(known, here, errors, seconds, best, where)
                limit = least_of(best)
    if not limit < bound:
        return -1
    lane = first_least(best)
    found = int(one_of(where, lane))
    point: int = found // LINES + LINES * WIDTH * (found % LINES * WIDTH + lane)
    return point


@inlined
def insert(
    known: Halves, first: Floats, second: Floats, point: int, at: int, which: int, scale: np.float32, found: Envelopes
) -> None:
    """Put a point, the best at `scale`, before place `at` of an envelope."""
    for place in range(which * MOST + found.counts[which], at, -1):
        found.points[place] = found.points[place - 1]
        found.slopes[place] = found.slopes[place - 1]
        found.squares[place] = found.squares[place - 1]
        found.scales[place] = found.scales[place - 1]
    one, other = point % (LINES * WIDTH), point // (LINES * WIDTH)
    found.points[at] = known.index_of[one + HALF_POINTS * other]
    found.slopes[at] = first[one] + second[other]
    found.squares[at] = first[LINES * WIDTH + one] + second[LINES * WIDTH + other]
    found.scales[at] = scale
    found.counts[which] += 1


@inlined
def error_at(found: Envelopes, place: int, scale: np.float32) -> np.float32:
    """The error of one parabola at a scale."""
    error: np.float32 = scale * (scale * found.squares[place] - TWO * found.slopes[place])
    return error


@inlined
def find_envelope(
    known: Halves, first: Floats, second: Floats, low: np.float32, high: np.float32, fine: np.float32, which: int,
    errors: Floats, seconds: Floats, found: Envelopes
) -> None:  # fmt: skip
    """One envelope between two scales, from the high end to the low one.

    Over s^2 the parabolas are lines in 1 / s, so their envelope is concave: between two scales at which it is known it
    lies above the chord. Where a crossing is less than `fine` above that, nothing below it is looked for.
    """
    begin = which * MOST
    found.counts[which] = 0
    found.points[begin] = 0
    for scale in (high, low):
        point = best_point(known, first, second, scale, HIGH, errors, seconds)
        if point >= 0:
            insert(known, first, second, point, begin + found.counts[which], which, scale, found)
    at = begin
    while at + 1 < begin + found.counts[which] < begin + MOST:
        rise = found.squares[at + 1] - found.squares[at]
        scale = TWO * (found.slopes[at + 1] - found.slopes[at]) / rise if rise > ZERO else ZERO
        upper, lower = found.scales[at], found.scales[at + 1]
        if not lower < scale < upper:
            at += 1
            continue
        crossing = error_at(found, at, scale)
        share = (scale - lower) * upper / ((upper - lower) * scale)
        level_upper = error_at(found, at, upper) / (upper * upper)
        level_lower = error_at(found, at + 1, lower) / (lower * lower)
        chord = (share * level_upper + (ONE - share) * level_lower) * scale * scale
        point = -1
        if crossing - chord > fine:
            point = best_point(known, first, second, scale, crossing - fine * NOISE, errors, seconds)
        if point < 0:
            at += 1
        else:
            insert(known, first, second, point, at + 1, which, scale, found)


@compiled
def find_envelopes(
    known: Halves, x: Floats, weight: Floats, ranges: Floats, groups: int,
    scratch: tuple[Floats, Floats, Floats, Floats, Floats], found: Envelopes
) -> None:  # fmt: skip
    """The envelopes of the 32 groups of a super-block for both shifts; ranges hold each sub-block's scales."""
    first_sums, second_sums, first, second, errors = scratch
    seconds = errors[LINES * WIDTH :]
    for group in range(SUPER_BLOCK // 8):
        at = group * 8
        low, high = ranges[2 * (group // groups)], ranges[2 * (group // groups) + 1]
        sum_halves(known, x, weight, at, first_sums)
        sum_halves(known, x, weight, at + 4, second_sums)
        energy = ZERO
        for i in range(at, at + 8):
            energy += weight[i] * x[i] * x[i]
        for negative in range(2):
            shift = -SHIFT if negative == 1 else SHIFT
            shift_halves(x, weight, at, shift, first_sums, first)
            shift_halves(x, weight, at + 4, shift, second_sums, second)
            which = 2 * group + negative
            find_envelope(known, first, second, low, high, energy * FINE, which, errors, seconds, found)
