"""Indices, shifts and sub-scales of one IQ1 super-block to bytes, in kernels: the twin of `packing_iq1.pack_iq1`.

codes f32 [J] of the sub-blocks, minus bool [32] and points i64 [32] of the groups of eight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Points = NDArray[np.int64]
Flags = NDArray[np.bool_]


@compiled
def pack_s(codes: Floats, minus: Flags, points: Points, target: Bytes, at: int) -> None:
    """All of an IQ1_S super-block but d, which the first two of its 50 bytes hold; a sub-block has one shift."""
    for j in range(8):
        word = (int(codes[j]) << 12) | (0x8000 if minus[4 * j] else 0)
        for i in range(4):
            target[at + 2 + 4 * j + i] = points[4 * j + i] & 255
            word |= (points[4 * j + i] >> 8) << (3 * i)
        target[at + 34 + 2 * j] = word & 255
        target[at + 35 + 2 * j] = word >> 8


@compiled
def pack_m(codes: Floats, minus: Flags, points: Points, half: Bytes, target: Bytes, at: int) -> None:
    """The 56 bytes of an IQ1_M super-block; half holds d."""
    for j in range(16):
        nibbles = 0
        for i in range(2):
            group = 2 * j + i
            target[at + group] = points[group] & 255
            nibbles |= ((points[group] >> 8) | (8 if minus[group] else 0)) << (4 * i)
        target[at + 32 + j] = nibbles
    for j in range(4):
        word = ((int(half[j // 2]) >> (4 * (j % 2))) & 15) << 12
        for i in range(4):
            word |= int(codes[4 * j + i]) << (3 * i)
        target[at + 48 + 2 * j] = word & 255
        target[at + 49 + 2 * j] = word >> 8
