"""IQ2_XXS, IQ2_XS and IQ2_S with a lower error than ggml's: the steps of `thorough/reference/iq2.py` in lanes.

Sixteen super-blocks at a time, one in each lane; every lattice point is tried for every group. A group's sums over its
eight weights are split in two halves of four with 81 combinations of levels each, so a point costs two additions.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.iq2 import TWO, quantize_rows
from quantkernels.ggml.cpu.iq2_pack import GROUP, GROUPS, HALF, INDEX_BITS, Integers, pack
from quantkernels.ggml.cpu.lanes_lattice import picked, raised, value_of, whole
from quantkernels.ggml.cpu.pack import place
from quantkernels.ggml.cpu.search import ONE, ROUND, ZERO, gather
from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.layout import SUPER_BLOCK, TYPES
from quantkernels.ggml.packing.fields import half_at
from quantkernels.ggml.thorough.cpu_iq2_error import take_better
from quantkernels.ggml.thorough.reference_iq2 import D_RATIOS, SCALE_RATIOS
from quantkernels.lanes import WIDTH, Lanes, buffer, load, magnitude, root, select, spread, store

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

HALVES = 81  # combinations of the levels of four weights
LEAST = np.float32(-3.4028235e38)
FIFTEEN = np.float32(15)
VALUES = (np.float32(1), np.float32(3.125), np.float32(5.375))  # what the decoder multiplies d * (2 scale + 1) with
SQUARES = (np.float32(1), np.float32(9.765625), np.float32(28.890625))
SAMPLES = len(SCALE_RATIOS)


@cache
def point_tables(name: str) -> tuple[Integers, Floats, Integers]:
    """What `search_iq2` needs of a type: where each point's halves lie in the tables [2 P], its code [P], index_of."""
    known = lattice(name)
    levels_PD = (known.points.astype(np.int64) - 1) // 2
    halves = levels_PD.reshape(-1, 2, 4) @ 3 ** np.arange(4) + np.array([0, HALVES])
    codes = (levels_PD << 2 * np.arange(GROUP)).sum(axis=1)
    return (halves.reshape(-1) * WIDTH).astype(np.int32), codes.astype(np.float32), known.index_of


class Thorough(NamedTuple):
    """What the search of one sub-block works on, in lane order."""

    x: Floats  # the super-blocks with their signs
    weight: Floats
    terms: Floats  # of one group: level l of weight i in line 3 i + l
    tables: Floats  # of one group, from `fill_tables`
    sums: Floats
    three: Floats  # scales being tried
    chosen: Floats  # codes of each group at these scales
    found: Floats  # the best codes of all groups of the super-blocks


