"""The truth for quantizing: every ggml search in numpy, float32, one operation at a time.

The bytes of a ggml type depend on the order of its sums: C adds the terms of a block one after the other in float32 and
nothing is fused. Here all blocks go through each step together (axis 0), and a sum inside a block is a running sum, so
the bytes equal those of stock ggml while the text stays close to the mathematics. A faster and more accurate sum
(pairwise, or in float64) would cost that equality. The price: some twenty times slower than `cpu.py`.

Shapes: B blocks or sub-blocks, N weights in each, S super-blocks, J sub-blocks in a super-block.
Source: the algorithms of ggml-quants.c (make_qx_quants, make_qkx2/3_quants, make_qp_quants, make_q3_quants).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml import packing
from quantkernels.ggml.layout import SUPER_BLOCK

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

TINY = np.float32(1e-15)  # a block whose largest magnitude or scale is below this is stored as zeros
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low mantissa bits


def quantize_blocks(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """The ggml bytes of `rows`.

    rows [R, C] f32, finite, C a multiple of the type's block; importance [C] f32 or None; gives [R, bytes] u8.
    """
    with np.errstate(all="ignore"):
        if name in ("Q4_K", "Q5_K", "Q2_K"):
            blocks = _quantize_scale_min_k(rows, name, importance)
        elif name == "Q6_K":
            blocks = _quantize_q6_k(rows, importance)
        elif name == "Q3_K":
            blocks = _quantize_q3_k(rows, importance)
        else:
            blocks = _quantize_legacy(rows, name, importance)
    return blocks.reshape(rows.shape[0], -1)


def nearest(values: Floats) -> Floats:
    """The nearest integers, ties to even, with ggml's wrap-around at and above 2**22 and 0 for NaN."""
    bits = (values + ROUND).view(np.int32)
    return ((bits & 0x007FFFFF) - 0x00400000).astype(np.float32)


def running_sum(terms_BN: Floats) -> Floats:
    """Each row's sum, added from left to right in float32."""
    return np.add.accumulate(terms_BN, axis=1, dtype=np.float32)[:, -1]


def round_half_away(values: Floats) -> Floats:
    """C's roundf."""
    whole = np.trunc(values)
    return whole + np.where(
        np.abs(values - whole) >= np.float32(0.5), np.copysign(np.float32(1), values), np.float32(0)
    )


def first_extreme(x_BN: Floats) -> Floats:
    """In each row the value of largest magnitude with its sign, the first one when several are equal, never -0.0."""
    where = np.argmax(np.abs(x_BN), axis=1)
    return np.take_along_axis(x_BN, where[:, None], axis=1)[:, 0] + np.float32(0)


def first_lowest(x_BN: Floats) -> Floats:
    """In each row the smallest value; of 0.0 and -0.0 the one that comes first, because its sign reaches the file."""
    return np.take_along_axis(x_BN, np.argmin(x_BN, axis=1)[:, None], axis=1)[:, 0]


def as_byte(codes: Floats) -> Floats:
    """What is left of an integer stored in a C uint8_t: only a scale below zero, from cancellation, is changed."""
    return np.mod(codes, np.float32(256))


def _or_zero(numerator: Floats, denominator: Floats) -> Floats:
    return np.where(denominator != 0, numerator / denominator, np.float32(0))


@dataclass(frozen=True, kw_only=True)
class Symmetric:
    """The result of `search_symmetric`: x is about scale * (codes - limit)."""

    scale_B: Floats
    codes_BN: Floats


