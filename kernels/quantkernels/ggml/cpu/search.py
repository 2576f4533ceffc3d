"""The searches of `reference.py` for sixteen blocks at a time, each in its own lane.

Buffers are flat float32 arrays in lane order: value i of the block in lane k lies at i * 16 + k, so a buffer of N
values takes N * 16 places and `at` counts values. A search returns the inverse scale (and minimum) that its best codes
came from and not the codes: rounding again is cheaper than copying codes whenever a trial wins, and ggml keeps the
searched codes only where the stored scale is zero.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, inlined
from quantkernels.lanes import (
    WIDTH,
    Lanes,
    Mask,
    bits_of,
    load,
    low_byte,
    magnitude,
    nearest_wrapped,
    select,
    spread,
    store,
    transpose,
)

Floats = NDArray[np.float32]

ZERO = np.float32(0)
ONE = np.float32(1)
TENTH = np.float32(0.1)
TINY = np.float32(1e-15)
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding and taking it away rounds to the nearest integer, ties to even


@compiled
def gather(source: Floats, offsets: NDArray[np.int64], count: int, target: Floats) -> None:
    """Bring `count` values of sixteen blocks, which start at `offsets`, into lane order; count is a multiple of 16."""
    for first in range(0, count, WIDTH):
        transpose(source, offsets, first, target, first)


@compiled
def bounded_codes(scaled: Lanes, low: np.float32, high: np.float32) -> Lanes:
    """The nearest integers within [low, high]; clamping first leaves the same integers for every finite value."""
    scaled = select(scaled < low, low, scaled)
    scaled = select(scaled > high, high, scaled)
    return (scaled + ROUND) - ROUND


@compiled
def wrapped_codes(scaled: Lanes, low: np.float32, high: np.float32) -> Lanes:
    """The nearest integers within [low, high], with ggml's wrap-around for huge values and NaN."""
    codes = nearest_wrapped(scaled)
    codes = select(codes < low, low, codes)
    return select(codes > high, high, codes)


@compiled
def extreme_of(x: Floats, at: int, count: int) -> Lanes:
    """The value of largest magnitude with its sign, the first of equals; 0 when all are 0."""
    largest = spread(ZERO)
    extreme = spread(ZERO)
    for i in range(at, at + count):
        value = load(x, i * WIDTH)
        size = magnitude(value)
        larger = size > largest
        largest = select(larger, size, largest)
        extreme = select(larger, value, extreme)
    return extreme


@compiled
def sum_of_squares(x: Floats, at: int, count: int) -> Lanes:
    """The sum of x * x, added in order."""
    total = spread(ZERO)
    for i in range(at, at + count):
        value = load(x, i * WIDTH)
        total += value * value
    return total


@compiled
def sum_of(weight: Floats, at: int, count: int) -> Lanes:
    """The sum of the weights, added in order."""
    total = spread(ZERO)
    for i in range(at, at + count):
        total += load(weight, i * WIDTH)
    return total


@compiled
def search_symmetric(x: Floats, weight: Floats, at: int, count: int, limit: int) -> tuple[Lanes, Lanes]:
    """The (scale, inverse) of least weighted square error among 19; inverse 0 marks a block stored as zeros."""
    low = np.float32(-limit)
    high = np.float32(limit - 1)
    extreme = extreme_of(x, at, count)
    inverse = low / extreme
    best_inverse = inverse
    scale = spread(ZERO)
    best = spread(ZERO)
    for trial in range(19):
        step = 0 if trial == 0 else trial - 10 + trial // 10
        inverse = -(np.float32(limit) + TENTH * np.float32(step)) / extreme
        sum_xl = spread(ZERO)
        sum_l2 = spread(ZERO)
        for i in range(at, at + count):
            value = load(x, i * WIDTH)
            factor = load(weight, i * WIDTH)
            codes = bounded_codes(inverse * value, low, high)
            sum_xl += factor * value * codes
            sum_l2 += factor * codes * codes
        ratio = sum_xl / sum_l2
        if trial == 0:
            scale = select(sum_l2 == ZERO, ZERO, ratio)
            best = scale * sum_xl
        else:
            better = (sum_l2 > ZERO) & (sum_xl * sum_xl > best * sum_l2)
            scale = select(better, ratio, scale)
            best = select(better, ratio * sum_xl, best)
            best_inverse = select(better, inverse, best_inverse)
    zeros = magnitude(extreme) < TINY
    return select(zeros, ZERO, scale), select(zeros, ZERO, best_inverse)


@compiled
def error_of(
    x: Floats, weight: Floats, codes: Floats, at: int, count: int, scale: Lanes, low: Lanes, absolute: bool
) -> Lanes:
    """The weighted error of scale * codes + low, square or absolute; codes start at 0."""
    total = spread(ZERO)
    if absolute:
        for i in range(count):
            error = scale * load(codes, i * WIDTH) + low - load(x, (at + i) * WIDTH)
            total += load(weight, (at + i) * WIDTH) * magnitude(error)
    else:
        for i in range(count):
            error = scale * load(codes, i * WIDTH) + low - load(x, (at + i) * WIDTH)
            total += load(weight, (at + i) * WIDTH) * (error * error)
    return total


