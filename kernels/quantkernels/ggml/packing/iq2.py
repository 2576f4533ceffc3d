"""Lattice indices, signs and scales to the bytes of IQ2_XXS, IQ2_XS and IQ2_S, and bytes back to weights, in numpy.

A super-block holds 32 groups of 8 weights, each a point of the type's lattice with signs of its own, and 4-bit scales
for every 32 (IQ2_XXS) or 16 weights. IQ2_XXS and IQ2_XS store seven signs; the eighth makes the count of minuses even.

Shapes: S super-blocks, G groups, J sub-blocks. Source: the block structs and dequantize functions of ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.fields import half_at, half_bytes, join, split

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Indices = NDArray[np.uint16]


def pack_iq2(name: str, d_S: Floats, scales_SJ: Bytes, indices_SG: Indices, signs_SG: Bytes) -> Bytes:
    """Super-blocks [S, bytes]; scales below 16, [S, 8] or [S, 16]; bit i of a group's signs is the sign of weight i."""
    halves = half_bytes(d_S)
    indices = indices_SG.astype(np.uint32)
    if name == "IQ2_XXS":
        signs = (signs_SG.reshape(-1, 8, 4) & 127).astype(np.uint32) << np.arange(0, 28, 7, dtype=np.uint32)
        words_SJ = np.bitwise_or.reduce(signs, axis=2) | (scales_SJ.astype(np.uint32) << np.uint32(28))
        low = indices.astype(np.uint8).reshape(-1, 8, 4)
        fields = np.concatenate([low, words_SJ[:, :, None].astype("<u4").view(np.uint8)], axis=2)
        return np.concatenate([halves, fields.reshape(-1, 64)], axis=1)
    pairs = join(scales_SJ.reshape(-1, 2, 1), 4).reshape(-1, 8)
    if name == "IQ2_XS":
        words_SG = (indices | ((signs_SG & 127).astype(np.uint32) << np.uint32(9))).astype("<u2")
        return np.concatenate([halves, np.ascontiguousarray(words_SG).view(np.uint8), pairs], axis=1)
    high = join((indices >> 8).astype(np.uint8).reshape(-1, 4, 1), 2).reshape(-1, 8)
    return np.concatenate([halves, indices.astype(np.uint8), signs_SG, high, pairs], axis=1)


def unpack_iq2_fields(blocks: Bytes, name: str) -> tuple[Floats, Bytes, Indices, Bytes]:
    """The inverse of `pack_iq2`, with all eight signs of a group."""
    d_S = half_at(blocks, 0)[:, 0]
    if name == "IQ2_XXS":
        fields = blocks[:, 2:].reshape(-1, 8, 8)
        words_SJ = np.ascontiguousarray(fields[:, :, 4:]).view("<u4")
        signs = (words_SJ >> np.arange(0, 28, 7, dtype=np.uint32)) & np.uint32(127)
        nibbles = (words_SJ[:, :, 0] >> np.uint32(28)).astype(np.uint8)
        indices = np.ascontiguousarray(fields[:, :, :4]).reshape(-1, 32)
        return d_S, nibbles, indices.astype(np.uint16), _with_eighth(signs.astype(np.uint8).reshape(-1, 32))
    pairs = blocks[:, -8:]
    scales = split(pairs.reshape(-1, 1), 4, 2).reshape(-1, 16)
    if name == "IQ2_XS":
        words_SG = np.ascontiguousarray(blocks[:, 2:66]).view("<u2").astype(np.uint16)
        signs = (words_SG >> np.uint16(9)).astype(np.uint8)
        return d_S, scales, (words_SG & 511).astype(np.uint16), _with_eighth(signs)
    high = split(blocks[:, 66:74].reshape(-1, 1), 2, 4)
    whole = blocks[:, 2:34].astype(np.uint16) | (high.reshape(-1, 32).astype(np.uint16) << np.uint16(8))
    return d_S, scales, whole, np.ascontiguousarray(blocks[:, 34:66])


def _with_eighth(signs: Bytes) -> Bytes:
    """Seven signs, and an eighth that makes the count of minuses even."""
    odd = np.bitwise_xor.reduce(np.unpackbits(signs[..., None], axis=-1), axis=-1)
    joined: Bytes = signs | (odd << np.uint8(7))
    return joined


def unpack_iq2(blocks: Bytes, name: str) -> Floats:
    """The weights that `blocks` [S, bytes] stand for, [S, 256] f32, as ggml's to_float computes them."""
    d_S, scales_SJ, indices_SG, signs_SG = unpack_iq2_fields(blocks, name)
    scale_SJ = d_S[:, None] * (np.float32(0.5) + scales_SJ.astype(np.float32)) * np.float32(0.25)
    scale_SG = np.repeat(scale_SJ, 32 // scale_SJ.shape[1], axis=1)
    minus = np.unpackbits(signs_SG[..., None], axis=-1, bitorder="little").astype(bool)
    sign = np.where(minus, np.float32(-1), np.float32(1))
    return (scale_SG[..., None] * lattice(name).values[indices_SG] * sign).reshape(-1, SUPER_BLOCK)
