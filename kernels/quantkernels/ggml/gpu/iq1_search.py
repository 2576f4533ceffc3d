"""The search of `reference/iq1.py` in Triton: sort, running sums, every pair of cuts, then the lattice.

Sorting is counting: a weight's rank is how many of its sub-block are smaller, 32 comparisons a weight, and the order
of equals is kept. Sorted values and running sums lie in memory as [N, sub-blocks], so that a lane can ask for any of
them while a warp reads neighbours. All 561 (IQ1_M: 153) pairs of cuts are tried as ggml does; the envelope that spares
the CPU most of them (`thorough/cpu_iq1_envelope.py`) would make lanes wait for each other, for some 1000 operations a
weight.

Shapes: N weights in a sub-block, H halves with sums of their own (IQ1_S: 1, IQ1_M: 2).
"""

# Triton knows no * in tuples, and mypy no tuples that grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

import triton.language as tl

from quantkernels.ggml.gpu.lattice import ENTRY_LOST, ENTRY_ROUNDED, FARTHEST, level_of, nearest_entry
from quantkernels.ggml.gpu.lattice_search import NAN, NOTHING
from quantkernels.ggml.gpu.numbers import (
    jitted,
    lane_of,
    load_byte,
    load_tuple,
    not_a_number,
    store_byte,
    store_half,
    store_pair,
    wrapped,
)

ENTRY_NEGATIVE = tl.constexpr(1 << 28)  # in an entry of IQ1: the shift is -1/8
MINUS_INFINITY = tl.constexpr(float("-inf"))


