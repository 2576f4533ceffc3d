"""Q3_K, Q6_K and IQ4_XS with the thorough search: sixteen super-blocks at a time, one per lane.

The steps are those of `thorough/reference.py`. A candidate holds its error, d, and the integer scales.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.k_symmetric import pack_scales
from quantkernels.ggml.cpu.pack import pack_crumbs, pack_flags, pack_nibbles, split_high
from quantkernels.ggml.cpu.search import ONE, ZERO, extreme_of, gather
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.thorough.cpu_levels import (
    TABLE,
    WHOLE,
    fit_scale,
    level_error,
    level_sums,
    nearest_code,
)
from quantkernels.ggml.thorough.cpu_search import (
    HALF,
    HIGHEST,
    as_half,
    clear,
    inverse_of,
    place,
    take_better,
    weigh,
    whole_within,
)
from quantkernels.lanes import WIDTH, buffer, load, select, spread, store, store_bytes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

HEAD = 2  # lines of a candidate before its integers


@compiled
def search_scales(
    x: Floats,
    weight: Floats,
    size: int,
    grid: tuple[int, np.float32, np.float32],
    limit: np.float32,
    window: tuple[int, int],
    near: Floats,
    candidate: Floats,
) -> None:
    """Fill `candidate`, which holds d, with the best integer scales for it and the error.

    near: the scales around which window[0] integers are tried, then those, of the other sign, that get window[1].
    """
    count = SUPER_BLOCK // size
    d = load(candidate, WIDTH)
    inverse = inverse_of(d)
    total = spread(ZERO)
    for j in range(count):
        best = spread(HIGHEST)
        best_code = spread(ZERO)
        for side in range(2):
            tries = window[side]
            first = load(near, (side * count + j) * WIDTH) * inverse - HALF * np.float32(tries - 1)
            for i in range(tries):
                code = whole_within(first + np.float32(i), -limit, limit - ONE)
                error = level_error(x, weight, j * size, size, d * code, grid)
                better = error < best
                best = select(better, error, best)
                best_code = select(better, code, best_code)
        store(candidate, (HEAD + j) * WIDTH, best_code)
        total += best
    store(candidate, 0, total)


@compiled
def refit_scales(
    x: Floats,
    weight: Floats,
    size: int,
    grid: tuple[int, np.float32, np.float32],
    best: Floats,
    candidate: Floats,
    near: Floats,
) -> None:
    """Put into `candidate` the least-squares d for the integers and codes of `best`, and those scales into `near`."""
    count = SUPER_BLOCK // size
    d = load(best, WIDTH)
    sum_xa = spread(ZERO)
    sum_a2 = spread(ZERO)
    for j in range(count):
        code = load(best, (HEAD + j) * WIDTH)
        sum_xl, sum_l2 = level_sums(x, weight, j * size, size, inverse_of(d * code), grid)
        sum_xa += code * sum_xl
        sum_a2 += code * code * sum_l2
    d = as_half(select(sum_a2 > ZERO, sum_xa / sum_a2, d))
    store(candidate, WIDTH, d)
    for j in range(count):
        store(near, j * WIDTH, d * load(best, (HEAD + j) * WIDTH))


@compiled
def pack_table(scales: Floats, lane: int, codes: Floats, out: Bytes, at: int) -> None:
    """The sub-scales and codes of IQ4_XS."""
    high = 0
    for j in range(0, 8, 2):
        one = int(scales[j * WIDTH + lane]) + 32
        two = int(scales[(j + 1) * WIDTH + lane]) + 32
        high |= ((one >> 4) | ((two >> 4) << 2)) << (2 * j)
        out[at + 4 + j // 2] = (one & 15) | ((two & 15) << 4)
    out[at + 2] = high & 255
    out[at + 3] = high >> 8
    for j in range(8):
        pairs = load(codes, j * 32) + load(codes, j * 32 + WIDTH) * np.float32(16)
        store_bytes(out, at + 8 + j * WIDTH, pairs)


@compiled
def write_scales(
    rows: Floats,
    start: int,
    best: Floats,
    lane: int,
    bits: int,
    grid: tuple[int, np.float32, np.float32],
    codes: Floats,
    out: Bytes,
    at: int,
) -> None:
    """The bytes of the super-block in one lane."""
    size = 32 if bits == 4 else 16
    scales = best[HEAD * WIDTH :]
    high = codes[SUPER_BLOCK:]
    d = store_half(out, at + (0 if bits == 4 else (108 if bits == 3 else 208)), best[WIDTH + lane])
    for j in range(SUPER_BLOCK // size):
        inverse = inverse_of(spread(d * scales[j * WIDTH + lane]))
        for i in range(j * size, (j + 1) * size, WIDTH):
            store(codes, i, nearest_code(load(rows, start + i) * inverse, grid))
    if bits == 4:
        pack_table(scales, lane, codes, out, at)
    elif bits == 3:
        pack_scales(scales, lane, out, at + 96)
        split_high(codes, high, np.float32(4))
        pack_flags(high, out, at)
        pack_crumbs(codes, out, at + 32)
    else:
        for j in range(SUPER_BLOCK // size):
            out[at + 192 + j] = int(scales[j * WIDTH + lane]) & 255
        split_high(codes, high, np.float32(16))
        pack_nibbles(codes, out, at, 64)
        pack_crumbs(high, out, at + 128)


@kernel
def quantize_scales(
    rows: Floats,
    importance: Floats,
    columns: int,
    bits: int,
    beyond: Floats,
    d_tops: Floats,
    first: tuple[int, int],
    late: tuple[int, int],
    sweeps: int,
    out: Bytes,
) -> None:
    """Q3_K (bits 3), Q6_K (bits 6) or IQ4_XS (bits 4) of flat `rows` into flat `out`; importance may be empty."""
    size = 32 if bits == 4 else 16
    count = SUPER_BLOCK // size
    block_bytes = 110 if bits == 3 else (136 if bits == 4 else 210)
    limit = np.float32(128 if bits == 6 else 32)
    lowest = np.float32(-127 if bits == 4 else -(1 << (bits - 1)))
    highest = np.float32(113) if bits == 4 else -lowest - ONE
    grid = (TABLE if bits == 4 else WHOLE, lowest, highest)
    x = buffer(SUPER_BLOCK)
    weight = buffer(SUPER_BLOCK)
    near = buffer(2 * count)
    candidate = buffer(HEAD + count)
    best = buffer(HEAD + count)
    codes = buffer(2 * SUPER_BLOCK // WIDTH)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // SUPER_BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, SUPER_BLOCK, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, x)
        weigh(importance, importance_offsets, SUPER_BLOCK, weight)
        for j in range(count):
            down, gain_down = fit_scale(x, weight, j * size, size, grid, lowest, beyond)
            up, gain_up = fit_scale(x, weight, j * size, size, grid, highest, beyond)
            store(near, j * WIDTH, select(gain_up > gain_down, up, down))
            store(near, (count + j) * WIDTH, select(gain_up > gain_down, down, up))
        steepest = extreme_of(near, 0, count)
        clear(best, HEAD + count)
        for r in range(len(d_tops) + sweeps):  # one loop, because each call here is compiled into the kernel anew
            begun = r >= len(d_tops)
            if begun:
                refit_scales(x, weight, size, grid, best, candidate, near)
            else:
                store(candidate, WIDTH, as_half(steepest / d_tops[r]))
            search_scales(x, weight, size, grid, limit, late if begun else first, near, candidate)
            take_better(candidate, best, HEAD + count)
        for k in range(present):
            write_scales(rows, offsets[k], best, k, bits, grid, codes, out, (group * WIDTH + k) * block_bytes)
