"""Codebooks of 16 levels in blocks of consecutive weights with their largest magnitude: NF4 and FP4 of bitsandbytes.

NF4's levels are quantiles of a normal distribution, so that each is used about equally often. A block's factor need not
be its largest magnitude: it is searched for the least squared error weighted by importance and by sqrt(w^2 + mean w^2)
of a weight (why: see quantkernels.scales). With double quantization factors are stored in 8 bits: an index into a table
of 256 fractions, times a factor for 256 of them, plus their mean.

Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314; bitsandbytes 0.50 (functional.py: create_dynamic_map,
get_4bit_type, quantize_4bit).
"""

# O out, I in (columns), B blocks, N weights of a block, M blocks of factors

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from converter.grids import Framed
from converter.grids.parts import check_weights, row_chunks
from quantkernels.columns import Frame

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4_POSITIVE = tuple(value / 12 for value in (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0))
# The levels, rising.
LEVELS: Mapping[str, tuple[float, ...]] = {
    "nf4": NF4,
    "fp4": (*(-value for value in reversed(FP4_POSITIVE[1:])), *FP4_POSITIVE),
}
FACTORS = 256  # that share a factor of their own
# What a block's largest magnitude is multiplied by, in the order of preference.
SHARES = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 1.03, 1.06)


@cache
def fractions() -> Tensor:
    """The 256 fractions that factors are multiples of, f32, rising: seven decades, both signs, finer near 1."""
    found: list[float] = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * ((edges[1:] + edges[:-1]) / 2)
        found += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(found))


@dataclass(frozen=True, kw_only=True)
class CodebookGrid:
    """NF4 or FP4 in blocks of `block` weights, counted through the rows; with `double`, factors of 8 bits.

    dtype is what readers make of the values; by_size: see quantkernels.scales.

    Parts: `codes` i8 [O, I], an index into LEVELS; `scale` f32 [B], what levels are multiplied by. With `double`
    `scale` is u8 [B], indices into `fractions`, and there are `nested` f32 [M], a factor for 256 of them, and `offset`
    f32 [1].
    """

    values: Literal["nf4", "fp4"] = "nf4"
    block: int = 64
    double: bool = True
    dtype: str = "F32"
    by_size: bool = True

    @property
    def name(self) -> str:
        return f"{self.values} b{self.block}" + (" double" if self.double else "")

    def encode(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The parts of `weight` [O, I] f32. Raises NumericsError when a value is not finite."""
        check_weights(weight)
        blocks_BN = self._blocks(weight)
        share_BN = None if importance is None else self._blocks(importance.expand_as(weight))
        scale_B = torch.cat(
            [
                self._search(blocks_BN[rows], None if share_BN is None else share_BN[rows])
                for rows in row_chunks(blocks_BN)
            ]
        )
        parts = self._coded(scale_B) if self.double else {"scale": scale_B}
        codes_BN = self._nearest(blocks_BN, self._scale(parts))
        return {"codes": codes_BN.flatten()[: weight.numel()].view(weight.shape), **parts}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight [O, I] f32 that a reader of these parts computes with."""
        codes = parts["codes"]
        levels = torch.tensor(LEVELS[self.values]).index_select(0, codes.flatten().int())
        spread = self._scale(parts).repeat_interleave(self.block)[: codes.numel()]
        return (levels * spread).view(codes.shape)

    def framed(self, parts: Mapping[str, Tensor]) -> Framed | None:
        """The parts with their codes set apart; None where a block goes on in the next row."""
        codes_OI = parts["codes"]
        if codes_OI.shape[1] % self.block:
            return None
        scale_OG = self._scale(parts).view(len(codes_OI), -1)
        nothing = torch.zeros(1, 1).expand_as(scale_OG)
        levels = LEVELS[self.values]
        frame = Frame(
            scale_OG=scale_OG,
            zero_OG=nothing,
            offset_OG=nothing,
            group_size=self.block,
            low=0,
            high=len(levels) - 1,
            table=levels,
        )
        return Framed(frame=frame, with_frame=lambda _, codes: {**parts, "codes": codes})

    def _blocks(self, values: Tensor) -> Tensor:
        """The values in blocks [B, N], the last one filled up with zeros."""
        flat = values.reshape(-1)
        return torch.nn.functional.pad(flat, (0, -len(flat) % self.block)).view(-1, self.block)

    def _search(self, blocks_BN: Tensor, share_BN: Tensor | None) -> Tensor:
        """The factor of each block, f32 [B], with the least weighted squared error among SHARES."""
        largest_B = blocks_BN.abs().amax(1)
        best_B, least_B = largest_B, torch.full_like(largest_B, torch.inf)
        heavy_BN = torch.ones_like(blocks_BN) if share_BN is None else share_BN
        if self.by_size:
            squares_BN = blocks_BN.square()
            heavy_BN = heavy_BN * squares_BN.add_(squares_BN.mean(1, keepdim=True)).sqrt_()
        levels = torch.tensor(LEVELS[self.values])
        for share in SHARES:
            scale_B = largest_B * share
            found_BN = levels[self._nearest(blocks_BN, scale_B).long()] * scale_B[:, None]
            error_B = (found_BN - blocks_BN).square_().mul_(heavy_BN).sum(1)
            best_B = torch.where(error_B < least_B, scale_B, best_B)
            least_B = torch.minimum(error_B, least_B)
        return best_B

    def _nearest(self, blocks_BN: Tensor, scale_B: Tensor) -> Tensor:
        """The codes i8 of the nearest levels; of 0 where a factor is 0."""
        levels = torch.tensor(LEVELS[self.values])
        steps_BN = blocks_BN / torch.where(scale_B == 0, torch.inf, scale_B)[:, None]
        return torch.bucketize(steps_BN, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.int8)

    def _coded(self, scale_B: Tensor) -> dict[str, Tensor]:
        """Double quantization of the factors."""
        offset = scale_B.mean()
        moved_MF = torch.nn.functional.pad(scale_B - offset, (0, -len(scale_B) % FACTORS)).view(-1, FACTORS)
        nested_M = moved_MF.abs().amax(1)
        table = fractions()
        steps_MF = moved_MF / torch.where(nested_M == 0, torch.inf, nested_M)[:, None]
        index_MF = torch.bucketize(steps_MF, (table[1:] + table[:-1]) / 2)
        return {
            "scale": index_MF.to(torch.uint8).flatten()[: len(scale_B)],
            "nested": nested_M,
            "offset": offset.reshape(1),
        }

    def _scale(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The factors as a reader computes them, f32 [B]."""
        scale_B = parts["scale"]
        if not self.double:
            return scale_B
        nested_B = parts["nested"].repeat_interleave(FACTORS)[: len(scale_B)]
        return fractions()[scale_B.long()] * nested_B + parts["offset"]
