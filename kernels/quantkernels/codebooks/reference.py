"""The truth for codebooks: every choice tried, every sum written out.

# O out, I in, G groups of a row, N columns of a group, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
SHARES = 12  # scales to begin with: the range over one less than the levels, times 1, 11/12 .. 1/12
PLACES = 3  # middles to begin with, a quarter, a half and three quarters of the way along what the range leaves free
ROUNDS = 4
SINGULAR = 1e-12  # of the larger product: a determinant below this leaves scale or offset undetermined


def groups(weight_OI: Floats, share_I: Floats, group_size: int) -> Iterator[tuple[int, int, Doubles, Doubles]]:
    """Row, group, the group's weights and their shares of importance, which are all 1 where none has any."""
    for o, row_I in enumerate(weight_OI.astype(np.float64)):
        for g, first in enumerate(range(0, len(row_I), group_size)):
            own = slice(first, first + group_size)
            share_N = share_I[own].astype(np.float64)
            yield o, g, row_I[own], share_N if share_N.any() else np.ones_like(share_N)


def levels(weight_OI: Floats, share_I: Floats, group_size: int, levels_OGL: Floats) -> None:
    """Fills levels_OGL: the best split of the first n sorted weights into k runs, from those into k - 1."""
    count = levels_OGL.shape[2]
    for o, g, weight_N, share_N in groups(weight_OI, share_I, group_size):
        order = weight_N.argsort(kind="stable")
        x, p, size = weight_N[order], share_N[order], len(order)
        least = np.full((count + 1, size + 1), np.inf)
        least[0, 0] = 0
        begin = np.zeros((count + 1, size + 1), np.int64)
        for k in range(1, min(count, size) + 1):
            for stop in range(k, size + 1):
                for start in range(k - 1, stop):
                    cost = least[k - 1, start] + spread(x[start:stop], p[start:stop])
                    if cost < least[k, stop]:
                        least[k, stop], begin[k, stop] = cost, start
        stop = size
        used = min(count, size)
        for k in range(used, 0, -1):
            start = begin[k, stop]
            levels_OGL[o, g, k - 1] = mean(x[start:stop], p[start:stop])
            stop = start
        levels_OGL[o, g, used:] = levels_OGL[o, g, used - 1]


def mean(x: Doubles, p: Doubles) -> float:
    """The weighted mean; the plain one where nothing has a weight."""
    total = p.sum()
    return float((p * x).sum() / total if total > 0 else x.mean())


def spread(x: Doubles, p: Doubles) -> float:
    """The weighted squared distance from the weighted mean."""
    return float((p * (x - mean(x, p)) ** 2).sum())


def nearest(steps_N: Doubles, table_L: Doubles) -> NDArray[np.int64]:
    """The codes of the nearest levels, the lower of two at the same distance."""
    middles = (table_L[1:] + table_L[:-1]) / 2
    codes_N: NDArray[np.int64] = (steps_N[:, None] > middles).sum(1)
    return codes_N


def scales(weight_OI: Floats, share_I: Floats, table_L: Doubles, group_size: int, scale_OG: Floats) -> None:
    """Fills scale_OG: between every two inverse scales at which some weight changes its level, one is tried."""
    middles = (table_L[1:] + table_L[:-1]) / 2
    for o, g, weight_N, share_N in groups(weight_OI, share_I, group_size):
        with np.errstate(divide="ignore", invalid="ignore"):
            turns = (middles / weight_N[:, None]).ravel()
        turns = np.unique(turns[np.isfinite(turns) & (turns > 0)])
        tried = np.concatenate([turns[:1] / 2, (turns[1:] + turns[:-1]) / 2, turns[-1:] * 2])
        gained = 0.0
        for inverse in tried:
            level_N = table_L[nearest(weight_N * inverse, table_L)]
            mixed, squares = (share_N * weight_N * level_N).sum(), (share_N * level_N**2).sum()
            if mixed > 0 and mixed * mixed / squares > gained:
                gained, scale_OG[o, g] = mixed * mixed / squares, mixed / squares


def offsets(
    weight_OI: Floats, share_I: Floats, count: int, group_size: int, scale_OG: Floats, offset_OG: Floats
) -> None:
    """Fills scale_OG and offset_OG by Lloyd's steps from every start; the last step's sums tell the error."""
    half = (count - 1) / 2
    for o, g, weight_N, share_N in groups(weight_OI, share_I, group_size):
        used = weight_N[share_N > 0]
        low, high = used.min(), used.max()
        scale_OG[o, g], offset_OG[o, g] = 0, mean(weight_N, share_N)
        total, first, second = share_N.sum(), (share_N * weight_N).sum(), (share_N * weight_N**2).sum()
        least = second - first * first / total
        for start in range(SHARES * PLACES if high > low else 0):
            share, place = 1 - (start // PLACES) / SHARES, (start % PLACES + 1) / (PLACES + 1)
            scale = (high - low) / (count - 1) * share
            offset = low + scale * half + (high - low) * (1 - share) * place
            for _ in range(ROUNDS):
                step_N = np.clip(np.rint((weight_N - offset) / scale + half), 0, count - 1) - half
                c, cc, xc = (share_N * step_N).sum(), (share_N * step_N**2).sum(), (share_N * weight_N * step_N).sum()
                determinant = total * cc - c * c
                if not determinant > SINGULAR * total * cc:
                    break
                scale = (total * xc - first * c) / determinant
                offset = (first - scale * c) / total
                if not scale > 0:
                    break
                error = second - scale * xc - offset * first
                if error < least:
                    least, scale_OG[o, g], offset_OG[o, g] = error, scale, offset


def errors(
    weight_OI: Floats,
    share_I: Floats,
    table_L: Floats,
    scale_OG: Floats,
    offset_OG: Floats,
    group_size: int,
    error_OG: Doubles,
) -> None:
    """Fills error_OG."""
    middles = (table_L[1:] + table_L[:-1]) / np.float32(2)
    for o, row_I in enumerate(weight_OI):
        for g, first in enumerate(range(0, len(row_I), group_size)):
            own = slice(first, first + group_size)
            scale, offset = scale_OG[o, g], offset_OG[o, g]
            steps_N = (row_I[own] - offset) / (scale if scale != 0 else np.float32(np.inf))
            value_N = table_L[(steps_N[:, None] > middles).sum(1)] * scale + offset
            off_N = row_I[own].astype(np.float64) - value_N
            error_OG[o, g] = (share_I[own] * off_N * off_N).sum()
