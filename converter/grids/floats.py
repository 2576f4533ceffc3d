"""Eight-bit floats with a scale for a tensor, each row, or each block of rows and columns.

A float carries its own exponent, so a scale need not bring the largest weight to the largest code: over a whole octave
of scales errors are alike in the mean. In a given row they are not, and the best of the octave takes 20 % off the
squared error of Gaussian rows of 256, 5 % at 4096, and 2.5 % of blocks of 128 x 128. A whole tensor has too many for
that to matter: its scale brings the largest weight to the largest code.
"""

# O out, I in (columns), P blocks of rows, Q blocks of columns

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from converter.grids.parts import check_weights, stored_scale
from converter.grids.plain import DTYPES
from converter.schemes import Granularity
from quantkernels import scales

TYPES: Mapping[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
KINDS: Mapping[str, scales.Float] = {"e4m3": scales.E4M3, "e5m2": scales.E5M2}


@dataclass(frozen=True, kw_only=True)
class Fp8Grid:
    """E4M3 (largest 448, 3 bits of mantissa) or E5M2 (57344, 2 bits); parts: `codes` fp8 [O, I] and `scale` [P, Q].

    block: rows and columns that share a scale, with granularity "block"; [1, 1] is the shape of the scale of a tensor,
    [O, 1] that of channels. Values beyond the largest, which a rounded scale can leave, become the largest.
    """

    values: Literal["e4m3", "e5m2"] = "e4m3"
    granularity: Granularity = "channel"
    block: tuple[int, int] | None = None
    scale_dtype: str = "F32"

    def __post_init__(self) -> None:
        assert self.granularity != "group" and (self.block is not None) == (self.granularity == "block")

    @property
    def name(self) -> str:
        return f"{self.values} " + ("x".join(map(str, self.block)) if self.block else self.granularity)

    def sharing(self, rows: int, columns: int) -> tuple[int, int]:
        """How many rows and columns share a scale in a weight of this shape."""
        if self.block:
            return self.block
        return (rows, columns) if self.granularity == "tensor" else (1, columns)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """The shape [P, Q] of the scales of a weight of this shape."""
        height, width = self.sharing(rows, columns)
        return -(-rows // height), -(-columns // width)

    def encode(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The parts of `weight` [O, I] f32, each value rounded to nearest; importance [I] weighs columns, not negative.

        Raises NumericsError for a weight that is not finite.
        """
        check_weights(weight)
        top = torch.finfo(TYPES[self.values]).max
        scale_PQ = stored_scale(self._scales(weight, importance), DTYPES[self.scale_dtype])
        steps_OI = (weight / self._spread(scale_PQ, weight.shape)).clamp_(-top, top)
        return {"codes": steps_OI.to(TYPES[self.values]), "scale": scale_PQ}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight [O, I] f32 that a reader of these parts computes with."""
        codes_OI = parts["codes"]
        return codes_OI.float() * self._spread(parts["scale"], codes_OI.shape)

    def framed(self, parts: Mapping[str, Tensor]) -> None:
        """None: a solver would have 253 codes to choose among, more than its tables hold."""

    def _scales(self, weight_OI: Tensor, importance: Tensor | None) -> Tensor:
        """The scales [P, Q] f32 before they are stored; 1 where there are but zeros."""
        if self.granularity == "tensor":
            scale_PQ = (weight_OI.abs().max() / torch.finfo(TYPES[self.values]).max).reshape(1, 1)
        else:
            height, width = self.sharing(*weight_OI.shape)
            threads = torch.get_num_threads()
            kind = KINDS[self.values]
            scale_PQ = scales.search_floats(weight_OI, importance, kind, height=height, width=width, threads=threads)
        return torch.where(scale_PQ == 0, 1.0, scale_PQ)

    def _spread(self, scale_PQ: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The scale of each weight, f32, or one for each row where columns share it."""
        height, width = self.sharing(*shape)
        tall = scale_PQ.float().repeat_interleave(height, 0)[: shape[0]]
        return tall if scale_PQ.shape[1] == 1 else tall.repeat_interleave(width, 1)[:, : shape[1]]
