"""IQ3_XXS and IQ3_S: super-blocks around the search of `cpu/iq3_search.py`, with the bytes of ggml.

Source: see `reference/iq3.py`, which also tells about the skipped sub-blocks of IQ3_S.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numpy.typing import NDArray

from quantkernels.compiling import inlined, instruction, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.iq3_search import (
    CODES,
    HALF,
    ONES,
    SUMS,
    TRIALS,
    TWO,
    WORK_LINES,
    best_trial,
    lowest_bit,
    refine,
    try_scales,
)
from quantkernels.ggml.cpu.pack import place
from quantkernels.ggml.cpu.search import ONE, ZERO, gather, sum_of_squares
from quantkernels.ggml.lattice import Lattice, lattice
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import (
    WIDTH,
    Lanes,
    bits_of,
    buffer,
    lanes_type,
    load,
    magnitude,
    nearest_wrapped,
    root,
    select,
    spread,
    store,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Shorts = NDArray[np.int16]
Integers = NDArray[np.int32]
Points = NDArray[np.uint16]

FIFTEEN = np.float32(15)
EIGHTEEN = np.float32(18)
XXS_TINY = np.float32(1e-8)  # IQ3_XXS stores a sub-block whose largest magnitude is below this as scale 0
XXS_FUDGE = np.float32(1.0125)
S_FUDGE = np.float32(1.033)
HUGE = np.float32(np.inf)
WRAPPING = np.float32(1e6)  # levels from which ggml's rounding may wrap around, with a margin of four


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A lattice as the search wants it: by codes, with points as it writes them.

    lists [2 * 4096]: for each code where its candidates begin in `neighbours` times 256, plus the number of fours they
    come in: 0 on the lattice, where the code's own point stands. First the lists of candidates that can win inside a
    cell, then ggml's own. neighbours: points in the order of ggml, the last repeated to make the four full.
    index [4096]: the index of a lattice point by its code. inverses [48]: the trials' inverse scales times the largest
    magnitude; from 32 on, those after the sixteenth four times over.
    """

    lists: Integers
    neighbours: Points
    index: Shorts
    inverses: Floats


@cache
def tables(name: str) -> Tables:
    """The tables of IQ3_XXS or IQ3_S."""
    grid = lattice(name)
    reach = 15 if name == "IQ3_XXS" else 9
    steps = np.minimum(np.arange(-reach, -reach + 32), reach).astype(np.float32)
    inverses = np.float32(15) + steps * np.float32(0.2)
    point_P = (grid.points.astype(np.int32) << np.arange(0, 16, 4, dtype=np.int32)).sum(axis=1).astype(np.uint16)
    row_K = np.where(grid.index_of < 0, -1 - grid.index_of, 0)
    count_K = np.where(grid.index_of < 0, np.diff(grid.neighbour_start)[row_K], 1)
    start_K = np.cumsum(count_K) - count_K
    code_C = np.arange(CODES).repeat(count_K)
    place_C = grid.neighbour_start[row_K[code_C]] + np.arange(len(code_C)) - start_K[code_C]
    point_C = np.where(grid.index_of[code_C] < 0, grid.neighbours[place_C], grid.index_of[code_C])
    needed_C = ~_dominated(grid, code_C, point_C, int(count_K.max()))
    parts = [_in_fours(code_C[needed_C], point_P[point_C[needed_C]]), _in_fours(code_C, point_P[point_C])]
    sizes = [np.where(grid.index_of < 0, fours_K, 0) for fours_K, _ in parts]
    starts = [4 * (np.cumsum(fours_K) - fours_K) for fours_K, _ in parts]
    starts[1] += len(parts[0][1])
    return Tables(
        lists=(np.concatenate(starts) * 256 + np.concatenate(sizes)).astype(np.int32),
        neighbours=np.concatenate([neighbours for _, neighbours in parts]),
        index=np.maximum(grid.index_of, 0).astype(np.int16),
        inverses=np.concatenate([inverses, np.tile(inverses[16:20], 4)]),
    )


def _in_fours(code_C: NDArray[np.int64], point_C: Points) -> tuple[NDArray[np.int64], Points]:
    """For each code the number of fours its candidates fill, and the candidates, each code's last one repeated."""
    count_K = np.bincount(code_C, minlength=CODES)
    fours_K = (count_K + 3) // 4
    last_K = np.cumsum(count_K) - 1
    owner = np.arange(CODES).repeat(4 * fours_K)
    rank = np.arange(len(owner)) - (4 * (np.cumsum(fours_K) - fours_K))[owner]
    return fours_K, point_C[np.minimum(last_K[owner] - count_K[owner] + 1 + rank, last_K[owner])]


