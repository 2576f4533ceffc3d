"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: sixteen blocks of 32 at a time, one per lane.

Without importance a block needs only its extremes; with importance the searches of the k-quants run on it, weighted by
the mean square of the whole row (Q8_0 has no such variant).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.search import (
    ONE,
    ZERO,
    bounded_codes,
    extreme_of,
    gather,
    search_scale_min,
    search_symmetric,
    trial_codes,
)
from quantkernels.lanes import (
    WIDTH,
    Lanes,
    bits_of,
    buffer,
    load,
    magnitude,
    root,
    select,
    spread,
    store,
    store_bytes,
    whole,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]

BLOCK = 32
HALF = np.float32(0.5)
BEYOND = np.float32(1e9)  # only an inverse that overflowed scales a weight past this; C then stores byte 0
WITH_IMPORTANCE = (np.float32(-0.9), np.float32(0.05), 36)


@compiled
def place(group: int, blocks: int, offsets: Offsets) -> int:
    """Where the sixteen blocks of `group` start; gives how many there are. Past the end the last one is repeated."""
    for k in range(WIDTH):
        offsets[k] = min(group * WIDTH + k, blocks - 1) * BLOCK
    return min(WIDTH, blocks - group * WIDTH)


@compiled
def within(scaled: Lanes) -> Lanes:
    """0 where the value is NaN or too large for a C integer."""
    return select(magnitude(scaled) < BEYOND, scaled, ZERO)


@compiled
def round_half_away(scaled: Lanes) -> Lanes:
    """C's roundf."""
    towards_zero = whole(scaled)
    rest = scaled - towards_zero
    up = select(rest >= HALF, ONE, ZERO)
    down = select(-rest >= HALF, ONE, ZERO)
    return towards_zero + up - down


@compiled
def inverse_of(scale: Lanes) -> Lanes:
    return select(scale == ZERO, ZERO, ONE / scale)


@compiled
def pack_codes(first: Lanes, second: Lanes, bits: int, target: Bytes, at: int) -> None:
    """32 codes of 4 or 5 bits, in two halves, to sixteen bytes; the fifth bits go to the four bytes before them."""
    if bits == 5:
        half = np.float32(16)
        fifth = bits_of(first >= half) | (bits_of(second >= half) << 16)
        for i in range(4):
            target[at + i] = (fifth >> (8 * i)) & 255
        first = select(first >= half, first - half, first)
        second = select(second >= half, second - half, second)
    store_bytes(target, at + (4 if bits == 5 else 0), first + second * np.float32(16))


@kernel
def quantize_q8_0(rows: Floats, out: Bytes) -> None:
    """Q8_0 of flat `rows` into flat `out`."""
    x = buffer(BLOCK)
    found = buffer(2)
    offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, offsets)
        gather(rows, offsets, BLOCK, x)
        scale = magnitude(extreme_of(x, 0, BLOCK)) / np.float32(127)
        store(found, 0, scale)
        store(found, WIDTH, inverse_of(scale))
        for k in range(present):
            at = (group * WIDTH + k) * 34
            store_half(out, at, found[k])
            for i in range(0, BLOCK, WIDTH):
                scaled = load(rows, offsets[k] + i) * found[WIDTH + k]
                store_bytes(out, at + 2 + i, round_half_away(within(scaled)))


@compiled
def range_codes(
    rows: Floats, start: int, low: np.float32, inverse: np.float32, shift: np.float32, top: np.float32
) -> Lanes:
    """Sixteen codes: (x - low) * inverse + shift without its fraction, at most `top`."""
    codes = whole(within((load(rows, start) - low) * inverse + shift))
    return select(codes > top, top, codes)


