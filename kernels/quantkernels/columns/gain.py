"""Rows that give as much as they did: what rounding took off a row's output, its scales give back.

The codes and scales of least error make w' smaller than w along w itself, as a least-squares fit always does: of an
error of 5 %, that is 5 % of the output. Unlike the rest of the error it points the same way for every input and in
every block. So scales are stretched until w H w'^T is w H w^T: the error grows by its own square, and the divergence of
the model falls, by 1 % at 3 bits and by 2 % at 2. The alternative, the same length of w' instead, gets half of that.

Source: Banner et al. 2018, arXiv:1810.05723, who correct lengths and means of weights.
"""

# O out, I in, G groups of a row.

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkernels.columns.frame import AnyFrame, Frame

MOST = 2.0  # a row that lost more than half of its output is noise, and stays


def restore_gain(weight: Tensor, hessian: Tensor, frame: AnyFrame, codes: Tensor) -> AnyFrame:
    """The frame with the scales of each row, and offsets, stretched alike, where it can store any; codes stay.

    weight [O, I] f32, hessian [I, I] f32, or bf16 where products are fast in it; all on one device.
    """
    if not isinstance(frame, Frame) or not _is_free(frame):
        return frame
    assert frame.scales is not None
    seen_OI = torch.nn.functional.linear(weight.to(hessian.dtype), hessian).float()  # w H, which is symmetric
    off_OI = frame.decode(codes).sub_(weight)
    power_O1 = (seen_OI * weight).sum(1, keepdim=True)
    gain_O1 = power_O1 / (power_O1 + (seen_OI * off_OI).sum(1, keepdim=True))
    gain_O1 = torch.where((gain_O1 > 1 / MOST) & (gain_O1 < MOST), gain_O1, 1.0)
    stretched = replace(frame, scale_OG=frame.scales.nearest(frame.scale_OG * gain_O1))
    if frame.offsets is None:
        return stretched
    return replace(stretched, offset_OG=frame.offsets.nearest(frame.offset_OG * gain_O1))


def _is_free(frame: Frame) -> bool:
    """Whether any scale can be stored, and any offset where there are offsets."""
    offsets_are_free = not frame.offsets.rungs if frame.offsets else not bool(frame.offset_OG.any())
    return frame.scales is not None and not frame.scales.rungs and offsets_are_free
