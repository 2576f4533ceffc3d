"""Q2_K, Q4_K and Q5_K, whose sub-blocks have a scale and a minimum: sixteen super-blocks at a time, one per lane.

The search runs in lane order. What follows it, rounding to the stored scales and packing, runs block by block on
sixteen neighbouring weights, where bytes come out in file order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.pack import pack_crumbs, pack_flags, pack_nibbles, place, split_high, weigh
from quantkernels.ggml.cpu.search import (
    ZERO,
    gather,
    search_nonnegative,
    search_scale_min,
    sum_of,
    sum_of_squares,
    trial_codes,
    wrapped_codes,
)
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import (
    WIDTH,
    Lanes,
    buffer,
    load,
    low_byte,
    magnitude,
    nearest_wrapped,
    root,
    select,
    spread,
    store,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int64]

ALONE_2 = (np.float32(-0.5), np.float32(0.1), 15)
ALONE_4 = (np.float32(-1.0), np.float32(0.1), 20)
ALONE_5 = (np.float32(-0.5), np.float32(0.1), 15)
WITH_IMPORTANCE = (np.float32(-0.9), np.float32(0.05), 36)


@compiled
def weigh_alone(x: Floats, weight: Floats, at: int, count: int, with_mean: bool) -> None:
    """The weights of a sub-block without importance: |x|, plus the root mean square when `with_mean`."""
    mean = spread(ZERO)
    if with_mean:
        mean = root(sum_of_squares(x, at, count) / np.float32(count))
    for i in range(at, at + count):
        store(weight, i * WIDTH, mean + magnitude(load(x, i * WIDTH)))


@compiled
def scales_by_maximum(values: Floats, codes: Floats, count: int, limit: int) -> Lanes:
    """Codes with the largest value at `limit`; gives the scale. Only codes up to 63 are clamped, as in ggml."""
    top = np.float32(limit)
    high = spread(ZERO)
    for i in range(count):
        value = load(values, i * WIDTH)
        high = select(value > high, value, high)
    inverse = select(high > ZERO, top / high, ZERO)
    for i in range(count):
        code = low_byte(nearest_wrapped(inverse * load(values, i * WIDTH)))
        store(codes, i * WIDTH, select(code > top, top, code) if limit == 63 else code)
    return high / top


@compiled
def pack_pairs(scales: Floats, depths: Floats, lane: int, limit: int, target: Bytes, at: int) -> None:
    """The twelve bytes of eight 6-bit (scale, depth) pairs of one lane."""
    for j in range(4):
        scale = min(int(scales[j * WIDTH + lane]), limit)
        depth = min(int(depths[j * WIDTH + lane]), limit)
        late_scale = min(int(scales[(j + 4) * WIDTH + lane]), limit)
        late_depth = min(int(depths[(j + 4) * WIDTH + lane]), limit)
        target[at + j] = (scale | ((late_scale >> 4) << 6)) & 255
        target[at + 4 + j] = (depth | ((late_depth >> 4) << 6)) & 255
        target[at + 8 + j] = (late_scale & 15) | ((late_depth & 15) << 4)


@compiled
def pair_at(target: Bytes, at: int, j: int) -> tuple[np.float32, np.float32]:
    """The j-th (scale, depth) that a reader finds in the twelve bytes at `at`."""
    if j < 4:
        return np.float32(target[at + j] & 63), np.float32(target[at + 4 + j] & 63)
    scale = (target[at + 4 + j] & 15) | ((target[at + j - 4] >> 6) << 4)
    depth = (target[at + 4 + j] >> 4) | ((target[at + j] >> 6) << 4)
    return np.float32(scale), np.float32(depth)


@compiled
def round_scale_min(
    rows: Floats, start: int, count: int, at: int, codes: Floats, scale: np.float32, depth: np.float32, limit: int
) -> None:
    """Codes of `count` neighbouring weights for a stored scale, which is not 0, and depth; written from `at` on."""
    for i in range(0, count, WIDTH):
        scaled = (load(rows, start + i) + depth) / spread(scale)
        store(codes, at + i, wrapped_codes(scaled, ZERO, np.float32(limit)))


@compiled
def repeat_search(
    rows: Floats,
    start: int,
    count: int,
    at: int,
    codes: Floats,
    inverse: np.float32,
    low: np.float32,
    limit: int,
    bounded: bool,
) -> None:
    """The codes that the search ended with, for a sub-block whose stored scale is 0."""
    for i in range(0, count, WIDTH):
        scaled = inverse * (load(rows, start + i) - low)
        store(codes, at + i, trial_codes(scaled, np.float32(limit), bounded))


@compiled
def search_group(
    x: Floats,
    weight: Floats,
    found: Floats,
    sub_codes: Floats,
    size: int,
    limit: int,
    scale_limit: int,
    steps: tuple[np.float32, np.float32, int],
    weighed: bool,
) -> None:
    """Scales and depths of sixteen super-blocks.

    found, in lane order: scales, depths, inverses, minimums, weight sums of the sub-blocks, then d and dmin.
    sub_codes: the codes of the scales, then those of the depths.
    """
    count = SUPER_BLOCK // size
    stride = count * WIDTH
    scratch = buffer(32)
    for j in range(count):
        at = j * size
        if not weighed:
            weigh_alone(x, weight, at, size, limit > 3)
        scale, depth, inverse, low = search_scale_min(
            x, weight, scratch, at, size, limit, steps, limit == 3 and not weighed, weighed
        )
        store(found, j * WIDTH, scale)
        store(found, stride + j * WIDTH, depth)
        store(found, 2 * stride + j * WIDTH, inverse)
        store(found, 3 * stride + j * WIDTH, low)
        store(found, 4 * stride + j * WIDTH, sum_of(weight, at, size))
    for part in range(2):
        values = found[part * stride : (part + 1) * stride]
        targets = sub_codes[part * stride : (part + 1) * stride]
        if weighed:
            scale = search_nonnegative(values, found[4 * stride : 5 * stride], targets, count, scale_limit)
        else:
            scale = scales_by_maximum(values, targets, count, scale_limit)
        store(found, 5 * stride + part * WIDTH, scale)


@kernel
def quantize_scale_min(rows: Floats, importance: Floats, columns: int, bits: int, out: Bytes) -> None:
    """Q4_K (bits 4), Q5_K (bits 5) or Q2_K (bits 2) of flat `rows`, into flat `out`; importance may be empty."""
    size = 16 if bits == 2 else 32
    limit = (1 << bits) - 1
    block_bytes = 84 if bits == 2 else (144 if bits == 4 else 176)
    scale_limit = 15 if bits == 2 else 63
    weighed = len(importance) > 0
    steps = WITH_IMPORTANCE
    if not weighed:
        steps = ALONE_4 if bits == 4 else ALONE_5
    count = SUPER_BLOCK // size
    stride = count * WIDTH
    x = buffer(SUPER_BLOCK)
    weight = buffer(SUPER_BLOCK)
    found = buffer(5 * count + 2)
    sub_codes = buffer(2 * count)
    codes = buffer(SUPER_BLOCK // WIDTH)
    high = buffer(SUPER_BLOCK // WIDTH)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // SUPER_BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, x)
        if weighed:
            gather(importance, importance_offsets, SUPER_BLOCK, weight)
            weigh(x, weight, np.float32(1 if bits == 2 else 2))
        search_group(x, weight, found, sub_codes, size, limit, scale_limit, steps, weighed)
        for k in range(present):
            at = (group * WIDTH + k) * block_bytes
            field = at + (80 if bits == 2 else 0)
            d = store_half(out, field, found[5 * stride + k])
            dmin = store_half(out, field + 2, found[5 * stride + WIDTH + k])
            if bits > 2:
                pack_pairs(sub_codes, sub_codes[stride:], k, 63 if bits == 5 else 255, out, at + 4)
            for j in range(count):
                if bits == 2:
                    pair = int(sub_codes[j * WIDTH + k]) | (int(sub_codes[stride + j * WIDTH + k]) << 4)
                    out[at + j] = pair & 255
                    scale, depth = np.float32(pair & 15), np.float32((pair >> 4) & 15)
                else:
                    scale, depth = pair_at(out, at + 4, j)
                start = offsets[k] + j * size
                if d * scale != ZERO:
                    round_scale_min(rows, start, size, j * size, codes, d * scale, dmin * depth, limit)
                else:
                    inverse = found[2 * stride + j * WIDTH + k]
                    low = found[3 * stride + j * WIDTH + k]
                    repeat_search(rows, start, size, j * size, codes, inverse, low, limit, weighed)
            if bits == 2:
                pack_crumbs(codes, out, at + 16)
            else:
                if bits == 5:
                    split_high(codes, high, np.float32(16))
                    pack_flags(high, out, at + 16)
                pack_nibbles(codes, out, at + block_bytes - 128, 32)
