"""The truth for the scale search: every group goes through each step together, in f32, columns from left to right.

Sums run over a group's columns in order, one operation at a time, so that `cpu.py` (one candidate per SIMD lane, the
same order) gives the same bits. A pairwise or f64 sum would be more accurate by about 1e-6 of the error, which no
choice between candidates depends on.

# O out, I in, G groups of a row, B groups in all, N columns of a group, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to nearest even, up to 2**22
COARSE = 64  # candidates of a symmetric group; with 256 the error of a Gaussian falls by 0.3 % and the time quadruples
SHRINKS = 24  # candidates of an asymmetric group, each with three zero points
TINY = np.finfo(np.float64).tiny
FINE = 16  # candidates around the best one


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which candidates are tried: inverse steps `sign * whole * (start + (stop - start) * t)` for t in `along`.

    With weights as parts of the group's largest, `whole` is the inverse step at which they just fit the codes. stop is
    max(least_stop, by_crest * largest / root mean square): the more a weight stands out, the more it pays to clip it.
    offset is added to the zero point; between is the distance of two neighbours in `along`. by_size: errors count by
    the size of their weights, too.
    """

    low: int
    high: int
    symmetric: bool
    along: Floats
    sign: Floats
    offset: Floats
    between: np.float32
    start: np.float32
    least_stop: np.float32
    by_crest: np.float32
    by_size: bool

    def numbers(self) -> tuple[Any, ...]:
        """The fields as the numba kernel takes them."""
        bounds = (np.float32(self.low), np.float32(self.high), self.symmetric)
        ranges = (self.between, self.start, self.least_stop, self.by_crest)
        return (*bounds, self.along, self.sign, self.offset, *ranges, self.by_size)


def plan(*, low: int, high: int, symmetric: bool, signed: bool, by_size: bool) -> Plan:
    """The candidates for codes from low to high; ranges fitted on Gaussian and Student-t rows of 32 to 4096."""
    bits = np.log2(high - low + 1)
    if symmetric:
        count = COARSE // 2 if signed else COARSE
        along = np.tile(np.linspace(0, 1, count), 2 if signed else 1)
        sign = np.repeat([1.0, -1.0] if signed else [1.0], count)
        offset = np.zeros_like(along)
    else:
        count = SHRINKS
        along = np.repeat(np.linspace(0, 1, count), 3)
        sign = np.ones_like(along)
        offset = np.tile([0.0, -1.0, 1.0], count)
    return Plan(
        low=low,
        high=high,
        symmetric=symmetric,
        along=along.astype(np.float32),
        sign=sign.astype(np.float32),
        offset=offset.astype(np.float32),
        between=np.float32(1 / (count - 1)),
        start=np.float32(0.75),
        least_stop=np.float32(max(1.6, 3.1 - 0.2 * bits)),
        by_crest=np.float32(1.8 / bits),
        by_size=by_size,
    )


def search(weight_OI: Floats, share_I: Floats, group_size: int, plan: Plan, scale_OG: Floats, zero_OG: Floats) -> None:
    """Fills scale_OG and zero_OG; see `quantkernels.scales.search`."""
    for g in range(scale_OG.shape[1]):
        columns = slice(g * group_size, min((g + 1) * group_size, weight_OI.shape[1]))
        share = np.broadcast_to(share_I[columns], weight_OI[:, columns].shape)
        scale_OG[:, g], zero_OG[:, g] = _search_groups(weight_OI[:, columns], share, plan)


def errors(
    weight_OI: Floats,
    importance_I: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    group_size: int,
    low: int,
    high: int,
    by_size: bool,
    error_OG: NDArray[np.float64],
) -> None:
    """Fills error_OG; see `quantkernels.scales.errors`."""
    for g in range(scale_OG.shape[1]):
        columns = slice(g * group_size, min((g + 1) * group_size, weight_OI.shape[1]))
        scale, zero = scale_OG[:, g : g + 1], zero_OG[:, g : g + 1]
        weight = weight_OI[:, columns]
        with np.errstate(all="ignore"):
            steps = np.clip(np.where(scale == 0, np.float32(0), weight / scale), low - zero, high - zero)
        share, wide = importance_I[columns].astype(np.float64), weight.astype(np.float64)
        size = np.sqrt(wide**2 + ((share * wide**2).sum(1) / max(share.sum(), TINY))[:, None])
        difference = wide - (np.rint(steps) * scale).astype(np.float64)
        error_OG[:, g] = (share * (size if by_size else 1.0) * difference * difference).sum(1)


