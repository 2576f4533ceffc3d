"""The scales that a block could hold in place of its own, and the block with them.

Super-blocks keep a float16 d (and one for minimums) and whole numbers for their sub-blocks: those may change here, d
stays. Types without sub-blocks may have any float16, and NVFP4 any of its eight-bit floats. MXFP4's powers of two, too
far apart to gain by, and the one scale of a ternary block, which is a weight of the model, stay.

# O out, G groups of a row, B blocks, J sub-blocks of a block.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkernels.columns.frame import Ladder
from quantkernels.ggml.layout import TYPES
from quantkernels.ggml.packing import fp4 as packing_fp4
from quantkernels.ggml.packing import iq1 as packing_iq1
from quantkernels.ggml.packing import iq2 as packing_iq2
from quantkernels.ggml.packing import iq3 as packing_iq3
from quantkernels.ggml.packing import pack_sub_scales
from quantkernels.ggml.packing.fields import half_at, join

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

HALVES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
PAIRS = {"Q2_K": 16, "Q4_K": 64, "Q5_K": 64}  # how many sub-scales and sub-minimums there are to choose among
# For types with sub-scales alone: what each one stands for in units of d.
RUNGS: dict[str, tuple[float, ...]] = {
    "Q3_K": tuple(float(scale) for scale in range(-32, 32)),
    "Q6_K": tuple(float(scale) for scale in range(-128, 128)),
    "IQ4_XS": tuple(float(scale) for scale in range(-32, 32)),
    "IQ1_S": tuple(float(2 * scale + 1) for scale in range(8)),
    "IQ1_M": tuple(float(2 * scale + 1) for scale in range(8)),
    "IQ2_XXS": tuple((0.5 + scale) * 0.25 for scale in range(16)),
    "IQ2_XS": tuple((0.5 + scale) * 0.25 for scale in range(16)),
    "IQ2_S": tuple((0.5 + scale) * 0.25 for scale in range(16)),
    "IQ3_XXS": tuple((0.5 + scale) * 0.5 for scale in range(16)),
    "IQ3_S": tuple(float(1 + 2 * scale) for scale in range(16)),
}
GROUPS = {"Q2_K": 16, "Q3_K": 16, "Q6_K": 16, "IQ1_M": 16, "IQ2_XS": 16, "IQ2_S": 16, "NVFP4": 16}  # 32 in the others


def ladders(blocks: Tensor, type: str) -> tuple[Ladder | None, Ladder | None]:
    """What the scales and the offsets of `blocks` [O, bytes a row] u8 may be; None where they stay."""
    known, size = TYPES[type], GROUPS.get(type, 32)
    raw = blocks.contiguous().numpy().reshape(-1, known.size_bytes)

    def ladder(unit_B1: NDArray[np.float32], rungs: tuple[float, ...]) -> Ladder:
        unit_OG = torch.from_numpy(np.repeat(unit_B1, known.weights // size, axis=1).reshape(len(blocks), -1))
        return Ladder(unit_OG=unit_OG, group_size=size, rungs=rungs)

    if type in HALVES:
        one_B1 = np.ones((len(raw), 1), np.float32)
        return ladder(one_B1, ()), ladder(one_B1, ()) if known.half_fields[1:] else None
    if type in PAIRS:
        rungs = tuple(float(scale) for scale in range(PAIRS[type]))
        scale_at, minimum_at = known.half_fields
        return ladder(half_at(raw, scale_at), rungs), ladder(-half_at(raw, minimum_at), rungs)
    if type == "NVFP4":
        values = packing_fp4.half_ue4m3(np.arange(127, dtype=np.uint8))
        return ladder(np.ones((len(raw), 1), np.float32), tuple(float(value) for value in values)), None
    if type in RUNGS:
        field = packing_iq1.d_field(raw) if type == "IQ1_M" else raw
        at = 0 if type == "IQ1_M" else known.half_fields[0]
        return ladder(half_at(field, at), RUNGS[type]), None
    return None, None


def with_scales(
    blocks: Tensor, type: str, scale_OG: Tensor, scales: Ladder, offset_OG: Tensor | None, offsets: Ladder | None
) -> Tensor:
    """`blocks` [O, bytes a row] u8 with scales and offsets that the ladders allow, in their groups."""
    known = TYPES[type]
    raw = blocks.contiguous().numpy().reshape(-1, known.size_bytes).copy()
    if type in HALVES:
        fields = [scale_OG] if offset_OG is None or offsets is None else [scale_OG, offset_OG]
        for at, values in zip(known.half_fields, fields, strict=True):
            raw[:, at : at + 2] = values.numpy().astype("<f2").reshape(-1, 1).view(np.uint8)
        return _rows(raw, blocks)
    position_BJ = scales.position(scale_OG).numpy().reshape(len(raw), -1)
    if type in PAIRS:
        assert offset_OG is not None and offsets is not None
        depth_BJ = offsets.position(offset_OG).numpy().reshape(len(raw), -1)
        packed = pack_sub_scales(type, position_BJ.astype(np.float32), depth_BJ.astype(np.float32))
        at = 0 if type == "Q2_K" else 4
        raw[:, at : at + packed.shape[1]] = packed
        return _rows(raw, blocks)
    return _rows(_with_positions(raw, type, position_BJ), blocks)


def _with_positions(raw: Bytes, type: str, position_BJ: Integers) -> Bytes:
    """The blocks with sub-scales given as positions among the rungs."""
    bytes_BJ = position_BJ.astype(np.uint8)
    if type == "Q3_K":
        low, high = join((bytes_BJ & 15).reshape(-1, 2, 8), 4), join((bytes_BJ >> 4).reshape(-1, 4, 4), 2)
        raw[:, 96:108] = np.concatenate([low, high], axis=1)
    elif type == "Q6_K":
        raw[:, 192:208] = (position_BJ - 128).astype(np.int8).view(np.uint8)
    elif type == "IQ4_XS":
        high = join((bytes_BJ >> 4).reshape(-1, 2, 4).swapaxes(1, 2), 2)
        low = join((bytes_BJ & 15).reshape(-1, 4, 2).swapaxes(1, 2), 4)
        raw[:, 2:8] = np.concatenate([high, low], axis=1)
    elif type == "NVFP4":
        raw[:, :4] = bytes_BJ
    elif type.startswith("IQ1"):
        ones = packing_iq1.unpack_fields(raw, type)
        raw = packing_iq1.pack_iq1(type, replace(ones, sub_scales=position_BJ.astype(np.uint16)))
    elif type.startswith("IQ2"):
        d_B, _, index_BK, signs_BK = packing_iq2.unpack_iq2_fields(raw, type)
        raw = packing_iq2.pack_iq2(type, d_B, bytes_BJ, index_BK, signs_BK)
    else:
        raw = packing_iq3.pack_iq3(type, replace(packing_iq3.unpack_fields(raw, type), sub_scales=bytes_BJ))
    return raw


def _rows(raw: Bytes, blocks: Tensor) -> Tensor:
    return torch.from_numpy(raw.reshape(len(blocks), -1))
