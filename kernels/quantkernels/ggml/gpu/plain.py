"""The types whose scale is the range or the largest magnitude of a block, in Triton; a lane is a block or sub-block."""

from __future__ import annotations

import triton.language as tl

from quantkernels.ggml.gpu.numbers import (
    extreme_of,
    inverse_of,
    jitted,
    lane_of,
    load_tuple,
    store_byte,
    store_half,
)


@jitted
def range_kernel(
    rows: tl.tensor,
    found: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    DIVISOR: tl.constexpr,
    MINIMUM: tl.constexpr,
    BYTES: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """The scale fields of Q4_0, Q5_0, Q8_0 (extreme / DIVISOR) or, with a MINIMUM, Q4_1, Q5_1 (range / DIVISOR).

    found [2, count]: the inverses and the minimums.
    """
    lane = lane_of(T)
    present = lane < count
    x = load_tuple(rows, lane * 32, present, 32)
    if MINIMUM:
        low = x[0]
        high = x[0]
        for i in tl.static_range(1, 32):
            low = tl.where(x[i] < low, x[i], low)
            high = tl.where(x[i] > high, x[i], high)
        scale = tl.math.div_rn(high - low, DIVISOR)
        store_half(out, lane * BYTES + 2, low, present)
    else:
        low = tl.zeros_like(x[0])
        extreme = extreme_of(x, 32)
        scale = tl.math.div_rn(tl.abs(extreme) if DIVISOR == 127.0 else extreme, DIVISOR)
    store_half(out, lane * BYTES, scale, present)
    tl.store(found + lane, inverse_of(scale), mask=present)
    tl.store(found + count + lane, low, mask=present)


@jitted
def searched_scale_kernel(
    found: tl.tensor, out: tl.tensor, count: tl.tensor, MINIMUM: tl.constexpr, BYTES: tl.constexpr, T: tl.constexpr
) -> None:
    """The scale fields of types with one scale, and one minimum, that a search has found."""
    lane = lane_of(T)
    present = lane < count
    store_half(out, lane * BYTES, tl.load(found + lane, mask=present, other=0.0), present)
    if MINIMUM:
        depth = tl.load(found + count + lane, mask=present, other=0.0)
        store_half(out, lane * BYTES + 2, depth * -1.0, present)


@jitted
def ternary_kernel(
    rows: tl.tensor, found: tl.tensor, out: tl.tensor, count: tl.tensor, BYTES: tl.constexpr, T: tl.constexpr
) -> None:
    """The scale field of TQ1_0 or TQ2_0, the largest magnitude of 256 weights; found [count]: its inverse."""
    lane = lane_of(T)
    present = lane < count
    largest = tl.zeros((T,), tl.float32)
    for i in range(256):
        value = tl.abs(tl.load(rows + lane * 256 + i, mask=present, other=0.0).to(tl.float32))
        largest = tl.where(value > largest, value, largest)
    store_half(out, lane * BYTES + BYTES - 2, largest, present)
    tl.store(found + lane, inverse_of(largest), mask=present)


@jitted
def exponent_of(value: tl.tensor) -> tl.tensor:
    """floor(log2f(value)) + 125 for a positive value, rounded up close below a power of two as log2f does.

    See `cpu_fp4.exponent_of` for why: n steps of 2**-24 round up where n < log(2) * 2**j.
    """
    small = value < 1.1754944e-38  # denormal
    bits = tl.where(small, value * 8388608.0, value).to(tl.int32, bitcast=True)
    power = (bits >> 23) - 127 - tl.where(small, 23, 0)
    above = power + 1
    steps = (0x00800000 - (bits & 0x007FFFFF)).to(tl.float32)
    distance = tl.where(above > 0, above - 1, -above).to(tl.float32)
    binade = (distance.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(steps < 0.69314718 * binade, above, power) + 125


@jitted
def mxfp4_kernel(rows: tl.tensor, out: tl.tensor, count: tl.tensor, T: tl.constexpr) -> None:
    """The exponent field of MXFP4."""
    lane = lane_of(T)
    present = lane < count
    largest = tl.abs(extreme_of(load_tuple(rows, lane * 32, present, 32), 32))
    store_byte(out, lane * 17, tl.where(largest > 0.0, exponent_of(largest), 0), present)


@jitted
def nvfp4_kernel(rows: tl.tensor, out: tl.tensor, count: tl.tensor, T: tl.constexpr) -> None:
    """The scale field of each sixteen weights of NVFP4; the byte for NaN beyond 448."""
    lane = lane_of(T)
    present = lane < count
    value = tl.math.div_rn(tl.abs(extreme_of(load_tuple(rows, lane * 16, present, 16), 16)), 6.0)
    bits = value.to(tl.int32, bitcast=True)
    field = (((bits >> 19) + 1) >> 1) - (120 << 3)
    denormal = (tl.where(value < 1.0, value, 0.0) * 512.0 + 0.5).to(tl.int32)
    denormal = tl.where(denormal > 7, 7, denormal)
    field = tl.where((bits >> 23) <= 120, denormal, tl.where(field < 0x78, field, 0x7E))
    store_byte(out, lane // 4 * 36 + lane % 4, tl.where(value > 448.0, 127, field), present)
