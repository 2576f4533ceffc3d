"""IQ2 blocks from what the searches leave in lane order: codes of groups, their signs, and the scales.

Codes are whole float32 numbers with level i in bits 2i and 2i + 1; only their lowest sixteen bits count.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.search import ONE, ZERO
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import WIDTH, Lanes, Mask, load, nearest_wrapped, select, spread, store

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

GROUP = 8
GROUPS = SUPER_BLOCK // GROUP
INDEX_BITS = MappingProxyType({"IQ2_XXS": 8, "IQ2_XS": 9, "IQ2_S": 10})
HALF = np.float32(0.5)
NAN = np.float32(np.nan)


@compiled
def turn_signs(signs: Floats, first: int, count: int, scale: Lanes) -> None:
    """Turn all signs of groups with a scale below zero; where it is zero there are none."""
    for k in range(first, first + count):
        old = load(signs, k * WIDTH)
        store(signs, k * WIDTH, select(scale == ZERO, ZERO, select(scale < ZERO, np.float32(255) - old, old)))


@compiled
def code_scales(scales: Floats, count: int, factor: np.float32, overflows: Mask) -> None:
    """Turn scales into their 4-bit codes; d * factor and the largest scale go to lines 16 and 17.

    Both are NaN where the squares of x overflow.
    """
    high = spread(ZERO)
    for j in range(count):
        scale = load(scales, j * WIDTH)
        high = select((scale > high) | ~(scale == scale), scale, high)  # a NaN stays, and is refused
    high = select(overflows, NAN, high)
    d = high / np.float32(31)
    inverse = ONE / d
    for j in range(count):
        code = nearest_wrapped(HALF * (inverse * load(scales, j * WIDTH) - ONE))
        code = select(code < ZERO, ZERO, code)
        store(scales, j * WIDTH, select(code > np.float32(15), np.float32(15), code))
    store(scales, 16 * WIDTH, d * factor)
    store(scales, 17 * WIDTH, high)


@compiled
def pack(
    out: Bytes, block: int, lane: int, bits: int, scales: Floats, found: Floats, signs: Floats, index_of: Integers
) -> None:
    """The bytes of one lane's super-block; without any scale only the signs of IQ2_S are left."""
    bytes_of_block = 66 if bits == 8 else (74 if bits == 9 else 82)
    at = block * bytes_of_block
    out[at : at + bytes_of_block] = 0
    empty = scales[17 * WIDTH + lane] == ZERO
    store_half(out, at, scales[16 * WIDTH + lane])
    for k in range(GROUPS):
        index = int(index_of[int(found[k * WIDTH + lane]) & 0xFFFF])
        sign = int(signs[k * WIDTH + lane])
        if bits == 10:
            out[at + 2 + k] = index & 255
            out[at + 34 + k] = sign
            out[at + 66 + k // 4] |= np.uint8((index >> 8) << (2 * (k % 4)))
        elif empty:
            continue
        elif bits == 9:
            out[at + 2 + 2 * k] = index & 255
            out[at + 3 + 2 * k] = (index >> 8) | ((sign & 127) << 1)
        else:
            out[at + 2 + 8 * (k // 4) + k % 4] = index
    if empty:
        return
    if bits == 8:
        for j in range(8):
            word = int(scales[j * WIDTH + lane]) << 28
            for k in range(4):
                word |= (int(signs[(4 * j + k) * WIDTH + lane]) & 127) << (7 * k)
            for k in range(4):
                out[at + 6 + 8 * j + k] = (word >> (8 * k)) & 255
    else:
        for j in range(8):
            low, high = int(scales[2 * j * WIDTH + lane]), int(scales[(2 * j + 1) * WIDTH + lane])
            out[at + bytes_of_block - 8 + j] = low | (high << 4)
