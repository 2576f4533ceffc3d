"""The scale search in numba: one candidate per SIMD lane, columns one after the other.

Lanes never meet, so no sum is reassociated: the bits equal `reference.py` on every machine and with any number of
threads. Summing along a group in several lanes would be as fast, but its bits would depend on the width of the vectors.
Measured on one core with AVX-512: about 80 million weights a second at 64 + 16 candidates.

# O out, I in, G groups of a row, N columns of a group, K candidates.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.scales.reference import FINE, ROUND

Floats = NDArray[np.float32]
ZERO, HALF, ONE, INFINITE = np.float32(0), np.float32(0.5), np.float32(1), np.float32(np.inf)


@compiled
def _code(steps: Any, lowest: Any, highest: Any) -> Any:
    steps = lowest if steps < lowest else steps
    steps = highest if steps > highest else steps
    return (steps + ROUND) - ROUND


@compiled
def _add(sums: tuple[Any, Any, Any], steps: Any, share: Any, lowest: Any, highest: Any) -> tuple[Any, Any, Any]:
    """A candidate's sums with one more weight."""
    code = _code(steps, lowest, highest)
    rest = steps - code
    shared = share * rest
    return sums[0] + shared * rest, sums[1] + shared * code, sums[2] + (share * code) * code


@compiled
def _error(sums: Floats, k: int, inverse: Any) -> Any:
    """The error that candidate k has once its scale is refitted."""
    left, mixed, squares = sums[0, k], sums[1, k], sums[2, k]
    return (left - mixed * mixed / squares) / (inverse * inverse) if squares > ZERO else INFINITE


@compiled
def _scale(sums: Floats, k: int, inverse: Any) -> Any:
    """The least-squares scale for the codes of candidate k."""
    return (ONE + sums[1, k] / sums[2, k]) / inverse


@compiled
def _load(weight_N: Floats, share_N: Floats, x: Floats, share: Floats) -> Any:
    """Fills x with the weights as parts of the largest one that has any importance, and gives that one."""
    n = weight_N.shape[0]
    largest, anywhere = ZERO, ZERO
    for j in range(n):
        magnitude = abs(weight_N[j])
        anywhere = max(anywhere, magnitude)
        if share_N[j] > ZERO:
            largest = max(largest, magnitude)
    x[n : n + 3] = ZERO
    share[n : n + 3] = ZERO
    for j in range(n):
        share[j] = share_N[j] if largest > ZERO else ONE
    largest = largest if largest > ZERO else anywhere
    if largest > ZERO:
        for j in range(n):
            x[j] = weight_N[j] / largest
    return largest


@compiled
def _range(x: Floats, share: Floats, n: int, low: Any, high: Any, symmetric: bool) -> tuple[Any, Any, Any]:
    """The inverse step at which the range just fits the codes, its zero point, and largest / root mean square."""
    total, squares, minimum, maximum = ZERO, ZERO, ZERO, ZERO
    for j in range(n):
        total += share[j]
        squares += share[j] * x[j] * x[j]
        if share[j] > ZERO:
            minimum = min(minimum, x[j])
            maximum = max(maximum, x[j])
    crest = np.float32(np.sqrt(total / squares))
    if symmetric:
        return (high - low) * HALF, ZERO, crest
    whole = (high - low) / (maximum - minimum)
    return whole, low - ((minimum * whole + ROUND) - ROUND), crest


@compiled
def _weigh_by_size(x: Floats, share: Floats, n: int, crest: Any) -> None:
    """Multiplies shares by sqrt(x^2 + mean of x^2)."""
    mean = ONE / (crest * crest)
    for j in range(n):
        share[j] = share[j] * np.sqrt(x[j] * x[j] + mean)


@compiled
def _best(
    x: Floats, share: Floats, n: int, low: Any, high: Any, inverse: Floats, zero: Floats, count: int, sums: Floats
) -> int:
    """The number of the best candidate; leaves every candidate's three sums, as in the reference, in `sums`."""
    left, mixed, squares = sums[0], sums[1], sums[2]
    for k in range(count):
        left[k] = ZERO
        mixed[k] = ZERO
        squares[k] = ZERO
    # Four columns per pass over the sums, still added one after the other: half the time of one column per pass.
    for j in range(0, n, 4):
        x_0, x_1, x_2, x_3 = x[j], x[j + 1], x[j + 2], x[j + 3]
        share_0, share_1, share_2, share_3 = share[j], share[j + 1], share[j + 2], share[j + 3]
        for k in range(count):
            step, lowest, highest = inverse[k], low - zero[k], high - zero[k]
            sums_k = (left[k], mixed[k], squares[k])
            sums_k = _add(sums_k, x_0 * step, share_0, lowest, highest)
            sums_k = _add(sums_k, x_1 * step, share_1, lowest, highest)
            sums_k = _add(sums_k, x_2 * step, share_2, lowest, highest)
            left[k], mixed[k], squares[k] = _add(sums_k, x_3 * step, share_3, lowest, highest)
    best, least = 0, INFINITE
    for k in range(count):
        error = _error(sums, k, inverse[k])
        if error < least:
            best, least = k, error
    return best


