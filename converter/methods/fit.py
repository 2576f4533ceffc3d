"""Scales for round-to-nearest that heed how inputs go together: chosen by the block of the Gram matrix of each group.

Weighing columns one by one takes errors of neighbouring columns to be independent. Inputs of a language model are not:
with the block H_gg of a group, the output error of its rounding is d H_gg d^T exactly, for every scale that is tried. A
tighter range clips some weights, and errors of the others then cancel more often than their squares say. It is the
search for clipping of AWQ, for all columns of a group at once and without rows.

Source: Lin et al. 2023, AWQ, arXiv:2306.00978 (clipping); the exact error from the Gram matrix follows from its sum.
"""

# O out, I in, G groups of a row, N columns of a group

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from converter.grids import Grid
from quantkernels.columns import Frame

SHARES = (1.1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)  # of the scale that is there
WIDEST = 512  # columns of a group; an error costs as many products for each weight
PIECE_WEIGHTS = 1 << 22


def fit_to_gram(weight_OI: Tensor, grid: Grid, parts: Mapping[str, Tensor], gram_II: Tensor) -> Mapping[str, Tensor]:
    """`parts` of weight_OI, or with other scales and codes of no more output error in each group, rounded to nearest.

    gram_II f32 [I, I]. Grids whose scales are not free, and groups wider than WIDEST, keep what they have.
    """
    framed = grid.framed(parts)
    if framed is None or not isinstance(framed.frame, Frame) or framed.frame.scales is None or framed.frame.table:
        return parts
    frame, scales, columns = framed.frame, framed.frame.scales, weight_OI.shape[1]
    size = frame.group_size
    if size > WIDEST or columns % size or scales.group_size != size or scales.rungs:
        return parts
    blocks_GNN = torch.stack([gram_II[at : at + size, at : at + size] for at in range(0, columns, size)])
    height = max(1, PIECE_WEIGHTS // columns)
    fitted = [
        _fit(weight_OI[at : at + height], frame, slice(at, at + height), blocks_GNN)
        for at in range(0, len(weight_OI), height)
    ]
    scale_OG, codes_OI = (torch.cat(one) for one in zip(*fitted, strict=True))
    return framed.with_frame(replace(frame, scale_OG=scale_OG), codes_OI)


def _fit(weight_OI: Tensor, frame: Frame, rows: slice, blocks_GNN: Tensor) -> tuple[Tensor, Tensor]:
    """The scales [O, G] and codes [O, I] of these rows."""
    assert frame.scales is not None
    grouped_OGN = weight_OI.reshape(len(weight_OI), -1, frame.group_size)
    zero_OG1, old_OG = frame.zero_OG[rows][:, :, None], frame.scale_OG[rows]
    best_OG, least_OG = old_OG, torch.full_like(old_OG, torch.inf)
    best_OGN = torch.zeros_like(grouped_OGN)
    for share in (1.0, *SHARES):
        scale_OG = frame.scales.nearest(old_OG * share)
        divisor_OG1 = torch.where(scale_OG == 0, torch.inf, scale_OG)[:, :, None]
        steps_OGN = (grouped_OGN / divisor_OG1 + zero_OG1).round_().clamp_(frame.low, frame.high)
        off_GON = ((steps_OGN - zero_OG1) * scale_OG[:, :, None] - grouped_OGN).transpose(0, 1)
        error_OG = (torch.bmm(off_GON, blocks_GNN) * off_GON).sum(2).T
        better_OG = error_OG < least_OG
        least_OG = torch.where(better_OG, error_OG, least_OG)
        best_OG = torch.where(better_OG, scale_OG, best_OG)
        best_OGN = torch.where(better_OG[:, :, None], steps_OGN, best_OGN)
    return best_OG, best_OGN.flatten(1).to(torch.int8)
