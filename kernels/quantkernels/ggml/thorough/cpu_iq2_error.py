"""Which of two IQ2 blocks has the lower error: both are decoded as a reader does it, and summed in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.iq2_pack import GROUP, GROUPS, HALF
from quantkernels.ggml.cpu.lanes_lattice import whole
from quantkernels.ggml.layout import SUPER_BLOCK

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@compiled
def with_eighth(signs: int) -> int:
    """Seven signs, and an eighth that makes the count of minuses even."""
    odd = signs ^ (signs >> 4)
    odd = odd ^ (odd >> 2)
    return signs | (((odd ^ (odd >> 1)) & 1) << 7)


@compiled
def fields_of(blocks: Bytes, at: int, bits: int, group: int) -> tuple[int, int, int]:
    """A group's (scale code, index, signs) in the block at `at`."""
    if bits == 8:
        word = 0
        for k in range(4):
            word |= whole(blocks[at + 6 + 8 * (group // 4) + k]) << (8 * k)
        return (
            word >> 28,
            whole(blocks[at + 2 + 8 * (group // 4) + group % 4]),
            with_eighth(word >> (7 * (group % 4)) & 127),
        )
    code = whole(blocks[at + (66 if bits == 9 else 74) + group // 4]) >> (4 * (group // 2 % 2)) & 15
    if bits == 9:
        word = whole(blocks[at + 2 + 2 * group]) | (whole(blocks[at + 3 + 2 * group]) << 8)
        return code, word & 511, with_eighth(word >> 9)
    high = whole(blocks[at + 66 + group // 4]) >> (2 * (group % 4)) & 3
    return code, whole(blocks[at + 2 + group]) | (high << 8), whole(blocks[at + 34 + group])


@compiled
def error_of(
    blocks: Bytes, at: int, bits: int, d: np.float32, rows: Floats, start: int, weights: Floats, values: Floats
) -> float:
    """The weighted square error, in float64, of what a decoder makes of the block at `at`."""
    total = 0.0
    for group in range(GROUPS):
        code, index, signs = fields_of(blocks, at, bits, group)
        scale = d * (HALF + np.float32(code)) * np.float32(0.25)
        for i in range(GROUP):
            value = scale * values[index * GROUP + i]
            wanted = rows[start + group * GROUP + i]
            difference = np.float64(-value if signs >> i & 1 else value) - np.float64(wanted)
            total += np.float64(weights[group * GROUP + i]) * (difference * difference)
    return total


@kernel
def take_better(
    rows: Floats,
    importance: Floats,
    bits: int,
    values: Floats,
    found_d: Floats,
    found: Bytes,
    d: Floats,
    out: Bytes,
) -> None:
    """Replace each block of flat `out` by that of flat `found` where that has a lower error; d [blocks], their d."""
    size = len(out) // len(d)
    for block in range(len(d)):
        start = block * SUPER_BLOCK
        weights = importance[start % len(importance) :]
        old = error_of(out, block * size, bits, d[block], rows, start, weights, values)
        if error_of(found, block * size, bits, found_d[block], rows, start, weights, values) < old:
            out[block * size : (block + 1) * size] = found[block * size : (block + 1) * size]