def _dominated(grid: Lattice, code_C: NDArray[np.int64], point_C: NDArray[np.int64], longest: int) -> NDArray[np.bool_]:
    """Which candidates have another one, earlier in their list, between themselves and the code in all dimensions."""
    away_CD = (grid.points[point_C] // 2).astype(np.int64) - ((code_C[:, None] >> np.arange(0, 12, 3)) & 7)
    dominated = np.zeros(len(code_C), np.bool_)
    for reach in range(1, longest):
        near, far = away_CD[:-reach], away_CD[reach:]
        between = ((near * far >= 0) & (np.abs(near) <= np.abs(far))).all(axis=1)
        dominated[reach:] |= between & (code_C[:-reach] == code_C[reach:])
    return dominated


def quantize_iq3(rows: Floats, importance: Floats, columns: int, name: str, out: Bytes) -> None:
    """IQ3_XXS or IQ3_S of flat `rows` into flat `out`; importance may be empty."""
    known = tables(name)
    search_rows(
        rows,
        importance,
        columns,
        name == "IQ3_XXS",
        known.lists,
        known.neighbours,
        known.index,
        known.inverses,
        out,
    )


@instruction
def least_of_eights(typing_context: Any, value: Any) -> Any:
    """The least of the first eight lanes in each of them, and of the other eight in those."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        result = values[0]
        for reach in (4, 2, 1):
            turned = [k // 8 * 8 + (k + reach) % 8 for k in range(WIDTH)]
            other = builder.shuffle_vector(result, result, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), turned))
            result = builder.select(builder.fcmp_ordered("<", other, result), other, result)
        return result

    return lanes_type(value), emit


@instruction
def largest_of(typing_context: Any, value: Any) -> Any:
    """The largest of sixteen lanes, none of them NaN."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        result = values[0]
        for reach in (8, 4, 2, 1):
            turned = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [(k + reach) % WIDTH for k in range(WIDTH)])
            other = builder.shuffle_vector(result, result, turned)
            result = builder.select(builder.fcmp_ordered(">", other, result), other, result)
        return builder.extract_element(result, ir.Constant(ir.IntType(32), 0))

    return types.float32(value), emit


@inlined
def fill_block(
    rows: Floats, start: int, importance: Floats, importance_start: int, mean_square: np.float32, block: Floats
) -> tuple[np.float32, int]:
    """Fill `block` with what `try_scales` needs, without flipped signs; gives the largest magnitude and the signs."""
    largest = spread(ZERO)
    signs = 0
    for half in range(2):
        at = half * WIDTH
        x = load(rows, start + at)
        square = x * x
        weight = square
        if len(importance) > 0:
            weight = load(importance, importance_start + at) * root(mean_square + square)
        size = magnitude(x)
        largest = select(size > largest, size, largest)
        signs |= bits_of(x < ZERO) << at
        store(block, at, size)
        store(block, 32 + at, weight)
        store(block, 64 + at, root(weight))
        store(block, 96 + at, weight * size)
    return largest_of(largest), signs


@inlined
def make_even(rows: Floats, start: int, signs: int, block: Floats) -> tuple[np.float32, int]:
    """Turn the cheapest of eight signs where the minus signs are odd in number; gives the largest value, the signs."""
    cheapest = 0
    for half in range(2):
        x = load(rows, start + half * WIDTH)
        cost = load(block, 32 + half * WIDTH) * x * x
        cheapest |= bits_of(cost == least_of_eights(cost)) << (half * WIDTH)
    for k in range(4):
        own = (signs >> (8 * k)) & 255
        own ^= own >> 4
        own ^= own >> 2
        if (own ^ (own >> 1)) & 1:
            lowest = (cheapest >> (8 * k)) & 255
            at = 8 * k + (lowest_bit(lowest) if lowest != 0 else 0)
            block[at] = -block[at]
            block[96 + at] = -block[96 + at]
            signs ^= 1 << at
    left, right = load(block, 0), load(block, WIDTH)
    return largest_of(select(right > left, right, left)), signs


@inlined
def store_sub_block(indices: Integers, signs: int, xxs: bool, j: int, slot: int, out: Bytes, at: int) -> None:
    """Write the indices and signs of sub-block j; IQ3_S takes the place of the next `slot` for all but ninth bits."""
    ninth = 0
    for g in range(8):
        out[at + 2 + 8 * slot + g] = indices[g] & 255
        ninth |= (indices[g] >> 8) << g
    if not xxs:
        out[at + 66 + j] = ninth
        for k in range(4):
            out[at + 74 + 4 * slot + k] = (signs >> (8 * k)) & 255
        return
    word = 0
    for k in range(4):
        word |= ((signs >> (8 * k)) & 127) << (7 * k)
    for k in range(4):
        out[at + 66 + 4 * j + k] = (word >> (8 * k)) & 255


