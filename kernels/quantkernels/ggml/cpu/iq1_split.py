"""The exact split of sixteen sub-blocks into three levels: every pair of cuts and every shift, one sub-block per lane.

Of the 561 pairs of cuts of an IQ1_S sub-block (153 of IQ1_M) few beat the best so far, so a pair is first compared with
it, and the division and the copies that follow are done only when some lane gains.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled
from quantkernels.ggml.cpu.iq1_lattice import LARGEST
from quantkernels.ggml.cpu.lanes_sort import placed_below, taken, value_of
from quantkernels.ggml.cpu.search import ONE, ZERO
from quantkernels.lanes import WIDTH, Lanes, bits_of, load, select, spread, store

Floats = NDArray[np.float32]
Keys = NDArray[np.int64]

SHIFT = np.float32(0.125)
PLUS_LOW, PLUS_HIGH = np.float32(-0.875), np.float32(1.125)
MINUS_LOW, MINUS_HIGH = np.float32(-1.125), np.float32(0.875)
PLUS_STEPS = (np.float32(0.75), np.float32(-1.25))  # between the squares of low and middle, of middle and high
MINUS_STEPS = (np.float32(1.25), np.float32(-0.75))


@compiled
def offer(
    sum_qx: Lanes, sum_q2: Lanes, number: int, best: Lanes, scale: Lanes, choice: Lanes
) -> tuple[Lanes, Lanes, Lanes]:
    """The (best, scale, choice) after cuts and shifts `number` were tried."""
    better = (sum_q2 > ZERO) & (sum_qx * sum_qx > best * sum_q2)
    ratio = sum_qx / sum_q2
    best = select(better, ratio * sum_qx, best)
    return best, select(better, ratio, scale), select(better, np.float32(number), choice)


@compiled
def split_whole(x: Floats, weight: Floats, at: int, keys: Keys, sums: Floats) -> tuple[Lanes, Lanes]:
    """The scale of the best split of 32 weights and its choice, (first * 33 + second) * 2 + minus; -1 for none.

    Where no split is any good because a sum overflowed, the scale is NaN: d then becomes NaN too, which the caller
    refuses. ggml stores zeros there, or stops the process.

    keys are sorted. The six parts of sums, 33 lines each: running sums of weighted values and of weights, and what the
    weights above a cut add, times the high level and times its square, for shifts plus and minus.
    """
    part = 33 * WIDTH
    total_x = spread(ZERO)
    total_w = spread(ZERO)
    store(sums, 0, total_x)
    store(sums, part, total_w)
    for i in range(32):
        factor = taken(weight, at * WIDTH, keys, i * WIDTH)
        total_x += factor * value_of(keys, i * WIDTH)
        total_w += factor
        store(sums, (i + 1) * WIDTH, total_x)
        store(sums, part + (i + 1) * WIDTH, total_w)
    for i in range(33):
        above_x = total_x - load(sums, i * WIDTH)
        above_w = total_w - load(sums, part + i * WIDTH)
        store(sums, 2 * part + i * WIDTH, above_x * PLUS_HIGH)
        store(sums, 3 * part + i * WIDTH, above_w * PLUS_HIGH * PLUS_HIGH)
        store(sums, 4 * part + i * WIDTH, above_x * MINUS_HIGH)
        store(sums, 5 * part + i * WIDTH, above_w * MINUS_HIGH * MINUS_HIGH)
    best = spread(-LARGEST)
    scale = spread(ZERO)
    choice = spread(-ONE)
    for first in range(33):
        below_x = load(sums, first * WIDTH)
        below_w = load(sums, part + first * WIDTH)
        plus_x, minus_x = below_x * PLUS_LOW, below_x * MINUS_LOW
        plus_w, minus_w = below_w * PLUS_LOW * PLUS_LOW, below_w * MINUS_LOW * MINUS_LOW
        for second in range(first, 33):
            line = second * WIDTH
            middle_x = (load(sums, line) - below_x) * SHIFT
            middle_w = (load(sums, part + line) - below_w) * SHIFT * SHIFT
            qx_plus = plus_x + middle_x + load(sums, 2 * part + line)
            q2_plus = plus_w + middle_w + load(sums, 3 * part + line)
            qx_minus = minus_x - middle_x + load(sums, 4 * part + line)
            q2_minus = minus_w + middle_w + load(sums, 5 * part + line)
            better = (qx_plus * qx_plus > best * q2_plus) | (qx_minus * qx_minus > best * q2_minus)
            if bits_of(better) != 0:
                number = (first * 33 + second) * 2
                best, scale, choice = offer(qx_plus, q2_plus, number, best, scale, choice)
                best, scale, choice = offer(qx_minus, q2_minus, number + 1, best, scale, choice)
    return select(choice < ZERO, (total_x - total_x) + (total_w - total_w), scale), choice


@compiled
def split_halves(x: Floats, weight: Floats, at: int, keys: Keys, sums: Floats) -> tuple[Lanes, Lanes]:
    """The scale of the best split of 16 weights and its choice, (first * 17 + second) * 4 + shifts; -1 for none.

    As in `split_whole`, the scale is NaN where a sum overflowed.

    shifts: 2 when the first half's is minus, plus 1 when the second's is. The eight parts of sums, 17 lines each: for
    each half the running sums of weighted values and of weights, and the latter times the step that the square of the
    level makes at the second cut, for shifts plus and minus.
    """
    part = 17 * WIDTH
    one_x, one_w = spread(ZERO), spread(ZERO)
    two_x, two_w = spread(ZERO), spread(ZERO)
    for i in range(17):
        store(sums, i * WIDTH, one_x)
        store(sums, part + i * WIDTH, one_w * PLUS_STEPS[1])
        store(sums, 2 * part + i * WIDTH, one_w * MINUS_STEPS[1])
        store(sums, 3 * part + i * WIDTH, one_w)
        store(sums, 4 * part + i * WIDTH, two_x)
        store(sums, 5 * part + i * WIDTH, two_w * PLUS_STEPS[1])
        store(sums, 6 * part + i * WIDTH, two_w * MINUS_STEPS[1])
        store(sums, 7 * part + i * WIDTH, two_w)
        if i < 16:
            factor = taken(weight, at * WIDTH, keys, i * WIDTH)
            weighted = factor * value_of(keys, i * WIDTH)
            is_one = placed_below(keys, i * WIDTH, 8)
            one_x += select(is_one, weighted, ZERO)
            one_w += select(is_one, factor, ZERO)
            two_x += select(is_one, ZERO, weighted)
            two_w += select(is_one, ZERO, factor)
    best = spread(-LARGEST)
    scale = spread(ZERO)
    choice = spread(-ONE)
    one_plus, one_minus = one_x * PLUS_HIGH, one_x * MINUS_HIGH
    two_plus, two_minus = two_x * PLUS_HIGH, two_x * MINUS_HIGH
    for first in range(17):
        line = first * WIDTH
        one_below = load(sums, line)
        two_below = load(sums, 4 * part + line)
        one_first, two_first = load(sums, 3 * part + line), load(sums, 7 * part + line)
        one_plus_w = one_w * PLUS_HIGH * PLUS_HIGH + one_first * PLUS_STEPS[0]
        one_minus_w = one_w * MINUS_HIGH * MINUS_HIGH + one_first * MINUS_STEPS[0]
        two_plus_w = two_w * PLUS_HIGH * PLUS_HIGH + two_first * PLUS_STEPS[0]
        two_minus_w = two_w * MINUS_HIGH * MINUS_HIGH + two_first * MINUS_STEPS[0]
        for second in range(first, 17):
            line = second * WIDTH
            below = one_below + load(sums, line)
            x_plus, x_minus = one_plus - below, one_minus - below
            w_plus = one_plus_w + load(sums, part + line)
            w_minus = one_minus_w + load(sums, 2 * part + line)
            below = two_below + load(sums, 4 * part + line)
            y_plus, y_minus = two_plus - below, two_minus - below
            v_plus = two_plus_w + load(sums, 5 * part + line)
            v_minus = two_minus_w + load(sums, 6 * part + line)
            qx_0, q2_0 = x_plus + y_plus, w_plus + v_plus
            qx_1, q2_1 = x_plus + y_minus, w_plus + v_minus
            qx_2, q2_2 = x_minus + y_plus, w_minus + v_plus
            qx_3, q2_3 = x_minus + y_minus, w_minus + v_minus
            better = (qx_0 * qx_0 > best * q2_0) | (qx_1 * qx_1 > best * q2_1)
            better = better | (qx_2 * qx_2 > best * q2_2) | (qx_3 * qx_3 > best * q2_3)
            if bits_of(better) != 0:
                number = (first * 17 + second) * 4
                best, scale, choice = offer(qx_0, q2_0, number, best, scale, choice)
                best, scale, choice = offer(qx_1, q2_1, number + 1, best, scale, choice)
                best, scale, choice = offer(qx_2, q2_2, number + 2, best, scale, choice)
                best, scale, choice = offer(qx_3, q2_3, number + 3, best, scale, choice)
    total = one_x + two_x + one_w + two_w
    return select(choice < ZERO, total - total, scale), choice
