"""The truth for the thorough search of IQ3_XXS and IQ3_S: all lattice points, the decoder's values, scales together.

Where ggml rounds and then tries listed neighbours, here every point competes: at scale e a point with values u gains
e (2 sum w x u - e sum w u u) of the weighted square sum, and both sums are computed once for all scales. A row of
scales for each sub-block gives its gain as a curve; from the curves of the eight comes the d whose multiples 1, 3 .. 31
suit all of them, and from there on points, sub-scales and d take turns: the best points for each sub-scale and those
beside it, then the d of least squares. Weights are the importance itself, or 1. What ggml made is kept wherever it is
no worse. The alternative, every float16 d with every sub-scale, gains less than a hundredth more (measured on samples).

IQ3_XXS has no free signs: eight weights with an odd number of minus signs need one of the wrong sign. Every point
therefore has a second value, with its cheapest weight turned, and of two groups one takes that.

Shapes: S super-blocks, J sub-blocks (8), G groups of four (64), P lattice points. Signs are split off: x is positive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.packing.iq3 import Fields, pack_iq3, unpack_iq3

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

SAMPLES = 16  # scales tried for each sub-block, in equal steps
LOWEST, STEP = np.float32(0.03), np.float32(0.0042)  # the first, and the step, in units of the largest magnitude
SMALLEST = np.float32(1 / 32)  # a sub-block's largest magnitude counts as no less than this share of the super-block's
FIRST_D, D_RATIO, D_COUNT = np.float32(0.94 / 31), np.float32(1.02), 32  # the d tried, in units of the largest scale
TURNS = 4
SURELY = 1 - 1e-12  # beyond what another order of the sums could change


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Sums for every group and point: gain at scale e is e * (linear - e * square); turned is linear with one sign off.

    linear, turned, square [S, G, P]; odd [S, G / 2] where eight weights need a turned point; largest [S, J].
    """

    linear: Floats
    turned: Floats
    square: Floats
    odd: NDArray[np.bool_]
    largest: Floats


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Points [S, G], which of them are turned, and the gain [S, J] of each sub-block."""

    points: Integers
    turned: NDArray[np.bool_]
    gain: Floats


def improve_blocks(rows: Floats, name: str, importance: Floats | None, blocks: Bytes) -> Bytes:
    """`blocks` [S, bytes], ggml's for `rows` [R, C] f32, each replaced where a thorough search finds a better one."""
    x_SN = rows.reshape(-1, 256)
    weight_SN = np.ones_like(x_SN)
    if importance is not None:
        weight_SN = np.ascontiguousarray(np.broadcast_to(importance, rows.shape)).reshape(-1, 256)
    with np.errstate(all="ignore"):
        problem = _problem(x_SN, weight_SN, name)
        found = pack_iq3(name, _search(problem, x_SN, weight_SN, name))
        old_S = _error(x_SN, weight_SN, blocks, name)
        better = (_error(x_SN, weight_SN, found, name) < old_S * SURELY) & np.isfinite(old_S)
    return np.where(better[:, None], found, blocks)


def values_of(name: str) -> Floats:
    """The decoder's values [P, 4] with d and the odd sub-scales taken out."""
    return lattice(name).values * np.float32(0.25 if name == "IQ3_XXS" else 1)


def _error(x_SN: Floats, weight_SN: Floats, blocks: Bytes, name: str) -> NDArray[np.float64]:
    off = x_SN.astype(np.float64) - unpack_iq3(blocks, name)
    error: NDArray[np.float64] = np.add.accumulate(weight_SN * off * off, axis=1)[:, -1]
    return error


def _problem(x_SN: Floats, weight_SN: Floats, name: str) -> _Problem:
    value_PD = values_of(name)
    x = np.abs(x_SN).reshape(-1, 64, 1, 4)
    weight = weight_SN.reshape(-1, 64, 1, 4)
    terms = (weight * x) * value_PD
    squares = weight * (value_PD * value_PD)
    linear = np.float32(2) * (((terms[..., 0] + terms[..., 1]) + terms[..., 2]) + terms[..., 3])
    square = ((squares[..., 0] + squares[..., 1]) + squares[..., 2]) + squares[..., 3]
    odd = (x_SN < 0).reshape(-1, 32, 8).sum(axis=2) % 2 == 1
    largest = np.where(weight_SN > 0, np.abs(x_SN), np.float32(0)).reshape(-1, 8, 32).max(axis=2)
    return _Problem(
        linear=linear,
        turned=linear - np.float32(4) * terms.min(axis=3),
        square=square,
        odd=odd if name == "IQ3_XXS" else np.zeros_like(odd),
        largest=np.maximum(largest, largest.max(axis=1, keepdims=True) * SMALLEST),
    )


def _choose(problem: _Problem, scale_SJ: Floats) -> _Choice:
    """The best points for given scales."""
    scale = scale_SJ.repeat(8, axis=1)[:, :, None]
    straight = problem.linear - scale * problem.square
    turned = problem.turned - scale * problem.square
    best, best_turned = straight.max(axis=2).reshape(-1, 32, 2), turned.max(axis=2).reshape(-1, 32, 2)
    second = best[..., 0] + best_turned[..., 1] > best_turned[..., 0] + best[..., 1]
    is_turned = np.stack([problem.odd & ~second, problem.odd & second], axis=2)
    parts = np.where(is_turned, best_turned, best)
    gain = np.add.accumulate((parts[..., 0] + parts[..., 1]).reshape(-1, 8, 4), axis=2)[..., -1]
    flags = is_turned.reshape(-1, 64)
    points = np.where(flags, turned.argmax(axis=2), straight.argmax(axis=2))
    return _Choice(points=points, turned=flags, gain=scale_SJ * gain)


