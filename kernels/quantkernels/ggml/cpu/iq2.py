"""IQ2_XXS, IQ2_XS and IQ2_S: the search over lattice points, sixteen super-blocks at a time.

What all weights do alike runs in lane order, one super-block in each lane. What differs from group to group, the walk
through a list of neighbours, turns the lanes around: sixteen neighbours of one group at a time. The alternative, each
lane walking its own list, would wait for the longest of sixteen lists and gather every point.

Codes of groups are float32 numbers below 65536, plus OFF for a group that was not on the lattice and was moved there.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, inlined, kernel
from quantkernels.ggml.cpu.iq2_pack import GROUP, GROUPS, HALF, INDEX_BITS, code_scales, pack, turn_signs
from quantkernels.ggml.cpu.lanes_lattice import errors_of, first_least, odd_level, one_of, store_whole, tables_of, whole
from quantkernels.ggml.cpu.pack import place, weigh
from quantkernels.ggml.cpu.search import ONE, ZERO, gather, search_nonnegative, sum_of_squares
from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import (
    WIDTH,
    Lanes,
    Mask,
    bits_of,
    buffer,
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
Words = NDArray[np.uint16]
Integers = NDArray[np.int32]
Numbers = NDArray[np.uint32]
Longs = NDArray[np.int64]

TWO = np.float32(2)
THREE = np.float32(3)
FOUR = np.float32(4)
FIVE = np.float32(5)
TENTH = np.float32(0.1)
OFF = np.float32(65536)
MOST = np.float32(3.4028235e38)
SAFE = np.float32(1e6)  # a value this many times the scale still rounds without ggml's wrap-around at 2**22


class Space(NamedTuple):
    """What the search of one sub-block works on; Floats lie in lane order."""

    x: Floats  # magnitudes of the super-blocks
    weight: Floats
    roots: Floats  # of the weights
    chosen: Floats  # codes of the sub-block's groups at the scale being tried
    found: Floats  # the best codes of all groups of the super-blocks
    scale: Floats  # the scale being tried
    row: Numbers  # for each group of the sub-block what it rounds to
    waiting: Longs  # entries of groups off the lattice; one place more than groups
    rows: Numbers  # of `search_tables`
    codes: Words  # of `search_tables`


@cache
def search_tables(name: str) -> tuple[Numbers, Words, Integers]:
    """What the kernel walks through for a type: (rows u32 [3**8], codes u16 [chunks * 16], index_of i32).

    A row stands for the code whose levels are its digits to base 3: 64 * first chunk + 2 * chunks + (1 if it is off the
    lattice). Neighbour j of C chunks lies in chunk j % C, lane j // C, so the first of equals is in the first lane. A
    point is its own only neighbour; the last neighbour fills up a row.
    """
    known = lattice(name)
    code_P = ((known.points.astype(np.int64) - 1) // 2 << 2 * np.arange(GROUP)).sum(axis=1)
    digits_RD = np.arange(3**GROUP)[:, None] // 3 ** np.arange(GROUP) % 3
    index_R = known.index_of[(digits_RD << 2 * np.arange(GROUP)).sum(axis=1)]
    off_R = index_R < 0
    row_R = np.where(off_R, -1 - index_R, 0)
    count_R = np.where(off_R, np.diff(known.neighbour_start)[row_R], 1)
    chunks_R = (count_R + WIDTH - 1) // WIDTH
    first_R = np.concatenate([[0], np.cumsum(chunks_R)])
    owner = np.repeat(np.arange(3**GROUP), chunks_R * WIDTH)
    chunk, lane = np.divmod(np.arange(len(owner)) - first_R[owner] * WIDTH, WIDTH)
    neighbour = np.minimum(lane * chunks_R[owner] + chunk, count_R[owner] - 1)
    start_R = known.neighbour_start[row_R]
    point = np.where(
        off_R[owner], known.neighbours[start_R[owner] + np.where(off_R[owner], neighbour, 0)], index_R[owner]
    )
    rows = 64 * first_R[:-1] + 2 * chunks_R + off_R
    return rows.astype(np.uint32), code_P[point].astype(np.uint16), known.index_of


@compiled
def split_signs(x: Floats, weight: Floats, even: bool, signs: Floats) -> None:
    """Leave magnitudes in `x` and each group's signs, weight i worth 2**i, in `signs`.

    With `even` the weight that costs least is turned where the count of minuses is odd: its magnitude is below zero.
    """
    for group in range(GROUPS):
        at = group * GROUP
        total = spread(ZERO)
        odd = total > ZERO
        least = spread(ZERO)
        cheapest = spread(ZERO)
        change = spread(ZERO)
        for i in range(GROUP):
            value = load(x, (at + i) * WIDTH)
            minus = value < ZERO
            bit = np.float32(1 << i)
            total = select(minus, total + bit, total)
            odd = (odd | minus) & ~(odd & minus)
            cost = load(weight, (at + i) * WIDTH) * value * value
            toward = select(minus, -bit, spread(bit))
            store(x, (at + i) * WIDTH, select(minus, -value, value))
            if i == 0:
                least = cost
                change = toward
            else:
                less = cost < least
                least = select(less, cost, least)
                cheapest = select(less, np.float32(i), cheapest)
                change = select(less, toward, change)
        if even:
            for i in range(GROUP):
                value = load(x, (at + i) * WIDTH)
                turn = odd & (cheapest == np.float32(i))
                store(x, (at + i) * WIDTH, select(turn, -value, value))
            total = select(odd, total + change, total)
        store(signs, group * WIDTH, total)


@inlined
def round_group(x: Floats, at: int, inverse: Lanes, wraps: bool) -> tuple[Lanes, Lanes]:
    """What the magnitudes of a group round to: (row of `search_tables`, code)."""
    row = spread(ZERO)
    code = spread(ZERO)
    power = 1  # 3 to the power of i
    for i in range(GROUP):
        digit = np.float32(power)
        bit = np.float32(1 << (2 * i))
        scaled = inverse * load(x, (at + i) * WIDTH)
        if wraps:
            level = nearest_wrapped(HALF * (scaled - ONE))
            level = select(level < ZERO, ZERO, level)
            level = select(level > TWO, TWO, level)
            row += level * digit
            code += level * bit
        else:  # the nearest of 1, 3, 5 with ties to the even level, without a rounding instruction
            middle, high = scaled > TWO, scaled >= FOUR
            row = select(middle, row + digit, row)
            row = select(high, row + digit, row)
            code = select(middle, code + bit, code)
            code = select(high, code + bit, code)
        power *= 3
    return row, code


@inlined
def list_waiting(space: Space, count: int) -> int:
    """Fill `waiting` with the groups off the lattice, 64 * (entry in the table) + place; gives how many there are.

    Without a branch: nobody can predict which groups are on the lattice.
    """
    found = 0
    for place_of in range(count):
        entry = whole(space.rows[space.row[place_of]])
        space.waiting[np.uint64(found)] = (entry << 6) | place_of
        found += entry & 1
    return found


@inlined
def snap_waiting(space: Space, at: int, count: int) -> None:
    """The code of the best neighbour, the first of equals, for each group that waits."""
    for k in range(count):  # here and not around a call, which would cost as much as the search
        entry = space.waiting[k]
        place_of = entry & 63
        lane = place_of & 15
        chunks = (entry >> 7) & 31
        first = (entry >> 12) * WIDTH
        begin = (at + (place_of >> 4) * GROUP) * WIDTH + lane
        tables = tables_of(space.x, space.roots, begin, space.scale[lane])
        best = errors_of(space.codes, first, tables)
        if chunks == 1:
            first += first_least(best)
        else:
            where = spread(ZERO)
            for chunk in range(1, chunks):
                error = errors_of(space.codes, first + chunk * WIDTH, tables)
                less = error < best
                best = select(less, error, best)
                where = select(less, np.float32(chunk), where)
            winner = first_least(best)
            first += winner + WIDTH * int(one_of(where, winner))
        space.chosen[place_of] = np.float32(space.codes[np.uint64(first)]) + OFF


@inlined
def snap(space: Space, at: int, size: int, inverse: Lanes, scale: Lanes, active: Mask, largest: Lanes) -> None:
    """The codes of a sub-block's groups for one scale, to `chosen`; largest is the largest magnitude."""
    limit = spread(SAFE)
    wraps = bits_of(active & ~(limit >= magnitude(inverse * largest))) != 0  # not "<", which a NaN would pass
    groups = size // GROUP
    for k in range(groups):
        row, code = round_group(space.x, at + k * GROUP, inverse, wraps)
        store_whole(space.row, k * WIDTH, row)
        store(space.chosen, k * WIDTH, code)
    waiting = list_waiting(space, groups * WIDTH)
    store(space.scale, 0, scale)
    snap_waiting(space, at, waiting)


