"""The search for scales of floats in numba: one candidate per SIMD lane, as in `cpu.py`, with the same promise.

# O out, I in, P blocks of rows, Q blocks of columns, G groups of a row, K candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.scales.reference_floats import SMALL

Floats = NDArray[np.float32]
ZERO, ONE, INFINITE = np.float32(0), np.float32(1), np.float32(np.inf)


@compiled
def _nearest(steps: Any, kind: tuple[Any, Any, Any]) -> Any:
    split, normal, centre = kind
    wide = steps * split
    code = wide - (wide - steps)
    even = (steps + centre) - centre
    return even if abs(steps) < normal else code


@compiled
def _add(sums: tuple[Any, Any, Any], steps: Any, share: Any, kind: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """A candidate's sums with one more weight."""
    code = _nearest(steps, kind)
    rest = steps - code
    shared, coded = share * rest, share * code
    return sums[0] + shared * rest, sums[1] + shared * code, sums[2] + coded * code


@compiled
def _add_row(
    weight_I: Floats, share_I: Floats, largest: Any, inverse: Floats, sums: Floats, kind: tuple[Any, Any, Any]
) -> None:
    """Adds the sums of a row of a block to those of each candidate, four columns for each pass over these."""
    left, mixed, squares = sums[0], sums[1], sums[2]
    whole = weight_I.shape[0] // 4 * 4
    for j in range(0, whole, 4):
        x_0, x_1 = weight_I[j] / largest, weight_I[j + 1] / largest
        x_2, x_3 = weight_I[j + 2] / largest, weight_I[j + 3] / largest
        share_0, share_1, share_2, share_3 = share_I[j], share_I[j + 1], share_I[j + 2], share_I[j + 3]
        for k in range(inverse.shape[0]):
            step, sums_k = inverse[k], (left[k], mixed[k], squares[k])
            sums_k = _add(sums_k, x_0 * step, share_0, kind)
            sums_k = _add(sums_k, x_1 * step, share_1, kind)
            sums_k = _add(sums_k, x_2 * step, share_2, kind)
            left[k], mixed[k], squares[k] = _add(sums_k, x_3 * step, share_3, kind)
    for j in range(whole, weight_I.shape[0]):
        x, share = weight_I[j] / largest, share_I[j]
        for k in range(inverse.shape[0]):
            sums_k = (left[k], mixed[k], squares[k])
            left[k], mixed[k], squares[k] = _add(sums_k, x * inverse[k], share, kind)


@compiled
def _best(total: NDArray[np.float64], inverse: Floats) -> Any:
    """The least-squares scale of the candidate that has the least error with it."""
    scale, least = 0.0, np.inf
    for k in range(inverse.shape[0]):
        left, mixed, squares = total[0, k], total[1, k], total[2, k]
        if squares > 0.0:
            wide = np.float64(inverse[k])
            error = (left - mixed * mixed / squares) / (wide * wide)
            if error < least:
                scale, least = (1.0 + mixed / squares) / wide, error
    return np.float32(scale)


@kernel
def search(
    weight_OI: Floats,
    share_I: Floats,
    height: int,
    width: int,
    scale_PQ: Floats,
    inverse: Floats,
    split: Any,
    normal: Any,
    centre: Any,
) -> None:
    """Fills scale_PQ; see `quantkernels.scales.search_floats`."""
    lanes = inverse.shape[0]
    sums, total = np.empty((3, lanes), np.float32), np.empty((3, lanes), np.float64)
    ones = np.ones(min(width, weight_OI.shape[1]), np.float32)
    for p in range(scale_PQ.shape[0]):
        rows = range(p * height, min((p + 1) * height, weight_OI.shape[0]))
        for q in range(scale_PQ.shape[1]):
            first, last = q * width, min((q + 1) * width, weight_OI.shape[1])
            largest = ZERO
            for o in rows:
                for j in range(first, last):
                    largest = max(largest, abs(weight_OI[o, j]))
            if largest == ZERO:
                scale_PQ[p, q] = ZERO
                continue
            share = share_I[first:last]
            if not share.any():
                share = ones[: last - first]
            total[:] = 0.0
            for o in rows:
                sums[:] = ZERO
                _add_row(weight_OI[o, first:last], share, largest, inverse, sums, (split, normal, centre))
                for s in range(3):
                    for k in range(lanes):
                        total[s, k] += np.float64(sums[s, k])
            scale_PQ[p, q] = _best(total, inverse) * largest


@kernel
def choose(
    weight_OI: Floats,
    share_I: Floats,
    values_OGK: Floats,
    group_size: int,
    fourth: bool,
    by_size: bool,
    best_OG: NDArray[np.int64],
    top: Any,
    split: Any,
    normal: Any,
    centre: Any,
) -> None:
    """Fills best_OG; see `quantkernels.scales.choose_float`."""
    kind, lanes = (split, normal, centre), values_OGK.shape[2]
    ones = np.ones(group_size, np.float32)
    divisor, error = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    for g in range(values_OGK.shape[1]):
        first = g * group_size
        share = share_I[first : first + group_size]
        if not share.any():
            share = ones
        whole = ZERO
        for j in range(group_size):
            whole += share[j]
        for o in range(weight_OI.shape[0]):
            weight, values = weight_OI[o, first : first + group_size], values_OGK[o, g]
            squares = ZERO
            for j in range(group_size):
                squares += share[j] * weight[j] * weight[j]
            mean, unit = squares / whole, ONE / max(values[0], SMALL)
            for k in range(lanes):
                divisor[k] = values[k] if values[k] != ZERO else INFINITE
                error[k] = ZERO
            for j in range(group_size):
                w = weight[j]
                heavy = share[j] * np.sqrt(w * w + mean) if by_size else share[j]
                for k in range(lanes):
                    steps = min(max(w / divisor[k], -top), top)
                    off = (_nearest(steps, kind) * values[k] - w) * unit
                    square = off * off
                    error[k] += heavy * (square * square if fourth else square)
            best = 0
            for k in range(1, lanes):
                if error[k] < error[best]:
                    best = k
            best_OG[o, g] = best
