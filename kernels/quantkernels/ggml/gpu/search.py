"""The searches of `reference/search.py` in Triton: one thread has one sub-block.

Searches write the scales they find, and the inverses that their best codes came from, to `found` [fields, sub-blocks]
f32; `gpu/scales.py` and `gpu/round.py` make blocks of them. Trials come as a float32 array from the host, so that they
are the very numbers of the reference.
"""

# Triton knows no * in tuples, and mypy no tuples that grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton.language as tl

from quantkernels.ggml.gpu.numbers import (
    bounded,
    extreme_of,
    jitted,
    lane_of,
    load_tuple,
    low_byte,
    nearest,
    sum_of,
    wrapped,
)


@jitted
def mean_square_kernel(
    rows: tl.tensor,
    means: tl.tensor,
    span: tl.tensor,
    factor: tl.tensor,
    divisor: tl.tensor,
    count: tl.tensor,
    T: tl.constexpr,
) -> None:
    """means [count]: factor * the sum of the squares of `span` weights / divisor; a lane is a row or a block."""
    lane = lane_of(T)
    present = lane < count
    total = tl.zeros((T,), tl.float32)
    for i in range(span):
        value = tl.load(rows + lane * span + i, mask=present, other=0.0).to(tl.float32)
        total += value * value
    tl.store(means + lane, tl.math.div_rn(factor * total, divisor), mask=present)


