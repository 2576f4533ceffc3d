"""Levels of a row's own, or of a group of its columns: k-means on a line, weighted by importance.

Where a scale stretches a fixed set of levels, here every level lies where the weights are: the least squared error that
so many levels can have, for 16 bits each. That is 1/16 bit a weight for 16 levels and rows of 4096, and 2 bits in
groups of 128, so at 4 bits levels belong to rows.

Source: Kim et al. 2023, SqueezeLLM, arXiv:2306.07629, which weighs by gradients where this weighs by inputs.
"""

# O out, I in (columns), G groups of a row, N columns of a group, L levels

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.grids import Framed, observers
from converter.grids.parts import check_weights, row_chunks
from converter.grids.plain import DTYPES
from quantkernels import codebooks
from quantkernels.columns import Frame


@dataclass(frozen=True, kw_only=True)
class KMeansGrid:
    """2 to 4 bits; parts: `codes` i8 [O, I] from 0, and `levels` [O, G, L] of levels_dtype, which do not fall.

    group_size None: one set of levels a row.
    """

    bits: int
    group_size: int | None = None
    levels_dtype: str = "F32"

    def __post_init__(self) -> None:
        assert 2 <= self.bits <= 4 and self.levels_dtype in DTYPES

    @property
    def name(self) -> str:
        return f"kmeans{self.bits} " + (f"g{self.group_size}" if self.group_size else "channel")

    def columns_per_codebook(self, columns: int) -> int:
        """How many of a row's `columns` share levels."""
        return self.group_size or columns

    def encode(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The parts of `weight` [O, I] f32; importance [I], not negative. Raises NumericsError for one not finite."""
        check_weights(weight)
        size, dtype = self.columns_per_codebook(weight.shape[1]), DTYPES[self.levels_dtype]
        exact_OGL = codebooks.levels(
            weight, importance, count=1 << self.bits, group_size=size, threads=torch.get_num_threads()
        )
        limits = torch.finfo(dtype)
        levels_OGL = exact_OGL.clamp(limits.min, limits.max).to(dtype)
        return {"codes": self._nearest(weight, levels_OGL.float()), "levels": levels_OGL}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight [O, I] f32 that a reader of these parts computes with."""
        codes_OI, levels_OGL = parts["codes"], parts["levels"].float()
        columns = codes_OI.shape[1]

        def chunk(rows: slice) -> Tensor:
            codes_OGN = observers.grouped(codes_OI[rows], self.columns_per_codebook(columns)).long()
            return levels_OGL[rows].gather(2, codes_OGN).flatten(1)[:, :columns]

        return torch.cat([chunk(rows) for rows in row_chunks(codes_OI)])

    def framed(self, parts: Mapping[str, Tensor]) -> Framed:
        """The parts with their codes set apart; levels stay as they are."""
        levels_OGL = parts["levels"].float()
        nothing = torch.zeros(1, 1).expand(levels_OGL.shape[:2])
        frame = Frame(
            scale_OG=torch.ones(1, 1).expand_as(nothing),
            zero_OG=nothing,
            offset_OG=nothing,
            group_size=self.columns_per_codebook(parts["codes"].shape[1]),
            low=0,
            high=(1 << self.bits) - 1,
            levels_OGL=levels_OGL,
        )
        return Framed(frame=frame, with_frame=lambda _, codes: {**parts, "codes": codes})

    def _nearest(self, weight_OI: Tensor, levels_OGL: Tensor) -> Tensor:
        """The codes [O, I] i8 of the nearest levels, the lower of two as near."""
        middles_OGL = ((levels_OGL[..., 1:] + levels_OGL[..., :-1]) / 2).contiguous()
        columns = weight_OI.shape[1]

        def chunk(rows: slice) -> Tensor:
            weight_OGN = observers.grouped(weight_OI[rows], self.columns_per_codebook(columns)).contiguous()
            return torch.searchsorted(middles_OGL[rows], weight_OGN).to(torch.int8).flatten(1)[:, :columns]

        return torch.cat([chunk(rows) for rows in row_chunks(weight_OI)])
