"""The truth for the searches of ggml: numpy, float32, one operation at a time.

The bytes of a ggml type depend on the order of its sums: C adds the terms of a block one after the other in float32 and
nothing is fused. Here all blocks go through each step together (axis 0), and a sum inside a block is a running sum, so
the bytes equal those of stock ggml while the text stays close to the mathematics. A faster and more accurate sum
(pairwise, or in float64) would cost that equality.

Shapes: B blocks or sub-blocks, N weights in each.
Source: the algorithms of ggml-quants.c (make_qx_quants, make_qkx2/3_quants, make_qp_quants, make_q3_quants).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TINY = np.float32(1e-15)  # a block whose largest magnitude or scale is below this is stored as zeros
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low mantissa bits


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
