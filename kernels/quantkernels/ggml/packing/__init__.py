"""Codes and scales to the bytes of a block, and bytes back to weights, in numpy.

Shapes: B blocks of 32, S super-blocks of 256, J sub-blocks, N weights in a block. Codes come as floats that hold small
integers; fields keep their order in the file. Source: the block structs and dequantize functions of ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.fields import Integers, half_at, half_bytes, join, split
from quantkernels.ggml.packing.fp4 import unpack_fp4
from quantkernels.ggml.packing.iq1 import unpack_iq1
from quantkernels.ggml.packing.iq2 import unpack_iq2
from quantkernels.ggml.packing.iq3 import unpack_iq3
from quantkernels.ggml.packing.iq4 import unpack_iq4
from quantkernels.ggml.packing.ternary import unpack_ternary

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def pack_legacy(name: str, scale_B: Floats, minimum_B: Floats | None, codes_BN: Floats) -> Bytes:
    """Blocks of Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0, [B, bytes]; codes of Q8_0 are signed, the others are not."""
    fields = [half_bytes(scale_B)]
    if minimum_B is not None:
        fields.append(half_bytes(minimum_B))
    if name == "Q8_0":
        return np.concatenate([*fields, codes_BN.astype(np.int8).view(np.uint8)], axis=1)
    codes = codes_BN.astype(np.uint8)
    if name.startswith("Q5"):
        fields.append(np.packbits(codes >> 4, axis=1, bitorder="little"))
    return np.concatenate([*fields, join((codes & 15).reshape(-1, 2, 16), 4)], axis=1)


def pack_sub_scales(name: str, scales_SJ: Floats, depths_SJ: Floats) -> Bytes:
    """The 4-bit (Q2_K) or 6-bit pairs of a super-block's sub-blocks, [S, 16] or [S, 12].

    Values above the field, which a scale below zero wraps to, spill into the neighbouring field just as in ggml.
    """
    low, high = scales_SJ.astype(np.uint8), depths_SJ.astype(np.uint8)
    if name == "Q2_K":
        return low | (high << np.uint8(4))
    return np.concatenate(
        [
            low[:, :4] | ((low[:, 4:] >> 4) << 6),
            high[:, :4] | ((high[:, 4:] >> 4) << 6),
            (low[:, 4:] & 15) | ((high[:, 4:] & 15) << 4),
        ],
        axis=1,
    )


def unpack_sub_scales(name: str, fields: Bytes) -> tuple[Floats, Floats]:
    """The (scales, depths) [S, J] that a reader finds in `fields`."""
    if name == "Q2_K":
        return (fields & 15).astype(np.float32), (fields >> 4).astype(np.float32)
    first, second, third = fields[:, :4], fields[:, 4:8], fields[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=1)
    depths = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=1)
    return scales.astype(np.float32), depths.astype(np.float32)


def pack_scale_min_k(name: str, d_S: Floats, dmin_S: Floats, sub_scales: Bytes, codes_SN: Floats) -> Bytes:
    """Blocks of Q2_K, Q4_K or Q5_K, [S, bytes]; codes [S, 256]."""
    halves = [half_bytes(d_S), half_bytes(dmin_S)]
    whole = codes_SN.astype(np.uint8)
    if name == "Q2_K":
        return np.concatenate([sub_scales, _pack_crumbs(whole), *halves], axis=1)
    nibbles = join((whole & 15).reshape(-1, 2, 32), 4).reshape(-1, 128)
    fifth_bits = [join((whole >> 4).reshape(-1, 8, 32), 1)] if name == "Q5_K" else []
    return np.concatenate([*halves, sub_scales, *fifth_bits, nibbles], axis=1)


def pack_q6_k(d_S: Floats, scales_SJ: Floats, codes_SN: Floats) -> Bytes:
    """Blocks of Q6_K, [S, 210]; codes [S, 256] from 0 to 63, scales signed."""
    whole = codes_SN.astype(np.uint8)
    nibbles = join((whole & 15).reshape(-1, 2, 64), 4).reshape(-1, 128)
    scales = np.nan_to_num(scales_SJ).astype(np.int8).view(np.uint8)
    return np.concatenate([nibbles, _pack_crumbs(whole >> 4), scales, half_bytes(d_S)], axis=1)


def pack_q3_k(d_S: Floats, scales_SJ: Floats, codes_SN: Floats) -> Bytes:
    """Blocks of Q3_K, [S, 110]; codes [S, 256] from 0 to 7, scales from -32 to 31."""
    whole = codes_SN.astype(np.uint8)
    scales = (scales_SJ + np.float32(32)).astype(np.uint8)
    scale_bytes = np.concatenate(
        [join((scales & 15).reshape(-1, 2, 8), 4), join((scales >> 4).reshape(-1, 4, 4), 2)], axis=1
    )
    third_bits = join((whole >> 2).reshape(-1, 8, 32), 1)
    return np.concatenate([third_bits, _pack_crumbs(whole & 3), scale_bytes, half_bytes(d_S)], axis=1)


def _pack_crumbs(codes: Integers) -> Bytes:
    """Two-bit codes [S, 256] to [S, 64]: in each half, weights 32 apart share a byte."""
    return join(codes.reshape(-1, 4, 32), 2).reshape(-1, 64)


def _unpack_crumbs(crumbs: Bytes) -> Bytes:
    return split(crumbs.reshape(-1, 32), 2, 4).reshape(-1, SUPER_BLOCK)


def unpack_blocks(blocks: Bytes, name: str) -> Floats:
    """The weights that `blocks` [B, bytes] stand for, [B, N] f32, as ggml's to_float computes them."""
    if name == "Q8_0":
        return blocks[:, 2:].view(np.int8).astype(np.float32) * half_at(blocks, 0)
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        return _unpack_legacy(blocks, name)
    if name in ("Q2_K", "Q4_K", "Q5_K"):
        return _unpack_scale_min_k(blocks, name)
    if name == "Q6_K":
        low = split(blocks[:, :128].reshape(-1, 64), 4, 2).reshape(-1, SUPER_BLOCK)
        codes = (low | (_unpack_crumbs(blocks[:, 128:192]) << 4)).astype(np.float32) - np.float32(32)
        scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
        return _scaled(half_at(blocks, 208) * scales, codes)
    if name == "Q3_K":
        third = split(blocks[:, :32], 1, 8).reshape(-1, SUPER_BLOCK)
        codes = (_unpack_crumbs(blocks[:, 32:96]) | (third << 2)).astype(np.float32) - np.float32(4)
        low = split(blocks[:, 96:104], 4, 2).reshape(-1, 16)
        high = split(blocks[:, 104:108], 2, 4).reshape(-1, 16)
        scales = (low | (high << 4)).astype(np.float32) - np.float32(32)
        return _scaled(half_at(blocks, 108) * scales, codes)
    if name.startswith("IQ4"):
        return unpack_iq4(blocks, name)
    if name.startswith("IQ2"):
        return unpack_iq2(blocks, name)
    if name.startswith("IQ3"):
        return unpack_iq3(blocks, name)
    if name.startswith("IQ1"):
        return unpack_iq1(blocks, name)
    if name.startswith("TQ"):
        return unpack_ternary(blocks, name)
    if name.endswith("FP4"):
        return unpack_fp4(blocks, name)
    raise ValueError(f"{name} is not a block type")


