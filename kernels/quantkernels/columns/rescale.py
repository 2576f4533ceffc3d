"""Other scales for codes that stay: each group's scale and offset in turn move to where the error is least.

The error is quadratic in the two, so the best real values solve two equations; of the values that can be stored (see
Ladder) the nearest and its neighbours are tried exactly. Plain torch: the products are the work. The alternative, the
best scales of a whole row at once, solves equations of all its groups and then rounds each, which undoes some of it.

# O out, I in, G groups of a row, S columns of a span, N columns of a group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quantkernels.columns.frame import AnyFrame, Frame, Ladder, PointFrame
from quantkernels.columns.reference import WORTH

SPAN = 256  # columns, or a group where that is wider, whose slopes are kept up to date at a time
LEAST = 1e-12  # of the larger curvature: a determinant below this leaves one of the two undetermined


def rescale(weight: Tensor, hessian: Tensor, frame: AnyFrame, codes: Tensor) -> AnyFrame:
    """The frame with scales and offsets under which `codes` have less error, or the same; see `columns.refine`.

    Frames without ladders are given back as they are.
    """
    if frame.scales is None:
        return frame
    offsets = frame.offsets if isinstance(frame, Frame) else None
    each = frame.scales.group_size
    every = each // frame.group_size
    steps_OI, off_OI = frame.steps(codes), frame.decode(codes) - weight
    scale_OG = frame.scale_OG[:, ::every].clone()
    offset_OG = frame.offset_OG[:, ::every].clone() if isinstance(frame, Frame) else torch.zeros_like(scale_OG)
    span = each * max(1, SPAN // each)
    for first in range(0, weight.shape[1], span):
        inside = slice(first, min(first + span, weight.shape[1]))
        hessian_SS = hessian[inside, inside]
        slope_OS = off_OI @ hessian[:, inside]
        for at in range(0, inside.stop - first, each):
            own, group = slice(at, at + each), (first + at) // each
            chosen = slice(group, group + 1)
            steps_ON = steps_OI[:, first + at : first + at + each]
            new_scale_O1, new_offset_O1 = _best(
                steps_ON,
                slope_OS[:, own],
                hessian_SS[own, own],
                scale_OG[:, chosen],
                offset_OG[:, chosen],
                frame.scales.part(chosen),
                offsets.part(chosen) if offsets else None,
            )
            change_ON = steps_ON * (new_scale_O1 - scale_OG[:, chosen]) + (new_offset_O1 - offset_OG[:, chosen])
            scale_OG[:, chosen], offset_OG[:, chosen] = new_scale_O1, new_offset_O1
            off_OI[:, first + at : first + at + each] += change_ON
            slope_OS += change_ON @ hessian_SS[own]
    if isinstance(frame, PointFrame):
        return replace(frame, scale_OG=scale_OG.repeat_interleave(every, 1))
    return replace(
        frame, scale_OG=scale_OG.repeat_interleave(every, 1), offset_OG=offset_OG.repeat_interleave(every, 1)
    )


def _best(
    steps_ON: Tensor,
    slope_ON: Tensor,
    hessian_NN: Tensor,
    scale_O1: Tensor,
    offset_O1: Tensor,
    scales: Ladder,
    offsets: Ladder | None,
) -> tuple[Tensor, Tensor]:
    """The scale and the offset [O, 1] of one group that can be stored and cost least; those it has if none is better.

    A change of the scale by a and of the offset by b changes the error by 2 (a p + b q) + a^2 A + 2 a b B + b^2 C.
    """
    bent_ON = steps_ON @ hessian_NN
    p_O1, q_O1 = (steps_ON * slope_ON).sum(1, keepdim=True), slope_ON.sum(1, keepdim=True)
    aa_O1, ab_O1 = (bent_ON * steps_ON).sum(1, keepdim=True), bent_ON.sum(1, keepdim=True)
    bb = hessian_NN.sum()
    alone_O1 = -p_O1 / aa_O1.clamp(min=torch.finfo(torch.float32).tiny)
    if offsets is None:
        pairs = [(scales.nearest(scale_O1 + alone_O1, step), offset_O1) for step in _around(scales)]
    else:
        determinant_O1 = aa_O1 * bb - ab_O1.square()
        sound_O1 = determinant_O1 > LEAST * aa_O1 * bb
        safe_O1 = torch.where(sound_O1, determinant_O1, 1)
        a_O1 = torch.where(sound_O1, (ab_O1 * q_O1 - bb * p_O1) / safe_O1, alone_O1)
        pairs = []
        for step in _around(scales):
            new_O1 = scales.nearest(scale_O1 + a_O1, step)
            b_O1 = -(q_O1 + (new_O1 - scale_O1) * ab_O1) / bb  # the best offset beside this very scale
            pairs += [(new_O1, offsets.nearest(offset_O1 + b_O1, other)) for other in _around(offsets)]
    least_O1 = torch.zeros_like(scale_O1)
    best_O1, beside_O1 = scale_O1, offset_O1
    # What f32 leaves uncertain in a gain; a smaller one is none.
    floor_O1 = (1 - float(WORTH)) * (p_O1 * alone_O1).abs()
    for new_O1, other_O1 in pairs:
        a_O1, b_O1 = new_O1 - scale_O1, other_O1 - offset_O1
        rise_O1 = a_O1 * (2 * p_O1 + a_O1 * aa_O1 + 2 * b_O1 * ab_O1) + b_O1 * (2 * q_O1 + b_O1 * bb)
        better_O1 = rise_O1 < least_O1 - floor_O1
        least_O1 = torch.where(better_O1, rise_O1, least_O1)
        best_O1, beside_O1 = torch.where(better_O1, new_O1, best_O1), torch.where(better_O1, other_O1, beside_O1)
    return best_O1, beside_O1


def _around(ladder: Ladder) -> tuple[int, ...]:
    """Which rungs beside the nearest are tried; floats are fine enough for the nearest alone."""
    return (0, -1, 1) if ladder.rungs else (0,)
