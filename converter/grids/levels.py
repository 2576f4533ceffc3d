"""Fixed levels times a scale for each row or group of columns: ternary, stretched elastic, logarithmic, NF4, FP4.

A level is what a code means in units of the scale. Scales are fitted exactly (quantkernels.codebooks), so grids differ
by their levels alone. With an offset beside the scale, which is where a group's levels have their middle, they follow
weights that are not centred; at 2 bits and groups of 32 the squared error of Gaussian weights falls by a fifth. Side
data then weighs as much as a bit a weight, so it may be coded itself: 4 bits each, multiples of a unit that the row
keeps (double quantization). The alternative, a class for each grid, would differ in a tuple of numbers.

Source: ternary, Li and Liu 2016, arXiv:1605.04711; stretched elastic quantization, Liu et al. 2025, ParetoQ,
arXiv:2502.02631 (here fitted after training, which is not what that paper trains); logarithmic, Miyashita et al. 2016,
arXiv:1603.01025; NF4 and double quantization, Dettmers et al. 2023, arXiv:2305.14314.
"""

# O out, I in (columns), G groups of a row, L levels

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.grids import Framed, codebook, double
from converter.grids.parts import check_weights, row_chunks, stored_scale
from converter.grids.plain import DTYPES
from quantkernels import codebooks
from quantkernels.columns import AnyFrame, Frame, Ladder


def _even(bits: int) -> tuple[float, ...]:
    """Levels one apart around zero, which is none of them."""
    return tuple(code - (2**bits - 1) / 2 for code in range(2**bits))


def _both_signs(positive: tuple[float, ...]) -> tuple[float, ...]:
    return (*(-level for level in positive), 0.0, *reversed(positive))


# Rising. At 3 bits log has powers of 2. At 4 it has powers of the root of 2: whole powers reach down to 1/64 and leave
# nothing between 1/2 and 1, three times the squared error of Gaussian weights.
LEVELS: Mapping[str, tuple[float, ...]] = {
    "ternary": (-1.0, 0.0, 1.0),
    "seq2": _even(2),
    "seq3": _even(3),
    "seq4": _even(4),
    "log3": _both_signs((1.0, 0.5, 0.25)),
    "log4": _both_signs(tuple(float(torch.tensor(2 ** (-step / 2))) for step in range(7))),
    **codebook.LEVELS,
}


