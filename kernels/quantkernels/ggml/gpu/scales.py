"""The scales of super-blocks in Triton: from what the searches found to the fields of a block; a lane is a super-block.

Where a search overflowed and a scale is NaN, d becomes NaN, which the caller refuses.
"""

# Triton knows no * in tuples, and mypy no tuples that grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import triton.language as tl

from quantkernels.ggml.gpu.numbers import (
    bounded,
    extreme_of,
    inverse_of,
    jitted,
    lane_of,
    load_byte,
    load_tuple,
    low_byte,
    nearest,
    not_a_number,
    store_half,
    store_pair,
    wrapped,
)
from quantkernels.ggml.gpu.search import search_nonnegative, search_symmetric

NAN = tl.constexpr(float("nan"))


@jitted
def scales_by_maximum(values: tl.tuple, LIMIT: tl.constexpr, N: tl.constexpr) -> tuple[tl.tensor, tl.tuple]:
    """The scale that brings the largest value to LIMIT, and the codes. Only those up to 63 are clamped, as in ggml."""
    high = tl.zeros_like(values[0])
    for i in tl.static_range(N):
        high = tl.where(values[i] > high, values[i], high)
    inverse = tl.where(high > 0.0, tl.math.div_rn(LIMIT, high), 0.0)
    codes = ()
    for i in tl.static_range(N):
        code = low_byte(nearest(inverse * values[i]))
        if LIMIT == 63.0:
            code = tl.where(code > LIMIT, LIMIT, code)
        codes = codes + (code,)
    return tl.math.div_rn(high, LIMIT), codes


