"""The truth for IQ1_S and IQ1_M: an exact split into three levels, then the lattice point nearest to it, in numpy.

Sorted weights are cut in two places into low, middle and high; running sums give the fit of every pair of cuts and of
every shift of the levels by 1/8. A group of eight whose levels are no lattice point takes the nearest of ggml's list
for it, and then the scale is fitted again. Groups are chosen before d and the sub-scales are rounded: this is where
`thorough/reference/iq1.py` gains.

Shapes: R rows, C columns, S super-blocks of 256, J sub-blocks in one, B sub-blocks, N weights in each, G groups of 8.
Source: quantize_row_iq1_s_impl and quantize_row_iq1_m_impl of ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.fields import Bytes, Floats
from quantkernels.ggml.packing.iq1 import SHIFT, Fields, pack_iq1
from quantkernels.ggml.reference.search import nearest, running_sum

PLUS = np.array([-1, 0, 1], np.float32) + SHIFT
MINUS = np.array([-1, 0, 1], np.float32) - SHIFT
TINY_S = np.float32(1e-12)  # a sub-block whose largest magnitude is below this is stored as zeros
TINY_M = np.float32(1e-7)
FUDGE_S = np.float32(1.125)  # what ggml multiplies d with
FUDGE_M = np.float32(1.1125)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Levels 0, 1, 2 [B, N], shifts of the groups [B, N / 8] (true for minus), and scales [B], 0 for skipped blocks."""

    scale_B: Floats
    negative: NDArray[np.bool_]
    levels_BN: NDArray[np.int64]


