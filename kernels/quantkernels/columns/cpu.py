"""The column loops in numba: sixteen rows at a time, one row per SIMD lane.

Eight columns settle what becomes of each other at once; the columns behind them are then corrected for all eight, so
that a correction is read and written once for eight products.

Within a block of columns the operations and their order are those of `reference.py`, lane by lane, so a weight of at
most 128 columns gets its very bits. Beyond a block the corrections of its 128 columns are summed by a matrix product
before they are added, which rounds differently: codes may then differ where a value lies within about 1e-6 steps
of a tie.

# O out, I in, G groups of a row, C columns of the block, R rows of a tile, L levels.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from quantkernels.columns.reference import WORTH, Codes, Floats, Grid
from quantkernels.compiling import inlined, kernel
from quantkernels.lanes import (
    WIDTH,
    Lanes,
    bits_of,
    buffer,
    load,
    magnitude,
    select,
    spread,
    store,
    store_bytes,
    transpose,
)
from quantkernels.rows import over_rows

Offsets: TypeAlias = NDArray[np.int64]
AT_ONCE = 8  # columns; the code of `correct` says so, too
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to nearest even, up to 2**22
ZERO, HALF, ONE, INFINITE = np.float32(0), np.float32(0.5), np.float32(1), np.float32(np.inf)


def solve(
    weight_OI: Floats,
    shares_II: Floats,
    rough_II: torch.Tensor,
    grid: Grid,
    codes_OI: Codes,
    *,
    block: int,
    threads: int,
) -> None:
    """Fills codes_OI; rough_II is shares_II in the type of the products between blocks."""
    rows, columns = weight_OI.shape
    offs = torch.empty(weight_OI.shape, dtype=rough_II.dtype)
    for first in range(0, columns, block):
        inside = slice(first, min(first + block, columns))
        left_OC = np.ascontiguousarray(weight_OI[:, inside])
        torch.from_numpy(left_OC).add_(offs[:, :first] @ rough_II[:first, inside])
        shares_CC = np.ascontiguousarray(shares_II[inside, inside])
        off_OC = np.empty_like(left_OC)

        def piece(top: int, bottom: int) -> None:
            some = slice(top, bottom)
            solve_block(
                first,  # noqa: B023 - called before the loop goes on
                weight_OI[some],
                left_OC[some],  # noqa: B023
                shares_CC,  # noqa: B023
                grid.scale_OG[some],
                grid.zero_OG[some],
                grid.offset_OG[some],
                grid.group_I,
                np.float32(grid.low),
                np.float32(grid.high),
                _of_rows(grid.levels_OGL, some),
                codes_OI[some],
                off_OC[some],  # noqa: B023
            )

        over_rows(rows, threads, piece)
        offs[:, inside] = torch.from_numpy(off_OC)


def refine(
    first: int,
    slope_OC: Floats,
    off_OI: Floats,
    value_OI: Floats,
    hessian_II: Floats,
    grid: Grid,
    codes_OI: Codes,
    *,
    threads: int,
) -> None:
    """Moves the codes of the block of columns that begins at `first` once; see `reference.refine`, here in place, too.

    slope_OC are the slopes of the block's columns; what they become is not seen.
    """
    inside = slice(first, first + slope_OC.shape[1])
    hessian_CC = np.ascontiguousarray(hessian_II[inside, inside])

    def piece(top: int, bottom: int) -> None:
        some = slice(top, bottom)
        refine_block(
            first,
            value_OI[some],
            hessian_CC,
            grid.scale_OG[some],
            grid.zero_OG[some],
            grid.offset_OG[some],
            grid.group_I,
            np.float32(grid.low),
            np.float32(grid.high),
            _of_rows(grid.levels_OGL, some),
            codes_OI[some],
            slope_OC[some],
            off_OI[some],
        )

    over_rows(len(value_OI), threads, piece)


def _of_rows(levels_OGL: Floats, rows: slice) -> Floats:
    """The levels of these rows; all share the one table that there may be."""
    return levels_OGL if len(levels_OGL) == 1 else levels_OGL[rows]


@inlined
def load_tile(values_OI: Floats, offsets_R: Offsets, first: int, columns: int, tile: Floats) -> None:
    """Fills the tile's first lines with as many columns of its rows, from `first` on."""
    whole = columns // WIDTH * WIDTH
    for i in range(0, whole, WIDTH):
        transpose(values_OI, offsets_R, first + i, tile, i)
    flat = values_OI.reshape(-1)
    for i in range(whole, columns):
        for r in range(WIDTH):
            tile[i * WIDTH + r] = flat[offsets_R[r] + first + i]


@inlined
def load_group(values_OG: Floats, top: int, used: int, group: int, line: Floats) -> None:
    """Fills a line with what `group` has in the tile of rows that begins at `top`."""
    for r in range(used):
        line[r] = values_OG[top + r, group]


