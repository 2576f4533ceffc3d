"""HQQ: offsets that leave large errors to few weights; without calibration data.

Half-quadratic splitting: with scale and codes held, each error is split into a part that is paid for by its p-norm, p
below 1, and a rest that is paid for by its square. The first comes from shrinking each error by itself, the second from
a mean, both in closed form and in turn, while the price of the rest grows. Squares alone would move the offset for
every outlier; the p-norm lets outliers be. Scales stay as round-to-nearest fitted them, by default for least squares;
the paper takes the group's range, which leaves more of either error on a trained model's weights (measured). Errors are
in units of the scale, so that the shrinking does not depend on how large weights are; the paper's code takes them as
they come. What it calls a zero point is an offset here: level * scale + offset. Whole zero points, which other formats
store, are further apart than the steps it takes.

Source: Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models,
mobiusml.github.io/hqq_blog.
"""

# O out, I in, G groups of a row, N columns of a group

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from converter.grids import Framed, Grid, observers
from converter.grids.parts import row_chunks
from converter.methods import Block, Options, Rounded
from converter.methods.rtn import importance_of, is_quantized, round_to_nearest
from quantkernels import columns
from quantkernels.columns import Frame

POWER = 0.7  # of the norm
PRICE = 10.0  # of the rest's square, to begin with
GROWTH = 1.01  # of that, each time
TIMES = 20


def hqq(block: Block, grids: Mapping[str, Grid], options: Options) -> Rounded:
    """Every tensor of the block rounded to nearest, then the offsets of those that have any moved, and codes with them.

    With options.importance both weigh columns. A group keeps what had the least sum of errors to the power of POWER, so
    none has more than it began with. Grids whose groups have no offsets are rounded to nearest, with a note.
    """
    rounded = round_to_nearest(block, grids, options)
    coded, notes = dict(rounded.coded), dict(rounded.notes)
    for name, weight_OI in block.tensors.items():
        if not is_quantized(weight_OI, grids[name]):
            continue
        framed = _movable(grids[name], coded[name].parts)
        if framed is None:
            notes[name] = "its grid has no offsets to move: rounded to nearest"
            continue
        importance = importance_of(block, name) if options.importance else None
        coded[name] = replace(coded[name], parts=move_offsets(weight_OI, framed, importance))
    return Rounded(coded=coded, notes=notes)


def _movable(grid: Grid, parts: Mapping[str, Tensor]) -> Framed | None:
    """The parts with codes set apart, where each group has an offset of its own beside levels."""
    framed = grid.framed(parts)
    if framed is None or not isinstance(framed.frame, Frame):
        return None
    return framed if framed.frame.offsets and framed.frame.table else None


def move_offsets(
    weight_OI: Tensor, framed: Framed, importance: Tensor | None, times: int = TIMES
) -> Mapping[str, Tensor]:
    """The parts after `times` steps, some rows at a time; importance [I] f32."""
    assert isinstance(framed.frame, Frame)
    chunks = row_chunks(weight_OI)
    heights = [len(weight_OI[rows]) for rows in chunks]
    pieces = [
        _move(weight_OI[rows], frame, importance, times)
        for rows, frame in zip(chunks, columns.split(framed.frame, heights), strict=True)
        if isinstance(frame, Frame)
    ]
    frame = columns.stack([frame for frame, _ in pieces])
    return framed.with_frame(frame, torch.cat([codes_OI for _, codes_OI in pieces]))


def _move(weight_OI: Tensor, frame: Frame, importance: Tensor | None, times: int) -> tuple[Frame, Tensor]:
    """The frame with other offsets and the codes [O, I] i8."""
    assert frame.offsets is not None
    size, width = frame.group_size, weight_OI.shape[1]
    weight_OGN = observers.grouped(weight_OI, size)
    present_GN = observers.grouped(torch.ones(1, width), size)[0]
    share_GN = present_GN if importance is None else observers.grouped(importance[None], size)[0]
    share_GN = torch.where(share_GN.sum(1, keepdim=True) > 0, share_GN, present_GN)
    moving, price = frame, PRICE
    for _ in range(times):
        error_OGN = _errors(weight_OGN, moving)
        rest_OGN = (error_OGN - shrink(error_OGN, price)) * share_GN
        by_OG = rest_OGN.sum(2) / share_GN.sum(1) * moving.scale_OG
        moving = replace(moving, offset_OG=moving.offset_OG + by_OG)
        price *= GROWTH
    moved = replace(frame, offset_OG=frame.offsets.nearest(moving.offset_OG))
    before_OG, after_OG = ((_power(_errors(weight_OGN, one).abs(), POWER) * share_GN).sum(2) for one in (frame, moved))
    best = replace(frame, offset_OG=torch.where(after_OG < before_OG, moved.offset_OG, frame.offset_OG))
    return best, _codes(weight_OGN, best).flatten(1)[:, :width].contiguous()


def shrink(error: Tensor, price: float, power: float = POWER) -> Tensor:
    """About the u with the least |u|^power / power + price / 2 (u - error)^2, each by itself; exactly for power 1."""
    size = error.abs()
    floor = torch.finfo(size.dtype).tiny  # what is smaller becomes 0 in any case
    return error.sign() * (size - _power(size.clamp(min=floor), power - 1) / price).clamp_(min=0)


def _power(values: Tensor, power: float) -> Tensor:
    """values ** power by numpy: torch's last bit depends on where in a tensor a value stands, and so on threads."""
    return torch.from_numpy(np.power(values.numpy(), np.float32(power)))


def _errors(weight_OGN: Tensor, frame: Frame) -> Tensor:
    """What rounding to nearest leaves [O, G, N], in units of the scale; 0 where that is 0."""
    steps_OGN = torch.tensor(frame.table)[_codes(weight_OGN, frame).long()]
    left_OGN = weight_OGN - (steps_OGN * frame.scale_OG[:, :, None] + frame.offset_OG[:, :, None])
    return left_OGN / torch.where(frame.scale_OG == 0, torch.inf, frame.scale_OG)[:, :, None]


def _codes(weight_OGN: Tensor, frame: Frame) -> Tensor:
    """The nearest codes [O, G, N] i8."""
    divisor_OG = torch.where(frame.scale_OG == 0, torch.inf, frame.scale_OG)
    steps_OGN = (weight_OGN - frame.offset_OG[:, :, None]) / divisor_OG[:, :, None]
    levels = torch.tensor(frame.table)
    return torch.bucketize(steps_OGN, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.int8)