@compiled
def survey(x: Floats, weight: Floats, at: int, count: int) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """The smallest value or 0, the largest value, the sum of the weights and the weighted sum of the values."""
    high = load(x, at * WIDTH)
    low = high
    sum_w = load(weight, at * WIDTH)
    sum_x = sum_w * high
    for i in range(at + 1, at + count):
        value = load(x, i * WIDTH)
        factor = load(weight, i * WIDTH)
        low = select(value < low, value, low)
        high = select(value > high, value, high)
        sum_w += factor
        sum_x += factor * value
    return select(low > ZERO, ZERO, low), high, sum_w, sum_x


@compiled
def search_scale_min(
    x: Floats,
    weight: Floats,
    codes: Floats,
    at: int,
    count: int,
    limit: int,
    steps: tuple[np.float32, np.float32, int],
    absolute: bool,
    bounded: bool,
) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """The (scale, depth, inverse, minimum) of least weighted error over `steps` (first, width, count).

    codes is scratch for `count` values. Where a block is constant scale and inverse are 0.
    """
    top = np.float32(limit)
    low, high, sum_w, sum_x = survey(x, weight, at, count)
    active = ~(high == low)
    inverse = top / (high - low)
    for i in range(count):
        store(codes, i * WIDTH, wrapped_codes(inverse * (load(x, (at + i) * WIDTH) - low), ZERO, top))
    scale = ONE / inverse
    best = error_of(x, weight, codes, at, count, scale, low, absolute)
    # An inverse that overflowed gives codes 0 above (ggml's wrap-around); 0 gives them again when rounding is repeated.
    best_inverse = select(inverse > np.float32(3.4028235e38), ZERO, inverse)
    best_low = low

    for step in range(steps[2] + 1):
        inverse = (steps[0] + steps[1] * np.float32(step) + top) / (high - best_low)
        sum_l = spread(ZERO)
        sum_l2 = spread(ZERO)
        sum_xl = spread(ZERO)
        for i in range(count):
            value = load(x, (at + i) * WIDTH)
            scaled = inverse * (value - best_low)
            trial = trial_codes(scaled, top, bounded)
            store(codes, i * WIDTH, trial)
            weighted = load(weight, (at + i) * WIDTH) * trial
            sum_l += weighted
            sum_l2 += weighted * trial
            sum_xl += weighted * value
        determinant = sum_w * sum_l2 - sum_l * sum_l
        trial_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        trial_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = trial_low > ZERO
        trial_scale = select(positive, sum_xl / sum_l2, trial_scale)
        trial_low = select(positive, ZERO, trial_low)
        error = error_of(x, weight, codes, at, count, trial_scale, trial_low, absolute)
        better = active & (determinant > ZERO) & (error < best)
        best = select(better, error, best)
        scale = select(better, trial_scale, scale)
        best_inverse = select(better, inverse, best_inverse)
        low = select(better, best_low, low)
        best_low = select(better, trial_low, best_low)
    return select(active, scale, ZERO), -best_low, select(active, best_inverse, ZERO), select(active, low, ZERO)


@compiled
def trial_codes(scaled: Lanes, top: np.float32, bounded: bool) -> Lanes:
    """Codes in [0, top]: clamped before rounding when `bounded`, else with ggml's wrap-around."""
    if bounded:
        scaled = select(scaled > ZERO, scaled, ZERO)  # a NaN becomes 0
        scaled = select(scaled > top, top, scaled)
        return (scaled + ROUND) - ROUND
    return wrapped_codes(scaled, ZERO, top)


@compiled
def search_nonnegative(values: Floats, weight: Floats, codes: Floats, count: int, limit: int) -> Lanes:
    """The scale for values that are never negative, whose codes in [0, limit] are written to `codes`."""
    top = np.float32(limit)
    high = spread(ZERO)
    for i in range(count):
        value = load(values, i * WIDTH)
        high = select(value > high, value, high)
    inverse = top / high
    best_inverse = inverse
    best = spread(ZERO)
    for trial in range(9):
        step = 0 if trial == 0 else trial - 5 + trial // 5
        if trial > 0:
            inverse = (TENTH * np.float32(step) + top) / high
        scale = ONE / inverse
        error = spread(ZERO)
        for i in range(count):
            value = load(values, i * WIDTH)
            code = nearest_wrapped(inverse * value)
            code = low_byte(code) if trial == 0 else select(code > top, top, code)
            difference = value - scale * code
            error += load(weight, i * WIDTH) * difference * difference
        if trial == 0:
            best = error
        else:
            better = error < best
            best = select(better, error, best)
            best_inverse = select(better, inverse, best_inverse)
    return descend_nonnegative(values, weight, codes, count, top, best_inverse, high)