def quantize_iq1(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """The ggml bytes of `rows` [R, C] f32, finite; importance [C] f32, or None for IQ1_M; gives [R, bytes] u8.

    Where a sum of the search overflows d becomes NaN, which the caller refuses; ggml stores zeros there, or stops the
    process.
    """
    size = 32 if name == "IQ1_S" else 16
    weight_SN = weights_of(rows, importance)
    x_BN, weight_BN = rows.reshape(-1, size), weight_SN.reshape(-1, size)
    with np.errstate(all="ignore"):
        split = _split_whole(x_BN, weight_BN) if name == "IQ1_S" else _split_halves(x_BN, weight_BN)
        largest_B = np.abs(x_BN).max(axis=1)
        skipped_B = (largest_B < (TINY_S if name == "IQ1_S" else TINY_M)) | (split.scale_B == -np.inf)
        scale_B, indices = _to_lattice(x_BN, weight_BN, split)
        scale_SJ = np.where(skipped_B, np.float32(0), scale_B).reshape(-1, SUPER_BLOCK // size)
        indices = np.where(skipped_B[:, None], 0, indices).reshape(-1, 32)
        negative = split.negative & ~skipped_B[:, None]
        maximum_S = scale_SJ.max(axis=1)
        d_S = maximum_S / np.float32(15)
        nearest_SJ = nearest(np.float32(0.5) * ((np.float32(1) / d_S)[:, None] * scale_SJ - np.float32(1)))
        zero_S1 = maximum_S[:, None] == 0
        sub_scales = np.where(zero_S1, np.float32(0), np.clip(nearest_SJ, np.float32(0), np.float32(7)))
        shared = negative[:, :1] if name == "IQ1_S" else negative
        negative = shared.reshape(len(d_S), -1) & ~zero_S1
        if name == "IQ1_S":
            d_S = d_S * FUDGE_S
        else:
            d_S = _fit_d(rows.reshape(-1, SUPER_BLOCK), weight_SN, d_S, sub_scales, negative, indices) * FUDGE_M
        d_S = np.where(zero_S1[:, 0], np.float32(0), d_S)
        fields = Fields(
            d_S=d_S,
            sub_scales=sub_scales.astype(np.uint16),
            negative=negative,
            indices=indices.astype(np.uint16),
        )
        return pack_iq1(name, fields).reshape(len(rows), -1)


def weights_of(rows: Floats, importance: Floats | None) -> Floats:
    """The weights of the search, [S, 256]: importance times sqrt(2 * mean square + x^2), or x^2 without."""
    x_SN = rows.reshape(-1, SUPER_BLOCK)
    with np.errstate(all="ignore"):
        if importance is None:
            return x_SN * x_SN
        mean_square_S = np.float32(2) * running_sum(x_SN * x_SN) / np.float32(SUPER_BLOCK)
        spread_SN = np.broadcast_to(importance, rows.shape).reshape(-1, SUPER_BLOCK)
        return spread_SN * np.sqrt(mean_square_S[:, None] + x_SN * x_SN)


class _Best:
    """The best cut so far of each block: its fit, scale, cuts and the number of its shifts."""

    def __init__(self, blocks: int) -> None:
        self.fit_B = np.full(blocks, -np.finfo(np.float32).max)
        self.scale_B = np.full(blocks, -np.inf, np.float32)
        self.first_B = np.zeros(blocks, np.int64)
        self.second_B = np.zeros(blocks, np.int64)
        self.shifts_B = np.zeros(blocks, np.int64)

    def offer(self, first: int, second: int, shifts: int, sum_qx_B: Floats, sum_q2_B: Floats) -> None:
        """Take these cuts where they fit better."""
        better_B = (sum_q2_B > 0) & (sum_qx_B * sum_qx_B > self.fit_B * sum_q2_B)
        scale_B = sum_qx_B / sum_q2_B
        self.scale_B = np.where(better_B, scale_B, self.scale_B)
        self.fit_B = np.where(better_B, scale_B * sum_qx_B, self.fit_B)
        self.first_B[better_B], self.second_B[better_B], self.shifts_B[better_B] = first, second, shifts

    def split(self, order_BN: NDArray[np.intp], most: int, total_B: Floats) -> Split:
        """Levels in the original order; a negative scale is turned around, with the levels and the shifts.

        Where no cut was any good and total_B is not finite, the scale is NaN.
        """
        lost_B = (self.scale_B == -np.inf) & ~np.isfinite(total_B)
        self.scale_B = np.where(lost_B, np.float32(np.nan), self.scale_B)
        position = np.arange(order_BN.shape[1])
        sorted_levels = (position >= self.first_B[:, None]).astype(np.int64) + (position >= self.second_B[:, None])
        levels_BN = np.empty_like(sorted_levels)
        np.put_along_axis(levels_BN, order_BN, sorted_levels, axis=1)
        turned_B = (self.scale_B < 0) & np.isfinite(self.scale_B)
        shifts_B = np.where(turned_B, most - self.shifts_B, self.shifts_B)
        shifts = np.stack([shifts_B > most // 2, shifts_B % 2 == 1], axis=1)
        return Split(
            scale_B=np.where(turned_B, -self.scale_B, self.scale_B),
            negative=shifts if most == 3 else np.repeat(shifts[:, :1], order_BN.shape[1] // 8, axis=1),
            levels_BN=np.where(turned_B[:, None], 2 - levels_BN, levels_BN),
        )


def _running(terms_BN: Floats) -> Floats:
    """Running sums from 0 on: [B, N + 1]."""
    return np.add.accumulate(np.pad(terms_BN, ((0, 0), (1, 0))), axis=1, dtype=np.float32)


def _split_whole(x_BN: Floats, weight_BN: Floats) -> Split:
    """IQ1_S: all 32 weights have the same shift."""
    order_BN = np.argsort(x_BN, axis=1, kind="stable")
    sum_x = _running(np.take_along_axis(weight_BN * x_BN, order_BN, axis=1))
    sum_w = _running(np.take_along_axis(weight_BN, order_BN, axis=1))
    last = x_BN.shape[1]
    best = _Best(len(x_BN))
    for first in range(last + 1):
        for second in range(first, last + 1):
            cuts = (0, first, second, last)
            parts_x = [sum_x[:, high] - sum_x[:, low] for low, high in pairwise(cuts)]
            parts_w = [sum_w[:, high] - sum_w[:, low] for low, high in pairwise(cuts)]
            for shifts, values in enumerate((PLUS, MINUS)):
                terms_x = [part * value for part, value in zip(parts_x, values, strict=True)]
                terms_w = [part * value * value for part, value in zip(parts_w, values, strict=True)]
                sum_qx = terms_x[0] + terms_x[1] + terms_x[2]
                best.offer(first, second, shifts, sum_qx, terms_w[0] + terms_w[1] + terms_w[2])
    return best.split(order_BN, 1, sum_x[:, last] + sum_w[:, last])


def _split_halves(x_BN: Floats, weight_BN: Floats) -> Split:
    """IQ1_M: each half of the 16 weights has a shift of its own; 0 to 3 count them, the first half's in the high bit.

    Running sums are kept for each half. Levels are 1 apart, so the sum over three parts is the total times the highest
    level less the two running sums; ggml computes it in this way, and so the rounding asks for it here.
    """
    order_BN = np.argsort(x_BN, axis=1, kind="stable")
    last = x_BN.shape[1]
    sums = []
    for half in (0, 1):
        inside = order_BN // (last // 2) == half
        taken_x = np.where(inside, np.take_along_axis(weight_BN * x_BN, order_BN, axis=1), np.float32(0))
        taken_w = np.where(inside, np.take_along_axis(weight_BN, order_BN, axis=1), np.float32(0))
        sums.append((_running(taken_x), _running(taken_w)))
    best = _Best(len(x_BN))
    for first in range(last + 1):
        for second in range(first, last + 1):
            fits = []
            for sum_x, sum_w in sums:
                below = sum_x[:, first] + sum_x[:, second]
                for low, middle, high in (PLUS, MINUS):
                    sum_qx = sum_x[:, last] * high - below
                    steps = (low * low - middle * middle, middle * middle - high * high)
                    squares = sum_w[:, last] * high * high + sum_w[:, first] * steps[0] + sum_w[:, second] * steps[1]
                    fits.append((sum_qx, squares))
            for shifts in range(4):
                one, other = fits[shifts // 2], fits[2 + shifts % 2]
                best.offer(first, second, shifts, one[0] + other[0], one[1] + other[1])
    totals = [total[:, last] for pair in sums for total in pair]
    return best.split(order_BN, 3, totals[0] + totals[1] + totals[2] + totals[3])


def _to_lattice(x_BN: Floats, weight_BN: Floats, split: Split) -> tuple[Floats, NDArray[np.int64]]:
    """The scales, fitted again where a group was off the lattice, and the indices [B, N / 8]."""
    known = lattice("IQ1")
    groups = split.levels_BN.shape[1] // 8
    codes = (split.levels_BN.reshape(-1, 8) << (2 * np.arange(8))).sum(axis=1)
    indices = known.index_of[codes].astype(np.int64)
    levels_G3 = np.where(split.negative.reshape(-1, 1), MINUS, PLUS)
    scale_G = np.repeat(split.scale_B, groups)
    off = np.flatnonzero(indices < 0)
    for part in np.array_split(off, len(off) // 4096 + 1):
        values = x_BN.reshape(-1, 8)[part], weight_BN.reshape(-1, 8)[part], levels_G3[part], scale_G[part]
        indices[part] = _best_neighbour(-1 - indices[part], *values)
    lost_B = (indices.reshape(-1, groups) < 0).any(axis=1)
    points = known.points[np.maximum(indices, 0)].astype(np.int64) + 1
    q_BN = np.take_along_axis(levels_G3, points, axis=1).reshape(x_BN.shape)
    sum_qx_B = running_sum(weight_BN * q_BN * x_BN)
    sum_q2_B = running_sum(weight_BN * q_BN * q_BN)
    off_B = np.zeros(len(x_BN), bool)
    off_B[off // groups] = True
    fitted_B = np.where(off_B & (sum_qx_B > 0) & (sum_q2_B > 0), sum_qx_B / sum_q2_B, split.scale_B)
    return np.where(lost_B, np.float32(np.nan), fitted_B), np.maximum(indices, 0).reshape(-1, groups)


def _best_neighbour(
    row_G: NDArray[np.int64], x_G8: Floats, weight_G8: Floats, levels_G3: Floats, scale_G: Floats
) -> NDArray[np.int64]:
    """For each group the first point of least weighted distance in ggml's list; -1 where no distance is finite."""
    known = lattice("IQ1")
    start_G, end_G = known.neighbour_start[row_G], known.neighbour_start[row_G + 1]
    places = start_G[:, None] + np.arange(int((end_G - start_G).max(initial=0)))
    inside = places < end_G[:, None]
    neighbours = known.neighbours[np.where(inside, places, start_G[:, None])]
    distance = np.zeros(neighbours.shape, np.float32)
    for i in range(8):
        error_G3 = scale_G[:, None] * levels_G3 - x_G8[:, i : i + 1]
        term_G3 = weight_G8[:, i : i + 1] * error_G3 * error_G3
        distance += np.take_along_axis(term_G3, known.points[neighbours, i].astype(np.int64) + 1, axis=1)
    distance = np.where(inside & (distance < np.finfo(np.float32).max), distance, np.float32(np.inf))
    chosen = np.argmin(distance, axis=1)[:, None] if neighbours.size else np.zeros((len(row_G), 1), np.int64)
    found = np.isfinite(np.take_along_axis(distance, chosen, axis=1)[:, 0]) if neighbours.size else row_G < 0
    nearest_G = np.take_along_axis(neighbours, chosen, axis=1)[:, 0] if neighbours.size else row_G
    return np.where(found, nearest_G, -1).astype(np.int64)


def _fit_d(
    x_SN: Floats,
    weight_SN: Floats,
    d_S: Floats,
    sub_scales_SJ: Floats,
    negative_SG: NDArray[np.bool_],
    indices_SG: NDArray[np.int64],
) -> Floats:
    """IQ1_M: the least-squares d for the chosen points and sub-scales; the given one where nothing weighs."""
    levels_SG3 = np.where(negative_SG[:, :, None], MINUS, PLUS)
    points = lattice("IQ1").points[indices_SG].astype(np.int64) + 1
    q_SG8 = np.take_along_axis(levels_SG3, points, axis=2)
    q_SN = (q_SG8 * np.repeat(2 * sub_scales_SJ + 1, 2, axis=1)[:, :, None]).reshape(x_SN.shape)
    sum_qx_S = running_sum(weight_SN * q_SN * x_SN)
    sum_q2_S = running_sum(weight_SN * q_SN * q_SN)
    return np.where(sum_q2_S > 0, sum_qx_S / sum_q2_S, d_S)
