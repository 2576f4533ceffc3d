"""The truth for the thorough IQ1_S and IQ1_M: every lattice point for every scale that is tried, in numpy and float64.

For a given d nothing has to be searched: a sub-block takes the best of 8 scales, its shifts, and in each group of eight
the best of 2048 points. Which values of d are tried is the same here as in `thorough/cpu_iq1.py`, whose envelopes may
miss a point that gains less than a thousandth; so bytes may differ where two choices are about as good.

Shapes: R rows, C columns, S super-blocks of 256, J sub-blocks, G groups of 8, P points, T trials.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.fields import Bytes, Floats, as_half
from quantkernels.ggml.packing.iq1 import SHIFT, Fields, pack_iq1

Doubles = NDArray[np.float64]

GROUPS = SUPER_BLOCK // 8
LEAST_WEIGHT = 2.0**-30  # of the largest in a super-block
ODD = np.array([1.0, 3, 5, 7, 9, 11, 13, 15])
SCALES = 0.9 * 1.14 ** np.arange(16, dtype=np.float64)  # of a sub-block's root mean square
LADDER = 0.55 * 1.041 ** np.arange(32, dtype=np.float64)  # of a fifteenth of the largest scale
FINE = 0.965 * 1.0047 ** np.arange(16, dtype=np.float64)  # of the best of those


@dataclass(frozen=True, kw_only=True)
class Parabolas:
    """What one group's points with one shift leave at scale s, s^2 square - 2 s slope; beaten points are left out."""

    points: NDArray[np.intp]
    slopes: Doubles
    squares: Doubles

    def errors(self, scales: Doubles) -> tuple[Doubles, NDArray[np.intp]]:
        """The least errors at `scales`, and the places of the points that leave them."""
        every = scales[..., None] * (scales[..., None] * self.squares - 2 * self.slopes)
        return every.min(axis=-1), every.argmin(axis=-1)


def quantize_thorough(rows: Floats, importance: Floats | None, name: str) -> Bytes:
    """Blocks [R, bytes] of IQ1_S or IQ1_M; rows [R, C] f32, importance [C] f32 or None for ones."""
    x_SN = rows.reshape(-1, SUPER_BLOCK).astype(np.float64)
    weight_SN = np.ones_like(x_SN)
    if importance is not None and importance.max() > 0:
        given_SN = np.broadcast_to(importance.astype(np.float64), rows.shape).reshape(-1, SUPER_BLOCK)
        high_S1 = given_SN.max(axis=1, keepdims=True)
        weight_SN = np.where(high_S1 > 0, np.maximum(given_SN / np.maximum(high_S1, 1e-300), LEAST_WEIGHT), 1.0)
    blocks = [_quantize_block(x_N, weight_N, name) for x_N, weight_N in zip(x_SN, weight_SN, strict=True)]
    return np.concatenate(blocks).reshape(len(rows), -1)


def parabolas_of(x_N: Doubles, weight_N: Doubles) -> list[tuple[Parabolas, Parabolas]]:
    """For each group of a super-block the parabolas of all points, with shift plus and with shift minus."""
    found = []
    for x_8, weight_8 in zip(x_N.reshape(-1, 8), weight_N.reshape(-1, 8), strict=True):
        pair = []
        for shift in (SHIFT, -SHIFT):
            q_P8 = lattice("IQ1").values.astype(np.float64) + shift
            slope_P, square_P = q_P8 @ (weight_8 * x_8), (q_P8 * q_P8) @ weight_8
            order = np.lexsort((-slope_P, square_P))
            highest = np.maximum.accumulate(slope_P[order])
            kept = order[np.concatenate([[True], slope_P[order][1:] > highest[:-1]])]
            pair.append(Parabolas(points=kept, slopes=slope_P[kept], squares=square_P[kept]))
        found.append((pair[0], pair[1]))
    return found


