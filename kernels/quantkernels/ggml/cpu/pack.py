"""What the k-quant kernels share: where super-blocks lie, search weights from importance, and packing of codes.

Codes stay whole float32 numbers until they are stored, so or-ing bit fields is adding multiples of powers of two and
one kind of vector does for everything.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled
from quantkernels.ggml.cpu.search import ONE, sum_of_squares
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import WIDTH, load, root, store, store_bytes, whole

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]


@compiled
def place(group: int, blocks: int, columns: int, offsets: Offsets, importance_offsets: Offsets) -> int:
    """Where the sixteen super-blocks of `group` start in the rows and in the importance; gives how many there are.

    Past the end the last super-block is repeated: its lanes are computed and thrown away.
    """
    first = group * WIDTH
    for k in range(WIDTH):
        block = min(first + k, blocks - 1)
        offsets[k] = block * SUPER_BLOCK
        importance_offsets[k] = block * SUPER_BLOCK % columns
    return min(WIDTH, blocks - first)


@compiled
def weigh(x: Floats, weight: Floats, factor: np.float32) -> None:
    """Turn importance into search weights: times sqrt(factor * mean square of the super-block + x * x)."""
    mean_square = factor * sum_of_squares(x, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK)
    for i in range(SUPER_BLOCK):
        value = load(x, i * WIDTH)
        store(weight, i * WIDTH, load(weight, i * WIDTH) * root(mean_square + value * value))


@compiled
def pack_crumbs(codes: Floats, target: Bytes, at: int) -> None:
    """256 two-bit codes to 64 bytes: in each half, weights 32 apart share a byte."""
    for half in range(2):
        for i in range(0, 32, WIDTH):
            first = half * 128 + i
            low = load(codes, first) + load(codes, first + 32) * np.float32(4)
            high = load(codes, first + 64) + load(codes, first + 96) * np.float32(4)
            store_bytes(target, at + half * 32 + i, low + high * np.float32(16))


@compiled
def split_high(codes: Floats, high: Floats, step: np.float32) -> None:
    """Take the multiples of `step` out of 256 codes and put their count into `high`."""
    for i in range(0, SUPER_BLOCK, WIDTH):
        code = load(codes, i)
        part = whole(code * (ONE / step))
        store(high, i, part)
        store(codes, i, code - part * step)


@compiled
def pack_flags(flags: Floats, target: Bytes, at: int) -> None:
    """256 flags of 0 or 1 to 32 bytes: weights 32 apart share a byte."""
    for i in range(0, 32, WIDTH):
        total = load(flags, i)
        for j in range(1, 8):
            total += load(flags, j * 32 + i) * np.float32(1 << j)
        store_bytes(target, at + i, total)


@compiled
def pack_nibbles(codes: Floats, target: Bytes, at: int, reach: int) -> None:
    """256 four-bit codes to 128 bytes: weights `reach` apart share a byte."""
    for first in range(0, SUPER_BLOCK, 2 * reach):
        for i in range(0, reach, WIDTH):
            pair = load(codes, first + i) + load(codes, first + reach + i) * np.float32(16)
            store_bytes(target, at + first // 2 + i, pair)
