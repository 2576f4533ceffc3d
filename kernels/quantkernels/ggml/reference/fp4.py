"""The truth for MXFP4 and NVFP4: a scale from the largest magnitude and the nearest four-bit float, in numpy.

A scale that its byte cannot hold becomes the byte for NaN, which the caller refuses. ggml clamps the scale of NVFP4 at
448 and with it the weights, and writes the NaN of E8M0 for blocks of MXFP4 just above the denormal range.

Shapes: B blocks or sub-blocks, N weights in each. Source: quantize_row_mxfp4_ref, quantize_row_nvfp4_ref and
ggml_fp32_to_ue4m3 of ggml.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.packing.fp4 import LEVELS, half_e8m0, half_ue4m3, pack_mxfp4, pack_nvfp4

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

NAN_UE4M3 = 127


def quantize_fp4(rows: Floats, name: str) -> Bytes:
    """Blocks of MXFP4 or NVFP4, [B, bytes]; rows [R, C] f32."""
    x_BN = rows.reshape(-1, 32 if name == "MXFP4" else 16)
    largest_B = np.abs(x_BN).max(axis=1)
    if name == "MXFP4":
        exponent_B = exponent_of(largest_B)
        return pack_mxfp4(exponent_B, nearest_code(x_BN, half_e8m0(exponent_B)))
    field_B = ue4m3_of(largest_B / np.float32(6))
    return pack_nvfp4(field_B.reshape(-1, 4), nearest_code(x_BN, half_ue4m3(field_B)).reshape(-1, 64))


def exponent_of(largest_B: Floats) -> Bytes:
    """The E8M0 byte that brings `largest_B` into [4, 8), the topmost of the levels' exponents; 0 for 0.

    Trap: ggml takes floor(log2f(x)), and a value within a few steps below a power of two rounds up to it. Exponents
    below 0 wrap around, as they do in ggml's cast; there the scale is so large that all codes are 0.
    """
    logarithm_B = np.log2(largest_B.astype(np.float64)).astype(np.float32)
    exponent_B = np.where(largest_B > 0, np.floor(logarithm_B) + np.float32(125), np.float32(0))
    return exponent_B.astype(np.int32).astype(np.uint8)


def ue4m3_of(value_B: Floats) -> Bytes:
    """The bytes for `value_B`, never negative, rounded half up; NaN beyond 448.

    Trap: what would round to 256 or more becomes 448, because ggml takes the topmost exponent for an overflow.
    """
    bits = value_B.view(np.int32)
    field = ((bits >> 19) + 1 >> 1) - ((127 - 7) << 3)  # rounding at the fourth bit of the mantissa carries upwards
    denormal = np.minimum((value_B * np.float32(512) + np.float32(0.5)).astype(np.int32), 7)
    field = np.where(bits >> 23 <= 127 - 7, denormal, np.where(field < 0x78, field, 0x7E))
    return np.where(value_B > np.float32(448), NAN_UE4M3, field).astype(np.uint8)


def nearest_code(x_BN: Floats, scale_B: Floats) -> Bytes:
    """The first code of least error in the order 0, 1, ... 15: of equals the one nearer to 0, and never -0."""
    best_BN = np.abs(x_BN)
    code_BN = np.zeros(x_BN.shape, np.uint8)
    for code in range(1, 16):
        level = LEVELS[code] if code < 8 else -LEVELS[code - 8]
        error_BN = np.abs(np.float32(level) * scale_B[:, None] - x_BN)
        code_BN = np.where(error_BN < best_BN, np.uint8(code), code_BN)
        best_BN = np.minimum(best_BN, error_BN)
    return code_BN
