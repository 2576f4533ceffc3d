"""Fields of IQ3_XXS and IQ3_S to the bytes of a super-block, and bytes back to fields and to weights, in numpy.

Both types store four magnitudes as the index of a lattice point, eight sub-scales of 4 bits, one for 32 weights, and
the signs of eight weights together. IQ3_S has 512 points and all eight signs; IQ3_XXS has 256 points and seven signs,
the eighth making the number of minus signs even.

Shapes: S super-blocks. Source: block_iq3_xxs, block_iq3_s and their dequantize functions in ggml.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.lattice import lattice

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Fields:
    """What a super-block of either type holds.

    d [S] f32; sub_scales [S, 8] u8 below 16; indices [S, 64] u16; signs [S, 32] u8, bit i set where weight i of eight
    is negative. For IQ3_XXS the highest bit of the signs is not stored: reading makes it from the other seven.
    """

    d_S: Floats
    sub_scales: Bytes
    indices: NDArray[np.uint16]
    signs: Bytes


def pack_iq3(name: str, fields: Fields) -> Bytes:
    """Super-blocks of IQ3_XXS [S, 98] or IQ3_S [S, 110]."""
    half = fields.d_S.astype("<f2")[:, None].view(np.uint8)
    low = (fields.indices & 255).astype(np.uint8)
    if name == "IQ3_XXS":
        seven = (fields.signs & 127).astype(np.uint32).reshape(-1, 8, 4) << np.arange(0, 28, 7, dtype=np.uint32)
        words = np.bitwise_or.reduce(seven, axis=2) | (fields.sub_scales.astype(np.uint32) << np.uint32(28))
        return np.concatenate([half, low, words.astype("<u4").view(np.uint8)], axis=1)
    ninth = np.packbits((fields.indices >> 8).astype(np.uint8), axis=1, bitorder="little")
    nibbles = fields.sub_scales[:, ::2] | (fields.sub_scales[:, 1::2] << np.uint8(4))
    return np.concatenate([half, low, ninth, fields.signs, nibbles], axis=1)


def unpack_fields(blocks: Bytes, name: str) -> Fields:
    """The inverse of `pack_iq3`, with the eighth sign of IQ3_XXS filled in."""
    half: NDArray[np.float16] = np.ascontiguousarray(blocks[:, :2]).view("<f2")
    low = blocks[:, 2:66].astype(np.uint16)
    if name == "IQ3_XXS":
        words: NDArray[np.uint32] = np.ascontiguousarray(blocks[:, 66:98]).view("<u4").astype(np.uint32)
        seven = (words[:, :, None] >> np.arange(0, 28, 7, dtype=np.uint32)) & np.uint32(127)
        signs = even_signs(seven.astype(np.uint8).reshape(-1, 32))
        sub_scales = (words >> np.uint32(28)).astype(np.uint8)
    else:
        low |= np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16) << np.uint16(8)
        signs = blocks[:, 74:106]
        sub_scales = np.stack([blocks[:, 106:] & 15, blocks[:, 106:] >> 4], axis=2).reshape(-1, 8)
    return Fields(d_S=half[:, 0].astype(np.float32), sub_scales=sub_scales, indices=low, signs=signs)


def even_signs(seven: Bytes) -> Bytes:
    """Signs with the eighth bit set where the number of the other seven is odd."""
    once = seven ^ (seven >> np.uint8(4))
    twice = once ^ (once >> np.uint8(2))
    whole: Bytes = seven | (((twice ^ (twice >> np.uint8(1))) & np.uint8(1)) << np.uint8(7))
    return whole


def unpack_iq3(blocks: Bytes, name: str) -> Floats:
    """The weights [S, 256] f32 that `blocks` stand for, in the order of operations of ggml's to_float."""
    fields = unpack_fields(blocks, name)
    sub_scales = fields.sub_scales.astype(np.float32)
    if name == "IQ3_XXS":
        scale_SJ = fields.d_S[:, None] * (np.float32(0.5) + sub_scales) * np.float32(0.5)
    else:
        scale_SJ = fields.d_S[:, None] * (np.float32(1) + np.float32(2) * sub_scales)
    values = lattice(name).values[fields.indices].reshape(-1, 8, 32)
    bits = np.unpackbits(fields.signs, axis=1, bitorder="little").astype(np.float32).reshape(-1, 8, 32)
    weights: Floats = scale_SJ[:, :, None] * values * (np.float32(1) - np.float32(2) * bits)
    return weights.reshape(-1, 256)
