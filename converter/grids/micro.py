"""Microscaling: floats of 4 or 8 bits in groups of 16 or 32 columns whose scales are coded, too.

    mxfp4   E2M1, a power of two for 32           OCP Microscaling Formats (MX) Specification 1.0
    mxfp8   E4M3, a power of two for 32           the same
    nvfp4   E2M1, an E4M3 scale for 16, divided by one number for the tensor: 6 * 448 / largest

A scale is searched among the storable ones around that of the largest weight, for the least squared error weighted by
importance and by sqrt(w^2 + mean w^2) of a weight (why: see quantkernels.scales): a few levels cut off at the top often
buy finer steps below. The usual rule, the largest weight to the largest level, is among the candidates. Between powers
of two that is cutting a lot off or halving the steps, and fourth powers of errors choose a little better there than
squares: 1 to 3 % off the KL divergence of three models with MXFP4 weights, next to nothing where inputs are rounded,
too. In NVFP4 they choose worse.
"""

# O out, I in (columns), G groups of a row, N columns of a group

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from converter.activations import FP4_LEVELS, FP4_MAX, FP8_MAX
from converter.grids import Framed
from converter.grids.parts import check_weights, row_chunks
from quantkernels import scales
from quantkernels.columns import Frame

# Levels by code: E2M1 without its second zero, from -6 to 6.
LEVELS = (*(-level for level in reversed(FP4_LEVELS[1:])), *FP4_LEVELS)
MIDDLE = len(FP4_LEVELS) - 1  # the code of 0
BIAS = 127  # of a power of two stored as E8M0
# Candidates in steps of the coded scale, from that of the largest weight: binades, or steps of E4M3.
POWERS = (1, 0, -1)
STEPS = tuple(range(6, -5, -1))


@dataclass(frozen=True, kw_only=True)
class MicroGrid:
    """One of the three; parts: `codes`, `scale` [O, G] and, for nvfp4, `divisor` f32 [1] of the scales.

    codes are i8 [O, I], an index into LEVELS (4 bits), or fp8 [O, I] (mxfp8); scale is u8, an exponent plus 127, or
    fp8. largest: for nvfp4 the largest magnitude of all tensors that share the divisor (0: of this one alone);
    engines that fuse linears want one for them. by_size: see quantkernels.scales.
    """

    values: Literal["mxfp4", "mxfp8", "nvfp4"]
    largest: float = 0.0
    by_size: bool = True

    @property
    def name(self) -> str:
        return self.values

    @property
    def group_size(self) -> int:
        """How many columns share a scale."""
        return 16 if self.values == "nvfp4" else 32

    def encode(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The parts of `weight` [O, I] f32, I a multiple of the group size; importance [I] weighs columns.

        Raises NumericsError when a weight is not finite.
        """
        check_weights(weight)
        parts: dict[str, Tensor] = {}
        if self.values == "nvfp4":
            largest = self.largest or float(weight.abs().max())
            parts["divisor"] = torch.tensor([FP4_MAX * FP8_MAX / (largest or 1.0)])
        chunks = [self._chunk(weight[rows], importance, parts.get("divisor")) for rows in row_chunks(weight)]
        return parts | {part: torch.cat([chunk[part] for chunk in chunks]) for part in ("codes", "scale")}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight [O, I] f32 that a reader of these parts computes with."""
        scale_OG = self._value(parts["scale"], parts.get("divisor"))
        if self.values == "mxfp8":
            levels_OI = parts["codes"].float()
        else:
            levels_OI = torch.tensor(LEVELS).index_select(0, parts["codes"].flatten().int()).view(parts["codes"].shape)
        return (self._grouped(levels_OI) * scale_OG[:, :, None]).flatten(1)

    def framed(self, parts: Mapping[str, Tensor]) -> Framed | None:
        """The parts with their 4-bit codes set apart; None for mxfp8, which has more codes than a solver's tables."""
        if self.values == "mxfp8":
            return None
        scale_OG = self._value(parts["scale"], parts.get("divisor"))
        nothing = torch.zeros(1, 1).expand_as(scale_OG)
        frame = Frame(
            scale_OG=scale_OG,
            zero_OG=nothing,
            offset_OG=nothing,
            group_size=self.group_size,
            low=0,
            high=len(LEVELS) - 1,
            table=LEVELS,
        )
        return Framed(frame=frame, with_frame=lambda _, codes: {**parts, "codes": codes})

    def _grouped(self, values_OI: Tensor) -> Tensor:
        return values_OI.reshape(len(values_OI), -1, self.group_size)

    def _value(self, scale: Tensor, divisor: Tensor | None) -> Tensor:
        """What coded scales mean, f32."""
        if divisor is not None:
            return scale.view(torch.float8_e4m3fn).float() / divisor
        return torch.exp2(scale.float() - BIAS)

    def _chunk(self, weight_OI: Tensor, importance: Tensor | None, divisor: Tensor | None) -> dict[str, Tensor]:
        grouped_OGN = self._grouped(weight_OI)
        coded_OGK = torch.stack(self._candidates(grouped_OGN.abs().amax(-1), divisor), -1)
        values_OGK = self._value(coded_OGK, divisor)
        kind = scales.E4M3 if self.values == "mxfp8" else scales.E2M1
        best_OG1 = scales.choose_float(
            weight_OI,
            importance,
            values_OGK,
            kind,
            fourth=self.values != "nvfp4",
            by_size=self.by_size,
            threads=torch.get_num_threads(),
        )[:, :, None]
        scale_OG, value_OG1 = coded_OGK.gather(2, best_OG1)[:, :, 0], values_OGK.gather(2, best_OG1)
        codes_OI = self._nearest(grouped_OGN / torch.where(value_OG1 == 0, torch.inf, value_OG1)).flatten(1)
        if self.values == "mxfp8":
            codes_OI = codes_OI.view(torch.float8_e4m3fn)
        if divisor is not None:
            scale_OG = scale_OG.view(torch.float8_e4m3fn)
        return {"codes": codes_OI, "scale": scale_OG}

    def _candidates(self, largest_OG: Tensor, divisor: Tensor | None) -> list[Tensor]:
        """Coded scales to try, u8 [O, G] (fp8 by its bits), the one of the usual rule first."""
        if divisor is None:
            top = FP8_MAX if self.values == "mxfp8" else FP4_MAX
            exponent_OG = (largest_OG / top).clamp(min=2.0**-BIAS).log2().ceil() + BIAS
            return [(exponent_OG + step).clamp(0, 2 * BIAS).to(torch.uint8) for step in POWERS]
        first_OG = (largest_OG / FP4_MAX * divisor).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        highest = 126  # the code of 448; 127 is NaN
        steps = sorted(STEPS, key=abs)
        return [(first_OG.int() + step).clamp(0, highest).to(torch.uint8) for step in steps]

    def _nearest(self, steps_OGN: Tensor) -> Tensor:
        """Codes i8 of the levels nearest to `steps` (fp8 by its bits), of two as near the even one.

        Weights in bf16 over a power of two often lie halfway, and taken down they would all move one way.
        """
        if self.values == "mxfp8":
            return steps_OGN.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.int8)
        levels, upper = torch.tensor(LEVELS), torch.arange(1, len(LEVELS))
        middles = (levels[1:] + levels[:-1]) / 2
        goes_up = (upper - MIDDLE) % 2 == 0
        middles = torch.where(goes_up, middles.nextafter(torch.tensor(-torch.inf)), middles)
        return torch.bucketize(steps_OGN, middles, out_int32=True).to(torch.int8)
