"""The frames of the types whose codes name points of a lattice, IQ1, IQ2 and IQ3, and their blocks with other codes.

As for other types, scales are asked of the decoder: blocks whose codes all name a point that begins with a power of two
decode to the scale times that, exactly. What lies where is known to the packing of each family.

# O out, B blocks in the file, K codes of eight weights in a block, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkernels.columns.frame import EIGHT, PointFrame, join_code, split_code
from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.layout import TYPES
from quantkernels.ggml.packing import iq1 as packing_iq1
from quantkernels.ggml.packing import iq2 as packing_iq2
from quantkernels.ggml.packing import iq3 as packing_iq3
from quantkernels.ggml.packing import unpack_blocks

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class OnLattice:
    """A type's lattice, the columns that share its scale and shift, and which signs its points may have."""

    lattice: str
    group_size: int
    signs: Literal["none", "even", "free"]


LATTICES = MappingProxyType(
    {
        "IQ1_S": OnLattice(lattice="IQ1", group_size=32, signs="none"),
        "IQ1_M": OnLattice(lattice="IQ1", group_size=8, signs="none"),
        "IQ2_XXS": OnLattice(lattice="IQ2_XXS", group_size=32, signs="even"),
        "IQ2_XS": OnLattice(lattice="IQ2_XS", group_size=16, signs="even"),
        "IQ2_S": OnLattice(lattice="IQ2_S", group_size=16, signs="free"),
        "IQ3_XXS": OnLattice(lattice="IQ3_XXS", group_size=32, signs="even"),
        "IQ3_S": OnLattice(lattice="IQ3_S", group_size=32, signs="free"),
    }
)


def frame(blocks: Tensor, type: str) -> PointFrame:
    """The frame of `blocks` [O, bytes a row] u8."""
    of, known = LATTICES[type], TYPES[type]
    points_PD = lattice(of.lattice).values
    raw = blocks.contiguous().numpy().reshape(-1, known.size_bytes)
    groups = (len(blocks), -1)
    if of.signs == "none":  # a weight is (point + shift) scale: a point of 0 gives the shift's 1/8 of the scale
        first = int(np.argmax(points_PD[:, 0] == 0))
        negative_BG = packing_iq1.unpack_fields(raw, type).negative
        shift_BG = np.where(negative_BG, -packing_iq1.SHIFT, packing_iq1.SHIFT).astype(np.float32)
        unit_BG = shift_BG
    else:
        first = 0
        shift_BG = np.zeros((len(raw), known.weights // of.group_size), np.float32)
        unit_BG = np.full_like(shift_BG, points_PD[0, 0])
    index_BK = np.full((len(raw), known.weights // points_PD.shape[1]), first, np.uint16)
    decoded = unpack_blocks(_coded(raw, type, index_BK, np.zeros((len(raw), known.weights // EIGHT), np.uint8)), type)
    scale_BG = decoded[:, :: of.group_size] / unit_BG
    return PointFrame(
        scale_OG=torch.from_numpy(scale_BG.reshape(groups)),
        zero_OG=torch.from_numpy(-shift_BG.reshape(groups)),
        group_size=of.group_size,
        lattice=of.lattice,
        points_PD=torch.from_numpy(points_PD.copy()),
        signs=of.signs,
    )


def codes(blocks: Tensor, type: str) -> Tensor:
    """The codes [O, I / 8] i32 in `blocks` [O, bytes a row] u8, as a PointFrame has them."""
    raw = blocks.contiguous().numpy().reshape(-1, TYPES[type].size_bytes)
    index_BK, signs_BK = _read(raw, type)
    per_code = index_BK.size // signs_BK.size
    index_OBK = torch.from_numpy(index_BK.astype(np.int32)).reshape(len(blocks), -1, per_code)
    return join_code(index_OBK, torch.from_numpy(signs_BK.astype(np.int32)).reshape(len(blocks), -1))


def with_codes(blocks: Tensor, type: str, codes_OK: Tensor) -> Tensor:
    """`blocks` [O, bytes a row] u8 with the codes [O, I / 8] i32 in place of their own."""
    known = TYPES[type]
    raw = blocks.contiguous().numpy().reshape(-1, known.size_bytes)
    per_code = EIGHT // lattice(LATTICES[type].lattice).points.shape[1]
    index_OBK, signs_OB = split_code(codes_OK, per_code)
    index_BK = index_OBK.numpy().astype(np.uint16).reshape(len(raw), -1)
    written = _coded(raw, type, index_BK, signs_OB.numpy().astype(np.uint8).reshape(len(raw), -1))
    return torch.from_numpy(written.reshape(len(blocks), -1))


def _read(raw: Bytes, type: str) -> tuple[NDArray[np.uint16], Bytes]:
    """The indices of the points, and the signs of each eight weights, in blocks [B, bytes]."""
    if type.startswith("IQ1"):
        index_BK = packing_iq1.unpack_fields(raw, type).indices.astype(np.uint16)
        return index_BK, np.zeros_like(index_BK, np.uint8)
    if type.startswith("IQ2"):
        _, _, index_BK, signs_BK = packing_iq2.unpack_iq2_fields(raw, type)
        return index_BK, signs_BK
    fields = packing_iq3.unpack_fields(raw, type)
    return fields.indices, fields.signs


def _coded(raw: Bytes, type: str, index_BK: NDArray[np.uint16], signs_BK: Bytes) -> Bytes:
    """The blocks with these indices and signs."""
    if type.startswith("IQ1"):
        return packing_iq1.pack_iq1(type, replace(packing_iq1.unpack_fields(raw, type), indices=index_BK))
    if type.startswith("IQ2"):
        d_B, scales_BJ, _, _ = packing_iq2.unpack_iq2_fields(raw, type)
        return packing_iq2.pack_iq2(type, d_B, scales_BJ, index_BK, signs_BK)
    fields = packing_iq3.unpack_fields(raw, type)
    return packing_iq3.pack_iq3(type, replace(fields, indices=index_BK, signs=signs_BK))
