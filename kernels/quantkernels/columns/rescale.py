"""Other scales for codes that stay: each group's scale and offset in turn move to where the error is least.

The error is quadratic in the two, so the best real values solve two equations; of the values that can be stored (see
Ladder) the nearest and its neighbours are tried exactly. Plain torch: the products are the work. The alternative, the
best scales of a whole row at once, solves equations of all its groups and then rounds each, which undoes some of it.

# O out, I in, G groups of a row, S columns of a span, N columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkernels.columns.frame import AnyFrame, Frame, Ladder
from quantkernels.columns.reference import WORTH

LEAST = 1e-12  # of the larger curvature: a determinant below this leaves one of the two undetermined


def rescale(
    weight_OI: Tensor,
    hessian_SS: Tensor,
    frame: AnyFrame,
    codes: Tensor,
    value_OI: Tensor,
    off_OI: Tensor,
    slope_OS: Tensor,
    first: int,
) -> None:
    """Gives the groups of the span of columns that begins at `first` other scales and offsets, in place.

    Those of the frame change, and with them value_OI, what the codes mean, off_OI = value_OI - weight_OI and slope_OS,
    the span's columns of off_OI H; hessian_SS is H inside the span. Every step has less error, or changes nothing.
    """
    assert frame.scales is not None
    offsets = frame.offsets if isinstance(frame, Frame) else None
    each = frame.scales.group_size
    for at in range(0, slope_OS.shape[1], each):
        own, columns = slice(at, at + each), slice(first + at, min(first + at + each, weight_OI.shape[1]))
        part, group = frame.part(columns), columns.start // each
        scale_O1 = part.scale_OG[:, :1]
        steps_ON = part.steps(codes[:, columns.start // frame.together : columns.stop // frame.together])
        new_scale_O1, new_offset_O1 = _best(
            steps_ON,
            slope_OS[:, own],
            hessian_SS[own, own],
            scale_O1,
            part.offset_OG[:, :1] if isinstance(part, Frame) else torch.zeros_like(scale_O1),
            frame.scales.part(slice(group, group + 1)),
            offsets.part(slice(group, group + 1)) if offsets else None,
        )
        part.scale_OG[:] = new_scale_O1
        value_ON = steps_ON.mul_(new_scale_O1)
        if isinstance(part, Frame):
            part.offset_OG[:] = new_offset_O1
            value_ON.add_(new_offset_O1)
        value_OI[:, columns] = value_ON
        off_ON = value_ON - weight_OI[:, columns]
        slope_OS += (off_ON - off_OI[:, columns]) @ hessian_SS[own]
        off_OI[:, columns] = off_ON


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
    p_O1 = (steps_ON * slope_ON).sum(1, keepdim=True)
    aa_O1 = (bent_ON * steps_ON).sum(1, keepdim=True)
    alone_O1 = -p_O1 / aa_O1.clamp(min=torch.finfo(torch.float32).tiny)
    if offsets is None:
        q_O1 = ab_O1 = bb = torch.zeros((), device=p_O1.device)
        pairs = [(scales.nearest(scale_O1 + alone_O1, step), offset_O1) for step in _around(scales)]
    else:
        q_O1, ab_O1, bb = slope_ON.sum(1, keepdim=True), bent_ON.sum(1, keepdim=True), hessian_NN.sum()
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