def search_symmetric(x_BN: Floats, weight_BN: Floats, limit: int) -> Symmetric:
    """The scale among 19 candidates that leaves the least weighted square error; codes lie in [0, 2 limit).

    Each candidate rounds with an inverse scale near -limit / extreme and then takes the least-squares scale for the
    codes found. A block below TINY gets scale 0 and codes 0, not `limit`: that is what ggml stores.
    """
    extreme_B = first_extreme(x_BN)
    weighted_BN = weight_BN * x_BN
    scale_B = best_B = codes_BN = np.zeros(0, np.float32)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse_B = -(np.float32(limit) + np.float32(0.1) * np.float32(step)) / extreme_B
        candidate_BN = np.clip(nearest(inverse_B[:, None] * x_BN), np.float32(-limit), np.float32(limit - 1))
        sum_xl_B = running_sum(weighted_BN * candidate_BN)
        sum_l2_B = running_sum(weight_BN * candidate_BN * candidate_BN)
        if step == 0:
            scale_B = _or_zero(sum_xl_B, sum_l2_B)
            best_B = scale_B * sum_xl_B
            codes_BN = candidate_BN
            continue
        better_B = (sum_l2_B > 0) & (sum_xl_B * sum_xl_B > best_B * sum_l2_B)
        scale_B = np.where(better_B, sum_xl_B / sum_l2_B, scale_B)
        best_B = np.where(better_B, scale_B * sum_xl_B, best_B)
        codes_BN = np.where(better_B[:, None], candidate_BN, codes_BN)
    nonzero_B = np.abs(extreme_B) >= TINY
    return Symmetric(
        scale_B=np.where(nonzero_B, scale_B, np.float32(0)),
        codes_BN=np.where(nonzero_B[:, None], codes_BN + np.float32(limit), np.float32(0)),
    )


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Which inverse ranges a scale-and-minimum search tries: (first + width * step + limit) / range.

    absolute: weigh absolute errors, not squares. bounded: clamp before rounding, as ggml does with importance; without,
    a range that collapsed makes the rounding wrap around at 2**22, and those bytes are kept too.
    """

    first: float
    width: float
    count: int
    absolute: bool = False
    bounded: bool = False


@dataclass(frozen=True, kw_only=True)
class ScaleMin:
    """The result of `search_scale_min`: x is about scale * codes - depth, with scale and depth never negative."""

    scale_B: Floats
    depth_B: Floats
    codes_BN: Floats


def search_scale_min(x_BN: Floats, weight_BN: Floats, limit: int, steps: Steps) -> ScaleMin:
    """The scale and minimum of least weighted error (square, or absolute) over `steps`; codes lie in [0, limit].

    Each step rounds with its inverse range and solves the 2x2 weighted least squares. Trap: a step starts from the best
    minimum found so far, not from the block's minimum.
    """
    top = np.float32(limit)
    high_B = x_BN.max(axis=1)
    low_B = first_lowest(x_BN)
    low_B = np.where(low_B > 0, np.float32(0), low_B)
    active_B = high_B != low_B
    sum_w_B = running_sum(weight_BN)
    sum_x_B = running_sum(weight_BN * x_BN)

    def codes_for(inverse_B: Floats, bounded: bool) -> Floats:
        scaled_BN = inverse_B[:, None] * (x_BN - low_B[:, None])
        if bounded:
            return np.where(scaled_BN > 0, nearest(np.minimum(scaled_BN, top)), np.float32(0))
        return np.clip(nearest(scaled_BN), np.float32(0), top)

    def error_of(scale_B: Floats, minimum_B: Floats, codes_BN: Floats) -> Floats:
        error_BN = scale_B[:, None] * codes_BN + minimum_B[:, None] - x_BN
        return running_sum(weight_BN * (np.abs(error_BN) if steps.absolute else error_BN * error_BN))

    inverse_B = top / (high_B - low_B)
    codes_BN = codes_for(inverse_B, False)
    scale_B: Floats = np.float32(1) / inverse_B
    best_B = error_of(scale_B, low_B, codes_BN)
    for step in range(steps.count + 1):
        offset = np.float32(steps.first) + np.float32(steps.width) * np.float32(step) + top
        trial_BN = codes_for(offset / (high_B - low_B), steps.bounded)
        sum_l_B = running_sum(weight_BN * trial_BN)
        sum_l2_B = running_sum(weight_BN * trial_BN * trial_BN)
        sum_xl_B = running_sum(weight_BN * trial_BN * x_BN)
        determinant_B = sum_w_B * sum_l2_B - sum_l_B * sum_l_B
        slope_B: Floats = np.divide(sum_w_B * sum_xl_B - sum_x_B * sum_l_B, determinant_B)
        intercept_B: Floats = np.divide(sum_l2_B * sum_x_B - sum_l_B * sum_xl_B, determinant_B)
        positive_B = intercept_B > 0
        trial_scale_B = np.where(positive_B, sum_xl_B / sum_l2_B, slope_B)
        trial_low_B = np.where(positive_B, np.float32(0), intercept_B)
        error_B = error_of(trial_scale_B, trial_low_B, trial_BN)
        better_B = active_B & (determinant_B > 0) & (error_B < best_B)
        best_B = np.where(better_B, error_B, best_B)
        scale_B = np.where(better_B, trial_scale_B, scale_B)
        low_B = np.where(better_B, trial_low_B, low_B)
        codes_BN = np.where(better_B[:, None], trial_BN, codes_BN)
    return ScaleMin(
        scale_B=np.where(active_B, scale_B, np.float32(0)),
        depth_B=-low_B,
        codes_BN=np.where(active_B[:, None], codes_BN, np.float32(0)),
    )


def search_nonnegative(x_BN: Floats, weight_BN: Floats, limit: int) -> tuple[Floats, Floats]:
    """A scale and codes in [0, limit] for values that are never negative: 9 scales, then coordinate descent.

    Gives (scale [B], codes [B, N]). Used for the scales and minimums of a super-block.
    """
    top = np.float32(limit)
    high_B = np.maximum(x_BN.max(axis=1), np.float32(0))
    inverse_B = top / high_B
    error_BN = x_BN - (np.float32(1) / inverse_B)[:, None] * as_byte(nearest(inverse_B[:, None] * x_BN))
    best_B = running_sum(weight_BN * error_BN * error_BN)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial_B = (np.float32(0.1) * np.float32(step) + top) / high_B
        error_BN = x_BN - (np.float32(1) / trial_B)[:, None] * np.minimum(nearest(trial_B[:, None] * x_BN), top)
        error_B = running_sum(weight_BN * error_BN * error_BN)
        better_B = error_B < best_B
        best_B = np.where(better_B, error_B, best_B)
        inverse_B = np.where(better_B, trial_B, inverse_B)
    codes_BN = np.minimum(nearest(inverse_B[:, None] * x_BN), top)
    scale_B, codes_BN = _descend(x_BN, weight_BN, codes_BN, None, top)
    active_B = high_B >= TINY
    return np.where(active_B, scale_B, np.float32(0)), np.where(active_B[:, None], codes_BN, np.float32(0))


def search_descent(x_BN: Floats, limit: int) -> Symmetric:
    """Q3_K without importance: round by the extreme, then coordinate descent on the codes, weights x squared."""
    extreme_B = first_extreme(x_BN)
    inverse_B = np.float32(-limit) / extreme_B
    low, top = np.float32(-limit), np.float32(limit - 1)
    codes_BN = np.clip(nearest(inverse_B[:, None] * x_BN), low, top)
    scale_B, codes_BN = _descend(x_BN, x_BN * x_BN, codes_BN, low, top)
    nonzero_B = np.abs(extreme_B) >= TINY
    return Symmetric(
        scale_B=np.where(nonzero_B, scale_B, np.float32(0)),
        codes_BN=np.where(nonzero_B[:, None], codes_BN + np.float32(limit), np.float32(0)),
    )


def _descend(
    x_BN: Floats, weight_BN: Floats, codes_BN: Floats, low: np.float32 | None, top: np.float32
) -> tuple[Floats, Floats]:
    """Up to five sweeps that move one code at a time while the fit (sum wxl)^2 / sum wl^2 grows.

    With low None codes are bounded above only and a move also asks that the rest of the block is not all zero.
    """
    sum_xl_B = running_sum(weight_BN * x_BN * codes_BN)
    sum_l2_B = running_sum(weight_BN * codes_BN * codes_BN)
    codes_BN = as_byte(codes_BN) if low is None else codes_BN.copy()
    open_B = np.ones(len(x_BN), bool)  # a block closes after a sweep without a change
    for _ in range(5):
        changed_B = np.zeros(len(x_BN), bool)
        for i in range(x_BN.shape[1]):
            x, weight, old = x_BN[:, i], weight_BN[:, i], codes_BN[:, i]
            rest_xl: Floats = sum_xl_B - weight * x * old
            rest_l2: Floats = sum_l2_B - weight * old * old
            new = np.minimum(nearest(x * rest_l2 / rest_xl), top)
            allowed = rest_xl > 0
            if low is None:
                allowed &= rest_l2 > 0
            else:
                new = np.maximum(new, low)
            new_xl = rest_xl + weight * x * new
            new_l2 = rest_l2 + weight * new * new
            better = new_xl * new_xl * sum_l2_B > sum_xl_B * sum_xl_B * new_l2
            move = open_B & allowed & (new != old) & (new_l2 > 0) & better
            codes_BN[:, i] = np.where(move, as_byte(new) if low is None else new, old)
            sum_xl_B = np.where(move, new_xl, sum_xl_B)
            sum_l2_B = np.where(move, new_l2, sum_l2_B)
            changed_B |= move
        open_B &= changed_B
    return np.where(sum_l2_B > 0, sum_xl_B / sum_l2_B, np.float32(0)), codes_BN


def _quantize_legacy(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 with one scale, and one minimum in the _1 types."""
    x_BN = rows.reshape(-1, 32)
    bits = int(name[1])
    minimum_B = None
    if name == "Q8_0":
        scale_B = np.abs(x_BN).max(axis=1) / np.float32(127)
        scaled_BN = round_half_away(x_BN * _inverse(scale_B)[:, None])
        codes_BN = np.where(np.isfinite(scaled_BN), scaled_BN, np.float32(0))  # C turns what is not finite into byte 0
        return packing.pack_legacy(name, scale_B, None, codes_BN)
    if importance is not None:
        weight_BN = _row_weights(rows, importance).reshape(-1, 32)
        if name.endswith("_0"):
            found = search_symmetric(x_BN, weight_BN, 1 << (bits - 1))
            return packing.pack_legacy(name, found.scale_B, None, found.codes_BN)
        fitted = search_scale_min(x_BN, weight_BN, (1 << bits) - 1, WITH_IMPORTANCE)
        return packing.pack_legacy(name, fitted.scale_B, -fitted.depth_B, fitted.codes_BN)
    if name.endswith("_0"):
        scale_B = first_extreme(x_BN) / np.float32(-(1 << (bits - 1)))
        shifted_BN = x_BN * _inverse(scale_B)[:, None] + np.float32((1 << (bits - 1)) + 0.5)
    else:
        minimum_B = first_lowest(x_BN)
        scale_B = (x_BN.max(axis=1) - minimum_B) / np.float32((1 << bits) - 1)
        shifted_BN = (x_BN - minimum_B[:, None]) * _inverse(scale_B)[:, None] + np.float32(0.5)
    shifted_BN = np.where(np.isfinite(shifted_BN), shifted_BN, np.float32(0))
    codes_BN = np.minimum(np.trunc(shifted_BN), np.float32((1 << bits) - 1))
    return packing.pack_legacy(name, scale_B, minimum_B, codes_BN)


