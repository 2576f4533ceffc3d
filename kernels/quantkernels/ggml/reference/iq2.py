"""The truth for IQ2_XXS, IQ2_XS and IQ2_S: ggml's search over lattice points, in numpy, one float32 step at a time.

Each sub-block of 16 (IQ2_XXS: 32) tries a number of scales: its magnitudes are rounded to the levels 1, 3, 5, a group
of 8 off the lattice goes to the best of its neighbours, and the scale of the best fit wins. One more rounding at that
scale follows. The eighth sign of IQ2_XXS and IQ2_XS is bought by turning the weight that costs least.

Shapes: S super-blocks, B sub-blocks, N weights in each, G groups of 8.
Source: quantize_row_iq2_*_impl of ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.lattice import Lattice, lattice
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.iq2 import pack_iq2
from quantkernels.ggml.reference.search import Floats, nearest, running_sum, search_nonnegative

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

SHIFTS = 2 * np.arange(8)
GROUP = 8


def quantize_iq2(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """The ggml bytes of `rows`.

    rows [R, C] f32, finite, C a multiple of 256; importance [C] f32, or None for IQ2_S only; gives [R, bytes] u8.
    Raises ValueError without importance where ggml refuses to do without.
    """
    if importance is None and name != "IQ2_S":
        raise ValueError(f"{name} needs importance; without it ggml makes none either")
    with np.errstate(all="ignore"):
        return _quantize(rows.reshape(-1, SUPER_BLOCK), _weights(rows, name, importance), name).reshape(len(rows), -1)


def _weights(rows: Floats, name: str, importance: Floats | None) -> Floats:
    """How much the square error of each weight counts, [S, 256]."""
    x_SN = rows.reshape(-1, SUPER_BLOCK)
    factor = np.float32(2 if name == "IQ2_S" else 1)
    mean_square_S1 = (factor * running_sum(x_SN * x_SN) / np.float32(SUPER_BLOCK))[:, None]
    if importance is None:
        return np.float32(0.25) * mean_square_S1 + x_SN * x_SN
    spread = np.broadcast_to(importance, rows.shape).reshape(-1, SUPER_BLOCK)
    return spread * np.sqrt(mean_square_S1 + x_SN * x_SN)


def _quantize(x_SN: Floats, weight_SN: Floats, name: str) -> Bytes:
    size = 32 if name == "IQ2_XXS" else 16
    x_BN, weight_BN = x_SN.reshape(-1, size), weight_SN.reshape(-1, size)
    size_BN, minus_BN = _signs(x_BN, weight_BN, even=name != "IQ2_S")
    high_B = size_BN.max(axis=1)
    found = _search_xxs(size_BN, weight_BN) if name == "IQ2_XXS" else _search_xs(size_BN, weight_BN, name)
    nothing_B = (high_B < np.float32(1e-8 if name == "IQ2_S" else 1e-15)) | ~found.valid_B
    scale_B = np.where(nothing_B, np.float32(0), found.scale_B)
    turned_B = scale_B < 0
    scale_B = np.where(turned_B, -scale_B, scale_B)
    minus_BN = (minus_BN ^ turned_B[:, None]) & ~nothing_B[:, None]
    levels_BN = np.where(nothing_B[:, None], 0, found.levels_BN)

    scale_SJ = scale_B.reshape(len(x_SN), -1)
    high_S = np.maximum(scale_SJ.max(axis=1), np.float32(0))
    high_S[np.isinf(running_sum(x_SN * x_SN))] = np.nan  # ggml would make these zeros, or fail
    d_S = high_S / np.float32(31)
    scaled = np.float32(1) / d_S[:, None] * scale_SJ
    codes_SJ = np.clip(nearest(np.float32(0.5) * (scaled - np.float32(1))), 0, 15).astype(np.uint8)
    codes_SJ[high_S == 0] = 0
    if name == "IQ2_S":
        d_S = d_S * np.float32(0.9875)
    codes_G = (levels_BN.reshape(-1, GROUP) << SHIFTS).sum(axis=1)
    indices_SG = lattice(name).index_of[codes_G].reshape(-1, 32).astype(np.uint16)
    signs_SG = np.packbits(minus_BN.reshape(-1, GROUP), axis=1, bitorder="little").reshape(-1, 32)
    if name != "IQ2_S":  # ggml clears these and leaves those of IQ2_S
        indices_SG[high_S == 0] = 0
        signs_SG[high_S == 0] = 0
    return pack_iq2(name, d_S, codes_SJ, indices_SG, signs_SG)


def _signs(x_BN: Floats, weight_BN: Floats, even: bool) -> tuple[Floats, Flags]:
    """Magnitudes and which are minus; with `even`, a weight turned to an even count has a magnitude below zero."""
    minus_G8 = x_BN.reshape(-1, GROUP) < 0
    size_G8 = np.where(minus_G8, -x_BN.reshape(-1, GROUP), x_BN.reshape(-1, GROUP))
    if even:
        cost_G8 = (weight_BN * x_BN * x_BN).reshape(-1, GROUP)
        cheapest_G8 = np.arange(GROUP) == _first_minimum(cost_G8)[:, None]
        turn_G8 = cheapest_G8 & (minus_G8.sum(axis=1) % 2 == 1)[:, None]
        size_G8 = np.where(turn_G8, -size_G8, size_G8)
        minus_G8 = minus_G8 ^ turn_G8
    return size_G8.reshape(x_BN.shape), minus_G8.reshape(x_BN.shape)


def _first_minimum(values: Floats) -> Integers:
    """The first smallest value of each row as a chain of comparisons finds it: past a NaN nothing changes."""
    where = np.zeros(len(values), np.int64)
    best = values[:, 0]
    for i in range(1, values.shape[1]):
        less = values[:, i] < best
        best, where = np.where(less, values[:, i], best), np.where(less, i, where)
    return where


@dataclass(frozen=True, kw_only=True)
class _Found:
    """x is about scale * (2 levels + 1); a sub-block that is not valid is stored as zeros."""

    scale_B: Floats
    levels_BN: Integers
    valid_B: Flags


def _search_xxs(x_BN: Floats, weight_BN: Floats) -> _Found:
    """IQ2_XXS: 13 scales around that of a fit with levels 0 to 4, and one last rounding for every group."""
    grid = lattice("IQ2_XXS")
    root_BN = np.sqrt(weight_BN)
    scale_B, _ = search_nonnegative(x_BN, weight_BN, 4)
    reach_B = scale_B * np.float32(3)
    valid_B = ~(reach_B <= 0)
    best_B = np.zeros(len(x_BN), np.float32)
    levels_BN = np.zeros(x_BN.shape, np.int64)
    for step in range(-6, 7):
        inverse_B = (np.float32(5) + np.float32(step) * np.float32(0.1)) / reach_B
        trial_BN, _ = _round(grid, x_BN, root_BN, inverse_B, np.float32(1) / inverse_B)
        better_B, ratio_B, fit_B, _ = _fit(x_BN, weight_BN, trial_BN, best_B)
        scale_B = np.where(better_B, ratio_B, scale_B)
        best_B = np.where(better_B, fit_B, best_B)
        levels_BN = np.where(better_B[:, None], trial_BN, levels_BN)
    trial_BN, _ = _round(grid, x_BN, root_BN, np.float32(1) / scale_B, scale_B)
    positive_B = scale_B > 0
    levels_BN = np.where(positive_B[:, None], trial_BN, levels_BN)
    _, ratio_B, _, usable_B = _fit(x_BN, weight_BN, levels_BN, best_B)
    scale_B = np.where(positive_B & usable_B, ratio_B, scale_B)
    return _Found(scale_B=scale_B, levels_BN=levels_BN, valid_B=valid_B)


def _search_xs(x_BN: Floats, weight_BN: Floats, name: str) -> _Found:
    """IQ2_XS and IQ2_S: 19 scales around a fifth of the largest value; groups on the lattice are then left alone."""
    grid = lattice(name)
    root_BN = np.sqrt(weight_BN)
    high_B = x_BN.max(axis=1)
    scale_B = high_B / np.float32(5)
    best_B = np.zeros(len(x_BN), np.float32)
    levels_BN = np.zeros(x_BN.shape, np.int64)
    exact_BN = np.ones(x_BN.shape, np.bool_)
    for step in range(-9, 10):
        inverse_B = (np.float32(5) + np.float32(step) * np.float32(0.1)) / high_B
        trial_BN, on_BN = _round(grid, x_BN, root_BN, inverse_B, np.float32(1) / inverse_B)
        better_B, ratio_B, fit_B, _ = _fit(x_BN, weight_BN, trial_BN, best_B)
        scale_B = np.where(better_B, ratio_B, scale_B)
        best_B = np.where(better_B, fit_B, best_B)
        levels_BN = np.where(better_B[:, None], trial_BN, levels_BN)
        exact_BN = np.where(better_B[:, None], on_BN, exact_BN)
    again_B = (scale_B > 0) & ~exact_BN.all(axis=1)
    trial_BN, _ = _round(grid, x_BN, root_BN, np.float32(1) / scale_B, scale_B)
    levels_BN = np.where(again_B[:, None] & ~exact_BN, trial_BN, levels_BN)
    _, ratio_B, _, usable_B = _fit(x_BN, weight_BN, levels_BN, best_B)
    scale_B = np.where(again_B & usable_B, ratio_B, scale_B)
    return _Found(scale_B=scale_B, levels_BN=levels_BN, valid_B=np.ones(len(x_BN), np.bool_))


def _fit(x_BN: Floats, weight_BN: Floats, levels_BN: Integers, best_B: Floats) -> tuple[Flags, Floats, Floats, Flags]:
    """Whether the levels fit better than `best`, their least-squares scale, their fit, and whether that exists."""
    odd_BN = (2 * levels_BN + 1).astype(np.float32)
    sum_xq_B = running_sum(weight_BN * x_BN * odd_BN)
    sum_q2_B = running_sum(weight_BN * odd_BN * odd_BN)
    ratio_B = sum_xq_B / sum_q2_B
    usable_B = sum_q2_B > 0
    return usable_B & (sum_xq_B * sum_xq_B > best_B * sum_q2_B), ratio_B, ratio_B * sum_xq_B, usable_B


def _round(grid: Lattice, x_BN: Floats, root_BN: Floats, inverse_B: Floats, scale_B: Floats) -> tuple[Integers, Flags]:
    """The levels of lattice points for a scale, and for each weight whether its group was on the lattice at once."""
    scaled_BN = np.float32(0.5) * (inverse_B[:, None] * x_BN - np.float32(1))
    levels_G8 = np.clip(nearest(scaled_BN), 0, 2).astype(np.int64).reshape(-1, GROUP)
    index_G = grid.index_of[(levels_G8 << SHIFTS).sum(axis=1)]
    off = np.flatnonzero(index_G < 0)
    scale_G = np.repeat(scale_B, x_BN.shape[1] // GROUP)
    chosen = _best_neighbours(
        grid, -1 - index_G[off], x_BN.reshape(-1, GROUP)[off], root_BN.reshape(-1, GROUP)[off], scale_G[off]
    )
    levels_G8[off] = (grid.points[chosen].astype(np.int64) - 1) // 2
    on_BN = np.repeat(index_G >= 0, GROUP).reshape(x_BN.shape)
    return levels_G8.reshape(x_BN.shape), on_BN


def _best_neighbours(
    grid: Lattice, row_G: NDArray[np.int32], x_G8: Floats, root_G8: Floats, scale_G: Floats
) -> NDArray[np.int32]:
    """The first neighbour of least error in each row; errors count with the roots of the weights."""
    first_G, count_G = grid.neighbour_start[row_G], np.diff(grid.neighbour_start)[row_G]
    chosen_G = grid.neighbours[first_G]
    best_G = np.full(len(row_G), np.finfo(np.float32).max, np.float32)
    for j in range(int(count_G.max(initial=0))):
        left = np.flatnonzero(count_G > j)
        point = grid.neighbours[first_G[left] + j]
        difference = scale_G[left, None] * grid.points[point].astype(np.float32) - x_G8[left]
        error = running_sum(root_G8[left] * difference * difference)
        less = error < best_G[left]
        best_G[left] = np.where(less, error, best_G[left])
        chosen_G[left] = np.where(less, point, chosen_G[left])
    return chosen_G
