"""The truth for IQ3_XXS and IQ3_S: ggml's search over lattice points, in numpy.

For each sub-block of 32 magnitudes ggml tries a row of scales. At each scale every group of four is rounded to levels;
where the levels are no lattice point, the nearest of a few listed neighbours takes their place. The least-squares scale
of the best trial is then used once more to choose points. Distances to neighbours are weighted by the square root of
the weights, and the search takes 1, 3, .. 15 for the levels although the decoder of IQ3_XXS has 15.5 for the last.

ggml writes the sub-blocks of an IQ3_S super-block one after the other but skips those that are all zero, so that the
following ones land eight indices too early, under other sub-scales. Its bytes are followed there too: a reader cannot
tell the difference, and the thorough search does not have it.

Shapes: S super-blocks, B sub-blocks, G groups of four in a sub-block (8), N weights in a sub-block (32).
Source: quantize_row_iq3_xxs_impl and quantize_row_iq3_s_impl of ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.lattice import Lattice, lattice
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.iq3 import Fields, pack_iq3
from quantkernels.ggml.reference.search import Floats, nearest, running_sum

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

FARTHEST = np.float32(3.4028235e38)  # a neighbour must be nearer than this to be chosen
XXS_TINY = np.float32(1e-8)  # IQ3_XXS stores a sub-block whose largest magnitude is below this as scale 0


def quantize_iq3(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """The ggml bytes [S, bytes] of `rows`.

    rows [R, C] f32, finite, C a multiple of 256; importance [C] f32 or None.
    """
    with np.errstate(all="ignore"):
        x_BN = rows.reshape(-1, 32)
        weight_BN = x_BN * x_BN
        if importance is not None:
            mean_square_S = np.float32(2) * running_sum((x_BN * x_BN).reshape(-1, SUPER_BLOCK)) / np.float32(256)
            root_BN = np.sqrt(mean_square_S.repeat(8)[:, None] + weight_BN)
            weight_BN = np.broadcast_to(importance, rows.shape).reshape(-1, 32) * root_BN
        xxs = name == "IQ3_XXS"
        magnitude_BN, signs = _split_evenly(x_BN, weight_BN) if xxs else _split_signs(x_BN)
        found = _search(magnitude_BN, weight_BN, lattice(name), xxs)
        largest_B = magnitude_BN.max(axis=1)
        skipped_B = largest_B < XXS_TINY if xxs else largest_B == 0
        if xxs:
            signs = np.where(found.scale_B[:, None] < 0, ~signs, signs)
        scale_SJ = np.where(skipped_B, np.float32(0), np.abs(found.scale_B)).reshape(-1, 8)
        indices = np.where(skipped_B[:, None], 0, found.indices_BG).astype(np.uint16)
        signs = np.where(skipped_B[:, None], np.uint8(0), signs)
        if not xxs:
            indices, signs = _close_ranks(indices, signs, skipped_B)
        return _pack(name, scale_SJ, indices, signs)


def _pack(name: str, scale_SJ: Floats, indices: NDArray[np.uint16], signs: Bytes) -> Bytes:
    """Sub-scales of 4 bits with the largest at 15, and d a little above the plain quotient, as ggml found it better."""
    d_S = scale_SJ.max(axis=1) / np.float32(31)
    scaled_SJ = np.float32(0.5) * ((np.float32(1) / d_S)[:, None] * scale_SJ - np.float32(1))
    sub_scales = np.clip(nearest(scaled_SJ), np.float32(0), np.float32(15)).astype(np.uint8)
    fudge = np.float32(1.0125 if name == "IQ3_XXS" else 1.033)
    fields = Fields(
        d_S=d_S * fudge, sub_scales=sub_scales, indices=indices.reshape(-1, 64), signs=signs.reshape(-1, 32)
    )
    blocks = pack_iq3(name, fields)
    if name == "IQ3_XXS":
        blocks[scale_SJ.max(axis=1) == 0] = 0
    return blocks


def _close_ranks(indices: NDArray[np.uint16], signs: Bytes, skipped_B: Flags) -> tuple[NDArray[np.uint16], Bytes]:
    """Move the low index bytes and the signs of each super-block's sub-blocks to the front, past skipped ones."""
    order_SJ = np.argsort(skipped_B.reshape(-1, 8), axis=1, kind="stable")
    flat_B = (order_SJ + 8 * np.arange(len(order_SJ))[:, None]).reshape(-1)
    return (indices & 256) | (indices & 255)[flat_B], signs[flat_B]


def _split_signs(x_BN: Floats) -> tuple[Floats, Bytes]:
    return np.abs(x_BN), np.packbits(x_BN < 0, axis=1, bitorder="little")


