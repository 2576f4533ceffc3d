"""IQ4_NL and IQ4_XS: codes that name one of sixteen unevenly spaced levels; to bytes and back, in numpy.

Shapes: B blocks of 32, S super-blocks of 256, J = 8 sub-blocks in a super-block. Source: block_iq4_nl, block_iq4_xs and
their dequantize functions in ggml.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.fields import half_at, half_bytes, join, split

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MIDDLES = tuple((low + high) / 2 for low, high in pairwise(LEVELS))  # from here on the upper level is the nearest


def pack_iq4_nl(d_B: Floats, codes_BN: Bytes) -> Bytes:
    """Blocks of IQ4_NL, [B, 18]; codes [B, 32] below 16."""
    return np.concatenate([half_bytes(d_B), join(codes_BN.reshape(-1, 2, 16), 4)], axis=1)


def pack_iq4_xs(d_S: Floats, scales_SJ: Floats, codes_SN: Bytes) -> Bytes:
    """Super-blocks of IQ4_XS, [S, 136]; sub-scales [S, 8] from -32 to 31, codes [S, 256] below 16."""
    shifted = (scales_SJ + np.float32(32)).astype(np.uint8)
    high = join((shifted >> 4).reshape(-1, 2, 4).swapaxes(1, 2), 2)
    low = join((shifted & 15).reshape(-1, 4, 2).swapaxes(1, 2), 4)
    codes = join(codes_SN.reshape(-1, 2, 16), 4).reshape(-1, 128)
    return np.concatenate([half_bytes(d_S), high, low, codes], axis=1)


def unpack_iq4(blocks: Bytes, name: str) -> Floats:
    """The weights of IQ4_NL blocks [B, 18] or IQ4_XS super-blocks [B, 136], as ggml's to_float computes them."""
    levels = np.array(LEVELS, np.float32)
    if name == "IQ4_NL":
        return half_at(blocks, 0) * levels[split(blocks[:, 2:], 4, 2).reshape(-1, 32)]
    high = split(blocks[:, 2:4], 2, 4).swapaxes(1, 2).reshape(-1, 8)
    low = split(blocks[:, 4:8], 4, 2).swapaxes(1, 2).reshape(-1, 8)
    scale_SJ = half_at(blocks, 0) * ((low | (high << np.uint8(4))).astype(np.float32) - np.float32(32))
    codes = split(blocks[:, 8:].reshape(-1, 16), 4, 2).reshape(-1, 8, 32)
    return (scale_SJ[:, :, None] * levels[codes]).reshape(-1, SUPER_BLOCK)