@inlined
def store_sub_scale(code: int, xxs: bool, j: int, out: Bytes, at: int) -> None:
    """Write the sub-scale of sub-block j over zeros."""
    if xxs:
        out[at + 69 + 4 * j] |= np.uint8(code << 4)
    else:
        out[at + 106 + j // 2] |= np.uint8(code << (4 * (j % 2)))


@inlined
def store_scales(scales: Floats, xxs: bool, out: Bytes, at: int) -> None:
    """Write d and the eight 4-bit sub-scales for `scales`, the largest of which becomes 15."""
    largest = ZERO
    for j in range(8):
        largest = max(largest, scales[j])
    if largest == ZERO:
        if xxs:
            out[at : at + 98] = 0
        return
    d = largest / np.float32(31)
    store_half(out, at, d * (XXS_FUDGE if xxs else S_FUDGE))
    store(scales, 0, level_of_scale(ONE / d, load(scales, 0)))
    for j in range(8):
        store_sub_scale(int(scales[j]), xxs, j, out, at)


@inlined
def level_of_scale(inverse: np.float32, scale: Lanes) -> Lanes:
    """The sub-scale, 0 to 15, that a scale is rounded to."""
    code = nearest_wrapped(HALF * (inverse * scale - ONE))
    code = select(code < ZERO, ZERO, code)
    return select(code > FIFTEEN, FIFTEEN, code)


@inlined
def search_sub_block(
    block: Floats,
    most: np.float32,
    largest: np.float32,
    xxs: bool,
    lists: Integers,
    neighbours: Points,
    index: Shorts,
    inverses: Floats,
    work: Floats,
    flags: Integers,
    indices: Integers,
) -> np.float32:
    """Fill `indices` with the points of the sub-block in `block`; gives its scale, below 0 where all signs turn.

    most is the largest magnitude, largest that of the values whose sign is their own; work has WORK_LINES, flags 24.
    """
    plain = bool(most * (EIGHTEEN / largest) < WRAPPING)
    try_scales(block, largest, plain, xxs, lists, neighbours, inverses, work, flags)
    trial = best_trial(work, 31 if xxs else 19)
    scale = largest / FIFTEEN
    off_grid = not xxs
    for g in range(8):
        indices[g] = ONES
        flags[16 + g] = xxs
    if trial >= 0:
        off_grid = False
        scale = work[SUMS * WIDTH + trial]
        line, bit = trial // WIDTH, trial % WIDTH
        for g in range(8):
            indices[g] = int(work[(TRIALS + 8 * line + g) * WIDTH + bit])
            flags[16 + g] = (flags[8 * line + g] >> bit) & 1
            off_grid |= flags[16 + g] == 0
    if off_grid and scale > ZERO:
        scale = refine(block, scale, not xxs, flags, indices, lists, neighbours, work)
    for g in range(8):
        bits = indices[g] >> 1
        code = (bits & 7) | ((bits >> 1) & 0o70) | ((bits >> 2) & 0o700) | ((bits >> 3) & 0o7000)
        indices[g] = index[code]
    return scale


@kernel
def search_rows(
    rows: Floats,
    importance: Floats,
    columns: int,
    xxs: bool,
    lists: Integers,
    neighbours: Points,
    index: Shorts,
    inverses: Floats,
    out: Bytes,
) -> None:
    """The kernel of both types; the tables are those of `Tables`."""
    x = buffer(SUPER_BLOCK)
    mean_squares = buffer(1)
    block, scales, work = buffer(8), buffer(1), buffer(WORK_LINES)
    flags, indices = np.empty(24, np.int32), np.empty(8, np.int32)
    offsets, importance_offsets = np.empty(WIDTH, np.int64), np.empty(WIDTH, np.int64)
    size = 98 if xxs else 110
    blocks = len(rows) // SUPER_BLOCK
    store(mean_squares, 0, spread(ZERO))
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, offsets, importance_offsets)
        if len(importance) > 0:
            gather(rows, offsets, SUPER_BLOCK, x)
            store(mean_squares, 0, TWO * sum_of_squares(x, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK))
        for k in range(present):
            at = (group * WIDTH + k) * size
            out[at : at + size] = 0
            slot = 0
            store(scales, 0, spread(ZERO))
            for j in range(8):
                start = offsets[k] + 32 * j
                most, signs = fill_block(
                    rows, start, importance, importance_offsets[k] + 32 * j, mean_squares[k], block
                )
                largest = most
                if xxs:
                    largest, signs = make_even(rows, start, signs, block)
                if largest < XXS_TINY if xxs else largest == ZERO:
                    continue
                scale = search_sub_block(
                    block, most, largest, xxs, lists, neighbours, index, inverses, work, flags, indices
                )
                if scale < ZERO:
                    scale = -scale
                    signs = ~signs
                if scale != scale:  # sums overflowed: a d that the caller refuses
                    scale = HUGE
                scales[j] = scale
                store_sub_block(indices, signs, xxs, j, j if xxs else slot, out, at)
                slot += 1
            store_scales(scales, xxs, out, at)
