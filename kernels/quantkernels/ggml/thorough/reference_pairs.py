"""The truth for the thorough search of types with a minimum: Q4_1, Q5_1; Q2_K, Q4_K, Q5_K.

Shapes as in `thorough/reference/search.py`: S super-blocks, J sub-blocks; names without a suffix are [S, J].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml import packing
from quantkernels.ggml.packing.fields import as_half
from quantkernels.ggml.thorough.effort import Effort
from quantkernels.ggml.thorough.reference_search import (
    HALF,
    HIGHEST,
    ONE,
    TWO,
    ZERO,
    Candidate,
    Floats,
    Problem,
    better_of,
    bounded,
    inverse_of,
    nothing,
    picked,
    problem_of,
    running_total,
    whole_within,
)

Bytes = NDArray[np.uint8]


def _code_sums(problem: Problem, inverse: Floats, low: Floats, top: np.float32) -> tuple[Floats, Floats, Floats]:
    """Weighted sums of code, code * code and x * code, for the codes nearest to (x - low) * inverse."""
    code = bounded((problem.x - low[..., None]) * inverse[..., None], ZERO, top)
    weighted = problem.weight * code
    return running_total(weighted), running_total(weighted * code), running_total(weighted * problem.x)


def _pair_codes(problem: Problem, scale: Floats, low: Floats, top: np.float32) -> Floats:
    return bounded((problem.x - low[..., None]) * inverse_of(scale)[..., None], ZERO, top)


def _pair_error(problem: Problem, scale: Floats, low: Floats, top: np.float32) -> Floats:
    error = (problem.x - low[..., None]) - scale[..., None] * _pair_codes(problem, scale, low, top)
    return running_total(problem.weight * (error * error))


def search_scale_minimum(rows: Floats, name: str, importance: Floats | None, effort: Effort) -> Bytes:
    """Q4_1, Q5_1: one scale and one minimum for 32 weights.

    Sums are over weights less the block's lowest, or they would lose the error of a block far from 0.
    """
    problem, top = problem_of(rows, importance, 32, 32), np.float32((1 << int(name[1])) - 1)
    low: Floats = problem.x.min(axis=-1)
    above = Problem(x=problem.x - low[..., None], weight=problem.weight)
    reach: Floats = above.x.max(axis=-1)
    sum_w, sum_x = running_total(above.weight), running_total(above.weight * above.x)

    def solve(inverse: Floats, start: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        sum_l, sum_l2, sum_xl = _code_sums(above, inverse, start, top)
        minimum = np.divide(sum_l2 * sum_x - sum_l * sum_xl, sum_w * sum_l2 - sum_l * sum_l)
        return sum_l, sum_l2, sum_xl, minimum

    inverse, start, best_gain = np.divide(top, reach), np.zeros_like(reach), np.full(reach.shape, -HIGHEST)
    for below, beyond in product(effort.cuts, effort.cuts):
        trial = (top / ((ONE - below - beyond) * reach), below * reach)
        sum_l, sum_l2, sum_xl, minimum = solve(*trial)
        gain = np.divide(sum_xl - minimum * sum_l, sum_l2) * sum_xl + minimum * sum_x
        best_gain, inverse, start = picked(gain > best_gain, (gain, *trial), (best_gain, inverse, start))
    best = nothing(problem)
    for sweep in range(1 + effort.sweeps):
        if sweep > 0:
            inverse, start = inverse_of(best.d)[:, None], best.dmin[:, None] - low
        sum_l, sum_l2, sum_xl, minimum = solve(inverse, start)
        minimum = as_half(low + minimum)
        scale = as_half(np.divide(sum_xl - (minimum - low) * sum_l, sum_l2))
        error = _pair_error(problem, scale, minimum, top)[:, 0]
        new = Candidate(error=error, d=scale[:, 0], dmin=minimum[:, 0], scales=scale, depths=minimum)
        best = better_of(new, best)
    codes = _pair_codes(problem, best.d[:, None], best.dmin[:, None], top)[:, 0]
    return packing.pack_legacy(name, best.d, best.dmin, codes)


@dataclass(frozen=True, kw_only=True)
class Near:
    """Where integers are searched: scales and depths, and the mean codes that tell how one moves the other."""

    scale: Floats
    depth: Floats
    mean: Floats


def _free_pairs(problem: Problem, top: np.float32, cuts: Floats) -> tuple[Near, Floats, Floats]:
    """The best scale and depth of each sub-block, and its sums of weight * code * code and of weights."""
    low: Floats = np.minimum(problem.x.min(axis=-1), ZERO)
    reach: Floats = problem.x.max(axis=-1) - low
    sum_w, sum_x = running_total(problem.weight), running_total(problem.weight * problem.x)

    def solve(inverse: Floats, start: Floats) -> tuple[Floats, Floats, Floats]:
        sum_l, sum_l2, sum_xl = _code_sums(problem, inverse, start, top)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        minimum = np.divide(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        scale = np.where(minimum > 0, sum_xl / sum_l2, (sum_w * sum_xl - sum_x * sum_l) / determinant)
        minimum = np.where(minimum > 0, ZERO, minimum)
        return scale, minimum, np.add(scale * sum_xl, minimum * sum_x)

    scale, base, best = np.divide(reach, top), low, np.full(low.shape, -HIGHEST)
    for below, above in [*product(cuts, cuts), (None, None), (None, None)]:
        if below is None or above is None:  # round again from what the cuts gave
            trial, minimum, gain = solve(inverse_of(scale), base)
        else:
            trial, minimum, gain = solve(top / ((ONE - below - above) * reach), low + below * reach)
        best, scale, base = picked(gain > best, (gain, trial, minimum), (best, scale, base))
    sum_l, sum_l2, _ = _code_sums(problem, inverse_of(scale), base, top)
    return Near(scale=scale, depth=-base, mean=sum_l / sum_w), sum_l2, sum_w


def _choose_dmin(free: Near, sum_l2: Floats, sum_w: Floats, d_S: Floats, tops: Floats, limit: np.float32) -> Floats:
    """The dmin [S], the largest depth over one of `tops`, with the integer pairs nearest to the free ones.

    Nearest in the quadratic error around the free fit, its codes held: no pass over the weights is needed.
    """
    deepest_S = np.maximum(free.depth.max(axis=1), ZERO)
    best_S, chosen_S = np.full(len(d_S), HIGHEST), np.zeros_like(d_S)
    d = d_S[:, None]
    below = whole_within(free.scale * inverse_of(d) - HALF, ZERO, limit)
    for top in tops:
        dmin_S = as_half(deepest_S / top)
        dmin = dmin_S[:, None]
        least = np.full(free.scale.shape, HIGHEST)
        for step in range(2):
            code = np.minimum(below + np.float32(step), limit)
            off = d * code - free.scale
            deep = whole_within((free.depth + free.mean * off) * inverse_of(dmin), ZERO, limit)
            off_depth = dmin * deep - free.depth
            error = sum_l2 * off * off + sum_w * off_depth * (off_depth - TWO * free.mean * off)
            least = np.where(error < least, error, least)
        total_S = running_total(least)
        chosen_S = np.where(total_S < best_S, dmin_S, chosen_S)
        best_S = np.where(total_S < best_S, total_S, best_S)
    return chosen_S


def _search_pairs(
    problem: Problem, top: np.float32, limit: np.float32, d: Floats, dmin: Floats, near: Near, window: tuple[int, int]
) -> Candidate:
    """The best integers for d and dmin: window[0] scales around the near ones, and for each window[1] depths."""
    best = np.full(near.scale.shape, HIGHEST)
    scales, depths = np.zeros_like(best), np.zeros_like(best)
    d_S1, dmin_S1 = d[:, None], dmin[:, None]
    first = near.scale * inverse_of(d_S1) - HALF * np.float32(window[0] - 1)
    for i in range(window[0]):
        code = whole_within(first + np.float32(i), ZERO, limit)
        wanted = (near.depth + near.mean * (d_S1 * code - near.scale)) * inverse_of(dmin_S1)
        wanted = wanted - HALF * np.float32(window[1] - 1)
        for k in range(window[1]):
            deep = whole_within(wanted + np.float32(k), ZERO, limit)
            error = _pair_error(problem, d_S1 * code, -(dmin_S1 * deep), top)
            wins = error < best
            best, scales, depths = picked(wins, (error, code, deep), (best, scales, depths))
    return Candidate(error=running_total(best), d=d, dmin=dmin, scales=scales, depths=depths)


def _refit_pairs(problem: Problem, top: np.float32, best: Candidate) -> tuple[Floats, Floats, Near]:
    """The least-squares d and dmin, as stored, for the integers and codes of `best`, and where to look from there."""
    scale, low = best.d[:, None] * best.scales, -(best.dmin[:, None] * best.depths)
    sum_l, sum_l2, sum_xl = _code_sums(problem, inverse_of(scale), low, top)
    sum_w, sum_x = running_total(problem.weight), running_total(problem.weight * problem.x)
    aa, ab = running_total(best.scales * best.scales * sum_l2), running_total(best.scales * best.depths * sum_l)
    bb = running_total(best.depths * best.depths * sum_w)
    xa, xb = running_total(best.scales * sum_xl), running_total(best.depths * sum_x)
    determinant = aa * bb - ab * ab
    d = as_half(np.where(determinant > 0, (xa * bb - xb * ab) / determinant, best.d))
    dmin = as_half(np.where(determinant > 0, (xa * ab - xb * aa) / determinant, best.dmin))
    near = Near(scale=d[:, None] * best.scales, depth=dmin[:, None] * best.depths, mean=sum_l / sum_w)
    return d, dmin, near


def search_pairs_k(rows: Floats, name: str, importance: Floats | None, effort: Effort) -> Bytes:
    """Q2_K, Q4_K, Q5_K: an integer scale and an integer minimum for each sub-block."""
    problem = problem_of(rows, importance, 256, 16 if name == "Q2_K" else 32)
    top, limit = np.float32((1 << int(name[1])) - 1), np.float32(15 if name == "Q2_K" else 63)
    free, sum_l2, sum_w = _free_pairs(problem, top, effort.cuts)
    steepest, best = np.maximum(free.scale.max(axis=1), ZERO), nothing(problem)
    for d_top in effort.d_tops:
        d = as_half(steepest / d_top)
        dmin = _choose_dmin(free, sum_l2, sum_w, d, effort.dmin_tops, limit)
        best = better_of(_search_pairs(problem, top, limit, d, dmin, free, effort.first), best)
    for _ in range(effort.sweeps):
        d, dmin, near = _refit_pairs(problem, top, best)
        best = better_of(_search_pairs(problem, top, limit, d, dmin, near, effort.late), best)
    scale, low = best.d[:, None] * best.scales, -(best.dmin[:, None] * best.depths)
    codes = _pair_codes(problem, scale, low, top).reshape(-1, 256)
    fields = packing.pack_sub_scales(name, best.scales, best.depths)
    return packing.pack_scale_min_k(name, best.d, best.dmin, fields, codes)