def _inverse(scale_B: Floats) -> Floats:
    return np.where(scale_B != 0, np.float32(1) / scale_B, np.float32(0))


def _row_weights(rows: Floats, importance: Floats) -> Floats:
    mean_square_R = running_sum(rows * rows) / np.float32(rows.shape[1])
    return importance * np.sqrt(mean_square_R[:, None] + rows * rows)


def _super_block_importance(rows: Floats, importance: Floats) -> Floats:
    return np.broadcast_to(importance, rows.shape).reshape(-1, SUPER_BLOCK)


def _super_block_weights(rows: Floats, importance: Floats, factor: float) -> Floats:
    """Importance times sqrt(factor * mean square + x^2), [S, 256], the mean over the super-block."""
    x_SN = rows.reshape(-1, SUPER_BLOCK)
    mean_square_S = np.float32(factor) * running_sum(x_SN * x_SN) / np.float32(SUPER_BLOCK)
    root_SN = np.sqrt(mean_square_S[:, None] + x_SN * x_SN)
    return _super_block_importance(rows, importance) * root_SN


WITH_IMPORTANCE = Steps(first=-0.9, width=0.05, count=36, bounded=True)
_ALONE = {
    "Q2_K": Steps(first=-0.5, width=0.1, count=15, absolute=True),
    "Q4_K": Steps(first=-1.0, width=0.1, count=20),
    "Q5_K": Steps(first=-0.5, width=0.1, count=15),
}


