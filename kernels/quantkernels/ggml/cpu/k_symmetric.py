"""Q6_K and Q3_K, whose sub-blocks have a signed scale: sixteen super-blocks at a time, one per lane.

As in `cpu/k_scale_min.py` the search runs in lane order, rounding and packing block by block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.pack import pack_crumbs, pack_flags, pack_nibbles, place, split_high, weigh
from quantkernels.ggml.cpu.search import (
    ONE,
    TINY,
    ZERO,
    bounded_codes,
    extreme_of,
    gather,
    search_descent,
    search_symmetric,
    sum_of,
    wrapped_codes,
)
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import WIDTH, Lanes, buffer, load, magnitude, select, spread, store

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

COUNT = 16  # sub-blocks in a super-block, and weights in a sub-block
STRIDE = COUNT * WIDTH


@compiled
def square(x: Floats, weight: Floats) -> None:
    """Weights x * x."""
    for i in range(SUPER_BLOCK):
        value = load(x, i * WIDTH)
        store(weight, i * WIDTH, value * value)


@compiled
def round_symmetric(
    rows: Floats, start: int, at: int, codes: Floats, scale: np.float32, inverse: np.float32, limit: int
) -> None:
    """Sixteen codes in [0, 2 limit) for a stored scale; where it is 0 those that the search ended with."""
    value = load(rows, start)
    low = np.float32(-limit)
    high = np.float32(limit - 1)
    if scale != ZERO:
        code = wrapped_codes(value / spread(scale), low, high) + np.float32(limit)
    elif inverse != ZERO:
        code = bounded_codes(inverse * value, low, high) + np.float32(limit)
    else:
        code = spread(ZERO)
    store(codes, at, code)


@compiled
def search_group(x: Floats, weight: Floats, found: Floats, limit: int) -> None:
    """Fill `found`, in lane order, with the scales, the inverses and the weight sums of the sub-blocks."""
    for j in range(COUNT):
        scale, inverse = search_symmetric(x, weight, j * COUNT, COUNT, limit)
        store(found, j * WIDTH, scale)
        store(found, STRIDE + j * WIDTH, inverse)
        store(found, 2 * STRIDE + j * WIDTH, sum_of(weight, j * COUNT, COUNT))


@compiled
def scales_by_extreme(found: Floats, limit: int, codes: Floats) -> tuple[Lanes, Lanes]:
    """Signed codes with the extreme scale at -limit; gives (d, extreme)."""
    extreme = extreme_of(found, 0, COUNT)
    inverse = np.float32(-limit) / extreme
    for j in range(COUNT):
        code = wrapped_codes(inverse * load(found, j * WIDTH), np.float32(-limit), np.float32(limit - 1))
        store(codes, j * WIDTH, code)
    return ONE / inverse, extreme


@kernel
def quantize_q6_k(rows: Floats, importance: Floats, columns: int, out: Bytes) -> None:
    """Q6_K of flat `rows` into flat `out`; importance may be empty."""
    x = buffer(SUPER_BLOCK)
    weight = buffer(SUPER_BLOCK)
    found = buffer(3 * COUNT)
    sub_codes = buffer(COUNT + 2)
    codes = buffer(SUPER_BLOCK // WIDTH)
    high = buffer(SUPER_BLOCK // WIDTH)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // SUPER_BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, x)
        if len(importance) > 0:
            gather(importance, importance_offsets, SUPER_BLOCK, weight)
        else:
            square(x, weight)
        search_group(x, weight, found, 32)
        scale, extreme = scales_by_extreme(found, 128, sub_codes)
        store(sub_codes, STRIDE, scale)
        store(sub_codes, STRIDE + WIDTH, magnitude(extreme))
        for k in range(present):
            at = (group * WIDTH + k) * 210
            if sub_codes[STRIDE + WIDTH + k] < TINY:
                out[at : at + 210] = 0
                continue
            d = store_half(out, at + 208, sub_codes[STRIDE + k])
            for j in range(COUNT):
                code = sub_codes[j * WIDTH + k]
                out[at + 192 + j] = int(code) & 255
                inverse = found[STRIDE + j * WIDTH + k]
                round_symmetric(rows, offsets[k] + j * COUNT, j * COUNT, codes, d * code, inverse, 32)
            split_high(codes, high, np.float32(16))
            pack_nibbles(codes, out, at, 64)
            pack_crumbs(high, out, at + 128)


@compiled
def fit_scales(found: Floats, codes: Floats) -> Lanes:
    """Signed 6-bit codes for the scales by the symmetric search, weighted by the weight sums; gives d."""
    scale, inverse = search_symmetric(found, found[2 * STRIDE :], 0, COUNT, 32)
    for j in range(COUNT):
        code = bounded_codes(inverse * load(found, j * WIDTH), np.float32(-32), np.float32(31))
        store(codes, j * WIDTH, select(inverse == ZERO, np.float32(-32), code))
    return scale


@compiled
def pack_scales(codes: Floats, lane: int, target: Bytes, at: int) -> None:
    """The twelve bytes of one lane's sixteen 6-bit scales, stored plus 32: low nibbles, then high crumbs."""
    for j in range(4):
        target[at + 8 + j] = 0
    for j in range(8):
        first = int(codes[j * WIDTH + lane]) + 32
        second = int(codes[(j + 8) * WIDTH + lane]) + 32
        target[at + j] = (first & 15) | ((second & 15) << 4)
        crumbs = ((first >> 4) << (2 * (j // 4))) | ((second >> 4) << (2 * (j // 4 + 2)))
        target[at + 8 + j % 4] |= np.uint8(crumbs)


@kernel
def quantize_q3_k(rows: Floats, importance: Floats, columns: int, out: Bytes) -> None:
    """Q3_K of flat `rows` into flat `out`; importance may be empty."""
    x = buffer(SUPER_BLOCK)
    weight = buffer(SUPER_BLOCK)
    found = buffer(3 * COUNT)
    sub_codes = buffer(COUNT + 1)
    codes = buffer(SUPER_BLOCK // WIDTH)
    high = buffer(SUPER_BLOCK // WIDTH)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // SUPER_BLOCK
    weighed = len(importance) > 0
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, x)
        if weighed:
            gather(importance, importance_offsets, SUPER_BLOCK, weight)
            weigh(x, weight, np.float32(2))
            search_group(x, weight, found, 4)
            scale = fit_scales(found, sub_codes)
        else:
            for j in range(0, COUNT, 2):
                first, second = search_descent(x, weight, j * COUNT, COUNT, 4)
                store(found, j * WIDTH, first)
                store(found, (j + 1) * WIDTH, second)
            scale, extreme = scales_by_extreme(found, 32, sub_codes)
            scale = select(extreme == ZERO, ZERO, scale)
            for j in range(COUNT):
                code = select(extreme == ZERO, np.float32(-32), load(sub_codes, j * WIDTH))
                store(sub_codes, j * WIDTH, code)
        store(sub_codes, STRIDE, scale)
        for k in range(present):
            at = (group * WIDTH + k) * 110
            d = store_half(out, at + 108, sub_codes[STRIDE + k])
            pack_scales(sub_codes, k, out, at + 96)
            for j in range(COUNT):
                factor = d * sub_codes[j * WIDTH + k]
                inverse = found[STRIDE + j * WIDTH + k] if weighed else ZERO
                round_symmetric(rows, offsets[k] + j * COUNT, j * COUNT, codes, factor, inverse, 4)
                if not weighed and factor == ZERO:
                    for i in range(j * COUNT, (j + 1) * COUNT):
                        codes[i] = weight[i * WIDTH + k]
            split_high(codes, high, np.float32(4))
            pack_flags(high, out, at)
            pack_crumbs(codes, out, at + 32)
