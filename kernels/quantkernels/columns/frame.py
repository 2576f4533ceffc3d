"""A frame: everything about a weight's grid but the codes.

An integer grid and a ggml block say the same thing in different bytes: codes with a scale, a zero point and an offset
for each group of columns. Where eight weights share a code, it names a point of a lattice. Methods that choose codes
against fixed scales work on frames and know no format. The alternative, a solver per format, is what other tools have,
and why none has one for GGUF.

# O out, I in, G groups of a row, L levels, B blocks of eight columns, P points, D dimensions of each, 8 / D in a code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

EIGHT = 8  # columns of a code that names points
INDEX_BITS = 11  # of each point's index in such a code
SIGNS_AT = 2 * INDEX_BITS  # where the eight signs begin


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """Which values the scales (or offsets) of a frame may have: unit_OG times a rung; without rungs, any of dtype.

    unit_OG f32, one for each group_size columns, a multiple of the frame's; rungs rise.
    """

    unit_OG: Tensor
    group_size: int
    rungs: tuple[float, ...] = ()
    dtype: torch.dtype = torch.float16

    def nearest(self, wanted_OG: Tensor, step: int = 0) -> Tensor:
        """The allowed values nearest to wanted_OG [O, G], or with rungs those `step` further up."""
        if not self.rungs:
            limits = torch.finfo(self.dtype)
            return wanted_OG.clamp(limits.min, limits.max).to(self.dtype).float()
        rungs = torch.tensor(self.rungs, device=wanted_OG.device)
        return self.unit_OG * rungs[(self.position(wanted_OG) + step).clamp(0, len(rungs) - 1)]

    def position(self, wanted_OG: Tensor) -> Tensor:
        """Which rung is nearest to each of wanted_OG [O, G]; the last one below or at 0 where the unit is 0."""
        rungs = torch.tensor(self.rungs, device=wanted_OG.device)
        middles = (rungs[1:] + rungs[:-1]) / 2
        return torch.bucketize(torch.where(self.unit_OG == 0, 0, wanted_OG / self.unit_OG), middles)

    def part(self, groups: slice) -> Ladder:
        """The ladder of some of the groups."""
        return replace(self, unit_OG=self.unit_OG[:, groups])


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What codes mean: (code - zero) * scale + offset, or with a table (table[code] - zero) * scale + offset.

    Both are computed in f32, each operation rounded, which is what the readers of every grid here do. scale_OG, zero_OG
    and offset_OG f32; group_size contiguous columns share one of each, and a row's last group may be short. low and
    high bound the codes; a table rises strictly and has a value for each code from 0 to high. levels_OGL f32, rising or
    level, are such tables of each group's own. Group size, bounds, table and what could be stored are the frame's kind.
    scales and offsets say which other ones could be stored; None: they stay as they are.
    """

    scale_OG: Tensor
    zero_OG: Tensor
    offset_OG: Tensor
    group_size: int
    low: int
    high: int
    table: tuple[float, ...] = ()
    levels_OGL: Tensor | None = None
    scales: Ladder | None = None
    offsets: Ladder | None = None

    def __post_init__(self) -> None:
        assert self.scale_OG.shape == self.zero_OG.shape == self.offset_OG.shape
        assert self.levels_OGL is None or not (self.table or self.scales or self.offsets)
        assert not self.table or (self.low == 0 and len(self.table) == self.high + 1)

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for frames whose rows can be solved as one matrix."""
        ladders = [ladder and (ladder.dtype, ladder.rungs) for ladder in (self.scales, self.offsets)]
        return self.group_size, self.low, self.high, self.table, self.levels_OGL is not None, *ladders

    @property
    def together(self) -> int:
        """How many columns share a code."""
        return 1

    def part(self, columns: slice) -> Frame:
        """The frame of some of the columns, whole groups of it: views, so that what is written there is written here.

        It says nothing of other scales.
        """
        groups = slice(columns.start // self.group_size, -(-columns.stop // self.group_size))
        scale_OG, zero_OG, offset_OG = (each[:, groups] for each in (self.scale_OG, self.zero_OG, self.offset_OG))
        return replace(self, scale_OG=scale_OG, zero_OG=zero_OG, offset_OG=offset_OG, scales=None, offsets=None)

    def steps(self, codes_OI: Tensor) -> Tensor:
        """What codes [O, I] i8 mean in units of the scale, f32, without the offset."""
        if self.levels_OGL is not None:
            group_I = torch.arange(codes_OI.shape[1], device=codes_OI.device) // self.group_size
            row_O1 = torch.arange(len(codes_OI), device=codes_OI.device)[:, None]
            steps_OI = self.levels_OGL[row_O1, group_I, codes_OI.long()]
        elif self.table:
            steps_OI = torch.tensor(self.table, device=codes_OI.device)[codes_OI.long()]
        else:
            steps_OI = codes_OI.float()
        return steps_OI - self._of_columns(self.zero_OG, codes_OI.shape[1])

    def decode(self, codes_OI: Tensor) -> Tensor:
        """The weight [O, I] f32 that a reader makes of codes [O, I] i8."""
        scale_OI, offset_OI = (self._of_columns(each, codes_OI.shape[1]) for each in (self.scale_OG, self.offset_OG))
        return self.steps(codes_OI) * scale_OI + offset_OI

    def _of_columns(self, values_OG: Tensor, columns: int) -> Tensor:
        """What each column has of its group's values, [O, I], or [O, 1] where there is one group."""
        if values_OG.shape[1] == 1:
            return values_OG
        return values_OG[:, :, None].expand(-1, -1, self.group_size).flatten(1)[:, :columns]