@compiled
def mean_squares(rows: Floats, columns: int) -> Floats:
    """The mean square of each row, added in order; sixteen rows at a time."""
    count = len(rows) // columns
    means = np.empty((count + WIDTH - 1) // WIDTH * WIDTH, np.float32)
    tile = buffer(WIDTH)
    offsets = np.empty(WIDTH, np.int64)
    for first in range(0, count, WIDTH):
        for k in range(WIDTH):
            offsets[k] = min(first + k, count - 1) * columns
        total = spread(ZERO)
        for column in range(0, columns, WIDTH):
            gather(rows[column:], offsets, WIDTH, tile)
            for i in range(WIDTH):
                value = load(tile, i * WIDTH)
                total += value * value
        store(means, first, total / np.float32(columns))
    return means


@kernel
def quantize_by_range(rows: Floats, bits: int, with_minimum: bool, out: Bytes) -> None:
    """Q4_0, Q5_0 or, with a minimum, Q4_1, Q5_1 of flat `rows` into flat `out`, without importance."""
    x = buffer(BLOCK)
    found = buffer(3)
    offsets = np.empty(WIDTH, np.int64)
    top = np.float32((1 << bits) - 1)
    middle = 1 << (bits - 1)
    field_bytes = 4 if with_minimum else 2
    block_bytes = field_bytes + (16 if bits == 4 else 20)
    blocks = len(rows) // BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, offsets)
        gather(rows, offsets, BLOCK, x)
        if with_minimum:
            low = load(x, 0)
            high = low
            for i in range(1, BLOCK):
                value = load(x, i * WIDTH)
                low = select(value < low, value, low)
                high = select(value > high, value, high)
            scale = (high - low) / top
        else:
            low = spread(ZERO)
            scale = extreme_of(x, 0, BLOCK) / np.float32(-middle)
        store(found, 0, scale)
        store(found, WIDTH, inverse_of(scale))
        store(found, 2 * WIDTH, low)
        shift = HALF if with_minimum else np.float32(middle) + HALF
        for k in range(present):
            at = (group * WIDTH + k) * block_bytes
            store_half(out, at, found[k])
            if with_minimum:
                store_half(out, at + 2, found[2 * WIDTH + k])
            first = range_codes(rows, offsets[k], found[2 * WIDTH + k], found[WIDTH + k], shift, top)
            second = range_codes(rows, offsets[k] + WIDTH, found[2 * WIDTH + k], found[WIDTH + k], shift, top)
            pack_codes(first, second, bits, out, at + field_bytes)


@compiled
def searched_codes(
    rows: Floats, start: int, inverse: np.float32, low: np.float32, limit: int, with_minimum: bool
) -> Lanes:
    """Sixteen codes that the search ended with."""
    value = load(rows, start)
    if with_minimum:
        return trial_codes(inverse * (value - low), np.float32(limit), True)
    if inverse == ZERO:
        return spread(ZERO)
    return bounded_codes(inverse * value, np.float32(-limit), np.float32(limit - 1)) + np.float32(limit)


@kernel
def quantize_by_search(
    rows: Floats, importance: Floats, columns: int, bits: int, with_minimum: bool, out: Bytes
) -> None:
    """Q4_0, Q5_0 or, with a minimum, Q4_1, Q5_1 of flat `rows` into flat `out`, with importance."""
    x = buffer(BLOCK)
    weight = buffer(BLOCK)
    scratch = buffer(BLOCK)
    found = buffer(4)
    mean_square = buffer(1)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    means = mean_squares(rows, columns)
    limit = (1 << bits) - 1 if with_minimum else 1 << (bits - 1)
    field_bytes = 4 if with_minimum else 2
    block_bytes = field_bytes + (16 if bits == 4 else 20)
    blocks = len(rows) // BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, offsets)
        for k in range(WIDTH):
            importance_offsets[k] = offsets[k] % columns
            mean_square[k] = means[offsets[k] // columns]
        gather(rows, offsets, BLOCK, x)
        gather(importance, importance_offsets, BLOCK, weight)
        mean = load(mean_square, 0)
        for i in range(BLOCK):
            value = load(x, i * WIDTH)
            store(weight, i * WIDTH, load(weight, i * WIDTH) * root(mean + value * value))
        if with_minimum:
            scale, depth, inverse, low = search_scale_min(
                x, weight, scratch, 0, BLOCK, limit, WITH_IMPORTANCE, False, True
            )
            store(found, WIDTH, -depth)
            store(found, 3 * WIDTH, low)
        else:
            scale, inverse = search_symmetric(x, weight, 0, BLOCK, limit)
        store(found, 0, scale)
        store(found, 2 * WIDTH, inverse)
        for k in range(present):
            at = (group * WIDTH + k) * block_bytes
            store_half(out, at, found[k])
            if with_minimum:
                store_half(out, at + 2, found[WIDTH + k])
            low_k = found[3 * WIDTH + k]
            first = searched_codes(rows, offsets[k], found[2 * WIDTH + k], low_k, limit, with_minimum)
            second = searched_codes(rows, offsets[k] + WIDTH, found[2 * WIDTH + k], low_k, limit, with_minimum)
            pack_codes(first, second, bits, out, at + field_bytes)