@compiled
def descend_nonnegative(
    values: Floats, weight: Floats, codes: Floats, count: int, top: np.float32, inverse: Lanes, high: Lanes
) -> Lanes:
    """Up to five sweeps that move one code at a time while the fit grows; gives the scale and fills `codes`."""
    sum_xl = spread(ZERO)
    sum_l2 = spread(ZERO)
    for i in range(count):
        value = load(values, i * WIDTH)
        factor = load(weight, i * WIDTH)
        code = nearest_wrapped(inverse * value)
        code = select(code > top, top, code)
        sum_xl += factor * value * code
        sum_l2 += factor * code * code
        store(codes, i * WIDTH, low_byte(code))
    going = high == high
    for _ in range(5):
        changed = high < ZERO
        for i in range(count):
            value = load(values, i * WIDTH)
            factor = load(weight, i * WIDTH)
            old = load(codes, i * WIDTH)
            rest_xl = sum_xl - factor * value * old
            rest_l2 = sum_l2 - factor * old * old
            new = nearest_wrapped(value * rest_l2 / rest_xl)
            new = select(new > top, top, new)
            new_xl = rest_xl + factor * value * new
            new_l2 = rest_l2 + factor * new * new
            move = going & (rest_xl > ZERO) & (rest_l2 > ZERO) & ~(new == old)
            move = move & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
            store(codes, i * WIDTH, select(move, low_byte(new), old))
            sum_xl = select(move, new_xl, sum_xl)
            sum_l2 = select(move, new_l2, sum_l2)
            changed = changed | move
        going = going & changed
        if bits_of(going) == 0:
            break
    nothing = high < TINY
    for i in range(count):
        store(codes, i * WIDTH, select(nothing, ZERO, load(codes, i * WIDTH)))
    return select(nothing, ZERO, select(sum_l2 > ZERO, sum_xl / sum_l2, ZERO))


@inlined
def start_descent(x: Floats, codes: Floats, at: int, count: int, limit: int) -> tuple[Lanes, Lanes, Lanes]:
    """Codes by the extreme value, written to `codes` at `at`; gives the sums (xl, l2) and the extreme."""
    extreme = extreme_of(x, at, count)
    inverse = np.float32(-limit) / extreme
    sum_xl = spread(ZERO)
    sum_l2 = spread(ZERO)
    for i in range(at, at + count):
        value = load(x, i * WIDTH)
        code = bounded_codes(inverse * value, np.float32(-limit), np.float32(limit - 1))
        store(codes, i * WIDTH, code)
        sum_xl += value * value * value * code
        sum_l2 += value * value * code * code
    return sum_xl, sum_l2, extreme


@inlined
def descend(
    x: Floats, codes: Floats, i: int, sum_xl: Lanes, sum_l2: Lanes, going: Mask, limit: int
) -> tuple[Lanes, Lanes, Mask]:
    """Move code `i` where the fit grows; gives the sums (xl, l2) after it, and where it moved."""
    value = load(x, i * WIDTH)
    factor = value * value
    old = load(codes, i * WIDTH)
    rest_xl = sum_xl - factor * value * old
    rest_l2 = sum_l2 - factor * old * old
    new = wrapped_codes(value * rest_l2 / rest_xl, np.float32(-limit), np.float32(limit - 1))
    new_xl = rest_xl + factor * value * new
    new_l2 = rest_l2 + factor * new * new
    move = going & (rest_xl > ZERO) & (new_l2 > ZERO) & ~(new == old)
    move = move & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
    store(codes, i * WIDTH, select(move, new, old))
    return select(move, new_xl, sum_xl), select(move, new_l2, sum_l2), move


@inlined
def end_descent(codes: Floats, at: int, count: int, limit: int, sum_xl: Lanes, sum_l2: Lanes, extreme: Lanes) -> Lanes:
    """The scale; the codes get `limit` added, and are 0 where the block is stored as zeros."""
    zeros = magnitude(extreme) < TINY
    for i in range(at, at + count):
        store(codes, i * WIDTH, select(zeros, ZERO, load(codes, i * WIDTH) + np.float32(limit)))
    return select(zeros, ZERO, select(sum_l2 > ZERO, sum_xl / sum_l2, ZERO))


@compiled
def search_descent(x: Floats, codes: Floats, at: int, count: int, limit: int) -> tuple[Lanes, Lanes]:
    """Q3_K without importance: the scales of two neighbouring sub-blocks after coordinate descent.

    Codes plus limit are written to `codes` at `at`. Each step waits for the one before it, a division included, so two
    sub-blocks at once take little more time than one.
    """
    other = at + count
    sum_xl, sum_l2, extreme = start_descent(x, codes, at, count, limit)
    other_xl, other_l2, other_extreme = start_descent(x, codes, other, count, limit)
    going = extreme == extreme
    other_going = going
    for _ in range(5):
        changed = magnitude(extreme) < ZERO
        other_changed = changed
        for i in range(count):
            sum_xl, sum_l2, move = descend(x, codes, at + i, sum_xl, sum_l2, going, limit)
            changed = changed | move
            other_xl, other_l2, move = descend(x, codes, other + i, other_xl, other_l2, other_going, limit)
            other_changed = other_changed | move
        going = going & changed
        other_going = other_going & other_changed
        if bits_of(going | other_going) == 0:
            break
    scale = end_descent(codes, at, count, limit, sum_xl, sum_l2, extreme)
    return scale, end_descent(codes, other, count, limit, other_xl, other_l2, other_extreme)