@dataclass(frozen=True, kw_only=True)
class PointFrame:
    """What codes of eight columns mean: ((signs times points) - zero) * scale, computed in f32 in this order.

    A code is an i32: the index of its first point, that of its second in bits 11 and up (with D = 4), and in bits 22
    and up the signs, bit i set where weight i is negative. points_PD f32; signs: "none" where points have their own,
    "even" where an even number must be negative, "free" where any may. scale_OG and zero_OG are as in Frame, group_size
    a multiple of eight. Group size and lattice, a name for points and signs, are the frame's kind.
    """

    scale_OG: Tensor
    zero_OG: Tensor
    group_size: int
    lattice: str
    points_PD: Tensor
    signs: Literal["none", "even", "free"]
    scales: Ladder | None = None

    def __post_init__(self) -> None:
        assert self.scale_OG.shape == self.zero_OG.shape and self.group_size % EIGHT == 0
        assert self.points_PD.shape[1] in (4, 8) and len(self.points_PD) <= 1 << INDEX_BITS

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for frames whose rows can be solved as one matrix."""
        return self.group_size, self.lattice

    @property
    def together(self) -> int:
        """How many columns share a code."""
        return EIGHT

    def part(self, columns: slice) -> PointFrame:
        """The frame of some of the columns, whole groups of it; see `Frame.part`."""
        groups = slice(columns.start // self.group_size, -(-columns.stop // self.group_size))
        return replace(self, scale_OG=self.scale_OG[:, groups], zero_OG=self.zero_OG[:, groups], scales=None)

    def steps(self, codes_OB: Tensor) -> Tensor:
        """What codes [O, I / 8] i32 mean in units of the scale, [O, I] f32."""
        indices_OB, signs_OB = split_code(codes_OB, EIGHT // self.points_PD.shape[1])
        minus_OI = ((signs_OB[..., None] >> torch.arange(EIGHT)) & 1).flatten(1)
        points_OI = self.points_PD[indices_OB.long()].flatten(1) * (1 - 2 * minus_OI).float()
        return points_OI - self.zero_OG[:, torch.arange(points_OI.shape[1]) // self.group_size]

    def decode(self, codes_OB: Tensor) -> Tensor:
        """The weight [O, I] f32 that a reader makes of codes [O, I / 8] i32."""
        steps_OI = self.steps(codes_OB)
        return steps_OI * self.scale_OG[:, torch.arange(steps_OI.shape[1]) // self.group_size]


AnyFrame: TypeAlias = Frame | PointFrame


def split_code(codes_OB: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """The indices [O, B, points] and the signs [O, B] of codes of eight columns; see PointFrame."""
    shifts = INDEX_BITS * torch.arange(points)
    return (codes_OB[..., None] >> shifts) & ((1 << INDEX_BITS) - 1), codes_OB >> SIGNS_AT


def join_code(indices_OBK: Tensor, signs_OB: Tensor) -> Tensor:
    """The codes [O, B] i32 of indices [O, B, 1 or 2] and signs [O, B]."""
    shifts = INDEX_BITS * torch.arange(indices_OBK.shape[2])
    return ((indices_OBK.int() << shifts).sum(2) | (signs_OB.int() << SIGNS_AT)).to(torch.int32)


def stack(frames: Sequence[AnyFrame]) -> AnyFrame:
    """The rows of all `frames`, which are of one kind, as one frame."""
    assert len({frame.kind for frame in frames}) == 1
    return _with_rows(frames, torch.cat)


def on(frame: AnyFrame, device: torch.device) -> AnyFrame:
    """The frame with the tensors of its rows on `device`."""
    moved = _with_rows([frame], lambda values: values[0].to(device))
    return replace(moved, points_PD=moved.points_PD.to(device)) if isinstance(moved, PointFrame) else moved


def split(frame: AnyFrame, rows: Sequence[int]) -> list[AnyFrame]:
    """The inverse of `stack`: frames of so many rows each."""
    parts, first = [], 0
    for count in rows:
        own = slice(first, first + count)
        parts.append(_with_rows([frame], lambda values, own=own: values[0][own]))  # type: ignore[misc]
        first += count
    return parts


def _with_rows(frames: Sequence[AnyFrame], join: Callable[[list[Tensor]], Tensor]) -> AnyFrame:
    """The first frame with every tensor of rows replaced by what `join` makes of those of all."""

    def ladder(of: list[Ladder | None]) -> Ladder | None:
        present = [one for one in of if one is not None]
        return replace(present[0], unit_OG=join([one.unit_OG for one in present])) if present else None

    first = frames[0]
    scale_OG = join([frame.scale_OG for frame in frames])
    zero_OG = join([frame.zero_OG for frame in frames])
    scales = ladder([frame.scales for frame in frames])
    if isinstance(first, PointFrame):
        return replace(first, scale_OG=scale_OG, zero_OG=zero_OG, scales=scales)
    scalar = [frame for frame in frames if isinstance(frame, Frame)]
    offset_OG = join([frame.offset_OG for frame in scalar])
    offsets = ladder([frame.offsets for frame in scalar])
    own = [frame.levels_OGL for frame in scalar if frame.levels_OGL is not None]
    return replace(
        first,
        scale_OG=scale_OG,
        zero_OG=zero_OG,
        offset_OG=offset_OG,
        levels_OGL=join(own) if own else None,
        scales=scales,
        offsets=offsets,
    )
