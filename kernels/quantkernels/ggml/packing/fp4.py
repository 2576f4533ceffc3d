"""MXFP4 and NVFP4: four-bit floats (E2M1) under one-byte float scales; to bytes and back, in numpy.

MXFP4 has a power of two (E8M0) for 32 weights, NVFP4 an unsigned E4M3 for each 16 of its 64. Levels are kept as whole
numbers, twice the floats, and scales as half of what their byte says, as ggml does.

Shapes: B blocks, J sub-blocks. Source: block_mxfp4, block_nvfp4, ggml_e8m0_to_fp32_half and ggml_ue4m3_to_fp32 of ggml;
OCP Microscaling Formats (MX) Specification 1.0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.packing.fields import join, split

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LEVELS = (0, 1, 2, 3, 4, 6, 8, 12)  # codes 8 to 15 are their negatives


def half_e8m0(exponents: Bytes) -> Floats:
    """2 ** (exponent - 128), which is half of what the byte stands for; below 2 a denormal number."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128).astype(np.float32)


def half_ue4m3(fields: Bytes) -> Floats:
    """Half of what the lower seven bits stand for: 4 of exponent, 3 of mantissa. 127, NaN, gives 0."""
    exponent, mantissa = (fields >> 3 & 15).astype(np.int32), (fields & 7).astype(np.float32)
    normal = np.ldexp(np.float32(1) + mantissa / np.float32(8), exponent - 8)
    value = np.where(exponent == 0, np.ldexp(mantissa, -10), normal)
    return np.where(fields == 127, np.float32(0), value).astype(np.float32)


def pack_mxfp4(exponent_B: Bytes, codes_BN: Bytes) -> Bytes:
    """Blocks of MXFP4, [B, 17]; codes [B, 32] below 16."""
    return np.concatenate([exponent_B[:, None], join(codes_BN.reshape(-1, 2, 16), 4)], axis=1)


def pack_nvfp4(scales_BJ: Bytes, codes_BN: Bytes) -> Bytes:
    """Blocks of NVFP4, [B, 36]; scales [B, 4] as they are stored, codes [B, 64] below 16."""
    return np.concatenate([scales_BJ, join(codes_BN.reshape(-1, 2, 8), 4).reshape(-1, 32)], axis=1)


def unpack_fp4(blocks: Bytes, name: str) -> Floats:
    """The weights of MXFP4 blocks [B, 17] or NVFP4 blocks [B, 36], as ggml's to_float computes them."""
    levels = np.array([*LEVELS, *(-level for level in LEVELS)], np.float32)
    if name == "MXFP4":
        return levels[split(blocks[:, 1:], 4, 2).reshape(-1, 32)] * half_e8m0(blocks[:, :1])
    codes = split(blocks[:, 4:].reshape(-1, 8), 4, 2).reshape(-1, 4, 16)
    return (levels[codes] * half_ue4m3(blocks[:, :4])[:, :, None]).reshape(-1, 64)
