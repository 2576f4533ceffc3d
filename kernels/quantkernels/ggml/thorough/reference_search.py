"""What the truths of the thorough search share: the problem, candidates, and float32 sums from left to right.

Shapes: S blocks or super-blocks, J sub-blocks in each, N weights in a sub-block; names without a suffix are [S, J].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.reference.search import ROUND, first_extreme

Floats = NDArray[np.float32]

HIGHEST = np.float32(3e38)  # an error that any finite candidate beats
LEAST_WEIGHT = np.float32(2.0**-30)
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be stored: weights x [S, J, N] and how much each of them counts."""

    x: Floats
    weight: Floats


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Stored scales for every block and the error they leave: d [S], dmin [S] and integers [S, J]."""

    error: Floats
    d: Floats
    dmin: Floats
    scales: Floats
    depths: Floats


def problem_of(rows: Floats, importance: Floats | None, block: int, size: int) -> Problem:
    """Importance goes over the block's largest, and never below 2**-30: every sub-block is fitted to its weights."""
    weight = np.ones(rows.size, np.float32).reshape(-1, block)
    if importance is not None:
        asked = np.broadcast_to(importance, rows.shape).reshape(-1, block)
        high = asked.max(axis=1, keepdims=True)
        share = asked / high
        weight = np.where(high > 0, np.where(share > LEAST_WEIGHT, share, LEAST_WEIGHT), ONE)
    shape = (-1, block // size, size)
    return Problem(x=rows.reshape(shape), weight=weight.reshape(shape))


def running_total(terms: Floats) -> Floats:
    """Sums along the last axis, added from left to right in float32."""
    sums: Floats = np.add.accumulate(terms, axis=-1, dtype=np.float32)[..., -1]
    return sums + np.float32(0)  # a sum that starts from 0 is never -0


def bounded(values: Floats, low: np.float32, high: np.float32) -> Floats:
    values = np.where(values < low, low, values)
    values = np.where(values > high, high, values)
    return (values + ROUND) - ROUND


def whole_within(values: Floats, low: np.float32, high: np.float32) -> Floats:
    """The nearest integers in [low, high]; low for NaN."""
    values = np.where(values > low, values, low)
    values = np.where(values > high, high, values)
    return (values + ROUND) - ROUND


def inverse_of(scale: Floats) -> Floats:
    return np.where(scale == 0, np.float32(0), ONE / scale)


def extreme_of(x: Floats) -> Floats:
    return first_extreme(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1])


def nothing(problem: Problem) -> Candidate:
    """A candidate that stands for zeros and that any other beats."""
    blocks, count, _ = problem.x.shape
    zero_S, zero = np.zeros(blocks, np.float32), np.zeros((blocks, count), np.float32)
    return Candidate(error=np.full(blocks, HIGHEST), d=zero_S, dmin=zero_S, scales=zero, depths=zero)


def better_of(new: Candidate, best: Candidate) -> Candidate:
    wins = new.error < best.error
    wins_SJ = wins[:, None]
    return Candidate(
        error=np.where(wins, new.error, best.error),
        d=np.where(wins, new.d, best.d),
        dmin=np.where(wins, new.dmin, best.dmin),
        scales=np.where(wins_SJ, new.scales, best.scales),
        depths=np.where(wins_SJ, new.depths, best.depths),
    )


def picked(wins: NDArray[np.bool], new: tuple[Floats, ...], old: tuple[Floats, ...]) -> tuple[Floats, ...]:
    """Each of `new` where it wins, of `old` elsewhere."""
    return tuple(np.where(wins, *pair) for pair in zip(new, old, strict=True))