def _quantize_scale_min_k(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """Q2_K, Q4_K, Q5_K: super-blocks of 256 whose sub-blocks have a small scale and a small minimum each."""
    size, limit, scale_limit = (16, 3, 15) if name == "Q2_K" else (32, 15 if name == "Q4_K" else 31, 63)
    x_BN = rows.reshape(-1, size)
    if importance is None:
        magnitude_BN = np.abs(x_BN)
        weight_BN = magnitude_BN
        if name != "Q2_K":
            weight_BN = np.sqrt(running_sum(x_BN * x_BN) / np.float32(size))[:, None] + magnitude_BN
        found = search_scale_min(x_BN, weight_BN, limit, _ALONE[name])
    else:
        weight_BN = _super_block_weights(rows, importance, 1 if name == "Q2_K" else 2).reshape(-1, size)
        found = search_scale_min(x_BN, weight_BN, limit, WITH_IMPORTANCE)
    scale_SJ = found.scale_B.reshape(-1, SUPER_BLOCK // size)
    depth_SJ = found.depth_B.reshape(-1, SUPER_BLOCK // size)
    if importance is None:
        d_S, scales_SJ = _scales_by_maximum(scale_SJ, scale_limit)
        dmin_S, depths_SJ = _scales_by_maximum(depth_SJ, scale_limit)
    else:
        sum_w_SJ = running_sum(weight_BN).reshape(scale_SJ.shape)
        d_S, scales_SJ = search_nonnegative(scale_SJ, sum_w_SJ, scale_limit)
        dmin_S, depths_SJ = search_nonnegative(depth_SJ, sum_w_SJ, scale_limit)
        if name == "Q5_K":
            scales_SJ, depths_SJ = (np.minimum(codes, np.float32(63)) for codes in (scales_SJ, depths_SJ))
    fields = packing.pack_sub_scales(name, scales_SJ, depths_SJ)
    scales_SJ, depths_SJ = packing.unpack_sub_scales(name, fields)
    scale_B = (packing.as_half(d_S)[:, None] * scales_SJ).reshape(-1, 1)
    depth_B = (packing.as_half(dmin_S)[:, None] * depths_SJ).reshape(-1, 1)
    rounded_BN = np.clip(nearest((x_BN + depth_B) / scale_B), np.float32(0), np.float32(limit))
    codes_BN = np.where(scale_B != 0, rounded_BN, found.codes_BN)  # ggml keeps the search's codes where the scale is 0
    return packing.pack_scale_min_k(name, d_S, dmin_S, fields, codes_BN.reshape(-1, SUPER_BLOCK))


def _scales_by_maximum(value_SJ: Floats, limit: int) -> tuple[Floats, Floats]:
    high_S = np.maximum(value_SJ.max(axis=1), np.float32(0))
    inverse_S = np.where(high_S > 0, np.float32(limit) / high_S, np.float32(0))
    codes_SJ = as_byte(nearest(inverse_S[:, None] * value_SJ))
    if limit == 63:  # ggml clamps these, and lets those of Q2_K wrap
        codes_SJ = np.minimum(codes_SJ, np.float32(limit))
    return high_S / np.float32(limit), codes_SJ


def _quantize_q6_k(rows: Floats, importance: Floats | None) -> Bytes:
    """Q6_K: 16 sub-blocks of 16 with a signed 8-bit scale each."""
    x_BN = rows.reshape(-1, 16)
    weight_BN = x_BN * x_BN if importance is None else _super_block_importance(rows, importance).reshape(-1, 16)
    found = search_symmetric(x_BN, weight_BN, 32)
    scale_SJ = found.scale_B.reshape(-1, 16)
    extreme_S = first_extreme(scale_SJ)
    inverse_S = np.float32(-128) / extreme_S
    d_S = np.float32(1) / inverse_S
    scales_SJ = np.minimum(nearest(inverse_S[:, None] * scale_SJ), np.float32(127))
    codes_SN = _round_to_scales(x_BN, packing.as_half(d_S)[:, None] * scales_SJ, 32, found.codes_BN)
    blocks = packing.pack_q6_k(d_S, scales_SJ, codes_SN)
    blocks[np.abs(extreme_S) < TINY] = 0
    return blocks


def _quantize_q3_k(rows: Floats, importance: Floats | None) -> Bytes:
    """Q3_K: 16 sub-blocks of 16 with a signed 6-bit scale each."""
    x_BN = rows.reshape(-1, 16)
    if importance is None:
        found = search_descent(x_BN, 4)
        scale_SJ = found.scale_B.reshape(-1, 16)
        extreme_S = first_extreme(scale_SJ)
        inverse_S = np.float32(-32) / extreme_S
        scales_SJ = np.clip(nearest(inverse_S[:, None] * scale_SJ), np.float32(-32), np.float32(31))
        d_S = np.where(extreme_S != 0, np.float32(1) / inverse_S, np.float32(0))
        scales_SJ = np.where(extreme_S[:, None] != 0, scales_SJ, np.float32(-32))
    else:
        weight_SN = _super_block_weights(rows, importance, 2)
        found = search_symmetric(x_BN, weight_SN.reshape(-1, 16), 4)
        scale_SJ = found.scale_B.reshape(-1, 16)
        outer = search_symmetric(scale_SJ, running_sum(weight_SN.reshape(-1, 16)).reshape(-1, 16), 32)
        d_S = outer.scale_B
        scales_SJ = outer.codes_BN - np.float32(32)
    codes_SN = _round_to_scales(x_BN, packing.as_half(d_S)[:, None] * scales_SJ, 4, found.codes_BN)
    return packing.pack_q3_k(d_S, scales_SJ, codes_SN)


def _round_to_scales(x_BN: Floats, scale_SJ: Floats, limit: int, searched_BN: Floats) -> Floats:
    """Codes [S, 256] for stored scales; a sub-block whose stored scale is 0 keeps the codes of the search."""
    scale_B1 = scale_SJ.reshape(-1, 1)
    rounded_BN = np.clip(nearest(x_BN / scale_B1), np.float32(-limit), np.float32(limit - 1)) + np.float32(limit)
    return np.where(scale_B1 != 0, rounded_BN, searched_BN).reshape(-1, SUPER_BLOCK)
