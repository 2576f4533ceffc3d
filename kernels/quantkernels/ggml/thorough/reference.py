"""The truth for the thorough search: numpy, float32, one operation at a time.

Whatever the type, the search is the same: fit each sub-block freely (real scale and minimum, many roundings, least
squares for each); try several values of what a block stores once (d, dmin), and at each of them several integers for
every sub-block, by the error that a decoder will make with the nearest codes; then, in turn, solve d and dmin for the
codes found and search the integers around the best again. Stored float16 values take part as they are stored.

Sums run from left to right, so that the numba kernels, which hold one block in each lane, give the same bytes.

Shapes: S blocks or super-blocks, J sub-blocks in each, N weights in a sub-block; names without a suffix are [S, J].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml import packing
from quantkernels.ggml.packing.fields import as_half
from quantkernels.ggml.packing.fp4 import half_e8m0, half_ue4m3, pack_mxfp4, pack_nvfp4
from quantkernels.ggml.packing.iq4 import LEVELS, MIDDLES, pack_iq4_nl, pack_iq4_xs
from quantkernels.ggml.reference.fp4 import ue4m3_of
from quantkernels.ggml.thorough.effort import Effort, effort_of
from quantkernels.ggml.thorough.reference_pairs import search_pairs_k, search_scale_minimum
from quantkernels.ggml.thorough.reference_search import (
    HALF,
    HIGHEST,
    ONE,
    Candidate,
    Floats,
    Problem,
    better_of,
    bounded,
    extreme_of,
    inverse_of,
    nothing,
    picked,
    problem_of,
    running_total,
    whole_within,
)

Bytes = NDArray[np.uint8]

FLOAT4_LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
FLOAT4_MIDDLES = np.array([0.5, 1.5, 2.5, 3.5, 5, 7, 10], np.float32)


@dataclass(frozen=True, kw_only=True)
class Levels:
    """What codes stand for before the scale: whole numbers from `low` to `high`, or a table from `low` to `high`."""

    kind: str
    low: np.float32
    high: np.float32

    def index(self, values: Floats) -> NDArray[np.intp]:
        """The codes of the nearest levels, counted from 0; never that of -0."""
        if self.kind == "table":
            return np.searchsorted(np.array(MIDDLES), values, side="right")
        if self.kind == "float4":
            code: NDArray[np.intp] = (np.abs(values)[..., None] > FLOAT4_MIDDLES).sum(axis=-1)
            return code + 8 * ((values < 0) & (code > 0))
        return (bounded(values, self.low, self.high) - self.low).astype(np.intp)

    def nearest(self, values: Floats) -> Floats:
        if self.kind == "table":
            return np.array(LEVELS, np.float32)[self.index(values)]
        if self.kind == "float4":
            return np.concatenate([FLOAT4_LEVELS, -FLOAT4_LEVELS])[self.index(values)]
        return bounded(values, self.low, self.high)


def quantize_blocks(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """The bytes that the thorough search finds for `rows`, before any comparison with ggml's.

    rows [R, C] f32, finite; importance [C] f32 or None; gives [R, bytes] u8.
    Raises ValueError for a type that the search does not make.
    """
    effort = effort_of(name)
    with np.errstate(all="ignore"):
        if name in ("Q2_K", "Q4_K", "Q5_K"):
            blocks = search_pairs_k(rows, name, importance, effort)
        elif name in ("Q3_K", "Q6_K", "IQ4_XS"):
            blocks = _scales_k(rows, name, importance, effort)
        elif name in ("Q4_1", "Q5_1"):
            blocks = search_scale_minimum(rows, name, importance, effort)
        elif name in ("MXFP4", "NVFP4"):
            blocks = _float4(rows, name, importance)
        else:
            blocks = _scale(rows, name, importance, effort)
    return blocks.reshape(len(rows), -1)


def _levels(name: str) -> Levels:
    if name.startswith("IQ4"):
        return Levels(kind="table", low=np.float32(LEVELS[0]), high=np.float32(LEVELS[-1]))
    half = 1 << (int(name[1]) - 1)
    return Levels(kind="whole", low=np.float32(-half), high=np.float32(half - 1))


def _level_sums(problem: Problem, inverse: Floats, levels: Levels) -> tuple[Floats, Floats]:
    """Weighted sums of x * level and level * level, for the levels nearest to x * inverse."""
    level = levels.nearest(problem.x * inverse[..., None])
    weighted = problem.weight * level
    return running_total(weighted * problem.x), running_total(weighted * level)


def _level_error(problem: Problem, scale: Floats, levels: Levels) -> Floats:
    error = problem.x - scale[..., None] * levels.nearest(problem.x * inverse_of(scale)[..., None])
    return running_total(problem.weight * (error * error))


def _reaches(levels: Levels, beyond: Floats) -> Iterator[np.float32]:
    yield from levels.low - beyond
    yield from levels.high + beyond


def _scale(rows: Floats, name: str, importance: Floats | None, effort: Effort) -> Bytes:
    """Q4_0, Q5_0, Q8_0, IQ4_NL: one scale for 32 weights."""
    problem, levels = problem_of(rows, importance, 32, 32), _levels(name)
    extreme = extreme_of(problem.x)
    inverses = [reach / extreme for reach in _reaches(levels, effort.beyond)]
    best = nothing(problem)
    for trial in range(len(inverses) + effort.sweeps):
        inverse = inverses[trial] if trial < len(inverses) else inverse_of(best.d)[:, None]
        sum_xl, sum_l2 = _level_sums(problem, inverse, levels)
        scale = as_half(sum_xl / sum_l2)
        error = _level_error(problem, scale, levels)[:, 0]
        best = better_of(Candidate(error=error, d=scale[:, 0], dmin=best.dmin, scales=scale, depths=scale), best)
    codes = levels.index(problem.x[:, 0] * inverse_of(best.d)[:, None])
    if name == "IQ4_NL":
        return pack_iq4_nl(best.d, codes.astype(np.uint8))
    return packing.pack_legacy(name, best.d, None, (codes + (levels.low if name == "Q8_0" else 0)).astype(np.float32))


def _free_scale(problem: Problem, levels: Levels, end: np.float32, reaches: Floats) -> tuple[Floats, Floats]:
    """The best least-squares scale that brings the extreme weight to `end` or past it, and the error it takes away."""
    extreme = extreme_of(problem.x)
    scale, best = extreme / end, np.zeros_like(extreme)
    for reach in reaches:
        sum_xl, sum_l2 = _level_sums(problem, reach / extreme, levels)
        trial = sum_xl / sum_l2
        gain = trial * sum_xl
        scale, best = picked(gain > best, (trial, gain), (scale, best))
    return scale, best


def _search_scales(
    problem: Problem, levels: Levels, limit: np.float32, d: Floats, near: tuple[Floats, Floats], window: tuple[int, int]
) -> Candidate:
    """The best integer scales for d, among window[k] around each of near[k]."""
    best = np.full(problem.x.shape[:2], HIGHEST)
    scales = np.zeros_like(best)
    for scale, tries in zip(near, window, strict=True):
        first = scale * inverse_of(d)[:, None] - HALF * np.float32(tries - 1)
        for step in range(tries):
            code = whole_within(first + np.float32(step), -limit, limit - ONE)
            error = _level_error(problem, d[:, None] * code, levels)
            scales, best = picked(error < best, (code, error), (scales, best))
    return Candidate(error=running_total(best), d=d, dmin=np.zeros_like(d), scales=scales, depths=scales)


def _scales_k(rows: Floats, name: str, importance: Floats | None, effort: Effort) -> Bytes:
    """Q3_K, Q6_K, IQ4_XS: an integer scale, of either sign, for each sub-block."""
    problem, levels = problem_of(rows, importance, 256, 32 if name == "IQ4_XS" else 16), _levels(name)
    limit = np.float32(128 if name == "Q6_K" else 32)
    down, gain_down = _free_scale(problem, levels, levels.low, levels.low - effort.beyond)
    up, gain_up = _free_scale(problem, levels, levels.high, levels.high + effort.beyond)
    near, other = np.where(gain_up > gain_down, up, down), np.where(gain_up > gain_down, down, up)
    steepest, best = extreme_of(near), nothing(problem)
    for top in effort.d_tops:
        d = as_half(steepest / top)
        best = better_of(_search_scales(problem, levels, limit, d, (near, other), effort.first), best)
    for _ in range(effort.sweeps):
        sum_xl, sum_l2 = _level_sums(problem, inverse_of(best.d[:, None] * best.scales), levels)
        sum_xa, sum_a2 = running_total(best.scales * sum_xl), running_total(best.scales * best.scales * sum_l2)
        d = as_half(np.where(sum_a2 > 0, sum_xa / sum_a2, best.d))
        near = d[:, None] * best.scales
        best = better_of(_search_scales(problem, levels, limit, d, (near, other), effort.late), best)
    codes = levels.index(problem.x * inverse_of(best.d[:, None] * best.scales)[..., None]).reshape(-1, 256)
    if name == "IQ4_XS":
        return pack_iq4_xs(best.d, best.scales, codes.astype(np.uint8))
    pack = packing.pack_q3_k if name == "Q3_K" else packing.pack_q6_k
    return pack(best.d, best.scales, codes.astype(np.float32))


def _float4(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """MXFP4, NVFP4: every stored scale near the one that ggml would take."""
    size, steps = (32, range(-2, 2)) if name == "MXFP4" else (16, range(-5, 7))
    problem, levels = problem_of(rows, importance, size, size), Levels(kind="float4", low=ONE, high=ONE)
    largest = np.abs(extreme_of(problem.x)[:, 0])
    middle = (largest.view(np.int32) >> 23) - 2
    if name == "NVFP4":
        middle = np.minimum(ue4m3_of(np.divide(largest, np.float32(6))).astype(np.int32), 126)
    best, scale, field = np.full(len(largest), HIGHEST), np.zeros_like(largest), np.zeros(len(largest), np.uint8)
    for step in steps:
        trial = np.clip(middle + step, 0, 254 if name == "MXFP4" else 126).astype(np.uint8)
        value = half_e8m0(trial) if name == "MXFP4" else half_ue4m3(trial)
        error = _level_error(problem, value[:, None], levels)[:, 0]
        wins = error < best
        best, scale, field = (np.where(wins, *pair) for pair in ((error, best), (value, scale), (trial, field)))
    codes = levels.index(problem.x[:, 0] * inverse_of(scale)[:, None]).astype(np.uint8)
    return pack_mxfp4(field, codes) if name == "MXFP4" else pack_nvfp4(field.reshape(-1, 4), codes.reshape(-1, 64))