@inlined
def load_levels(levels_OGL: Floats, top: int, used: int, group: int, levels: Floats) -> None:
    """Fills `levels`, a line for each, with the levels of `group` in the tile of rows that begins at `top`."""
    many, grouped = levels_OGL.shape[0] > 1, levels_OGL.shape[1] > 1
    for k in range(levels_OGL.shape[2]):
        for r in range(used):
            levels[k * WIDTH + r] = levels_OGL[top + r if many else 0, group if grouped else 0, k]


@inlined
def to_level(steps: Lanes, zero: Lanes, low: Any, high: Any, levels: Floats, count: int) -> Lanes:
    """The nearest that a code can mean to `steps`, wanted values less the offset in units of the scale."""
    if count == 0:
        lowest, highest = low - zero, high - zero
        steps = select(steps < lowest, lowest, steps)
        steps = select(steps > highest, highest, steps)
        return (steps + ROUND) - ROUND
    steps = steps + zero
    level = load(levels, 0)
    for k in range(count - 1):
        below, above = load(levels, k * WIDTH), load(levels, (k + 1) * WIDTH)
        level = select(steps > (below + above) * HALF, above, level)
    return level - zero


@inlined
def code_of(steps: Lanes, zero: Lanes, levels: Floats, count: int) -> Lanes:
    """The codes of levels as to_level gives them; the first of equal levels."""
    level = steps + zero
    if count == 0:
        return level
    code = spread(ZERO)
    for k in range(count - 1):
        middle = (load(levels, k * WIDTH) + load(levels, (k + 1) * WIDTH)) * HALF
        code = code + select(middle < level, spread(ONE), ZERO)
    return code


@inlined
def correct(tile: Floats, shares_CC: Floats, shares: Floats, i: int, columns: int) -> None:
    """Adds to each line j of the tile behind i + 8 what the eight lines of `shares` say, times shares_CC[i .., j]."""
    one, two, three, four = load(shares, 0), load(shares, WIDTH), load(shares, 2 * WIDTH), load(shares, 3 * WIDTH)
    five, six = load(shares, 4 * WIDTH), load(shares, 5 * WIDTH)
    seven, eight = load(shares, 6 * WIDTH), load(shares, 7 * WIDTH)
    for j in range(i + AT_ONCE, columns):
        value = load(tile, j * WIDTH)
        value = value + one * shares_CC[i, j]
        value = value + two * shares_CC[i + 1, j]
        value = value + three * shares_CC[i + 2, j]
        value = value + four * shares_CC[i + 3, j]
        value = value + five * shares_CC[i + 4, j]
        value = value + six * shares_CC[i + 5, j]
        value = value + seven * shares_CC[i + 6, j]
        value = value + eight * shares_CC[i + 7, j]
        store(tile, j * WIDTH, value)


@inlined
def save_values(
    tile: Floats, i: int, wide: int, lines_R: Offsets, square: Floats, values_OI: Floats, top: int, used: int, at: int
) -> None:
    """Writes `wide` lines of the tile, from line i on, as columns of values_OI from `at` on, in the tile's rows."""
    transpose(tile, lines_R, i * WIDTH, square, 0)
    flat, columns = values_OI.reshape(-1), values_OI.shape[1]
    for r in range(used):
        if wide == WIDTH:
            store(values_OI, (top + r) * columns + at, load(square, r * WIDTH))
        else:
            for k in range(wide):
                flat[(top + r) * columns + at + k] = square[r * WIDTH + k]


@inlined
def save_codes(
    tile: Floats, i: int, wide: int, lines_R: Offsets, square: Floats, codes_OI: Codes, top: int, used: int, at: int
) -> None:
    """The same for lines that hold codes."""
    transpose(tile, lines_R, i * WIDTH, square, 0)
    flat, columns = codes_OI.reshape(-1), codes_OI.shape[1]
    for r in range(used):
        if wide == WIDTH:
            store_bytes(codes_OI, (top + r) * columns + at, load(square, r * WIDTH))
        else:
            for k in range(wide):
                flat[(top + r) * columns + at + k] = np.int8(square[r * WIDTH + k])


