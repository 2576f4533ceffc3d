"""Q4_0, Q5_0, Q8_0, IQ4_NL and Q4_1, Q5_1 with the thorough search: sixteen blocks of 32 at a time, one per lane.

The steps are those of `thorough/reference.py`. A candidate holds its error, the scale and the minimum.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.legacy import pack_codes
from quantkernels.ggml.cpu.search import ONE, ZERO, bounded_codes, extreme_of, gather
from quantkernels.ggml.thorough.cpu_levels import (
    TABLE,
    WHOLE,
    level_error,
    level_sums,
    nearest_code,
)
from quantkernels.ggml.thorough.cpu_pairs import code_sums, pair_error, survey
from quantkernels.ggml.thorough.cpu_search import HIGHEST, as_half, clear, inverse_of, place, take_better, weigh
from quantkernels.lanes import WIDTH, buffer, load, select, spread, store, store_bytes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 32


@compiled
def search_scale(
    x: Floats,
    weight: Floats,
    grid: tuple[int, np.float32, np.float32],
    beyond: Floats,
    sweeps: int,
    candidate: Floats,
    best: Floats,
) -> None:
    """Fill `best` with the scale of least error among the least-squares ones for many roundings."""
    extreme = extreme_of(x, 0, BLOCK)
    tries = len(beyond)
    for r in range(2 * tries + sweeps):
        inverse = inverse_of(load(best, WIDTH))
        if r < tries:
            inverse = (grid[1] - beyond[r]) / extreme
        elif r < 2 * tries:
            inverse = (grid[2] + beyond[r - tries]) / extreme
        sum_xl, sum_l2 = level_sums(x, weight, 0, BLOCK, inverse, grid)
        scale = as_half(sum_xl / sum_l2)
        store(candidate, 0, level_error(x, weight, 0, BLOCK, scale, grid))
        store(candidate, WIDTH, scale)
        take_better(candidate, best, 2)


@kernel
def quantize_scale(
    rows: Floats, importance: Floats, columns: int, bits: int, table: bool, beyond: Floats, sweeps: int, out: Bytes
) -> None:
    """Q4_0, Q5_0, Q8_0 or, with the table, IQ4_NL of flat `rows` into flat `out`; importance may be empty."""
    lowest = np.float32(-127 if table else -(1 << (bits - 1)))
    highest = np.float32(113) if table else -lowest - ONE
    grid = (TABLE if table else WHOLE, lowest, highest)
    block_bytes = 2 + 4 * bits
    x = buffer(BLOCK)
    weight = buffer(BLOCK)
    candidate = buffer(2)
    best = buffer(2)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, BLOCK, offsets, importance_offsets)
        gather(rows, offsets, BLOCK, x)
        weigh(importance, importance_offsets, BLOCK, weight)
        clear(best, 2)
        search_scale(x, weight, grid, beyond, sweeps, candidate, best)
        for k in range(present):
            at = (group * WIDTH + k) * block_bytes
            inverse_k = inverse_of(spread(store_half(out, at, best[WIDTH + k])))
            first = nearest_code(load(rows, offsets[k]) * inverse_k, grid)
            second = nearest_code(load(rows, offsets[k] + WIDTH) * inverse_k, grid)
            if bits == 8:
                store_bytes(out, at + 2, first + lowest)
                store_bytes(out, at + 2 + WIDTH, second + lowest)
            else:
                pack_codes(first, second, bits, out, at + 2)


@compiled
def search_scale_minimum(
    x: Floats,
    weight: Floats,
    above: Floats,
    top: np.float32,
    cuts: Floats,
    sweeps: int,
    candidate: Floats,
    best: Floats,
) -> None:
    """Fill `best` with the pair of least error: the best rounding by least squares, then refits as they are stored.

    above is scratch for the weights less the lowest: sums over these do not lose the error of a block far from 0.
    """
    low, _, _, _ = survey(x, weight, 0, BLOCK)
    for i in range(BLOCK):
        store(above, i * WIDTH, load(x, i * WIDTH) - low)
    _, reach, sum_w, sum_x = survey(above, weight, 0, BLOCK)
    tries = len(cuts)
    best_gain = spread(-HIGHEST)
    best_inverse = top / reach
    best_start = spread(ZERO)
    for r in range(tries * tries + 1 + sweeps):
        inverse = best_inverse
        start = best_start
        if r < tries * tries:
            inverse = top / ((ONE - cuts[r // tries] - cuts[r % tries]) * reach)
            start = cuts[r // tries] * reach
        elif r > tries * tries:
            inverse = inverse_of(load(best, WIDTH))
            start = load(best, 2 * WIDTH) - low
        sum_l, sum_l2, sum_xl = code_sums(above, weight, 0, BLOCK, inverse, start, top)
        minimum = (sum_l2 * sum_x - sum_l * sum_xl) / (sum_w * sum_l2 - sum_l * sum_l)
        if r < tries * tries:
            gain = (sum_xl - minimum * sum_l) / sum_l2 * sum_xl + minimum * sum_x
            better = gain > best_gain
            best_gain = select(better, gain, best_gain)
            best_inverse = select(better, inverse, best_inverse)
            best_start = select(better, start, best_start)
        else:
            minimum = as_half(low + minimum)
            scale = as_half((sum_xl - (minimum - low) * sum_l) / sum_l2)
            store(candidate, 0, pair_error(x, weight, 0, BLOCK, scale, minimum, top))
            store(candidate, WIDTH, scale)
            store(candidate, 2 * WIDTH, minimum)
            take_better(candidate, best, 3)


@kernel
def quantize_scale_minimum(
    rows: Floats, importance: Floats, columns: int, bits: int, cuts: Floats, sweeps: int, out: Bytes
) -> None:
    """Q4_1 or Q5_1 of flat `rows` into flat `out`; importance may be empty."""
    top = np.float32((1 << bits) - 1)
    block_bytes = 4 + 4 * bits
    x = buffer(BLOCK)
    weight = buffer(BLOCK)
    above = buffer(BLOCK)
    candidate = buffer(3)
    best = buffer(3)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, BLOCK, offsets, importance_offsets)
        gather(rows, offsets, BLOCK, x)
        weigh(importance, importance_offsets, BLOCK, weight)
        clear(best, 3)
        search_scale_minimum(x, weight, above, top, cuts, sweeps, candidate, best)
        for k in range(present):
            at = (group * WIDTH + k) * block_bytes
            inverse_k = inverse_of(spread(store_half(out, at, best[WIDTH + k])))
            minimum_k = store_half(out, at + 2, best[2 * WIDTH + k])
            first = bounded_codes((load(rows, offsets[k]) - minimum_k) * inverse_k, ZERO, top)
            second = bounded_codes((load(rows, offsets[k] + WIDTH) - minimum_k) * inverse_k, ZERO, top)
            pack_codes(first, second, bits, out, at + 4)
