"""Codes of weights for the scales that are stored, and codes to bytes, in Triton; a lane is a weight or a byte.

Codes pass through an array of one byte a weight, so that one packing kernel serves all types. Packing in the rounding
kernels would save that array's traffic, three bytes a weight of some terabytes a second, at a kernel for each layout.
"""

from __future__ import annotations

import triton.language as tl

from quantkernels.ggml.gpu.levels import IQ4_MIDDLES
from quantkernels.ggml.gpu.numbers import (
    bounded,
    jitted,
    lane_of,
    load_byte,
    store_byte,
    wrapped,
)
from quantkernels.ggml.gpu.search import trial_code
from quantkernels.ggml.gpu.unpack import byte_scale, sub_scale_min, symmetric_scale


@jitted
def scale_min_codes_kernel(
    rows: tl.tensor,
    found: tl.tensor,
    blocks: tl.tensor,
    codes: tl.tensor,
    subs: tl.tensor,
    count: tl.tensor,
    BITS: tl.constexpr,
    TOP: tl.constexpr,
    BOUNDED: tl.constexpr,
    SUPER: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Codes of Q2_K, Q4_K, Q5_K or, without SUPER, of Q4_1, Q5_1 with importance.

    Where the stored scale is 0, and without SUPER everywhere, they are those that the search ended with.
    """
    lane = lane_of(T)
    present = lane < count
    value = tl.load(rows + lane, mask=present, other=0.0).to(tl.float32)
    sub = lane // N
    inverse = tl.load(found + 2 * subs + sub, mask=present, other=0.0)
    low = tl.load(found + 3 * subs + sub, mask=present, other=0.0)
    code = trial_code(inverse * (value - low), TOP, BOUNDED)
    if SUPER:
        scale, depth = sub_scale_min(blocks, lane, present, BITS, N)
        code = tl.where(scale != 0.0, wrapped(tl.math.div_rn(value + depth, scale), 0.0, TOP), code)
    tl.store(codes + lane, code.to(tl.uint8), mask=present)


@jitted
def symmetric_codes_kernel(
    rows: tl.tensor,
    found: tl.tensor,
    blocks: tl.tensor,
    codes: tl.tensor,
    subs: tl.tensor,
    count: tl.tensor,
    NAME: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    DESCENT: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Codes, from 0 on, of Q3_K, Q6_K or, of any other NAME, of Q4_0 and Q5_0 with importance.

    Where the stored scale is 0 they are those of the search, which a DESCENT has left in `codes`.
    """
    lane = lane_of(T)
    present = lane < count
    value = tl.load(rows + lane, mask=present, other=0.0).to(tl.float32)
    if DESCENT:
        code = load_byte(codes, lane, present).to(tl.float32)
    else:
        inverse = tl.load(found + subs + lane // N, mask=present, other=0.0)
        code = tl.where(inverse != 0.0, bounded(inverse * value, LOW, HIGH) - LOW, 0.0)
    if NAME == "Q6_K":
        nothing = tl.load(found + 2 * subs + lane // 256, mask=present, other=0.0) != 0.0
        code = tl.where(nothing, 0.0, code)
    if NAME == "Q3_K" or NAME == "Q6_K":
        scale = symmetric_scale(blocks, lane, present, NAME)
        code = tl.where(scale != 0.0, wrapped(tl.math.div_rn(value, scale), LOW, HIGH) - LOW, code)
    tl.store(codes + lane, code.to(tl.uint8), mask=present)


@jitted
def level_codes_kernel(
    rows: tl.tensor, found: tl.tensor, codes: tl.tensor, subs: tl.tensor, count: tl.tensor, T: tl.constexpr
) -> None:
    """Codes of IQ4_NL or IQ4_XS, by the inverses in the second line of `found`."""
    lane = lane_of(T)
    present = lane < count
    value = tl.load(rows + lane, mask=present, other=0.0).to(tl.float32)
    scaled = tl.load(found + subs + lane // 32, mask=present, other=0.0) * value
    code = tl.zeros((T,), tl.int32)
    for k in tl.static_range(15):
        code = tl.where(scaled < IQ4_MIDDLES[k], code, k + 1)
    store_byte(codes, lane, code, present)


@jitted
def range_codes_kernel(
    rows: tl.tensor,
    found: tl.tensor,
    codes: tl.tensor,
    subs: tl.tensor,
    count: tl.tensor,
    SHIFT: tl.constexpr,
    TOP: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Codes of Q4_0, Q4_1, Q5_0, Q5_1: (x - minimum) * inverse + SHIFT without its fraction, at most TOP."""
    lane = lane_of(T)
    present = lane < count
    value = tl.load(rows + lane, mask=present, other=0.0).to(tl.float32)
    low = tl.load(found + subs + lane // 32, mask=present, other=0.0)
    scaled = (value - low) * tl.load(found + lane // 32, mask=present, other=0.0) + SHIFT
    code = tl.where(tl.abs(scaled) < 1e9, scaled, 0.0).to(tl.int32)  # C stores byte 0 for what it cannot hold
    store_byte(codes, lane, tl.where(code > TOP, TOP, code), present)


@jitted
def half_away_codes_kernel(
    rows: tl.tensor,
    found: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    N: tl.constexpr,
    SHIFT: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Codes of Q8_0, TQ1_0, TQ2_0: x * inverse, one inverse for N weights, rounded half away from 0, plus SHIFT."""
    lane = lane_of(T)
    present = lane < count
    value = tl.load(rows + lane, mask=present, other=0.0).to(tl.float32)
    scaled = value * tl.load(found + lane // N, mask=present, other=0.0)
    scaled = tl.where(tl.abs(scaled) < 1e9, scaled, 0.0)
    whole = scaled.to(tl.int32)
    rest = scaled - whole.to(tl.float32)
    code = whole + tl.where(rest >= 0.5, 1, 0) - tl.where(rest <= -0.5, 1, 0)
    store_byte(codes, lane, code + SHIFT, present)


@jitted
def float4_code(value: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The code from 0 to 15 of the nearest level times `scale`; half-way the one nearer to 0, and never -0."""
    size = tl.abs(value)
    code = tl.where(size > scale * 0.5, 1, 0)
    code = tl.where(size > scale * 1.5, 2, code)
    code = tl.where(size > scale * 2.5, 3, code)
    code = tl.where(size > scale * 3.5, 4, code)
    code = tl.where(size > scale * 5.0, 5, code)
    finite = scale * 8.0 <= 3.4028235e38  # a level that is infinite is never the nearest
    code = tl.where(finite & (size > scale * 7.0), 6, code)
    code = tl.where(finite & (size > scale * 10.0), 7, code)
    code = tl.where((value < 0.0) & (code > 0), code + 8, code)
    return tl.where(scale > 0.0, code, 0)


@jitted
def float4_codes_kernel(
    rows: tl.tensor, blocks: tl.tensor, codes: tl.tensor, count: tl.tensor, NAME: tl.constexpr, T: tl.constexpr
) -> None:
    """Codes of MXFP4 or NVFP4."""
    lane = lane_of(T)
    present = lane < count
    value = tl.load(rows + lane, mask=present, other=0.0).to(tl.float32)
    store_byte(codes, lane, float4_code(value, byte_scale(blocks, lane, present, NAME)), present)


@jitted
def pack_kernel(
    codes: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    WEIGHTS: tl.constexpr,
    BYTES: tl.constexpr,
    AT: tl.constexpr,
    RUN: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """One field of blocks of WEIGHTS in BYTES: from byte AT on, PARTS codes a byte that lie RUN weights apart.

    Of each code the WIDTH bits above the lowest SHIFT are stored. A lane is a byte of the field.
    """
    lane = lane_of(T)
    present = lane < count
    block = lane // (WEIGHTS // PARTS)
    byte = lane % (WEIGHTS // PARTS)
    first = block * WEIGHTS + byte // RUN * (RUN * PARTS) + byte % RUN
    packed = tl.zeros((T,), tl.int32)
    for p in tl.static_range(PARTS):
        code = load_byte(codes, first + p * RUN, present) >> SHIFT
        packed = packed | ((code & ((1 << WIDTH) - 1)) << (p * WIDTH))
    store_byte(out, block * BYTES + AT + byte, packed, present)


@jitted
def pack_trits_kernel(codes: tl.tensor, out: tl.tensor, count: tl.tensor, T: tl.constexpr) -> None:
    """The 52 code bytes of TQ1_0: five codes as a number in base 3, stored as a fraction of 256; four in the last."""
    lane = lane_of(T)
    present = lane < count
    block = lane // 52
    byte = lane % 52
    run = tl.where(byte < 32, 32, tl.where(byte < 48, 16, 4))
    first = tl.where(byte < 32, byte, tl.where(byte < 48, 160 + byte - 32, 240 + byte - 48))
    number = tl.zeros((T,), tl.int32)
    for p in tl.static_range(5):
        here = present & ((byte < 48) | (p < 4))
        number = number * 3 + load_byte(codes, block * 256 + first + p * run, here)
    store_byte(out, block * 54 + byte, (number * 256 + 242) // 243, present)
