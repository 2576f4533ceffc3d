"""MXFP4 and NVFP4 with the thorough search: every scale near the one that ggml would take, sixteen blocks at a time.

The steps are those of `thorough/reference.py`. A candidate holds its error, the scale, and the byte that says it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.fp4 import half_e8m0, half_ue4m3, ue4m3_of
from quantkernels.ggml.cpu.search import ZERO, extreme_of, gather
from quantkernels.ggml.thorough.cpu_levels import FLOAT4, level_error, nearest_code
from quantkernels.ggml.thorough.cpu_search import clear, inverse_of, place, take_better, weigh
from quantkernels.lanes import WIDTH, buffer, load, magnitude, spread, store, store_bytes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

GRID = (FLOAT4, np.float32(0), np.float32(0))
MXFP4_STEPS = (-2, 1)  # exponents around the one that brings the largest weight between 4 and 8
NVFP4_STEPS = (-5, 6)  # bytes around the one that brings the largest weight to 6; five or six up bring it to 4
SIX = np.float32(6)


@compiled
def search_bytes(
    x: Floats, weight: Floats, count: int, powers: bool, steps: tuple[int, int], candidate: Floats, best: Floats
) -> None:
    """Fill `best` with the stored scale of least error: a power of two, or a float of eight bits."""
    middle = buffer(1)
    bits = middle.view(np.int32)
    extreme = magnitude(extreme_of(x, 0, count))
    store(middle, 0, extreme if powers else extreme / SIX)
    clear(best, 3)
    for step in range(steps[0], steps[1] + 1):
        for k in range(WIDTH):
            if powers:
                field = min(max((int(bits[k]) >> 23) - 2 + step, 0), 254)
                candidate[WIDTH + k] = half_e8m0(field)
            else:
                field = min(max(min(ue4m3_of(middle[k], int(bits[k])), 126) + step, 0), 126)
                candidate[WIDTH + k] = half_ue4m3(field)
            candidate[2 * WIDTH + k] = np.float32(field)
        store(candidate, 0, level_error(x, weight, 0, count, load(candidate, WIDTH), GRID))
        take_better(candidate, best, 3)


@kernel
def quantize_mxfp4_thoroughly(rows: Floats, importance: Floats, columns: int, out: Bytes) -> None:
    """MXFP4 of flat `rows` into flat `out`; importance may be empty."""
    x = buffer(32)
    weight = buffer(32)
    candidate = buffer(3)
    best = buffer(3)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // 32
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, 32, offsets, importance_offsets)
        gather(rows, offsets, 32, x)
        weigh(importance, importance_offsets, 32, weight)
        search_bytes(x, weight, 32, True, MXFP4_STEPS, candidate, best)
        for k in range(present):
            at = (group * WIDTH + k) * 17
            out[at] = int(best[2 * WIDTH + k])
            inverse = inverse_of(spread(best[WIDTH + k]))
            first = nearest_code(load(rows, offsets[k]) * inverse, GRID)
            second = nearest_code(load(rows, offsets[k] + WIDTH) * inverse, GRID)
            store_bytes(out, at + 1, first + second * np.float32(16))


@kernel
def quantize_nvfp4_thoroughly(rows: Floats, importance: Floats, columns: int, out: Bytes) -> None:
    """NVFP4 of flat `rows` into flat `out`; importance may be empty. Sub-blocks of 16 are searched one by one."""
    x = buffer(WIDTH)
    weight = buffer(WIDTH)
    candidate = buffer(3)
    best = buffer(3)
    codes = buffer(2)
    pairs = np.empty(WIDTH, np.uint8)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    parts = len(rows) // WIDTH
    store(codes, WIDTH, spread(ZERO))
    for group in range((parts + WIDTH - 1) // WIDTH):
        present = place(group, parts, columns, WIDTH, offsets, importance_offsets)
        gather(rows, offsets, WIDTH, x)
        weigh(importance, importance_offsets, WIDTH, weight)
        search_bytes(x, weight, WIDTH, False, NVFP4_STEPS, candidate, best)
        for k in range(present):
            part = group * WIDTH + k
            at = part // 4 * 36
            out[at + part % 4] = int(best[2 * WIDTH + k])
            inverse = inverse_of(spread(best[WIDTH + k]))
            store(codes, 0, nearest_code(load(rows, offsets[k]) * inverse, GRID))
            store_bytes(pairs, 0, load(codes, 0) + load(codes, 8) * np.float32(16))
            for i in range(8):
                out[at + 4 + part % 4 * 8 + i] = pairs[i]