@kernel
def solve_block(
    first: int,
    weight_OI: Floats,
    left_OC: Floats,
    shares_CC: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    offset_OG: Floats,
    group_I: NDArray[np.int64],
    low: Any,
    high: Any,
    levels_OGL: Floats,
    codes_OI: Codes,
    off_OC: Floats,
) -> None:
    """Rounds the block of columns that begins at `first`: fills its codes and off_OC, what they are off by.

    left_OC are the block's best values, given the blocks before. Takes whole rows of weight and codes: a slice of
    columns is contiguous or not by its width, which would be two types of one kernel.
    """
    rows, columns = off_OC.shape
    count = levels_OGL.shape[2]
    lines = -(-columns // WIDTH) * WIDTH
    tile, weights, offs, codes, square = buffer(lines), buffer(lines), buffer(lines), buffer(lines), buffer(WIDTH)
    scale_R, zero_R, offset_R, levels = buffer(1), buffer(1), buffer(1), buffer(max(1, count))
    offsets_R, lefts_R, lines_R = np.zeros(WIDTH, np.int64), np.zeros(WIDTH, np.int64), np.arange(WIDTH) * WIDTH
    for top in range(0, rows, WIDTH):
        used, loaded = min(WIDTH, rows - top), -1
        for r in range(WIDTH):
            offsets_R[r] = (top + min(r, used - 1)) * weight_OI.shape[1]
            lefts_R[r] = (top + min(r, used - 1)) * columns
        load_tile(left_OC, lefts_R, 0, columns, tile)
        load_tile(weight_OI, offsets_R, first, columns, weights)
        for i in range(columns):
            within = i % AT_ONCE
            group = group_I[first + i]
            if group != loaded:
                load_group(scale_OG, top, used, group, scale_R)
                load_group(zero_OG, top, used, group, zero_R)
                load_group(offset_OG, top, used, group, offset_R)
                load_levels(levels_OGL, top, used, group, levels)
                loaded = group
            scale, zero, offset = load(scale_R, 0), load(zero_R, 0), load(offset_R, 0)
            left = load(tile, i * WIDTH)
            steps = to_level((left - offset) / select(scale == ZERO, INFINITE, scale), zero, low, high, levels, count)
            off = load(weights, i * WIDTH) - (steps * scale + offset)
            store(codes, i * WIDTH, code_of(steps, zero, levels, count))
            store(offs, i * WIDTH, off)
            for j in range(i + 1, min(i - within + AT_ONCE, columns)):
                store(tile, j * WIDTH, load(tile, j * WIDTH) + off * shares_CC[i, j])
            if within == AT_ONCE - 1:
                correct(tile, shares_CC, offs[(i - within) * WIDTH :], i - within, columns)
        for i in range(0, columns, WIDTH):
            save_codes(codes, i, min(WIDTH, columns - i), lines_R, square, codes_OI, top, used, first + i)
            save_values(offs, i, min(WIDTH, columns - i), lines_R, square, off_OC, top, used, i)


@kernel
def refine_block(
    first: int,
    value_OI: Floats,
    hessian_CC: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    offset_OG: Floats,
    group_I: NDArray[np.int64],
    low: Any,
    high: Any,
    levels_OGL: Floats,
    codes_OI: Codes,
    slope_OC: Floats,
    off_OI: Floats,
) -> None:
    """Moves each code of the block that begins at `first` to where the error is least, the others held.

    slope_OC holds the slopes inside the block; those of columns still to come are kept up to date in a tile.
    """
    rows, columns = slope_OC.shape
    count, stride = levels_OGL.shape[2], value_OI.shape[1]
    lines = -(-columns // WIDTH) * WIDTH
    slopes, values, changes, codes = buffer(lines), buffer(lines), buffer(lines), buffer(lines)
    levels, scale_R, zero_R, offset_R = buffer(max(1, count)), buffer(1), buffer(1), buffer(1)
    offsets_R, slopes_R = np.zeros(WIDTH, np.int64), np.zeros(WIDTH, np.int64)
    flat_codes, flat_off, flat_value = codes_OI.reshape(-1), off_OI.reshape(-1), value_OI.reshape(-1)
    for top in range(0, rows, WIDTH):
        used, loaded = min(WIDTH, rows - top), -1
        for r in range(WIDTH):
            offsets_R[r] = (top + min(r, used - 1)) * stride
            slopes_R[r] = (top + min(r, used - 1)) * columns
        load_tile(slope_OC, slopes_R, 0, columns, slopes)
        load_tile(value_OI, offsets_R, first, columns, values)
        moved = False
        for i in range(columns):
            within = i % AT_ONCE
            group = group_I[first + i]
            if group != loaded:
                load_group(scale_OG, top, used, group, scale_R)
                load_group(zero_OG, top, used, group, zero_R)
                load_group(offset_OG, top, used, group, offset_R)
                load_levels(levels_OGL, top, used, group, levels)
                loaded = group
            scale, zero, offset = load(scale_R, 0), load(zero_R, 0), load(offset_R, 0)
            old = load(values, i * WIDTH)
            best = old - load(slopes, i * WIDTH) / hessian_CC[i, i]
            steps = to_level((best - offset) / select(scale == ZERO, INFINITE, scale), zero, low, high, levels, count)
            value = steps * scale + offset
            better = magnitude(value - best) < magnitude(old - best) * WORTH
            change = select(better, value - old, ZERO)
            store(changes, i * WIDTH, change)
            store(values, i * WIDTH, value)
            store(codes, i * WIDTH, code_of(steps, zero, levels, count))
            if bits_of(better) != 0:
                moved = True
                for j in range(i + 1, min(i - within + AT_ONCE, columns)):
                    store(slopes, j * WIDTH, load(slopes, j * WIDTH) + change * hessian_CC[i, j])
            if within == AT_ONCE - 1 and moved:
                correct(slopes, hessian_CC, changes[(i - within) * WIDTH :], i - within, columns)
                moved = False
        for i in range(columns):
            for r in range(used):
                if changes[i * WIDTH + r] != ZERO:
                    at = offsets_R[r] + first + i
                    flat_off[at] += changes[i * WIDTH + r]
                    flat_value[at] = values[i * WIDTH + r]
                    flat_codes[at] = np.int8(codes[i * WIDTH + r])
