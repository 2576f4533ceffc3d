"""TQ1_0 and TQ2_0 of least weighted square error, exactly: sixteen blocks at a time, one per lane.

For any scale d the weights beyond d / 2 are stored as one of +d and -d, so the best codes take the largest magnitudes,
and there are only 256 ways to do that. For each the least-squares d, as float16 leaves it, is tried.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.lanes_sort import below_of, pair_keys, sort_keys, value_of
from quantkernels.ggml.cpu.pack import pack_crumbs
from quantkernels.ggml.cpu.search import ONE, ZERO, gather
from quantkernels.ggml.cpu.ternary import HALF, pack_trits
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.thorough.cpu_search import as_half, place, weigh
from quantkernels.lanes import WIDTH, Lanes, buffer, load, magnitude, select, spread, store

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

TWO = np.float32(2)
LARGEST_HALF = np.float32(65504)


@compiled
def best_scale(x: Floats, weight: Floats, keys: NDArray[np.int64]) -> Lanes:
    """The float16 scale of least error; of equals the one that takes more weights."""
    for i in range(SUPER_BLOCK):
        pair_keys(magnitude(load(x, i * WIDTH)), load(weight, i * WIDTH), keys, i * WIDTH)
    sort_keys(keys, SUPER_BLOCK)
    sum_wx = spread(ZERO)
    sum_w = spread(ZERO)
    best = spread(ZERO)
    scale = spread(ZERO)
    for i in range(SUPER_BLOCK - 1, -1, -1):
        factor = below_of(keys, i * WIDTH)
        sum_wx += factor * value_of(keys, i * WIDTH)
        sum_w += factor
        d = as_half(sum_wx / sum_w)
        error = d * (d * sum_w - TWO * sum_wx)
        better = (error < best) & ~(d > LARGEST_HALF)
        best = select(better, error, best)
        scale = select(better, d, scale)
    return scale


@compiled
def store_nearest(rows: Floats, start: int, scale: np.float32, codes: Floats) -> None:
    """The codes 0, 1, 2 of a block for a scale; half-way goes to 1."""
    border = scale * HALF
    for i in range(0, SUPER_BLOCK, WIDTH):
        value = load(rows, start + i)
        store(codes, i, select(value > border, TWO, ONE) - select(-value > border, ONE, ZERO))


@kernel
def quantize_ternary_thoroughly(rows: Floats, importance: Floats, columns: int, dense: bool, out: Bytes) -> None:
    """TQ1_0 when `dense`, else TQ2_0, of flat `rows` into flat `out`; importance may be empty."""
    x = buffer(SUPER_BLOCK)
    weight = buffer(SUPER_BLOCK)
    codes = buffer(SUPER_BLOCK // WIDTH)
    scales = buffer(1)
    keys = np.empty(SUPER_BLOCK * WIDTH, np.int64)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    code_bytes = 52 if dense else 64
    blocks = len(rows) // SUPER_BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, SUPER_BLOCK, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, x)
        weigh(importance, importance_offsets, SUPER_BLOCK, weight)
        store(scales, 0, best_scale(x, weight, keys))
        for k in range(present):
            at = (group * WIDTH + k) * (code_bytes + 2)
            store_nearest(rows, offsets[k], scales[k], codes)
            if dense:
                pack_trits(codes, out, at)
            else:
                pack_crumbs(codes, out, at)
            store_half(out, at + code_bytes, scales[k])


def quantize_thorough(rows: Floats, importance: Floats | None, name: str, out: Bytes) -> None:
    """Write TQ1_0 or TQ2_0 blocks of least error for `rows` to `out`.

    rows [R, C] f32, finite, contiguous; importance [C] f32 or None for ones; out [R, bytes] u8, contiguous.
    """
    weights = np.empty(0, np.float32) if importance is None else importance
    quantize_ternary_thoroughly(rows.reshape(-1), weights, rows.shape[1], name == "TQ1_0", out.reshape(-1))