@inlined
def fit(space: Space, at: int, size: int, codes: Floats) -> tuple[Lanes, Lanes]:
    """The weighted sums of x q and of q q for the levels q of `codes`."""
    sum_xq = spread(ZERO)
    sum_q2 = spread(ZERO)
    for k in range(size // GROUP):
        code = load(codes, k * WIDTH)
        for i in range(GROUP):
            odd = odd_level(code, i)
            factor = load(space.weight, (at + k * GROUP + i) * WIDTH)
            sum_xq += factor * load(space.x, (at + k * GROUP + i) * WIDTH) * odd
            sum_q2 += factor * odd * odd
    return sum_xq, sum_q2


@inlined
def replace(found: Floats, chosen: Floats, groups: int, may: Mask) -> Mask:
    """Take the codes of the last rounding where they `may` be: for all groups of IQ2_XXS, or those off the lattice.

    Gives the lanes where any was taken.
    """
    taken = may & ~may
    for k in range(groups):
        old = load(found, k * WIDTH)
        moved = may
        if groups != 4:
            moved = may & (old >= OFF)
        taken = taken | moved
        store(found, k * WIDTH, select(moved, load(chosen, k * WIDTH), old))
    return taken


@compiled
def search(space: Space, at: int, size: int, tiny: np.float32) -> Lanes:
    """The scale of a sub-block, 0 where it is stored as zeros; its groups' codes go to `found`."""
    groups = size // GROUP
    found = space.found[at // GROUP * WIDTH :]
    high = load(space.x, at * WIDTH)
    largest = spread(ZERO)
    for i in range(at, at + size):
        value = load(space.x, i * WIDTH)
        high = select(value > high, value, high)
        largest = select(magnitude(value) > largest, magnitude(value), largest)
    active = ~(high < tiny)
    reach = high
    scale = high / FIVE
    steps = 9
    if size == 32:
        steps = 6
        scale = search_nonnegative(space.x[at * WIDTH :], space.weight[at * WIDTH :], space.roots, size, 4)
        reach = scale * THREE
        active = active & ~(spread(ZERO) >= reach)  # past the range of float32 it is NaN, and so is the result
    for i in range(at, at + size):
        store(space.roots, i * WIDTH, root(load(space.weight, i * WIDTH)))
    for k in range(groups):
        store(found, k * WIDTH, spread(ZERO))
    best = spread(ZERO)
    refit = active & ~active
    for step in range(-steps, steps + 2):
        last = step > steps  # one more rounding at the best scale: here, so that the rounding is compiled once
        inverse = ONE / scale if last else (FIVE + np.float32(step) * TENTH) / reach
        snap(space, at, size, inverse, scale if last else ONE / inverse, active, largest)
        if last:
            refit = replace(found, space.chosen, groups, active & (scale > ZERO))
            break
        sum_xq, sum_q2 = fit(space, at, size, space.chosen)
        ratio = sum_xq / sum_q2
        better = (sum_q2 > ZERO) & (sum_xq * sum_xq > best * sum_q2)
        scale = select(better, ratio, scale)
        best = select(better, ratio * sum_xq, best)
        for k in range(groups):
            store(found, k * WIDTH, select(better, load(space.chosen, k * WIDTH), load(found, k * WIDTH)))
    sum_xq, sum_q2 = fit(space, at, size, found)
    scale = select(refit & (sum_q2 > ZERO), sum_xq / sum_q2, scale)
    for k in range(groups):
        store(found, k * WIDTH, select(active, load(found, k * WIDTH), ZERO))
    return select(active, scale, ZERO)


@compiled
def weigh_alone(x: Floats, weight: Floats) -> None:
    """The search weights of IQ2_S without importance: half the mean square of the super-block plus x * x."""
    mean_square = np.float32(0.25) * (TWO * sum_of_squares(x, 0, SUPER_BLOCK) / np.float32(SUPER_BLOCK))
    for i in range(SUPER_BLOCK):
        value = load(x, i * WIDTH)
        store(weight, i * WIDTH, mean_square + value * value)


@kernel
def quantize_iq2(
    rows: Floats,
    importance: Floats,
    columns: int,
    bits: int,
    lattice_rows: Numbers,
    codes: Words,
    index_of: Integers,
    out: Bytes,
) -> None:
    """IQ2_XXS, IQ2_XS or IQ2_S (`bits` of an index 8, 9 or 10) of flat `rows` into flat `out`.

    importance may be empty for IQ2_S; the tables are those of `search_tables`.
    """
    space = Space(
        buffer(SUPER_BLOCK),
        buffer(SUPER_BLOCK),
        buffer(SUPER_BLOCK),
        buffer(4),
        buffer(GROUPS),
        buffer(1),
        np.empty(4 * WIDTH, np.uint32),
        np.empty(4 * WIDTH + 1, np.int64),
        lattice_rows,
        codes,
    )
    signs = buffer(GROUPS)
    scales = buffer(SUPER_BLOCK // 16 + 2)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    size = 32 if bits == 8 else 16
    tiny = np.float32(1e-8) if bits == 10 else np.float32(1e-15)
    blocks = len(rows) // SUPER_BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, space.x)
        overflows = sum_of_squares(space.x, 0, SUPER_BLOCK) > MOST  # ggml would make these zeros, or fail
        if len(importance) > 0:
            gather(importance, importance_offsets, SUPER_BLOCK, space.weight)
            weigh(space.x, space.weight, TWO if bits == 10 else ONE)
        else:
            weigh_alone(space.x, space.weight)
        split_signs(space.x, space.weight, bits < 10, signs)
        for j in range(SUPER_BLOCK // size):
            scale = search(space, j * size, size, tiny)
            turn_signs(signs, j * size // GROUP, size // GROUP, scale)
            store(scales, j * WIDTH, magnitude(scale))
        code_scales(scales, SUPER_BLOCK // size, np.float32(0.9875) if bits == 10 else ONE, overflows)
        for k in range(present):
            pack(out, group * WIDTH + k, k, bits, scales, space.found, signs, index_of)


def quantize_rows(rows: Floats, importance: Floats, columns: int, name: str, out: Bytes) -> None:
    """IQ2_XXS, IQ2_XS or IQ2_S of flat `rows` into flat `out`; importance [columns] f32, or empty for IQ2_S only.

    Raises ValueError without importance where ggml refuses to do without.
    """
    if len(importance) == 0 and name != "IQ2_S":
        raise ValueError(f"{name} needs importance; without it ggml makes none either")
    quantize_iq2(rows, importance, columns, INDEX_BITS[name], *search_tables(name), out)