@jitted
def rank_kernel(
    values: tl.tensor,
    weights: tl.tensor,
    ranks: tl.tensor,
    sorted_x: tl.tensor,
    sorted_w: tl.tensor,
    subs: tl.tensor,
    count: tl.tensor,
    HALVES: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """ranks u8 of the weights, and sorted [H, N, subs] what they add to sums: w * x and w, 0 in the other half."""
    lane = lane_of(T)
    present = lane < count
    sub = lane // N
    n = lane % N
    own = tl.load(values + lane, mask=present, other=0.0)
    weight = tl.load(weights + lane, mask=present, other=0.0)
    rank = tl.zeros((T,), tl.int32)
    for i in range(N):
        other = tl.load(values + sub * N + i, mask=present, other=0.0)
        rank += tl.where((other < own) | ((other == own) & (i < n)), 1, 0)
    store_byte(ranks, lane, rank, present)
    for half in tl.static_range(HALVES):
        inside = n // (N // HALVES) == half
        at = (half * N + rank) * subs + sub
        tl.store(sorted_x + at, tl.where(inside, weight * own, 0.0), mask=present)
        tl.store(sorted_w + at, tl.where(inside, weight, 0.0), mask=present)


@jitted
def running_kernel(
    sorted_x: tl.tensor, sorted_w: tl.tensor, subs: tl.tensor, count: tl.tensor, N: tl.constexpr, T: tl.constexpr
) -> None:
    """Running sums in the place of what they add; a lane is a half of a sub-block."""
    lane = lane_of(T)
    present = lane < count
    at = lane // subs * N * subs + lane % subs
    sum_x = tl.zeros((T,), tl.float32)
    sum_w = tl.zeros((T,), tl.float32)
    for i in range(N):
        sum_x += tl.load(sorted_x + at + i * subs, mask=present, other=0.0)
        sum_w += tl.load(sorted_w + at + i * subs, mask=present, other=0.0)
        tl.store(sorted_x + at + i * subs, sum_x, mask=present)
        tl.store(sorted_w + at + i * subs, sum_w, mask=present)


@jitted
def sum_below(
    running: tl.tensor, cut: tl.tensor, lane: tl.tensor, subs: tl.tensor, half: tl.constexpr, N: tl.constexpr
) -> tl.tensor:
    """The running sum of the first `cut` values."""
    inside = (lane < subs) & (cut > 0)
    return tl.load(running + (half * N + cut - 1) * subs + lane, mask=inside, other=0.0)


@jitted
def whole_fit(
    first_x: tl.tensor,
    second_x: tl.tensor,
    last_x: tl.tensor,
    first_w: tl.tensor,
    second_w: tl.tensor,
    last_w: tl.tensor,
    SHIFT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The sums of w q x and w q q for one shift of all weights, added part by part as IQ1_S does."""
    sum_qx = first_x * (SHIFT - 1.0) + (second_x - first_x) * SHIFT + (last_x - second_x) * (SHIFT + 1.0)
    low = first_w * (SHIFT - 1.0) * (SHIFT - 1.0)
    middle = (second_w - first_w) * SHIFT * SHIFT
    high = (last_w - second_w) * (SHIFT + 1.0) * (SHIFT + 1.0)
    return sum_qx, low + middle + high


@jitted
def half_fit(
    first_x: tl.tensor,
    second_x: tl.tensor,
    last_x: tl.tensor,
    first_w: tl.tensor,
    second_w: tl.tensor,
    last_w: tl.tensor,
    SHIFT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The same sums of a half, from the total as IQ1_M does."""
    sum_qx = last_x * (SHIFT + 1.0) - (first_x + second_x)
    squares = last_w * (SHIFT + 1.0) * (SHIFT + 1.0) + first_w * (1.0 - 2.0 * SHIFT)
    return sum_qx, squares + second_w * (-1.0 - 2.0 * SHIFT)


@jitted
def cuts_kernel(
    running_x: tl.tensor,
    running_w: tl.tensor,
    scales: tl.tensor,
    cuts: tl.tensor,
    count: tl.tensor,
    HALVES: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """The best scale of each sub-block and its cuts i32: first, second, shifts.

    A shift is a bit, set for -1/8; that of the first half is the higher one. Where nothing fits the scale is minus
    infinity, and NaN when sums overflowed.
    """
    lane = lane_of(T)
    present = lane < count
    best = tl.full((T,), -FARTHEST, tl.float32)
    scale = tl.full((T,), MINUS_INFINITY, tl.float32)
    chosen = tl.zeros((T,), tl.int32)
    last_x = ()
    last_w = ()
    for half in tl.static_range(HALVES):
        last_x = last_x + (sum_below(running_x, N, lane, count, half, N),)
        last_w = last_w + (sum_below(running_w, N, lane, count, half, N),)
    for first in range(N + 1):
        first_x = ()
        first_w = ()
        for half in tl.static_range(HALVES):
            first_x = first_x + (sum_below(running_x, first, lane, count, half, N),)
            first_w = first_w + (sum_below(running_w, first, lane, count, half, N),)
        for second in range(first, N + 1):
            fits_x = ()
            fits_w = ()
            for half in tl.static_range(HALVES):
                second_x = sum_below(running_x, second, lane, count, half, N)
                second_w = sum_below(running_w, second, lane, count, half, N)
                for shift in tl.static_range(2):
                    if HALVES == 1:
                        fit_x, fit_w = whole_fit(
                            first_x[half],
                            second_x,
                            last_x[half],
                            first_w[half],
                            second_w,
                            last_w[half],
                            0.125 - 0.25 * shift,
                        )
                    else:
                        fit_x, fit_w = half_fit(
                            first_x[half],
                            second_x,
                            last_x[half],
                            first_w[half],
                            second_w,
                            last_w[half],
                            0.125 - 0.25 * shift,
                        )
                    fits_x = fits_x + (fit_x,)
                    fits_w = fits_w + (fit_w,)
            for shifts in tl.static_range(2 * HALVES):
                if HALVES == 1:
                    sum_qx = fits_x[shifts]
                    sum_q2 = fits_w[shifts]
                else:
                    sum_qx = fits_x[shifts // 2] + fits_x[2 + shifts % 2]
                    sum_q2 = fits_w[shifts // 2] + fits_w[2 + shifts % 2]
                better = (sum_q2 > 0.0) & (sum_qx * sum_qx > best * sum_q2)
                scale = tl.where(better, tl.math.div_rn(sum_qx, sum_q2), scale)
                best = tl.where(better, scale * sum_qx, best)
                chosen = tl.where(better, first | (second << 8) | (shifts << 16), chosen)
    total = last_x[0] + last_w[0]
    if HALVES == 2:
        total = total + last_x[1] + last_w[1]
    overflowed = (total != total) | (tl.abs(total) > FARTHEST)
    scale = tl.where((scale == MINUS_INFINITY) & overflowed, NAN, scale)
    tl.store(scales + lane, scale, mask=present)
    tl.store(cuts + lane, chosen, mask=present)


@jitted
def points_kernel(
    values: tl.tensor,
    weights: tl.tensor,
    ranks: tl.tensor,
    scales: tl.tensor,
    cuts: tl.tensor,
    bounds: tl.tensor,
    table: tl.tensor,
    entries: tl.tensor,
    count: tl.tensor,
    HALVES: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """The entries of groups of eight, with the sign of their shift. A negative scale turns levels and shifts around."""
    lane = lane_of(T)
    present = lane < count
    sub = lane // (N // 8)
    scale = tl.load(scales + sub, mask=present, other=0.0)
    cut = tl.load(cuts + sub, mask=present, other=0)
    turned = (scale < 0.0) & (scale > MINUS_INFINITY)
    scale = tl.where(turned, scale * -1.0, scale)
    shift_of = 1 - (lane % 2).to(tl.int32) if HALVES == 2 else 0
    negative = ((cut >> (16 + shift_of)) & 1 == 1) ^ turned
    code = tl.zeros((T,), tl.int32)
    for i in tl.static_range(8):
        rank = load_byte(ranks, lane * 8 + i, present)
        level = tl.where(rank >= cut & 255, 1, 0) + tl.where(rank >= (cut >> 8) & 255, 1, 0)
        code = code | (tl.where(turned, 2 - level, level) << (2 * i))
    x = load_tuple(values, lane * 8, present, 8)
    weight = load_tuple(weights, lane * 8, present, 8)
    shift = tl.where(negative, -0.125, 0.125)
    entry = nearest_entry(code, x, weight, scale, shift, bounds, table, present, -1.0, 1.0, 8)
    entry = tl.where(entry & ENTRY_LOST != 0, ENTRY_LOST, entry)
    tl.store(entries + lane, tl.where(negative, entry | ENTRY_NEGATIVE, entry), mask=present)


@jitted
def shift_in(entry: tl.tensor) -> tl.tensor:
    """The shift of a group's levels."""
    return tl.where(entry & ENTRY_NEGATIVE != 0, -0.125, 0.125)


@jitted
def lattice_fit_kernel(
    values: tl.tensor,
    weights: tl.tensor,
    entries: tl.tensor,
    scales: tl.tensor,
    count: tl.tensor,
    TINY: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """scales after the lattice, fitted again where a group was off it; a sub-block below TINY, or no fit, is zeros."""
    lane = lane_of(T)
    present = lane < count
    scale = tl.load(scales + lane, mask=present, other=0.0)
    skipped = scale == MINUS_INFINITY
    scale = tl.abs(scale)
    largest = tl.zeros((T,), tl.float32)
    sum_qx = tl.zeros((T,), tl.float32)
    sum_q2 = tl.zeros((T,), tl.float32)
    marks = tl.full((T,), ENTRY_ROUNDED, tl.int32)
    lost = tl.zeros((T,), tl.int32)
    for g in tl.static_range(N // 8):
        at = lane * (N // 8) + g
        entry = tl.load(entries + at, mask=present, other=0)
        marks = marks & entry
        lost = lost | (entry & ENTRY_LOST)
        x = load_tuple(values, at * 8, present, 8)
        weight = load_tuple(weights, at * 8, present, 8)
        for i in tl.static_range(8):
            size = tl.abs(x[i])
            largest = tl.where(size > largest, size, largest)
            q = (level_of(entry, i, 8) - 1).to(tl.float32) + shift_in(entry)
            sum_qx += weight[i] * q * x[i]
            sum_q2 += weight[i] * q * q
    skipped = skipped | (largest < TINY)
    fits = (marks == 0) & (sum_qx > 0.0) & (sum_q2 > 0.0)
    scale = tl.where(fits, tl.math.div_rn(sum_qx, sum_q2), scale)
    scale = tl.where(lost != 0, NAN, scale)
    tl.store(scales + lane, tl.where(skipped, 0.0, scale), mask=present)
    for g in tl.static_range(N // 8):
        at = lane * (N // 8) + g
        tl.store(entries + at, tl.zeros((T,), tl.int32), mask=present & skipped)


@jitted
def sub_scales_kernel(
    scales: tl.tensor,
    out: tl.tensor,
    d_found: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    NAME: tl.constexpr,
    J: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """The codes u8 of the sub-scales, NOTHING where all are zero, and d: that of IQ1_M to d_found f32 for now."""
    lane = lane_of(T)
    present = lane < count
    values = load_tuple(scales, lane * J, present, J)
    high = values[0]
    for i in tl.static_range(1, J):
        high = tl.where(values[i] > high, values[i], high)
    high = tl.where(not_a_number(values, J), NAN, high)
    d = tl.math.div_rn(high, 15.0)
    inverse = tl.math.div_rn(1.0, d)
    for i in tl.static_range(J):
        code = wrapped(0.5 * (inverse * values[i] - 1.0), 0.0, 7.0).to(tl.int32)
        store_byte(codes, lane * J + i, tl.where(high == 0.0, NOTHING, code), present)
    if NAME == "IQ1_S":
        store_half(out, lane * 50, d * 1.125, present)
    else:
        tl.store(d_found + lane, d, mask=present)


@jitted
def iq1_m_d_kernel(
    values: tl.tensor,
    weights: tl.tensor,
    entries: tl.tensor,
    codes: tl.tensor,
    d_found: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    T: tl.constexpr,
) -> None:
    """The least-squares d of IQ1_M, and the words that hold it above the sub-scales; a lane is a super-block."""
    lane = lane_of(T)
    present = lane < count
    sum_qx = tl.zeros((T,), tl.float32)
    sum_q2 = tl.zeros((T,), tl.float32)
    for g in range(32):
        at = lane * 32 + g
        entry = tl.load(entries + at, mask=present, other=0)
        odd = ((load_byte(codes, at // 2, present) & 7) * 2 + 1).to(tl.float32)
        x = load_tuple(values, at * 8, present, 8)
        weight = load_tuple(weights, at * 8, present, 8)
        for i in tl.static_range(8):
            q = ((level_of(entry, i, 8) - 1).to(tl.float32) + shift_in(entry)) * odd
            sum_qx += weight[i] * q * x[i]
            sum_q2 += weight[i] * q * q
    d = tl.load(d_found + lane, mask=present, other=0.0)
    d = tl.where(sum_q2 > 0.0, tl.math.div_rn(sum_qx, sum_q2), d) * 1.1125
    d = tl.where(load_byte(codes, lane * 16, present) > 15, 0.0, d)
    half = d.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    for k in tl.static_range(4):
        word = ((half >> (4 * k)) & 15) << 12
        for i in tl.static_range(4):
            word = word | ((load_byte(codes, lane * 16 + k * 4 + i, present) & 7) << (3 * i))
        store_pair(out, lane * 56 + 48 + k * 2, word, word >> 8, present)
