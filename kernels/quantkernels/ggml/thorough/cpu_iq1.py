"""IQ1_S and IQ1_M of least weighted square error: one number, d, is searched, and everything else is exact for it.

For given d each sub-block takes the best of its 8 scales, its shifts and, in each group of eight, the best of all 2048
points, independently of the others. A group's error as a function of the scale is the lower envelope of 2048 parabolas,
and only seven or so of them show: they are found once (`cpu_iq1_envelope.py`), after which any number of values of d
cost next to nothing. A ladder of 32, then of 16, then the least-squares value settle it. The alternative, coordinate
descent from ggml's choice, looks at all points again for each scale and stays near where it began.

d is never negative, although the lattice is not symmetric: a second search for -x would gain half a percent or less.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, inlined, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.iq1 import GROUPS
from quantkernels.ggml.cpu.iq1_pack import pack_m, pack_s
from quantkernels.ggml.cpu.search import ZERO
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.thorough.cpu_iq1_envelope import HIGH, MOST, Envelopes, Halves, find_envelopes, halves, lowest
from quantkernels.lanes import WIDTH, Lanes, buffer, load, select, spread, store

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LEAST_WEIGHT = np.float32(2.0**-30)  # of the largest in a super-block: groups of no importance are fitted too
FIFTEENTH = np.float32(1 / 15)
LEAST_SHARE = np.float32(0.06)  # of the largest scale: about d
REACH_LOW, REACH_HIGH = np.float32(0.5), np.float32(1.4)  # of root mean square and of largest magnitude
TINY = np.float32(1e-38)
# Trial scales of a sub-block in units of its weighted root mean square: from that of even weights to an outlier's.
TRIAL_LOW, TRIAL_STEP = np.float32(0.9), np.float32(1.14)
# Trial values of d in units of a fifteenth of the largest scale: 0.55 to 1.92; then 16 within the best one's step.
LADDER_LOW, LADDER_STEP = np.float32(0.55), np.float32(1.041)
FINE_LOW, FINE_STEP = np.float32(0.965), np.float32(1.0047)


@compiled
def weigh(rows: Floats, importance: Floats, start: int, columns: int, weight: Floats) -> None:
    """Importance over the super-block's largest, so that no sum overflows; ones where there is none."""
    largest = ZERO
    if len(importance) > 0:
        for i in range(SUPER_BLOCK):
            largest = max(largest, importance[start % columns + i])
    for i in range(SUPER_BLOCK):
        weight[i] = np.float32(1)
        if largest > ZERO:
            weight[i] = max(importance[start % columns + i] / largest, LEAST_WEIGHT)