def _scaled(scale_SJ: Floats, codes_SN: Floats) -> Floats:
    count = scale_SJ.shape[1]
    product = scale_SJ[:, :, None] * codes_SN.reshape(-1, count, codes_SN.shape[1] // count)
    return product.reshape(codes_SN.shape)


def _unpack_legacy(blocks: Bytes, name: str) -> Floats:
    has_minimum = name.endswith("_1")
    at = 4 if has_minimum else 2
    codes = split(blocks[:, -16:], 4, 2).reshape(-1, 32)
    if name.startswith("Q5"):
        codes = codes | (np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4))
    if has_minimum:
        return codes.astype(np.float32) * half_at(blocks, 0) + half_at(blocks, 2)
    return (codes.astype(np.float32) - np.float32(8 if name == "Q4_0" else 16)) * half_at(blocks, 0)


def _unpack_scale_min_k(blocks: Bytes, name: str) -> Floats:
    if name == "Q2_K":
        d, dmin, fields = half_at(blocks, 80), half_at(blocks, 82), blocks[:, :16]
        codes = _unpack_crumbs(blocks[:, 16:80])
    else:
        d, dmin, fields = half_at(blocks, 0), half_at(blocks, 2), blocks[:, 4:16]
        codes = split(blocks[:, -128:].reshape(-1, 32), 4, 2).reshape(-1, SUPER_BLOCK)
        if name == "Q5_K":
            codes = codes | (split(blocks[:, 16:48], 1, 8).reshape(-1, SUPER_BLOCK) << np.uint8(4))
    scales_SJ, depths_SJ = unpack_sub_scales(name, fields)
    depth_SN = np.repeat(dmin * depths_SJ, SUPER_BLOCK // depths_SJ.shape[1], axis=1)
    return _scaled(d * scales_SJ, codes.astype(np.float32)) - depth_SN