@compiled
def fill_half(terms: Floats, first: int, table: Floats, at: int, least: bool) -> None:
    """The sums, or the least, of the `terms` of four weights from `first` on, for all their levels, to line `at` on."""
    for high in range(9):
        third = load(terms, (3 * (first + 2) + high % 3) * WIDTH)
        fourth = load(terms, (3 * (first + 3) + high // 3) * WIDTH)
        for low in range(9):
            total = load(terms, (3 * first + low % 3) * WIDTH)
            second = load(terms, (3 * (first + 1) + low // 3) * WIDTH)
            if least:
                total = select(second < total, second, total)
                total = select(third < total, third, total)
                total = select(fourth < total, fourth, total)
            else:
                total = total + second + third + fourth
            store(table, (at + high * 9 + low) * WIDTH, total)


@compiled
def fill_tables(x: Floats, weight: Floats, group: int, even: bool, terms: Floats, tables: Floats) -> None:
    """The tables of a group's halves: linear terms 2 w |x| u, squares w u u, and what turning a sign costs.

    x has its signs. The last is 0 where the count of minuses is even, or need not be.
    """
    odd = spread(ZERO) > ZERO
    for i in range(GROUP):
        minus = load(x, (group * GROUP + i) * WIDTH) < ZERO
        odd = (odd | minus) & ~(odd & minus)
    for kind in range(3 if even else 2):
        for i in range(GROUP):
            at = (group * GROUP + i) * WIDTH
            factor = load(weight, at)
            if kind != 1:
                factor = TWO * factor * magnitude(load(x, at))
            if kind == 2:
                factor = select(odd, TWO * factor, ZERO)
            for level in range(3):
                store(terms, (3 * i + level) * WIDTH, factor * (SQUARES[level] if kind == 1 else VALUES[level]))
        fill_half(terms, 0, tables, 2 * kind * HALVES, kind == 2)
        fill_half(terms, 4, tables, (2 * kind + 1) * HALVES, kind == 2)


@compiled
def linear_of(tables: Floats, first: int, second: int, even: bool) -> Lanes:
    """A point's 2 sum w x u."""
    linear = load(tables, first) + load(tables, second)
    if even:
        skip = 4 * HALVES * WIDTH
        one, other = load(tables, skip + first), load(tables, skip + second)
        linear = linear - select(other < one, other, one)
    return linear


@compiled
def square_of(tables: Floats, first: int, second: int) -> Lanes:
    """A point's sum w u u."""
    skip = 2 * HALVES * WIDTH
    return load(tables, skip + first) + load(tables, skip + second)


@compiled
def sample(tables: Floats, halves: Integers, even: bool, unit: Lanes, sums: Floats) -> None:
    """Add to each of `sums` the best a group can reach at a scale: the largest 2 sum w x u - scale sum w u u."""
    low = spread(LEAST)
    best = (low, low, low, low, low, low, low, low)
    scales = (
        unit * SCALE_RATIOS[0],
        unit * SCALE_RATIOS[1],
        unit * SCALE_RATIOS[2],
        unit * SCALE_RATIOS[3],
        unit * SCALE_RATIOS[4],
        unit * SCALE_RATIOS[5],
        unit * SCALE_RATIOS[6],
        unit * SCALE_RATIOS[7],
    )
    for point in range(len(halves) // 2):
        first, second = whole(halves[2 * point]), whole(halves[2 * point + 1])
        best = raised(best, scales, linear_of(tables, first, second, even), square_of(tables, first, second))
    for k, value in enumerate(best):
        store(sums, k * WIDTH, load(sums, k * WIDTH) + value)


@compiled
def vertex(unit: Lanes, sums: Floats) -> tuple[Lanes, Lanes]:
    """The (scale, curvature) of a parabola through the best sampled scale; both 0 where there is none."""
    gain = spread(LEAST)
    scale = spread(ZERO)
    slope = scale
    value = scale
    for k in range(SAMPLES):
        here = unit * SCALE_RATIOS[k]
        sum_here = load(sums, k * WIDTH)
        before, after = max(k - 1, 0), min(k + 1, SAMPLES - 1)
        fall = load(sums, before * WIDTH) - load(sums, after * WIDTH)
        step = unit * (SCALE_RATIOS[after] - SCALE_RATIOS[before])
        better = here * sum_here > gain
        gain = select(better, here * sum_here, gain)
        scale = select(better, here, scale)
        slope = select(better, fall / step, slope)
        value = select(better, sum_here, value)
    top = HALF * (value + scale * slope) / slope
    usable = (slope > ZERO) & (top > ZERO)
    return select(usable, top, ZERO), select(usable, slope, ZERO)


@compiled
def survey(space: Thorough, at: int, groups: int, even: bool, halves: Integers) -> tuple[Lanes, Lanes]:
    """The best (scale, curvature) of a sub-block with a scale free of d: a parabola through samples of its gain."""
    total = spread(ZERO)
    square = spread(ZERO)
    for i in range(at * GROUP, (at + groups) * GROUP):
        factor, value = load(space.weight, i * WIDTH), load(space.x, i * WIDTH)
        total += factor
        square += factor * value * value
    unit = select(total > ZERO, root(square / total), ZERO)
    for k in range(SAMPLES):
        store(space.sums, k * WIDTH, spread(ZERO))
    for group in range(groups):
        fill_tables(space.x, space.weight, at + group, even, space.terms, space.tables)
        sample(space.tables, halves, even, unit, space.sums)
    return vertex(unit, space.sums)


@compiled
def nearest_code(scale: Lanes, inverse: Lanes) -> Lanes:
    """The scale code 0 to 15 whose 2 code + 1 lies nearest to scale * inverse."""
    code = HALF * (scale * inverse - ONE)
    code = select(code > ZERO, code, ZERO)
    code = select(code > FIFTEEN, FIFTEEN, code)
    return (code + ROUND) - ROUND


@compiled
def as_stored(values: Lanes, line: Floats, field: Bytes) -> Lanes:
    """What a reader finds where `values` were stored as float16."""
    store(line, 0, values)
    for k in range(WIDTH):
        line[k] = store_half(field, 0, line[k])
    return load(line, 0)


@compiled
def first_d(wanted: Floats, bends: Floats, count: int) -> Lanes:
    """The d whose odd multiples lie nearest to the `wanted` scales, errors weighed with their curvature."""
    top = spread(ZERO)
    for j in range(count):
        scale = load(wanted, j * WIDTH)
        top = select(scale > top, scale, top)
    best = spread(-LEAST)
    best_d = spread(ZERO)
    for ratio in D_RATIOS:
        d = top * ratio
        inverse = ONE / d
        loss = spread(ZERO)
        for j in range(count):
            scale = load(wanted, j * WIDTH)
            difference = scale - d * (TWO * nearest_code(scale, inverse) + ONE)
            loss += load(bends, j * WIDTH) * difference * difference
        better = loss < best
        best = select(better, loss, best)
        best_d = select(better, d, best_d)
    return best_d


@compiled
def pick(
    tables: Floats, halves: Integers, codes: Floats, even: bool, scales: Floats, sums: Floats, out: Floats
) -> None:
    """The best point of a group at three scales: codes to `out`, their values added to `sums`."""
    low = spread(LEAST)
    none = spread(ZERO)
    best = (low, low, low)
    chosen = (none, none, none)
    three = (load(scales, 0), load(scales, WIDTH), load(scales, 2 * WIDTH))
    for point in range(len(halves) // 2):
        first, second = whole(halves[2 * point]), whole(halves[2 * point + 1])
        linear, square = linear_of(tables, first, second, even), square_of(tables, first, second)
        found = picked(best, chosen, three, linear, square, codes[point])
        best, chosen = found[:3], found[3:]
    for k in range(3):
        store(sums, k * WIDTH, load(sums, k * WIDTH) + best[k])
        store(out, k * WIDTH, chosen[k])


@compiled
def settle_signs(x: Floats, weight: Floats, found: Floats, even: bool, signs: Floats) -> None:
    """Each group's signs, weight i worth 2**i; with `even` the cheapest weight is turned where their count is odd."""
    for group in range(GROUPS):
        code = load(found, group * WIDTH)
        total = spread(ZERO)
        odd = total > ZERO
        least = spread(-LEAST)
        change = spread(ZERO)
        for i in range(GROUP):
            at = (group * GROUP + i) * WIDTH
            value = load(x, at)
            minus = value < ZERO
            bit = np.float32(1 << i)
            total = select(minus, total + bit, total)
            odd = (odd | minus) & ~(odd & minus)
            cost = TWO * (TWO * load(weight, at) * magnitude(value)) * value_of(code, i)
            less = cost < least
            least = select(less, cost, least)
            change = select(less, select(minus, -bit, spread(bit)), change)
        store(signs, group * WIDTH, select(odd, total + change, total) if even else total)


@compiled
def choose(
    space: Thorough, at: int, groups: int, even: bool, wanted: Lanes, d: Lanes, halves: Integers, codes: Floats
) -> tuple[Lanes, Lanes, Lanes]:
    """The best of three codes for the scale of a sub-block, whose points go to `found`, and the (above, below) of d.

    Tried are the code nearest to the `wanted` scale and those beside it. above and below are the sub-block's share in
    the d of least squares.
    """
    nearest = nearest_code(wanted, ONE / d)
    for k in range(3):
        code = nearest + np.float32(k - 1)
        code = select(code < ZERO, ZERO, select(code > FIFTEEN, FIFTEEN, code))
        store(space.three, k * WIDTH, d * (TWO * code + ONE))
        store(space.sums, k * WIDTH, spread(ZERO))
    for group in range(groups):
        fill_tables(space.x, space.weight, at + group, even, space.terms, space.tables)
        pick(space.tables, halves, codes, even, space.three, space.sums, space.chosen[3 * group * WIDTH :])
    best = load(space.three, 0) * load(space.sums, 0)
    which = spread(ZERO)
    for k in range(1, 3):
        gain = load(space.three, k * WIDTH) * load(space.sums, k * WIDTH)
        better = gain > best
        best = select(better, gain, best)
        which = select(better, np.float32(k), which)
    code = nearest + (which - ONE)
    code = select(code < ZERO, ZERO, select(code > FIFTEEN, FIFTEEN, code))
    value = select(
        which == ZERO, load(space.sums, 0), select(which == ONE, load(space.sums, WIDTH), load(space.sums, 2 * WIDTH))
    )
    square = spread(ZERO)
    for group in range(groups):
        three = 3 * group * WIDTH
        late = select(which == ONE, load(space.chosen, three + WIDTH), load(space.chosen, three + 2 * WIDTH))
        point = select(which == ZERO, load(space.chosen, three), late)
        store(space.found, (at + group) * WIDTH, point)
        for i in range(GROUP):
            level = value_of(point, i)
            square += load(space.weight, ((at + group) * GROUP + i) * WIDTH) * (level * level)
    odd = TWO * code + ONE
    return code, odd * (HALF * (value + d * odd * square)), odd * odd * square


@kernel
def search_iq2(
    rows: Floats,
    importance: Floats,
    columns: int,
    bits: int,
    halves: Integers,
    codes: Floats,
    index_of: Integers,
    out: Bytes,
) -> None:
    """The thorough search's own blocks of flat `rows`, for IQ2_XXS, IQ2_XS or IQ2_S, to flat `out`.

    importance [columns]; the tables are those of `point_tables`; bits is that of `INDEX_BITS`.
    """
    space = Thorough(
        buffer(SUPER_BLOCK),
        buffer(SUPER_BLOCK),
        buffer(3 * GROUP),
        buffer(6 * HALVES),
        buffer(SAMPLES),
        buffer(3),
        buffer(12),
        buffer(GROUPS),
    )
    signs = buffer(GROUPS)
    wanted = buffer(SUPER_BLOCK // 16)
    bends = buffer(SUPER_BLOCK // 16)
    scales = buffer(SUPER_BLOCK // 16 + 2)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    field = np.empty(2, np.uint8)
    even = bits < 10
    groups = 4 if bits == 8 else 2
    count = GROUPS // groups
    blocks = len(rows) // SUPER_BLOCK
    for set_of in range((blocks + WIDTH - 1) // WIDTH):
        present = place(set_of, blocks, columns, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, space.x)
        gather(importance, importance_offsets, SUPER_BLOCK, space.weight)
        for j in range(count):
            scale, bend = survey(space, j * groups, groups, even, halves)
            store(wanted, j * WIDTH, scale)
            store(bends, j * WIDTH, bend)
        d = as_stored(first_d(wanted, bends, count), space.sums, field)
        above = spread(ZERO)
        below = spread(ZERO)
        for j in range(count):
            target = load(wanted, j * WIDTH)
            code, more, less = choose(space, j * groups, groups, even, target, d, halves, codes)
            store(scales, j * WIDTH, code)
            above += more
            below += less
        store(scales, 16 * WIDTH, select(below > ZERO, above / below, ZERO))
        store(scales, 17 * WIDTH, spread(ONE))
        settle_signs(space.x, space.weight, space.found, even, signs)
        for k in range(present):
            pack(out, set_of * WIDTH + k, k, bits, scales, space.found, signs, index_of)


def quantize_thorough(rows: Floats, importance: Floats | None, name: str, out: Bytes) -> None:
    """Write blocks of IQ2_XXS, IQ2_XS or IQ2_S to `out`: those of least error, and never worse than ggml's.

    rows [R, C] f32, finite, contiguous; importance [C] f32, or None to weigh all errors alike; out [R, bytes] u8.
    """
    columns = rows.shape[1]
    flat, target = rows.reshape(-1), out.reshape(-1)
    weights = np.ones(columns, np.float32) if importance is None else importance
    nothing = importance is None and name == "IQ2_S"  # of the others ggml makes none without importance
    quantize_rows(flat, np.empty(0, np.float32) if nothing else weights, columns, name, target)
    found = np.empty_like(target)
    search_iq2(flat, weights, columns, INDEX_BITS[name], *point_tables(name), found)
    d, found_d = (
        np.ascontiguousarray(half_at(blocks.reshape(-1, TYPES[name].size_bytes), 0)[:, 0]) for blocks in (target, found)
    )
    values = np.ascontiguousarray(lattice(name).values.reshape(-1))
    take_better(flat, weights, INDEX_BITS[name], values, found_d, found, d, target)