@compiled
def survey(rows: Floats, start: int, weight: Floats, groups: int, roots: Floats, ranges: Floats) -> None:
    """Each sub-block's weighted root mean square, and the lowest and highest scale that it can ask for."""
    size = groups * 8
    top = ZERO
    root = ZERO
    for j in range(SUPER_BLOCK // size):
        sum_w, squares, largest = TINY, ZERO, ZERO
        for i in range(j * size, (j + 1) * size):
            value = abs(rows[start + i])
            sum_w += weight[i]
            squares += weight[i] * value * value
            largest = max(largest, value)
        roots[j] = np.sqrt(squares / sum_w)
        ranges[2 * j] = largest
        top = max(top, largest)
        root = max(root, roots[j])
    for j in range(SUPER_BLOCK // size):
        ranges[2 * j + 1] = max(ranges[2 * j], top * LEAST_SHARE) * REACH_HIGH
        ranges[2 * j] = max(roots[j], root * LEAST_SHARE) * REACH_LOW


@compiled
def sub_block_error(found: Envelopes, first: int, groups: int, scale: Lanes) -> Lanes:
    """The least error of `groups` groups from `first` on, less what all zeros leave, for sixteen scales.

    In IQ1_S, of four groups, they share a shift; in IQ1_M, of two, each has its own.
    """
    plus = spread(ZERO)
    minus = spread(ZERO)
    for group in range(first, first + groups):
        with_plus = lowest(found, 2 * group, scale)
        with_minus = lowest(found, 2 * group + 1, scale)
        if groups == 4:
            plus += with_plus
            minus += with_minus
        else:
            plus += select(with_minus < with_plus, with_minus, with_plus)
    return select(minus < plus, minus, plus) if groups == 4 else plus


@compiled
def error_of(found: Envelopes, groups: int, d: Lanes) -> Lanes:
    """The least error of a super-block, less what all zeros leave, for sixteen values of d."""
    total = spread(ZERO)
    for first in range(0, GROUPS, groups):
        best = spread(HIGH)
        for code in range(8):
            error = sub_block_error(found, first, groups, d * np.float32(2 * code + 1))
            best = select(error < best, error, best)
        total += best
    return total


@compiled
def as_stored(value: np.float32, half: Bytes) -> np.float32:
    """The value that float16 leaves; 0 where that is infinite."""
    stored = store_half(half, 0, value)
    return stored if stored < np.float32(65520) else ZERO


@compiled
def best_of(
    found: Envelopes, groups: int, trials: Floats, best: np.float32, d: np.float32
) -> tuple[np.float32, np.float32]:
    """The (error, d) of the best among sixteen trial values and the best so far."""
    store(trials, WIDTH, error_of(found, groups, load(trials, 0)))
    for k in range(WIDTH):
        if trials[WIDTH + k] < best:
            best, d = trials[WIDTH + k], trials[k]
    return best, d


@compiled
def largest_scale(found: Envelopes, groups: int, roots: Floats, trials: Floats) -> np.float32:
    """The largest of the scales that suit the sub-blocks best, to a trial's step; roots are root mean squares."""
    largest = ZERO
    for j in range(GROUPS // groups):
        scale = roots[j] * TRIAL_LOW
        for k in range(WIDTH):
            trials[k] = scale
            scale *= TRIAL_STEP
        store(trials, WIDTH, sub_block_error(found, j * groups, groups, load(trials, 0)))
        best = 0
        for k in range(1, WIDTH):
            if trials[WIDTH + k] < trials[WIDTH + best]:
                best = k
        largest = max(largest, trials[best])
    return largest


@compiled
def choose(
    found: Envelopes, groups: int, d: np.float32, trials: Floats, codes: Floats, minus: NDArray[np.bool_],
    points: NDArray[np.int64]
) -> np.float32:  # fmt: skip
    """Sub-scales, shifts and points for d; gives the least-squares d for them, d itself where nothing weighs."""
    sum_xq = np.float64(0)
    sum_qq = np.float64(0)
    for j in range(GROUPS // groups):
        for k in range(WIDTH):
            trials[k] = d * np.float32(2 * (k % 8) + 1)
        store(trials, WIDTH, sub_block_error(found, j * groups, groups, load(trials, 0)))
        code = 0
        for k in range(1, 8):
            if trials[WIDTH + k] < trials[WIDTH + code]:
                code = k
        codes[j] = np.float32(code)
        scale = trials[code]
        errors = np.zeros(2, np.float32)
        for group in range(j * groups, (j + 1) * groups):
            if groups == 2:
                errors[0] = ZERO
                errors[1] = ZERO
            for shift in range(2):
                errors[shift] += vertex_of(found, 2 * group + shift, scale)[0]
            minus[group] = errors[1] < errors[0]
        for group in range(j * groups, (j + 1) * groups):
            if groups == 4:
                minus[group] = errors[1] < errors[0]
            which = 2 * group + (1 if minus[group] else 0)
            vertex = vertex_of(found, which, scale)[1]
            points[group] = found.points[vertex]
            factor = np.float64(2 * code + 1)
            sum_xq += factor * np.float64(found.slopes[vertex])
            sum_qq += factor * factor * np.float64(found.squares[vertex])
    return np.float32(sum_xq / sum_qq) if sum_qq > 0 else d


@inlined
def vertex_of(found: Envelopes, which: int, scale: np.float32) -> tuple[np.float32, int]:
    """The (error, place) of the best parabola of one envelope for a scale, the first of equals."""
    best = np.float32(3e38)
    place = which * MOST
    for vertex in range(which * MOST, which * MOST + found.counts[which]):
        error = scale * (scale * found.squares[vertex] - np.float32(2) * found.slopes[vertex])
        if error < best:
            best, place = error, vertex
    return best, place


@compiled
def settle(
    found: Envelopes, groups: int, roots: Floats, trials: Floats, half: Bytes, codes: Floats,
    minus: NDArray[np.bool_], points: NDArray[np.int64]
) -> np.float32:  # fmt: skip
    """The d of least error, with sub-scales, shifts and points for it."""
    step = largest_scale(found, groups, roots, trials) * FIFTEENTH * LADDER_LOW
    best, d = ZERO, ZERO
    for _ in range(2):
        for k in range(WIDTH):
            trials[k] = as_stored(step, half)
            step *= LADDER_STEP
        best, d = best_of(found, groups, trials, best, d)
    step = d * FINE_LOW
    for k in range(WIDTH):
        trials[k] = as_stored(step, half)
        step *= FINE_STEP
    best, d = best_of(found, groups, trials, best, d)
    refit = choose(found, groups, d, trials, codes, minus, points)
    for k in range(WIDTH):
        trials[k] = as_stored(refit, half)
    refit = trials[0]
    better, refit = best_of(found, groups, trials, best, d)
    if better < best:
        d = refit
        choose(found, groups, d, trials, codes, minus, points)
    return d


@kernel
def quantize_iq1_thoroughly(
    rows: Floats, importance: Floats, columns: int, known: Halves, wide: bool, out: Bytes
) -> None:
    """IQ1_M when `wide`, else IQ1_S, of flat `rows` into flat `out`; importance may be empty."""
    groups = 2 if wide else 4
    weight = np.empty(SUPER_BLOCK, np.float32)
    roots = np.empty(GROUPS // groups, np.float32)
    ranges = np.empty(2 * GROUPS // groups, np.float32)
    codes = np.empty(GROUPS // groups, np.float32)
    minus = np.empty(GROUPS, np.bool_)
    points = np.empty(GROUPS, np.int64)
    half = np.empty(2, np.uint8)
    trials = buffer(2)
    found = Envelopes(
        np.empty(2 * GROUPS, np.int64),
        np.empty(2 * GROUPS * MOST, np.int64),
        np.empty(2 * GROUPS * MOST, np.float32),
        np.empty(2 * GROUPS * MOST, np.float32),
        np.empty(2 * GROUPS * MOST, np.float32),
    )
    scratch = (buffer(18), buffer(18), buffer(12), buffer(12), buffer(12))
    for block in range(len(rows) // SUPER_BLOCK):
        start = block * SUPER_BLOCK
        weigh(rows, importance, start, columns, weight)
        survey(rows, start, weight, groups, roots, ranges)
        find_envelopes(known, rows[start : start + SUPER_BLOCK], weight, ranges, groups, scratch, found)
        d = settle(found, groups, roots, trials, half, codes, minus, points)
        if wide:
            store_half(half, 0, d)
            pack_m(codes, minus, points, half, out, block * 56)
        else:
            store_half(out, block * 50, d)
            pack_s(codes, minus, points, out, block * 50)


def quantize_thorough(rows: Floats, importance: Floats | None, name: str, out: Bytes) -> None:
    """Write IQ1_S or IQ1_M blocks of low error for `rows` to `out`.

    rows [R, C] f32, finite, contiguous; importance [C] f32 or None for ones; out [R, bytes] u8, contiguous.
    """
    weights = np.empty(0, np.float32) if importance is None else importance
    quantize_iq1_thoroughly(rows.reshape(-1), weights, rows.shape[1], halves(), name == "IQ1_M", out.reshape(-1))