@jitted
def fit_scales_kernel(
    found: tl.tensor,
    trials: tl.tensor,
    fitted: tl.tensor,
    fields: tl.tensor,
    count: tl.tensor,
    WEIGHED: tl.constexpr,
    LIMIT: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """fitted [count]: d of all super-blocks, then their dmin; fields [count, N] u8: the small scales and depths.

    A lane is the scales or the depths of a super-block, whose weight sums are the fifth line of `found`.
    """
    lane = lane_of(T)
    present = lane < count
    values = load_tuple(found, lane * N, present, N)
    if WEIGHED:
        weight = load_tuple(found, (2 * count + lane % (count // 2)) * N, present, N)
        scale, codes = search_nonnegative(values, weight, trials, LIMIT, N)
    else:
        scale, codes = scales_by_maximum(values, LIMIT, N)
    tl.store(fitted + lane, tl.where(not_a_number(values, N), NAN, scale), mask=present)
    words = fields.to(tl.pointer_type(tl.int32))
    for i in tl.static_range(0, N, 4):
        word = codes[i].to(tl.int32) | (codes[i + 1].to(tl.int32) << 8)
        word = word | (codes[i + 2].to(tl.int32) << 16) | (codes[i + 3].to(tl.int32) << 24)
        tl.store(words + (lane * N + i) // 4, word, mask=present)


@jitted
def scale_min_fields_kernel(
    fitted: tl.tensor,
    fields: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    BITS: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """d, dmin and the small scales and depths, packed, of the blocks `out` of Q2_K, Q4_K or Q5_K."""
    lane = lane_of(T)
    present = lane < count
    at = lane * (84 if BITS == 2 else (144 if BITS == 4 else 176))
    field = at + (80 if BITS == 2 else 0)
    store_half(out, field, tl.load(fitted + lane, mask=present, other=0.0), present)
    store_half(out, field + 2, tl.load(fitted + count + lane, mask=present, other=0.0), present)
    low = ()
    high = ()
    for i in tl.static_range(N):
        scale = load_byte(fields, lane * N + i, present)
        depth = load_byte(fields, (count + lane) * N + i, present)
        if BITS == 5:
            scale = tl.where(scale > 63, 63, scale)
            depth = tl.where(depth > 63, 63, depth)
        low = low + (scale,)
        high = high + (depth,)
    if BITS == 2:
        for i in tl.static_range(0, N, 2):
            store_pair(out, at + i, low[i] | (high[i] << 4), low[i + 1] | (high[i + 1] << 4), present)
    else:
        for i in tl.static_range(0, 4, 2):
            store_pair(
                out,
                at + 4 + i,
                low[i] | ((low[i + 4] >> 4) << 6),
                low[i + 1] | ((low[i + 5] >> 4) << 6),
                present,
            )
            store_pair(
                out,
                at + 8 + i,
                high[i] | ((high[i + 4] >> 4) << 6),
                high[i + 1] | ((high[i + 5] >> 4) << 6),
                present,
            )
            store_pair(
                out,
                at + 12 + i,
                (low[i + 4] & 15) | ((high[i + 4] & 15) << 4),
                (low[i + 5] & 15) | ((high[i + 5] & 15) << 4),
                present,
            )


@jitted
def q6_k_scales_kernel(found: tl.tensor, out: tl.tensor, count: tl.tensor, T: tl.constexpr) -> None:
    """d and the scales of Q6_K; found then has, in its third line, where a super-block is below TINY and all zeros."""
    lane = lane_of(T)
    present = lane < count
    values = load_tuple(found, lane * 16, present, 16)
    extreme = extreme_of(values, 16)
    inverse = tl.math.div_rn(-128.0, extreme)
    nothing = tl.abs(extreme) < 1e-15
    d = tl.where(nothing, 0.0, tl.math.div_rn(1.0, inverse))
    store_half(out, lane * 210 + 208, tl.where(not_a_number(values, 16), NAN, d), present)
    tl.store(found + 2 * count * 16 + lane, tl.where(nothing, 1.0, 0.0), mask=present)
    codes = ()
    for i in tl.static_range(16):
        code = wrapped(inverse * values[i], -128.0, 127.0)
        codes = codes + (tl.where(nothing, 0.0, code).to(tl.int32),)
    for i in tl.static_range(0, 16, 2):
        store_pair(out, lane * 210 + 192 + i, codes[i], codes[i + 1], present)


@jitted
def q3_k_scales_kernel(
    found: tl.tensor, trials: tl.tensor, out: tl.tensor, count: tl.tensor, WEIGHED: tl.constexpr, T: tl.constexpr
) -> None:
    """d and the scales of Q3_K, stored plus 32: low nibbles, then high crumbs."""
    lane = lane_of(T)
    present = lane < count
    values = load_tuple(found, lane * 16, present, 16)
    if WEIGHED:
        weight = load_tuple(found + 2 * count * 16, lane * 16, present, 16)
        d, inverse = search_symmetric(values, weight, trials, -32.0, 31.0, 16)
    else:
        inverse = tl.math.div_rn(-32.0, extreme_of(values, 16))
        d = tl.math.div_rn(1.0, inverse)
        nothing = extreme_of(values, 16) == 0.0
        d = tl.where(nothing, 0.0, d)
        inverse = tl.where(nothing, 0.0, inverse)
    store_half(out, lane * 110 + 108, tl.where(not_a_number(values, 16), NAN, d), present)
    codes = ()
    for i in tl.static_range(16):
        code = bounded(inverse * values[i], -32.0, 31.0) if WEIGHED else wrapped(inverse * values[i], -32.0, 31.0)
        codes = codes + (tl.where(inverse == 0.0, -32.0, code).to(tl.int32) + 32,)
    fields = ()
    for i in tl.static_range(8):
        fields = fields + ((codes[i] & 15) | ((codes[i + 8] & 15) << 4),)
    for i in tl.static_range(4):
        crumbs = (codes[i] >> 4) | ((codes[i + 4] >> 4) << 2)
        fields = fields + (crumbs | ((codes[i + 8] >> 4) << 4) | ((codes[i + 12] >> 4) << 6),)
    for i in tl.static_range(0, 12, 2):
        store_pair(out, lane * 110 + 96 + i, fields[i], fields[i + 1], present)


@jitted
def iq4_xs_scales_kernel(found: tl.tensor, out: tl.tensor, count: tl.tensor, T: tl.constexpr) -> None:
    """d and the scales of IQ4_XS; found [2, sub-blocks] then has the inverses of what the codes stand for."""
    lane = lane_of(T)
    present = lane < count
    values = load_tuple(found, lane * 8, present, 8)
    d = tl.math.div_rn(extreme_of(values, 8), -32.0)
    inverse = inverse_of(d)
    store_half(out, lane * 136, tl.where(not_a_number(values, 8), NAN, d), present)
    codes = ()
    for i in tl.static_range(8):
        code = wrapped(inverse * values[i], -32.0, 31.0)
        tl.store(found + (count + lane) * 8 + i, inverse_of(d * code), mask=present)
        codes = codes + (code.to(tl.int32) + 32,)
    fields = ()
    for i in tl.static_range(2):
        high = (codes[4 * i] >> 4) | ((codes[4 * i + 1] >> 4) << 2)
        fields = fields + (high | ((codes[4 * i + 2] >> 4) << 4) | ((codes[4 * i + 3] >> 4) << 6),)
    for i in tl.static_range(4):
        fields = fields + ((codes[2 * i] & 15) | ((codes[2 * i + 1] & 15) << 4),)
    for i in tl.static_range(0, 6, 2):
        store_pair(out, lane * 136 + 2 + i, fields[i], fields[i + 1], present)