def _search_groups(weight_BN: Floats, share_BN: Floats, plan: Plan) -> tuple[Floats, Floats]:
    """The scale and the zero point of each group [B]."""
    largest_B = np.where(share_BN > 0, np.abs(weight_BN), np.float32(0)).max(1)
    share_BN = np.where(largest_B[:, None] > 0, share_BN, np.float32(1))
    largest_B = np.where(largest_B > 0, largest_B, np.abs(weight_BN).max(1))
    with np.errstate(all="ignore"):
        x_BN: Floats = np.divide(weight_BN, np.where(largest_B > 0, largest_B, np.float32(1))[:, None])
        crest_B = np.sqrt(_running_sum(share_BN) / _running_sum(share_BN * x_BN * x_BN))
        stop_B = np.maximum(plan.least_stop, plan.by_crest * crest_B)
        if plan.symmetric:
            inverse_B = np.full_like(largest_B, np.float32(plan.high - plan.low) * np.float32(0.5))
            zero_B = np.zeros_like(largest_B)
        else:
            minimum_B = np.minimum(np.where(share_BN > 0, x_BN, np.float32(0)).min(1), np.float32(0))
            maximum_B = np.maximum(np.where(share_BN > 0, x_BN, np.float32(0)).max(1), np.float32(0))
            inverse_B = np.float32(plan.high - plan.low) / (maximum_B - minimum_B)
            zero_B = np.float32(plan.low) - ((minimum_B * inverse_B + ROUND) - ROUND)
        span_B = inverse_B * (stop_B - plan.start)
        if plan.by_size:
            share_BN = share_BN * np.sqrt(x_BN * x_BN + (np.float32(1) / (crest_B * crest_B))[:, None])
        inverse_BK = plan.sign * (inverse_B[:, None] * plan.start + span_B[:, None] * plan.along)
        zero_BK = np.clip(zero_B[:, None] + plan.offset, plan.low, plan.high).astype(np.float32)
        error_B, scale_B, inverse_B, zero_B = _best(x_BN, share_BN, inverse_BK, zero_BK, plan)
        spacing_B = span_B * plan.between
        around = (np.arange(FINE, dtype=np.float32) - np.float32((FINE - 1) / 2)) * np.float32(2 / FINE)
        inverse_BK = inverse_B[:, None] + spacing_B[:, None] * around
        fine_error_B, fine_scale_B, _, _ = _best(x_BN, share_BN, inverse_BK, np.tile(zero_B[:, None], FINE), plan)
    scale_B = np.where(fine_error_B < error_B, fine_scale_B, scale_B)
    usable_B = (largest_B > 0) & np.isfinite(error_B)
    return np.where(usable_B, scale_B * largest_B, np.float32(0)), np.where(usable_B, zero_B, np.float32(0))


def _best(
    x_BN: Floats, share_BN: Floats, inverse_BK: Floats, zero_BK: Floats, plan: Plan
) -> tuple[Floats, Floats, Floats, Floats]:
    """Least error, scale with that error, inverse step and zero point [B] of each group's best candidate.

    The sums are over what rounding leaves, r = x / step - code: sum(w x c) itself would drown an 8-bit grid's error,
    some 1e-4 of the weights' square, in f32 rounding.
    """
    left_BK, mixed_BK, squares_BK = (np.zeros_like(inverse_BK) for _ in range(3))
    lowest_BK, highest_BK = np.float32(plan.low) - zero_BK, np.float32(plan.high) - zero_BK
    for n in range(x_BN.shape[1]):
        steps_BK = x_BN[:, n : n + 1] * inverse_BK
        codes_BK = (np.minimum(np.maximum(steps_BK, lowest_BK), highest_BK) + ROUND) - ROUND
        rest_BK = steps_BK - codes_BK
        shared_BK = share_BN[:, n : n + 1] * rest_BK
        left_BK += shared_BK * rest_BK
        mixed_BK += shared_BK * codes_BK
        squares_BK += (share_BN[:, n : n + 1] * codes_BK) * codes_BK
    error_BK = (left_BK - mixed_BK * mixed_BK / squares_BK) / (inverse_BK * inverse_BK)
    error_BK = np.where(squares_BK > 0, error_BK, np.float32(np.inf))
    scale_BK = (np.float32(1) + mixed_BK / squares_BK) / inverse_BK
    best_B1 = error_BK.argmin(1)[:, None]
    error_B, scale_B, inverse_B, zero_B = (
        np.take_along_axis(values, best_B1, 1)[:, 0] for values in (error_BK, scale_BK, inverse_BK, zero_BK)
    )
    return error_B, scale_B, inverse_B, zero_B


def _running_sum(terms_BN: Floats) -> Floats:
    total_B: Floats = np.add.accumulate(terms_BN, axis=1, dtype=np.float32)[:, -1]
    return total_B
