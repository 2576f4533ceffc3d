"""Coordinate descent over codes and scales: each in turn goes to where the error is least, everything else held.

Spans of columns take turns: of each the slopes are one matrix product, then its groups get other scales, where others
can be stored, then its codes move. So a sweep over both costs the products of one. The alternative, all scales of the
weight before all codes, was measured to end at the same error for twice the products.

That product is nearly all of the time, and may be of bf16 values: what is off by 2^-9 of itself sends codes elsewhere
only where two are as good as each other, and the error that was reached agreed to 1e-4 of itself. Everything inside a
span is computed in f32.

# O out, I in, S columns of a span, C columns of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkernels.columns.frame import AnyFrame, Frame, on
from quantkernels.columns.rescale import rescale

SPAN = 128  # columns, or a group where that is wider, whose slopes are kept up to date at a time

# Moves the codes of a block of columns, given its first column and its slopes [O, C], which may become anything.
Move = Callable[[int, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Descent:
    """A weight on its way down, every tensor on one device; those of the frame, codes, value_OI and off_OI change.

    value_OI is what the codes mean, off_OI = value_OI - weight_OI. rough_OI and rough_hessian_II are those two as the
    products of spans take them, in f32 the same tensors.
    """

    weight_OI: Tensor
    hessian_II: Tensor
    frame: AnyFrame
    codes: Tensor
    value_OI: Tensor
    off_OI: Tensor
    rough_OI: Tensor
    rough_hessian_II: Tensor


def begin(
    weight: Tensor, hessian: Tensor, frame: AnyFrame, codes: Tensor, device: torch.device, rough_hessian: Tensor
) -> Descent:
    """The descent that starts at these codes; nothing that was given changes. rough_hessian: in the products' type."""
    frame = _copied(on(frame, device))
    codes = codes.to(device).clone(memory_format=torch.contiguous_format)
    weight = weight.to(device, torch.float32)
    value_OI = frame.decode(codes).contiguous()
    off_OI = (value_OI - weight).contiguous()  # laid out as weight is, otherwise
    return Descent(
        weight_OI=weight,
        hessian_II=hessian.to(device, torch.float32).contiguous(),
        frame=frame,
        codes=codes,
        value_OI=value_OI,
        off_OI=off_OI,
        rough_OI=off_OI.to(rough_hessian.dtype),
        rough_hessian_II=rough_hessian.to(device).contiguous(),
    )


def sweep(state: Descent, move: Move, block: int) -> None:
    """Once over all scales and codes; `move` is given blocks of at most `block` columns."""
    off_OI, hessian_II, frame = state.off_OI, state.hessian_II, state.frame
    columns = off_OI.shape[1]
    each = frame.scales.group_size if frame.scales else block
    span = each * max(1, SPAN // each)
    for first in range(0, columns, span):
        inside = slice(first, min(first + span, columns))
        slope_OS = torch.nn.functional.linear(state.rough_OI, state.rough_hessian_II[inside]).float()  # it is symmetric
        if frame.scales:
            hessian_SS = hessian_II[inside, inside]
            rescale(state.weight_OI, hessian_SS, frame, state.codes, state.value_OI, off_OI, slope_OS, first)
        for start in range(inside.start, inside.stop, block):
            own = slice(start, min(start + block, inside.stop))
            before_OC = off_OI[:, own].clone()
            move(start, slope_OS[:, own.start - first : own.stop - first].contiguous())
            if own.stop < inside.stop:
                change_OC = off_OI[:, own] - before_OC
                slope_OS[:, own.stop - first :] += change_OC @ hessian_II[own, own.stop : inside.stop]
        if state.rough_OI is not off_OI:
            state.rough_OI[:, inside] = off_OI[:, inside]


def _copied(frame: AnyFrame) -> AnyFrame:
    """The frame with scales and offsets of its own, f32 and contiguous: kernels that hold them see them change."""

    def copy(values: Tensor) -> Tensor:
        return values.float().clone(memory_format=torch.contiguous_format)

    if isinstance(frame, Frame):
        return replace(frame, scale_OG=copy(frame.scale_OG), offset_OG=copy(frame.offset_OG))
    return replace(frame, scale_OG=copy(frame.scale_OG))