@dataclass(frozen=True, kw_only=True)
class LevelGrid:
    """`values` names the levels; parts: `codes` i8 [O, I] from 0, `scale` [O, G] and, with offset, `offset` [O, G].

    group_size None: one scale a row. scale_bits 0: scales and offsets are of scale_dtype. Otherwise `scale` is u8, from
    0 to 2**scale_bits - 1, `offset` i8, of as many bits and signed, and `units` [O, 1 or 2] of scale_dtype what they
    are multiples of. A weight is level * scale + offset in f32, each operation rounded.
    """

    values: str
    group_size: int | None = None
    offset: bool = False
    scale_bits: int = 0
    scale_dtype: str = "F32"

    def __post_init__(self) -> None:
        assert self.values in LEVELS and 0 <= self.scale_bits <= 8 and self.scale_dtype in DTYPES
        assert not self.offset or self.values.startswith("seq"), "offsets are fitted to even levels"

    @property
    def name(self) -> str:
        where = f"g{self.group_size}" if self.group_size else "channel"
        return f"{self.values} {where}" + (" offset" if self.offset else "") + (" double" if self.scale_bits else "")

    @property
    def levels(self) -> tuple[float, ...]:
        """What the codes mean in units of the scale."""
        return LEVELS[self.values]

    def columns_per_scale(self, columns: int) -> int:
        """How many of a row's `columns` share a scale."""
        return self.group_size or columns

    def encode(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The parts of `weight` [O, I] f32; importance [I], not negative. Raises NumericsError for one not finite."""
        check_weights(weight)
        size, threads = self.columns_per_scale(weight.shape[1]), torch.get_num_threads()
        if self.offset:
            count = len(self.levels)
            scale_OG, offset_OG = codebooks.offsets(weight, importance, count=count, group_size=size, threads=threads)
            side = self._stored(weight, importance, {"scale": scale_OG, "offset": offset_OG})
        else:
            scale_OG = codebooks.scales(weight, importance, self.levels, group_size=size, threads=threads)
            side = self._stored(weight, importance, {"scale": scale_OG})
        return {"codes": self._nearest(weight, side), **side}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight [O, I] f32 that a reader of these parts computes with."""
        codes_OI = parts["codes"]
        scale_OG, offset_OG = self._side(parts)
        levels_L, group_I = torch.tensor(self.levels), self._groups(codes_OI.shape[1])

        def chunk(rows: slice) -> Tensor:
            levels_OI = levels_L.index_select(0, codes_OI[rows].flatten().int()).view(-1, codes_OI.shape[1])
            return levels_OI.mul_(scale_OG[rows][:, group_I]).add_(offset_OG[rows][:, group_I])

        return torch.cat([chunk(rows) for rows in row_chunks(codes_OI)])

    def framed(self, parts: Mapping[str, Tensor]) -> Framed:
        """The parts with their codes set apart; scales and offsets may have other values that can be stored."""
        scale_OG, offset_OG = self._side(parts)
        size = self.columns_per_scale(parts["codes"].shape[1])
        frame = Frame(
            scale_OG=scale_OG,
            zero_OG=torch.zeros(1, 1).expand_as(scale_OG),
            offset_OG=offset_OG,
            group_size=size,
            low=0,
            high=len(self.levels) - 1,
            table=self.levels,
            scales=self._ladder(parts, scale_OG, 0, size),
            offsets=self._ladder(parts, offset_OG, 1, size) if self.offset else None,
        )

        def with_frame(new: AnyFrame, codes: Tensor) -> Mapping[str, Tensor]:
            assert isinstance(new, Frame)
            found = {"scale": new.scale_OG} | ({"offset": new.offset_OG} if self.offset else {})
            if not self.scale_bits:
                return {"codes": codes} | {part: values.to(DTYPES[self.scale_dtype]) for part, values in found.items()}
            return {"codes": codes, **double.codes_of(found, parts["units"]), "units": parts["units"]}

        return Framed(frame=frame, with_frame=with_frame)

    def _stored(self, weight: Tensor, importance: Tensor | None, side: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scales (and offsets) [O, G] f32 as they are stored."""
        dtype = DTYPES[self.scale_dtype]
        if not self.scale_bits:
            return {part: stored_scale(values_OG, dtype) for part, values_OG in side.items()}
        size = self.columns_per_scale(weight.shape[1])
        return double.coded(weight, importance, side, self.levels, group_size=size, bits=self.scale_bits, dtype=dtype)

    def _groups(self, columns: int) -> Tensor:
        return torch.arange(columns) // self.columns_per_scale(columns)

    def _side(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scales and offsets [O, G] f32 as a reader computes them."""
        scale_OG = parts["scale"].float()
        offset_OG = parts["offset"].float() if self.offset else torch.zeros(1, 1).expand_as(scale_OG)
        if self.scale_bits:
            scale_OG = scale_OG * parts["units"][:, :1].float()
            offset_OG = offset_OG * parts["units"][:, 1:].float() if self.offset else offset_OG
        return scale_OG, offset_OG

    def _ladder(self, parts: Mapping[str, Tensor], values_OG: Tensor, which: int, size: int) -> Ladder:
        """The values that scales (which 0) or offsets (1) may have."""
        if not self.scale_bits:
            return Ladder(unit_OG=values_OG, group_size=size, dtype=DTYPES[self.scale_dtype])
        low, high = double.bounds(self.scale_bits, signed=which == 1)
        unit_OG = parts["units"][:, which : which + 1].float().expand_as(values_OG)
        return Ladder(unit_OG=unit_OG, group_size=size, rungs=tuple(map(float, range(low, high + 1))))

    def _nearest(self, weight_OI: Tensor, side: Mapping[str, Tensor]) -> Tensor:
        """The codes [O, I] i8 of the nearest levels; any where the scale is 0."""
        levels_L, group_I = torch.tensor(self.levels), self._groups(weight_OI.shape[1])
        scale_OG, offset_OG = self._side(side)
        divisor_OG = torch.where(scale_OG == 0, torch.inf, scale_OG)
        middles = (levels_L[1:] + levels_L[:-1]) / 2

        def chunk(rows: slice) -> Tensor:
            steps_OI = (weight_OI[rows] - offset_OG[rows][:, group_I]).div_(divisor_OG[rows][:, group_I])
            return torch.bucketize(steps_OI, middles, out_int32=True).to(torch.int8)

        return torch.cat([chunk(rows) for rows in row_chunks(weight_OI)])
