"""Codebooks in numba, a group at a time in f64: rows are independent, so threads change no bit.

k-means fills the table of its reference by halves: where the last run of the best split begins never falls as more
weights are split, so a row of the table costs n log n instead of n^2. Measured on one core: 1.9 million weights a
second at 16 levels and rows of 4096, 7.7 million at 4 levels and groups of 128.

# O out, I in, G groups of a row, N columns of a group, L levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkernels.codebooks.reference import PLACES, ROUNDS, SHARES, SINGULAR, Doubles, Floats
from quantkernels.compiling import compiled, kernel

STARTS = SHARES * PLACES


@compiled
def _load(weight_N: Floats, share_N: Floats, x: Doubles, p: Doubles) -> None:
    """Fills x and p with the weights and their importance, 1 where the group has none."""
    anything = False
    for j in range(weight_N.shape[0]):
        x[j], p[j] = weight_N[j], share_N[j]
        anything |= share_N[j] > 0
    if not anything:
        p[: weight_N.shape[0]] = 1.0


@compiled
def _cost(sums: Doubles, start: int, stop: int) -> Any:
    """The weighted squared distance of sorted weights start .. stop - 1 from their mean, from sums up to each."""
    total = sums[0, stop] - sums[0, start]
    first = sums[1, stop] - sums[1, start]
    spread = sums[2, stop] - sums[2, start]
    if total > 0.0:
        spread -= first * first / total
    return max(spread, 0.0)


@compiled
def _fill(
    before: Doubles, least: Doubles, begin: NDArray[np.int32], sums: Doubles, k: int, n: int, todo: NDArray[np.int32]
) -> None:
    """Row k of the table: least[stop] and where the last run begins, halving the range of stops again and again."""
    todo[0, 0], todo[0, 1], todo[0, 2], todo[0, 3] = k, n, k - 1, n - 1
    depth = 1
    while depth > 0:
        depth -= 1
        low, high, first, last = todo[depth, 0], todo[depth, 1], todo[depth, 2], todo[depth, 3]
        stop = (low + high) // 2
        best, where = np.inf, first
        for start in range(first, min(last, stop - 1) + 1):
            cost = before[start] + _cost(sums, start, stop)
            if cost < best:
                best, where = cost, start
        least[stop], begin[stop] = best, where
        if low < stop:
            todo[depth, 0], todo[depth, 1], todo[depth, 2], todo[depth, 3] = low, stop - 1, first, where
            depth += 1
        if stop < high:
            todo[depth, 0], todo[depth, 1], todo[depth, 2], todo[depth, 3] = stop + 1, high, where, last
            depth += 1


@kernel
def levels(weight_OI: Floats, share_I: Floats, group_size: int, levels_OGL: Floats) -> None:
    """Fills levels_OGL; see `quantkernels.codebooks.levels`."""
    columns, count = weight_OI.shape[1], levels_OGL.shape[2]
    x, p = np.empty(group_size), np.empty(group_size)
    sums = np.zeros((3, group_size + 1))
    rows = np.empty((2, group_size + 1))
    begin = np.zeros((count + 1, group_size + 1), np.int32)
    todo = np.empty((128, 4), np.int32)
    for o in range(weight_OI.shape[0]):
        for g in range(levels_OGL.shape[1]):
            first = g * group_size
            n = min(group_size, columns - first)
            _load(weight_OI[o, first : first + n], share_I[first : first + n], x, p)
            order = np.argsort(x[:n], kind="mergesort")
            # Counted from the middle, so that sums of squares lose nothing to a common offset.
            centre = x[order[n // 2]]
            for j in range(n):
                value, share = x[order[j]] - centre, p[order[j]]
                sums[0, j + 1] = sums[0, j] + share
                sums[1, j + 1] = sums[1, j] + share * value
                sums[2, j + 1] = sums[2, j] + share * value * value
            used = min(count, n)
            rows[:] = np.inf
            rows[0, 0] = 0.0
            for k in range(1, used + 1):
                rows[k % 2, :k] = np.inf
                _fill(rows[(k - 1) % 2], rows[k % 2], begin[k], sums, k, n, todo)
            stop = n
            for k in range(used, 0, -1):
                start = begin[k, stop]
                total = sums[0, stop] - sums[0, start]
                if total > 0.0:
                    levels_OGL[o, g, k - 1] = centre + (sums[1, stop] - sums[1, start]) / total
                else:
                    plain = 0.0
                    for j in range(start, stop):
                        plain += x[order[j]]
                    levels_OGL[o, g, k - 1] = plain / (stop - start)
                stop = start
            for k in range(used, count):
                levels_OGL[o, g, k] = levels_OGL[o, g, used - 1]


@kernel
def scales(weight_OI: Floats, share_I: Floats, table_L: Doubles, group_size: int, scale_OG: Floats) -> None:
    """Fills scale_OG; see `quantkernels.codebooks.scales`."""
    columns, count = weight_OI.shape[1], table_L.shape[0]
    x, p = np.empty(group_size), np.empty(group_size)
    inverse = np.empty(group_size * (count - 1))
    who, code = np.empty(group_size * (count - 1), np.int32), np.empty(group_size * (count - 1), np.int32)
    for o in range(weight_OI.shape[0]):
        for g in range(scale_OG.shape[1]):
            first = g * group_size
            n = min(group_size, columns - first)
            _load(weight_OI[o, first : first + n], share_I[first : first + n], x, p)
            turns, mixed, squares = 0, 0.0, 0.0
            for j in range(n):
                at = 0  # the level of a weight next to nothing, on its side of zero
                for k in range(count - 1):
                    middle = (table_L[k] + table_L[k + 1]) / 2
                    at += middle < 0.0 or (middle == 0.0 and x[j] > 0.0)
                mixed += p[j] * x[j] * table_L[at]
                squares += p[j] * table_L[at] * table_L[at]
                if x[j] == 0.0 or p[j] == 0.0:
                    continue
                for k in range(count - 1):
                    middle = (table_L[k] + table_L[k + 1]) / 2
                    if middle * x[j] > 0.0:
                        inverse[turns], who[turns], code[turns] = middle / x[j], j, k
                        turns += 1
            gained = 0.0
            scale_OG[o, g] = 0.0
            if mixed > 0.0:
                gained = mixed * mixed / squares
                scale_OG[o, g] = mixed / squares
            order = np.argsort(inverse[:turns], kind="mergesort")
            for e in range(turns):
                j, k = who[order[e]], code[order[e]]
                outer, inner = (k + 1, k) if x[j] > 0.0 else (k, k + 1)
                mixed += p[j] * x[j] * (table_L[outer] - table_L[inner])
                squares += p[j] * (table_L[outer] * table_L[outer] - table_L[inner] * table_L[inner])
                if mixed > 0.0 and squares > 0.0 and mixed * mixed > gained * squares:
                    gained = mixed * mixed / squares
                    scale_OG[o, g] = mixed / squares


@kernel
def offsets(
    weight_OI: Floats, share_I: Floats, count: int, group_size: int, scale_OG: Floats, offset_OG: Floats
) -> None:
    """Fills scale_OG and offset_OG; see `quantkernels.codebooks.offsets`. One start per SIMD lane."""
    columns = weight_OI.shape[1]
    half, top = (count - 1) / 2, np.float64(count - 1)
    x, p = np.empty(group_size), np.empty(group_size)
    scale, offset, inverse = np.empty(STARTS), np.empty(STARTS), np.empty(STARTS)
    c, cc, xc = np.empty(STARTS), np.empty(STARTS), np.empty(STARTS)
    for o in range(weight_OI.shape[0]):
        for g in range(scale_OG.shape[1]):
            start = g * group_size
            n = min(group_size, columns - start)
            _load(weight_OI[o, start : start + n], share_I[start : start + n], x, p)
            total, first, second = 0.0, 0.0, 0.0
            low, high = np.inf, -np.inf
            for j in range(n):
                total += p[j]
                first += p[j] * x[j]
                second += p[j] * x[j] * x[j]
                if p[j] > 0.0:
                    low, high = min(low, x[j]), max(high, x[j])
            scale_OG[o, g] = 0.0
            offset_OG[o, g] = first / total
            if not high > low:
                continue
            least = second - first * first / total
            for k in range(STARTS):
                share, place = 1 - (k // PLACES) / SHARES, (k % PLACES + 1) / (PLACES + 1)
                scale[k] = (high - low) / top * share
                offset[k] = low + scale[k] * half + (high - low) * (1 - share) * place
            for _ in range(ROUNDS):
                for k in range(STARTS):
                    inverse[k] = 1.0 / scale[k]
                    c[k], cc[k], xc[k] = 0.0, 0.0, 0.0
                for j in range(n):
                    value, importance = x[j], p[j]
                    for k in range(STARTS):
                        step = np.rint((value - offset[k]) * inverse[k] + half)
                        step = 0.0 if step < 0.0 else step
                        step = (top if step > top else step) - half
                        shared = importance * step
                        c[k] += shared
                        cc[k] += shared * step
                        xc[k] += shared * value
                for k in range(STARTS):
                    determinant = total * cc[k] - c[k] * c[k]
                    if not determinant > SINGULAR * total * cc[k]:
                        continue
                    refitted = (total * xc[k] - first * c[k]) / determinant
                    if not refitted > 0.0:
                        continue
                    scale[k], offset[k] = refitted, (first - refitted * c[k]) / total
                    error = second - scale[k] * xc[k] - offset[k] * first
                    if error < least:
                        least = error
                        scale_OG[o, g], offset_OG[o, g] = scale[k], offset[k]


@kernel
def errors(
    weight_OI: Floats,
    share_I: Floats,
    table_L: Floats,
    scale_OG: Floats,
    offset_OG: Floats,
    group_size: int,
    error_OG: Doubles,
) -> None:
    """Fills error_OG; see `quantkernels.codebooks.errors`."""
    columns, count = weight_OI.shape[1], table_L.shape[0]
    for o in range(weight_OI.shape[0]):
        for g in range(scale_OG.shape[1]):
            first = g * group_size
            scale, offset = scale_OG[o, g], offset_OG[o, g]
            divisor = scale if scale != np.float32(0) else np.float32(np.inf)
            total = 0.0
            for j in range(first, min(first + group_size, columns)):
                steps = (weight_OI[o, j] - offset) / divisor
                level = table_L[0]
                for k in range(count - 1):
                    level = table_L[k + 1] if steps > (table_L[k] + table_L[k + 1]) / np.float32(2) else level
                off = np.float64(weight_OI[o, j]) - np.float64(level * scale + offset)
                total += np.float64(share_I[j]) * off * off
            error_OG[o, g] = total