def _split_evenly(x_BN: Floats, weight_BN: Floats) -> tuple[Floats, Bytes]:
    """Magnitudes and signs with an even number of minus signs in eight; the cheapest weight takes the wrong sign."""
    negative = (x_BN < 0).reshape(-1, 8)
    cost = (weight_BN * x_BN * x_BN).reshape(-1, 8)
    cheapest = np.zeros(len(cost), np.int64)
    for i in range(1, 8):
        lower = cost[:, i] < np.take_along_axis(cost, cheapest[:, None], axis=1)[:, 0]
        cheapest = np.where(lower, i, cheapest)
    flipped = (np.arange(8) == cheapest[:, None]) & (negative.sum(axis=1) % 2 == 1)[:, None]
    magnitude = np.where(flipped.reshape(x_BN.shape), -np.abs(x_BN), np.abs(x_BN))
    return magnitude, np.packbits((negative ^ flipped).reshape(x_BN.shape), axis=1, bitorder="little")


@dataclass(frozen=True, kw_only=True)
class _Found:
    scale_B: Floats
    indices_BG: Integers


def _search(x_BN: Floats, weight_BN: Floats, grid: Lattice, xxs: bool) -> _Found:
    """The least-squares scale and the points of the best of 31 or 19 trials, improved once at that scale.

    In IQ3_S all groups are chosen anew when one of them is off the grid, in IQ3_XXS only those off the grid.
    """
    root_BN = np.sqrt(weight_BN)
    largest_B = x_BN.max(axis=1)
    scale_B = largest_B / np.float32(15)
    best_B = np.zeros_like(scale_B)
    indices_BG = np.zeros((len(x_BN), 8), np.int64)
    on_grid_BG = np.full(indices_BG.shape, xxs)
    reach = 15 if xxs else 9
    for step in range(-reach, reach + 1):
        inverse_B = (np.float32(15) + np.float32(step) * np.float32(0.2)) / largest_B
        trial_BG, trial_on_grid_BG = _choose(x_BN, root_BN, inverse_B, np.float32(1) / inverse_B, grid)
        sum_xq_B, sum_q2_B = _fit(x_BN, weight_BN, trial_BG, grid)
        better_B = (sum_q2_B > 0) & (sum_xq_B * sum_xq_B > best_B * sum_q2_B)
        scale_B = np.where(better_B, sum_xq_B / sum_q2_B, scale_B)
        best_B = np.where(better_B, scale_B * sum_xq_B, best_B)
        indices_BG = np.where(better_B[:, None], trial_BG, indices_BG)
        on_grid_BG = np.where(better_B[:, None], trial_on_grid_BG, on_grid_BG)
    again_B = ~on_grid_BG.all(axis=1) & (scale_B > 0)
    again_BG = again_B[:, None] & ~on_grid_BG if xxs else np.broadcast_to(again_B[:, None], on_grid_BG.shape)
    chosen_BG, _ = _choose(x_BN, root_BN, np.float32(1) / scale_B, scale_B, grid)
    indices_BG = np.where(again_BG, chosen_BG, indices_BG)
    sum_xq_B, sum_q2_B = _fit(x_BN, weight_BN, indices_BG, grid)
    scale_B = np.where(again_B & (sum_q2_B > 0), sum_xq_B / sum_q2_B, scale_B)
    return _Found(scale_B=scale_B, indices_BG=indices_BG)


def _fit(x_BN: Floats, weight_BN: Floats, indices_BG: Integers, grid: Lattice) -> tuple[Floats, Floats]:
    """The sums of w x q and w q q, whose quotient is the scale of least error for these points."""
    q_BN = grid.points[indices_BG].reshape(x_BN.shape).astype(np.float32)
    return running_sum(weight_BN * x_BN * q_BN), running_sum(weight_BN * q_BN * q_BN)


def _choose(x_BN: Floats, root_BN: Floats, inverse_B: Floats, scale_B: Floats, grid: Lattice) -> tuple[Integers, Flags]:
    """The point [B, G] of every group at a scale, and whether rounding alone found it."""
    rounded_BN = nearest(np.float32(0.5) * (inverse_B[:, None] * x_BN - np.float32(1)))
    levels = np.clip(rounded_BN, np.float32(0), np.float32(7)).astype(np.int64).reshape(-1, 8, 4)
    chosen = grid.index_of[(levels << np.arange(0, 12, 3)).sum(axis=2)].astype(np.int64)
    on_grid = chosen >= 0
    groups = np.nonzero(~on_grid)
    if len(groups[0]) == 0:
        return chosen, on_grid
    rows = -1 - chosen[groups]
    counts = grid.neighbour_start[rows + 1] - grid.neighbour_start[rows]
    starts = np.cumsum(counts) - counts
    owner = np.arange(len(rows)).repeat(counts)
    candidates = grid.neighbours[grid.neighbour_start[rows][owner] + np.arange(len(owner)) - starts[owner]]
    x, root = (values.reshape(-1, 8, 4)[groups][owner] for values in (x_BN, root_BN))
    off = scale_B[groups[0]][owner, None] * grid.points[candidates].astype(np.float32) - x
    distance = running_sum(root * off * off)
    distance = np.where(distance < FARTHEST, distance, FARTHEST)
    first = np.flatnonzero(distance == np.minimum.reduceat(distance, starts)[owner])
    chosen[groups] = candidates[first[np.unique(owner[first], return_index=True)[1]]]
    return chosen, on_grid