def _search(problem: _Problem, x_SN: Floats, weight_SN: Floats, name: str) -> Fields:
    d_S, sub_scales = _start(problem)
    best_total = np.full(len(d_S), -np.inf, np.float32)
    best_d, best_sub = d_S, sub_scales
    best_points, best_turned = np.zeros((len(d_S), 64), np.int64), np.zeros((len(d_S), 64), np.bool_)
    for turn in range(TURNS):
        steps = (0, 1) if turn == 0 else (0, -1, 1)
        choice, sub_scales = _best_sub_scales(problem, d_S, sub_scales, steps)
        total = np.add.accumulate(choice.gain, axis=1)[:, -1]
        better = total > best_total
        best_total = np.where(better, total, best_total)
        best_d = np.where(better, d_S, best_d)
        best_sub, best_points, best_turned = (
            np.where(better[:, None], new, old)
            for new, old in ((sub_scales, best_sub), (choice.points, best_points), (choice.turned, best_turned))
        )
        d_S = _least_squares(problem, choice, sub_scales)
    signs = _signs(x_SN, weight_SN, best_points, best_turned, name)
    return Fields(d_S=best_d, sub_scales=best_sub.astype(np.uint8), indices=best_points.astype(np.uint16), signs=signs)


def _start(problem: _Problem) -> tuple[Floats, Integers]:
    """The d, as float16 holds it, whose multiples suit all sub-blocks, and the sub-scale below the best of each."""
    curves = np.stack(
        [_choose(problem, problem.largest * (LOWEST + STEP * np.float32(t))).gain for t in range(SAMPLES)]
    )
    best_SJ = problem.largest * (LOWEST + STEP * curves.argmax(axis=0).astype(np.float32))
    d_S = best_SJ.max(axis=1) * FIRST_D
    best_total = np.full(len(d_S), -np.inf, np.float32)
    best_d = d_S
    for _ in range(D_COUNT):
        below = _sub_scale_below(best_SJ, d_S)
        gains = [_gain_at(curves, problem, d_S, np.minimum(below + step, 15)) for step in (0, 1)]
        total = np.add.accumulate(np.maximum(gains[0], gains[1]), axis=1)[:, -1]
        best_d = np.where(total > best_total, d_S, best_d)
        best_total = np.maximum(total, best_total)
        d_S = d_S * D_RATIO
    best_d = best_d.astype(np.float16).astype(np.float32)
    return best_d, _sub_scale_below(best_SJ, best_d)


def _sub_scale_below(scale_SJ: Floats, d_S: Floats) -> Integers:
    position = (scale_SJ / d_S[:, None] - np.float32(1)) * np.float32(0.5)
    below: Integers = np.clip(np.nan_to_num(position), 0, 15).astype(np.int64)
    return below


def _gain_at(curves: Floats, problem: _Problem, d_S: Floats, sub_scales: Integers) -> Floats:
    """The gains [S, J] read from the curves [T, S, J] at a scale between the samples."""
    scale_SJ = d_S[:, None] * (2 * sub_scales + 1).astype(np.float32)
    position = (scale_SJ / problem.largest - LOWEST) / STEP
    middle = np.clip(np.nan_to_num(position + np.float32(0.5)), 1, SAMPLES - 2).astype(np.int64)
    low, own, high = (np.take_along_axis(curves, (middle + step)[None], axis=0)[0] for step in (-1, 0, 1))
    away = position - middle.astype(np.float32)
    gain: Floats = own + np.float32(0.5) * away * ((high - low) + away * ((high - own) - (own - low)))
    return gain


def _best_sub_scales(
    problem: _Problem, d_S: Floats, sub_scales: Integers, steps: tuple[int, ...]
) -> tuple[_Choice, Integers]:
    """The best points for the best sub-scale among those `steps` away, the first of equals."""
    best, best_sub = None, sub_scales
    for step in steps:
        trial = np.clip(sub_scales + step, 0, 15)
        choice = _choose(problem, d_S[:, None] * (2 * trial + 1).astype(np.float32))
        if best is None:
            best, best_sub = choice, trial
            continue
        better = choice.gain > best.gain
        groups = better.repeat(8, axis=1)
        best = _Choice(
            points=np.where(groups, choice.points, best.points),
            turned=np.where(groups, choice.turned, best.turned),
            gain=np.where(better, choice.gain, best.gain),
        )
        best_sub = np.where(better, trial, best_sub)
    assert best is not None
    return best, best_sub


def _least_squares(problem: _Problem, choice: _Choice, sub_scales: Integers) -> Floats:
    """The d of least error, as float16 holds it."""
    at = choice.points[:, :, None]
    linear = np.where(choice.turned[:, :, None], problem.turned, problem.linear)
    factor = (2 * sub_scales + 1).astype(np.float32).repeat(8, axis=1)
    top = np.add.accumulate(factor * np.take_along_axis(linear, at, axis=2)[..., 0], axis=1)[:, -1]
    bottom = np.add.accumulate(factor * factor * np.take_along_axis(problem.square, at, axis=2)[..., 0], axis=1)[:, -1]
    d_S: Floats = (np.float32(0.5) * top / bottom).astype(np.float16).astype(np.float32)
    return d_S


def _signs(x_SN: Floats, weight_SN: Floats, points: Integers, turned: NDArray[np.bool_], name: str) -> Bytes:
    """The signs [S, 32], in turned groups with that of the cheapest weight, the first of equals, turned."""
    terms = (weight_SN * np.abs(x_SN)).reshape(-1, 64, 4) * values_of(name)[points]
    turn = (np.arange(4) == terms.argmin(axis=2)[..., None]) & turned[..., None]
    negative = (x_SN < 0) ^ turn.reshape(x_SN.shape)
    return np.packbits(negative, axis=1, bitorder="little")
