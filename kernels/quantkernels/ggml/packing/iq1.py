"""IQ1_S and IQ1_M: lattice indices, shifts and sub-scales to the bytes of a super-block, and back, in numpy.

Eight weights are one of 2048 ternary points plus or minus 1/8, times an odd number from 1 to 15, times d. In IQ1_S
32 weights share shift and sub-scale; in IQ1_M each eight have a shift and 16 share a sub-scale, and the float16 d lies
in the highest four bits of four 16-bit words, above the sub-scales. Shapes: S super-blocks.
Source: block_iq1_s, block_iq1_m and their dequantize functions of ggml.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.packing.fields import Bytes, Floats, half_at, half_bytes

Words = NDArray[np.integer[Any]]  # 16 bits: numpy keeps u16 through shifts by small ints, its stubs do not know

SHIFT = np.float32(0.125)
THREE_BITS = np.array([0, 3, 6, 9], np.uint16)
D_PARTS = np.array([0, 4, 8, 12], np.uint16)  # which bits of d lie on top of which word


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What a super-block of either type holds.

    d [S] f32; sub_scales [S, 8 or 16] u16 below 8, which stand for 1, 3 .. 15; negative [S, 8 or 32] bool, where the
    shift is -1/8; indices [S, 32] u16, the points.
    """

    d_S: Floats
    sub_scales: Words
    negative: NDArray[np.bool_]
    indices: Words


def pack_iq1(name: str, fields: Fields) -> Bytes:
    """Super-blocks of IQ1_S [S, 50] or IQ1_M [S, 56]."""
    low = (fields.indices & 255).astype(np.uint8)
    high = fields.indices >> 8
    negative = fields.negative.astype(np.uint16)
    if name == "IQ1_S":
        words = np.bitwise_or.reduce(high.reshape(-1, 8, 4) << THREE_BITS, axis=2)
        words = words | (fields.sub_scales << 12) | (negative << 15)
        return np.concatenate([half_bytes(fields.d_S), low, words.astype("<u2").view(np.uint8)], axis=1)
    nibbles = (high | (negative << 3)).reshape(-1, 16, 2)
    words = np.bitwise_or.reduce(fields.sub_scales.reshape(-1, 4, 4) << THREE_BITS, axis=2)
    words = words | (((half_bytes(fields.d_S).view("<u2") >> D_PARTS) & 15) << 12)
    pairs = (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).astype(np.uint8)
    return np.concatenate([low, pairs, words.astype("<u2").view(np.uint8)], axis=1)


def unpack_fields(blocks: Bytes, name: str) -> Fields:
    """The fields of super-blocks [S, bytes]."""
    if name == "IQ1_S":
        words = np.ascontiguousarray(blocks[:, 34:]).view("<u2")
        high = (words[:, :, None] >> THREE_BITS) & 7
        return Fields(
            d_S=half_at(blocks, 0)[:, 0],
            sub_scales=(words >> 12) & 7,
            negative=words >= 0x8000,
            indices=blocks[:, 2:34] | (high.reshape(-1, 32) << 8),
        )
    nibbles = np.stack([blocks[:, 32:48] & 15, blocks[:, 32:48] >> 4], axis=2).reshape(-1, 32).astype(np.uint16)
    words = np.ascontiguousarray(blocks[:, 48:]).view("<u2")
    return Fields(
        d_S=half_at(d_field(blocks), 0)[:, 0],
        sub_scales=((words[:, :, None] >> THREE_BITS) & 7).reshape(-1, 16),
        negative=nibbles >= 8,
        indices=blocks[:, :32] | ((nibbles & 7) << 8),
    )


def d_field(blocks: Bytes) -> Bytes:
    """The float16 field d of IQ1_M super-blocks [S, 56], gathered: [S, 2]."""
    words = np.ascontiguousarray(blocks[:, 48:]).view("<u2")
    gathered = np.bitwise_or.reduce((words >> 12) << D_PARTS, axis=1, keepdims=True)
    return gathered.astype("<u2").view(np.uint8)


def unpack_iq1(blocks: Bytes, name: str) -> Floats:
    """The weights that `blocks` [S, bytes] stand for, [S, 256] f32, as ggml's to_float computes them."""
    fields = unpack_fields(blocks, name)
    scale = fields.d_S[:, None] * (2 * fields.sub_scales + 1).astype(np.float32)
    shift = np.where(fields.negative, -SHIFT, SHIFT)
    points = lattice("IQ1").values[fields.indices]
    scale_SK = np.repeat(scale, 32 // scale.shape[1], axis=1)
    shift_SK = np.repeat(shift, 32 // shift.shape[1], axis=1)
    weights: Floats = scale_SK[:, :, None] * (points + shift_SK[:, :, None])
    return weights.reshape(len(blocks), -1)
