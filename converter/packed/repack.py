"""Codes from a checkpoint's grid to ggml's where it is the same grid: moved, not rounded again.

    MXFP4                               -> MXFP4, byte for byte
    4 bits, symmetric (zero point 8)    -> Q4_0: d = scale
    4 bits                              -> Q4_1: d = scale, m = -zero * scale
    8 bits, symmetric (zero point 128)  -> Q8_0: d = scale

Groups have to be whole blocks of 32 columns in order; a scale for more of them is repeated. d and m are f16: scales of
F16 and most of BF16 are kept exactly, others to 2^-11 of themselves, so that a value is off by less than a hundredth of
a step. Rounding decoded values again is off by up to half a step, because ggml's search sees 32 of 128 values, which
seldom reach both ends of their grid. NVFP4 stays out: its scale for a whole tensor has no place in ggml's blocks.
"""

# N rows, I columns, Q scales in a row, B blocks

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from converter.packed.weight import Coded, Packed
from quantkernels.ggml import TYPES
from quantkernels.ggml.packing import pack_legacy
from quantkernels.ggml.packing.fp4 import pack_mxfp4

# Bits of codes by the type that has their grid.
BITS: Mapping[str, int] = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
EVENLY = ("pack-quantized", "gptq", "awq", "int8")
# The largest share of itself by which rounding to f16 may change a scale: half a step of 11 bits.
SHARE = 2.0**-11


def same_grid(packed: Packed, type: str) -> bool:
    """Whether codes may go over to a ggml type unchanged, as far as headers tell."""
    if type == "MXFP4":
        return packed.format == "mxfp4" and packed.shape[-1] % TYPES[type].weights == 0
    if packed.format not in EVENLY or BITS.get(type) != packed.bits:
        return False
    stays = packed.format in ("gptq", "awq") or ("zero" in packed.parts) == (type == "Q4_1")
    width = TYPES[type].weights
    return stays and packed.block[1] % width == 0 == packed.shape[-1] % packed.block[1]  # no short last group


def mxfp4_blocks(codes_NB: Tensor, scale_NQ: Tensor) -> Tensor:
    """Blocks of MXFP4, u8 [N, bytes a row], from bytes of two codes each and exponents."""
    codes = torch.stack([codes_NB & 15, codes_NB >> 4], dim=-1).reshape(-1, TYPES["MXFP4"].weights)
    blocks = pack_mxfp4(scale_NQ.contiguous().view(torch.uint8).reshape(-1).numpy(), codes.numpy())
    return torch.from_numpy(blocks).reshape(len(codes_NB), -1)


def evenly_spaced_blocks(coded: Coded, type: str) -> tuple[Tensor, Tensor]:
    """Blocks of Q4_0, Q4_1 or Q8_0, u8 [N, bytes a row], and which rows they hold, bool [N].

    A row is left out where f16 does not hold a scale or a minimum, or zero points are not what the type has, and all
    are where columns are in another order.
    """
    if coded.group_I is not None:
        nothing = torch.zeros(len(coded.codes), 0, dtype=torch.uint8)
        return nothing, torch.zeros(len(nothing), dtype=torch.bool)
    lowest, width = -(1 << (BITS[type] - 1)), TYPES[type].weights
    signed = coded.codes.dtype == torch.int8
    codes = coded.codes.to(torch.int16) + (0 if signed else lowest)
    zero = torch.zeros_like(coded.scale) if coded.zero is None else coded.zero + (0 if signed else lowest)
    minimum = (lowest - zero) * coded.scale
    held = _held(coded.scale) & (_held(minimum) if type == "Q4_1" else (zero == 0).all(1))
    scale_B, minimum_B = (
        part.half().float().repeat_interleave(coded.columns // width, 1).flatten().numpy()
        for part in (coded.scale, minimum)
    )
    stored = codes if type == "Q8_0" else codes - lowest
    stored_BN = stored.reshape(-1, width).float().numpy()
    blocks = pack_legacy(type, scale_B, minimum_B if type == "Q4_1" else None, stored_BN)
    return torch.from_numpy(blocks).reshape(len(codes), -1), held


def _held(scale_NQ: Tensor) -> Tensor:
    """Which rows have only numbers that f16 holds, bool [N]."""
    return ((scale_NQ.half().float() - scale_NQ).abs() <= SHARE * scale_NQ.abs()).all(1)