@kernel
def search(
    weight_OI: Floats,
    share_I: Floats,
    group_size: int,
    scale_OG: Floats,
    zero_OG: Floats,
    low: Any,
    high: Any,
    symmetric: bool,
    along: Floats,
    sign: Floats,
    offset: Floats,
    between: Any,
    start: Any,
    least_stop: Any,
    by_crest: Any,
    by_size: bool,
) -> None:
    """Fills scale_OG and zero_OG; see `quantkernels.scales.search`."""
    lanes = max(along.shape[0], FINE)
    # Up to three weights of 0 with no share behind the last column, which change no sum.
    x, share = np.zeros(group_size + 3, np.float32), np.zeros(group_size + 3, np.float32)
    inverse, zero = np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    sums = np.empty((3, lanes), np.float32)
    count = along.shape[0]
    for o in range(weight_OI.shape[0]):
        for g in range(scale_OG.shape[1]):
            first = g * group_size
            n = min(group_size, weight_OI.shape[1] - first)
            largest = _load(weight_OI[o, first : first + n], share_I[first : first + n], x, share)
            if largest == ZERO:
                scale_OG[o, g] = ZERO
                zero_OG[o, g] = ZERO
                continue
            whole, centre, crest = _range(x, share, n, low, high, symmetric)
            span = whole * (max(least_stop, by_crest * crest) - start)
            if by_size:
                _weigh_by_size(x, share, n, crest)
            for k in range(count):
                inverse[k] = sign[k] * (whole * start + span * along[k])
                zero[k] = min(max(centre + offset[k], low), high)
            best = _best(x, share, n, low, high, inverse, zero, count, sums)
            error = _error(sums, best, inverse[best])
            scale = _scale(sums, best, inverse[best])
            chosen, at = zero[best], inverse[best]
            spacing = span * between
            for k in range(FINE):
                inverse[k] = at + spacing * ((np.float32(k) - np.float32((FINE - 1) / 2)) * np.float32(2 / FINE))
                zero[k] = chosen
            best = _best(x, share, n, low, high, inverse, zero, FINE, sums)
            if _error(sums, best, inverse[best]) < error:
                scale = _scale(sums, best, inverse[best])
            usable = error < INFINITE
            scale_OG[o, g] = scale * largest if usable else ZERO
            zero_OG[o, g] = chosen if usable else ZERO


@kernel
def errors(
    weight_OI: Floats,
    importance_I: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    group_size: int,
    low: Any,
    high: Any,
    by_size: bool,
    error_OG: NDArray[np.float64],
) -> None:
    """Fills error_OG; see `quantkernels.scales.errors`. Eight sums in f64, added at the end in a fixed order."""
    lanes = np.empty(8, np.float64)
    for o in range(weight_OI.shape[0]):
        for g in range(scale_OG.shape[1]):
            first = g * group_size
            n = min(group_size, weight_OI.shape[1] - first)
            scale, zero = scale_OG[o, g], zero_OG[o, g]
            divisor = scale if scale != ZERO else np.float32(np.inf)
            whole, squares = 0.0, 0.0
            for j in range(first, first + n):
                whole += np.float64(importance_I[j])
                squares += np.float64(importance_I[j]) * np.float64(weight_OI[o, j]) ** 2
            mean = squares / whole if whole > 0.0 else 0.0
            lanes[:] = 0.0
            for start in range(first, first + n, 8):
                for k in range(min(8, first + n - start)):
                    w = weight_OI[o, start + k]
                    steps = _code(w / divisor, low - zero, high - zero)
                    difference = np.float64(w) - np.float64(steps * scale)
                    size = np.sqrt(np.float64(w) * np.float64(w) + mean) if by_size else 1.0
                    lanes[k] += np.float64(importance_I[start + k]) * size * difference * difference
            total = 0.0
            for k in range(8):
                total += lanes[k]
            error_OG[o, g] = total