@jitted
def weights_of(
    x: tl.tuple,
    importance: tl.tensor,
    means: tl.tensor,
    start: tl.tensor,
    columns: tl.tensor,
    span: tl.tensor,
    present: tl.tensor,
    WEIGHTS: tl.constexpr,
    N: tl.constexpr,
) -> tl.tuple:
    """The search weights of a sub-block that starts at weight `start`.

    WEIGHTS names what they are; means holds the mean square of each `span` weights.
    """
    weight = ()
    mean = tl.zeros_like(x[0])
    if WEIGHTS == "root mean square + size":
        for i in tl.static_range(N):
            mean += x[i] * x[i]
        mean = tl.math.sqrt_rn(tl.math.div_rn(mean, N + 0.0))
    if WEIGHTS == "importance * root":
        mean = tl.load(means + start // span, mask=present, other=0.0)
    given = x
    if WEIGHTS == "importance" or WEIGHTS == "importance * root":
        given = load_tuple(importance, start % columns, present, N)
    for i in tl.static_range(N):
        if WEIGHTS == "square":
            value = x[i] * x[i]
        elif WEIGHTS == "size":
            value = tl.abs(x[i])
        elif WEIGHTS == "root mean square + size":
            value = mean + tl.abs(x[i])
        else:
            value = given[i]
            if WEIGHTS == "importance * root":
                value = value * tl.math.sqrt_rn(mean + x[i] * x[i])
        weight = weight + (value,)
    return weight


@jitted
def symmetric_sums(
    x: tl.tuple, weight: tl.tuple, inverse: tl.tensor, LOW: tl.constexpr, HIGH: tl.constexpr, N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The sums of w * x * code and w * code * code."""
    sum_xl = tl.zeros_like(inverse)
    sum_l2 = tl.zeros_like(inverse)
    for i in tl.static_range(N):
        code = bounded(inverse * x[i], LOW, HIGH)
        sum_xl += weight[i] * x[i] * code
        sum_l2 += weight[i] * code * code
    return sum_xl, sum_l2


@jitted
def search_symmetric(
    x: tl.tuple,
    weight: tl.tuple,
    trials: tl.tensor,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The (scale, inverse) of least weighted square error among 19; inverse 0 marks a block stored as zeros."""
    extreme = extreme_of(x, N)
    best_inverse = tl.zeros_like(extreme)
    scale = tl.zeros_like(extreme)
    best = tl.zeros_like(extreme)
    for trial in range(19):
        inverse = tl.math.div_rn(tl.load(trials + trial), extreme)
        sum_xl, sum_l2 = symmetric_sums(x, weight, inverse, LOW, HIGH, N)
        better = ((sum_l2 > 0.0) & (sum_xl * sum_xl > best * sum_l2)) | (trial == 0)  # the first is taken as it is
        ratio = tl.where(sum_l2 == 0.0, 0.0, tl.math.div_rn(sum_xl, sum_l2))
        scale = tl.where(better, ratio, scale)
        best = tl.where(better, ratio * sum_xl, best)
        best_inverse = tl.where(better, inverse, best_inverse)
    zeros = tl.abs(extreme) < 1e-15
    return tl.where(zeros, 0.0, scale), tl.where(zeros, 0.0, best_inverse)


@jitted
def symmetric_kernel(
    rows: tl.tensor,
    importance: tl.tensor,
    means: tl.tensor,
    trials: tl.tensor,
    found: tl.tensor,
    columns: tl.tensor,
    span: tl.tensor,
    count: tl.tensor,
    WEIGHTS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """found [3, count]: scales, inverses and weight sums of sub-blocks of N."""
    lane = lane_of(T)
    present = lane < count
    x = load_tuple(rows, lane * N, present, N)
    weight = weights_of(x, importance, means, lane * N, columns, span, present, WEIGHTS, N)
    scale, inverse = search_symmetric(x, weight, trials, LOW, HIGH, N)
    tl.store(found + lane, scale, mask=present)
    tl.store(found + count + lane, inverse, mask=present)
    tl.store(found + 2 * count + lane, sum_of(weight, N), mask=present)


@jitted
def trial_code(scaled: tl.tensor, TOP: tl.constexpr, BOUNDED: tl.constexpr) -> tl.tensor:
    """A code in [0, TOP]: clamped before rounding when BOUNDED, else with ggml's wrap-around."""
    code = bounded(scaled, 0.0, TOP) if BOUNDED else wrapped(scaled, 0.0, TOP)
    return code


@jitted
def error_of(
    x: tl.tuple,
    weight: tl.tuple,
    codes: tl.tuple,
    scale: tl.tensor,
    low: tl.tensor,
    ABSOLUTE: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """The weighted error of scale * codes + low, square or absolute."""
    total = tl.zeros_like(scale)
    for i in tl.static_range(N):
        error = scale * codes[i] + low - x[i]
        if ABSOLUTE:
            total += weight[i] * tl.abs(error)
        else:
            total += weight[i] * (error * error)
    return total


@jitted
def codes_for(
    x: tl.tuple, inverse: tl.tensor, low: tl.tensor, TOP: tl.constexpr, BOUNDED: tl.constexpr, N: tl.constexpr
) -> tl.tuple:
    codes = ()
    for i in tl.static_range(N):
        codes = codes + (trial_code(inverse * (x[i] - low), TOP, BOUNDED),)
    return codes


@jitted
def scale_min_kernel(
    rows: tl.tensor,
    importance: tl.tensor,
    means: tl.tensor,
    trials: tl.tensor,
    found: tl.tensor,
    columns: tl.tensor,
    span: tl.tensor,
    count: tl.tensor,
    TRIALS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    TOP: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BOUNDED: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """found [5, count]: scales, depths, inverses, minimums and weight sums of sub-blocks of N.

    The inverse, and the minimum that goes with it, are those that the best codes came from.
    """
    lane = lane_of(T)
    present = lane < count
    x = load_tuple(rows, lane * N, present, N)
    weight = weights_of(x, importance, means, lane * N, columns, span, present, WEIGHTS, N)
    low = x[0]
    high = x[0]
    sum_w = weight[0]
    sum_x = weight[0] * x[0]
    for i in tl.static_range(1, N):
        low = tl.where(x[i] < low, x[i], low)
        high = tl.where(x[i] > high, x[i], high)
        sum_w += weight[i]
        sum_x += weight[i] * x[i]
    low = tl.where(low > 0.0, 0.0, low)
    active = high != low
    first_scale = tl.math.div_rn(1.0, tl.math.div_rn(TOP, high - low))
    best_low = low
    best_inverse = tl.zeros_like(low)
    scale = tl.zeros_like(low)
    best = tl.zeros_like(low)
    for trial in range(TRIALS):
        first = trial == 0  # the whole range, taken as it is
        inverse = tl.math.div_rn(tl.load(trials + trial), high - best_low)
        # One that overflows gives codes 0 in ggml, by wrap-around; 0 gives them without, and when rounding is repeated.
        inverse = tl.where(first & (inverse > 3.4028235e38), 0.0, inverse)
        codes = codes_for(x, inverse, best_low, TOP, BOUNDED, N)
        sum_l = tl.zeros_like(low)
        sum_l2 = tl.zeros_like(low)
        sum_xl = tl.zeros_like(low)
        for i in tl.static_range(N):
            weighted = weight[i] * codes[i]
            sum_l += weighted
            sum_l2 += weighted * codes[i]
            sum_xl += weighted * x[i]
        determinant = sum_w * sum_l2 - sum_l * sum_l
        trial_scale = tl.math.div_rn(sum_w * sum_xl - sum_x * sum_l, determinant)
        trial_low = tl.math.div_rn(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        positive = trial_low > 0.0
        trial_scale = tl.where(positive, tl.math.div_rn(sum_xl, sum_l2), trial_scale)
        trial_low = tl.where(positive, 0.0, trial_low)
        trial_scale = tl.where(first, first_scale, trial_scale)
        trial_low = tl.where(first, low, trial_low)
        error = error_of(x, weight, codes, trial_scale, trial_low, ABSOLUTE, N)
        better = (active & (determinant > 0.0) & (error < best)) | first
        best = tl.where(better, error, best)
        scale = tl.where(better, trial_scale, scale)
        best_inverse = tl.where(better, inverse, best_inverse)
        low = tl.where(better, best_low, low)
        best_low = tl.where(better, trial_low, best_low)
    tl.store(found + lane, tl.where(active, scale, 0.0), mask=present)
    tl.store(found + count + lane, best_low * -1.0, mask=present)  # Triton's minus is 0 - x and loses the sign of 0
    tl.store(found + 2 * count + lane, tl.where(active, best_inverse, 0.0), mask=present)
    tl.store(found + 3 * count + lane, tl.where(active, low, 0.0), mask=present)
    tl.store(found + 4 * count + lane, sum_w, mask=present)


@jitted
def descend(
    x: tl.tuple,
    weight: tl.tuple,
    codes: tl.tuple,
    LOW: tl.constexpr,
    TOP: tl.constexpr,
    SIGNED: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tuple]:
    """Up to five sweeps that move one code at a time while the fit grows; gives (scale, codes).

    Codes that are not SIGNED are kept in a byte, and a move asks that the rest of the block is not all zero.
    """
    sum_xl = tl.zeros_like(x[0])
    sum_l2 = tl.zeros_like(x[0])
    for i in tl.static_range(N):
        sum_xl += weight[i] * x[i] * codes[i]
        sum_l2 += weight[i] * codes[i] * codes[i]
    kept = ()
    for i in tl.static_range(N):
        kept = kept + (codes[i] if SIGNED else low_byte(codes[i]),)
    going = (sum_l2 == sum_l2) | (sum_l2 != sum_l2)
    for _ in range(5):
        changed = sum_l2 < sum_l2
        moved = ()
        for i in tl.static_range(N):
            old = kept[i]
            rest_xl = sum_xl - weight[i] * x[i] * old
            rest_l2 = sum_l2 - weight[i] * old * old
            new = nearest(tl.math.div_rn(x[i] * rest_l2, rest_xl))
            new = tl.where(new > TOP, TOP, new)
            allowed = going & (rest_xl > 0.0)
            if SIGNED:
                new = tl.where(new < LOW, LOW, new)
            else:
                allowed = allowed & (rest_l2 > 0.0)
            new_xl = rest_xl + weight[i] * x[i] * new
            new_l2 = rest_l2 + weight[i] * new * new
            move = allowed & (new != old) & (new_l2 > 0.0) & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
            moved = moved + (tl.where(move, new if SIGNED else low_byte(new), old),)
            sum_xl = tl.where(move, new_xl, sum_xl)
            sum_l2 = tl.where(move, new_l2, sum_l2)
            changed = changed | move
        kept = moved
        going = going & changed
    return tl.where(sum_l2 > 0.0, tl.math.div_rn(sum_xl, sum_l2), 0.0), kept


@jitted
def descent_kernel(
    rows: tl.tensor,
    found: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Q3_K without importance: found [count], the scales after coordinate descent; codes u8, from 0 on."""
    lane = lane_of(T)
    present = lane < count
    x = load_tuple(rows, lane * N, present, N)
    extreme = extreme_of(x, N)
    inverse = tl.math.div_rn(LOW, extreme)
    weight = ()
    rounded = ()
    for i in tl.static_range(N):
        weight = weight + (x[i] * x[i],)
        rounded = rounded + (bounded(inverse * x[i], LOW, HIGH),)
    scale, rounded = descend(x, weight, rounded, LOW, HIGH, True, N)
    zeros = tl.abs(extreme) < 1e-15
    tl.store(found + lane, tl.where(zeros, 0.0, scale), mask=present)
    for i in tl.static_range(N):
        code = tl.where(zeros, 0.0, rounded[i] - LOW)
        tl.store(codes + lane * N + i, code.to(tl.uint8), mask=present)


@jitted
def search_nonnegative(
    values: tl.tuple, weight: tl.tuple, trials: tl.tensor, TOP: tl.constexpr, N: tl.constexpr
) -> tuple[tl.tensor, tl.tuple]:
    """A scale and codes in [0, TOP] for values that are never negative: 9 scales, then coordinate descent."""
    high = tl.zeros_like(values[0])
    for i in tl.static_range(N):
        high = tl.where(values[i] > high, values[i], high)
    best_inverse = tl.math.div_rn(TOP, high)
    scale = tl.math.div_rn(1.0, best_inverse)
    best = tl.zeros_like(high)
    for i in tl.static_range(N):
        difference = values[i] - scale * low_byte(nearest(best_inverse * values[i]))
        best += weight[i] * difference * difference
    for trial in range(8):
        inverse = tl.math.div_rn(tl.load(trials + trial), high)
        scale = tl.math.div_rn(1.0, inverse)
        error = tl.zeros_like(high)
        for i in tl.static_range(N):
            code = nearest(inverse * values[i])
            difference = values[i] - scale * tl.where(code > TOP, TOP, code)
            error += weight[i] * difference * difference
        better = error < best
        best = tl.where(better, error, best)
        best_inverse = tl.where(better, inverse, best_inverse)
    codes = ()
    for i in tl.static_range(N):
        code = nearest(best_inverse * values[i])
        codes = codes + (tl.where(code > TOP, TOP, code),)
    scale, codes = descend(values, weight, codes, 0.0, TOP, False, N)
    nothing = high < 1e-15
    kept = ()
    for i in tl.static_range(N):
        kept = kept + (tl.where(nothing, 0.0, codes[i]),)
    return tl.where(nothing, 0.0, scale), kept
