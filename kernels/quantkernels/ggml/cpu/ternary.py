"""TQ1_0 and TQ2_0: block by block, sixteen weights of a block at a time.

Rounding to -1, 0 or 1 is two comparisons, so finding the largest magnitude and packing are all the work there is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.pack import pack_crumbs
from quantkernels.ggml.cpu.search import ONE, ZERO
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import WIDTH, Lanes, buffer, load, magnitude, select, spread, store, store_bytes, whole

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

HALF = np.float32(0.5)
BEYOND = np.float32(1e9)  # only an inverse that overflowed scales a weight past this; C then stores 0
THREE = np.float32(3)
NINE = np.float32(9)


@compiled
def largest_magnitude(rows: Floats, start: int, scratch: Floats) -> np.float32:
    """The largest magnitude of a block; scratch has room for one store."""
    largest = spread(ZERO)
    for i in range(start, start + SUPER_BLOCK, WIDTH):
        size = magnitude(load(rows, i))
        largest = select(size > largest, size, largest)
    store(scratch, 0, largest)
    found = ZERO
    for k in range(WIDTH):
        found = max(found, scratch[k])
    return found


@compiled
def store_codes(rows: Floats, start: int, inverse: np.float32, codes: Floats) -> None:
    """The codes 0, 1, 2 of a block: scaled weights to the nearest integer, halves away from zero, plus 1."""
    for i in range(0, SUPER_BLOCK, WIDTH):
        scaled = load(rows, start + i) * inverse
        up = select((scaled >= HALF) & (scaled < BEYOND), ONE, ZERO)
        down = select((-scaled >= HALF) & (-scaled < BEYOND), ONE, ZERO)
        store(codes, i, up - down + ONE)


@compiled
def as_fraction(number: Lanes) -> Lanes:
    """Numbers below 243 as the smallest bytes that are at least number / 243 of 256; the quotient is never near one."""
    return whole((number * np.float32(256) + np.float32(242)) / np.float32(243))


@compiled
def pack_five(codes: Floats, first: int, reach: int, target: Bytes, at: int) -> None:
    """Sixteen bytes of five codes each, which lie `reach` apart."""
    high = load(codes, first) * NINE + load(codes, first + reach) * THREE + load(codes, first + 2 * reach)
    low = load(codes, first + 3 * reach) * THREE + load(codes, first + 4 * reach)
    store_bytes(target, at, as_fraction(high * NINE + low))


@compiled
def pack_trits(codes: Floats, target: Bytes, at: int) -> None:
    """256 codes to 52 bytes: 32 and 16 bytes of five codes, 4 bytes of four codes and an empty place."""
    pack_five(codes, 0, 32, target, at)
    pack_five(codes, 16, 32, target, at + 16)
    pack_five(codes, 160, 16, target, at + 32)
    for j in range(4):
        number = ((codes[240 + j] * THREE + codes[244 + j]) * THREE + codes[248 + j]) * THREE + codes[252 + j]
        target[at + 48 + j] = int((number * np.float32(768) + np.float32(242)) / np.float32(243))


@kernel
def quantize_ternary(rows: Floats, dense: bool, out: Bytes) -> None:
    """TQ1_0 when `dense`, else TQ2_0, of flat `rows` into flat `out`."""
    codes = buffer(SUPER_BLOCK // WIDTH)
    scratch = buffer(1)
    code_bytes = 52 if dense else 64
    for block in range(len(rows) // SUPER_BLOCK):
        start = block * SUPER_BLOCK
        at = block * (code_bytes + 2)
        d = largest_magnitude(rows, start, scratch)
        store_codes(rows, start, ONE / d if d > ZERO else ZERO, codes)
        if dense:
            pack_trits(codes, out, at)
        else:
            pack_crumbs(codes, out, at)
        store_half(out, at + code_bytes, d)