def sub_block_errors(group: list[tuple[Parabolas, Parabolas]], scales: Doubles) -> Doubles:
    """The least error of a sub-block at `scales`, less what zeros leave: four groups share a shift, two do not."""
    plus, minus = (np.array([pair[shift].errors(scales)[0] for pair in group]) for shift in (0, 1))
    shared: Doubles = np.minimum(plus.sum(axis=0), minus.sum(axis=0))
    own: Doubles = np.minimum(plus, minus).sum(axis=0)
    return shared if len(group) == 4 else own


def errors_of_d(sub_blocks: list[list[tuple[Parabolas, Parabolas]]], d_T: Doubles) -> Doubles:
    """The least error of a super-block for each d, less what zeros leave."""
    errors = [sub_block_errors(groups, d_T[:, None] * ODD).min(axis=1) for groups in sub_blocks]
    total: Doubles = np.sum(errors, axis=0)
    return total


def split_groups(parabolas: list[tuple[Parabolas, Parabolas]], name: str) -> list[list[tuple[Parabolas, Parabolas]]]:
    """The groups by sub-block."""
    each = 4 if name == "IQ1_S" else 2
    return [parabolas[first : first + each] for first in range(0, GROUPS, each)]


def _quantize_block(x_N: Doubles, weight_N: Doubles, name: str) -> Bytes:
    sub_blocks = split_groups(parabolas_of(x_N, weight_N), name)
    size = SUPER_BLOCK // len(sub_blocks)
    sum_w_J = weight_N.reshape(-1, size).sum(axis=1)
    root_J = np.sqrt((weight_N * x_N * x_N).reshape(-1, size).sum(axis=1) / sum_w_J)
    best_scales = [
        root * SCALES[np.argmin(sub_block_errors(groups, root * SCALES))]
        for root, groups in zip(root_J, sub_blocks, strict=True)
    ]
    d, error = 0.0, 0.0
    for step in range(2):
        tried = _stored(d * FINE if step else max(best_scales) / 15 * LADDER)
        errors = errors_of_d(sub_blocks, tried)
        if errors.min() < error:
            d, error = float(tried[errors.argmin()]), float(errors.min())
    fields, refit = _choose(sub_blocks, d)
    tried = _stored(np.array([refit]))
    if errors_of_d(sub_blocks, tried)[0] < error:
        fields, _ = _choose(sub_blocks, float(tried[0]))
    return pack_iq1(name, fields)


def _stored(d_T: Doubles) -> Doubles:
    with np.errstate(over="ignore"):
        stored = as_half(d_T.astype(np.float32)).astype(np.float64)
    return np.where(np.isfinite(stored), stored, 0.0)


def _choose(sub_blocks: list[list[tuple[Parabolas, Parabolas]]], d: float) -> tuple[Fields, float]:
    """Sub-scales, shifts and points for d, and the least-squares d for these."""
    codes, negative, indices = [], [], []
    sum_xq, sum_qq = 0.0, 0.0
    for groups in sub_blocks:
        scales: Doubles = d * ODD
        code = int(sub_block_errors(groups, scales).argmin())
        codes.append(code)
        scale = scales[code : code + 1]
        errors = np.array([[float(one.errors(scale)[0][0]) for one in pair] for pair in groups])
        if len(groups) == 4:
            errors = np.broadcast_to(errors.sum(axis=0), errors.shape)
            negative.append(bool(errors[0, 1] < errors[0, 0]))
        else:
            negative += [bool(minus < plus) for plus, minus in errors]
        for pair, (plus, minus) in zip(groups, errors, strict=True):
            parabolas = pair[1 if minus < plus else 0]
            place = int(parabolas.errors(scale)[1][0])
            indices.append(int(parabolas.points[place]))
            sum_xq += float(ODD[code] * parabolas.slopes[place])
            sum_qq += float(ODD[code] ** 2 * parabolas.squares[place])
    fields = Fields(
        d_S=np.array([d], np.float32),
        sub_scales=np.array([codes], np.uint16),
        negative=np.array([negative]),
        indices=np.array([indices], np.uint16),
    )
    return fields, sum_xq / sum_qq if sum_qq > 0 else d
