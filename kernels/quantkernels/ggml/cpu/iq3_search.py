"""The search of IQ3_XXS and IQ3_S over scales and lattice points: sixteen trials of one group at a time, one per lane.

Neighbouring trials mostly round a group of four to the same levels, so their list of neighbours is walked once for all
of them: two lists for sixteen trials on average. What a level of a dimension costs at each trial's scale is computed
once, after which a neighbour's distance is four loads and three additions, in ggml's order; the first of equally near
neighbours wins as in ggml. The alternative, one block per lane, would walk sixteen different lists with gathers, and
wait for the longest.

Half of ggml's neighbours can be left out without changing a result. Say the lattice point A lies between the rounded
levels and the point B in all dimensions, borders included. Then no dimension of A is farther from the weights than that
of B, in float32 too because its operations are monotonic, so B, later in the list, never wins. That needs the weights
to lie inside the cell they were rounded to; near its border, where rounding errors matter, the whole list is walked.

A *code* has the levels 0 to 7 of a group in three bits each, a *point* the odd numbers 1 to 15 that they stand for in
four bits each. Both are kept as whole float32 numbers in lanes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numpy.typing import NDArray

from quantkernels.compiling import inlined, instruction
from quantkernels.ggml.cpu.search import ONE, ROUND, ZERO
from quantkernels.lanes import (
    WIDTH,
    Lanes,
    bits_of,
    lanes_type,
    load,
    magnitude,
    nearest_wrapped,
    select,
    spread,
    store,
)

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]
Points = NDArray[np.uint16]

HALF = np.float32(0.5)
TWO = np.float32(2)
SEVEN = np.float32(7)
FARTHEST = np.float32(3.4028235e38)  # a neighbour must be nearer than this to be chosen
CODES = 4096
ALL = 0xFFFF
ONES = 0x1111  # the point of the lowest levels
# Lines of the work space: costs of levels and codes (33), points of four groups together (2, and 1 past the end), the
# points of the trials (eight groups, then eight for the second sixteen trials), sums and what is made of them (8).
TOGETHER, TRIALS, SUMS, WORK_LINES = 33, 36, 52, 60
# Distance from the border of a cell, in levels, from which on left-out neighbours cannot win: it makes a difference of
# 4e-4 scales between the distances, whose float32 errors stay below 16 * 2**-23 scales each.
INSIDE = np.float32(0.4999)

FOUR_LANES: Any = types.UniTuple(lanes_type, 4)  # type: ignore[attr-defined]
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)


@instruction
def item(typing_context: Any, array: Any, index: Any) -> Any:
    """One number of a contiguous array, without numba's allowance for negative indices."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        data = context.make_array(typed.args[0])(context, builder, values[0]).data
        return builder.load(builder.gep(data, [values[1]]))

    return array.dtype(array, types.int64), emit


@instruction
def lowest_bit(typing_context: Any, bits: Any) -> Any:
    """The position of the lowest bit that is set; 64 for 0."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.cttz(values[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.int64), emit


@instruction
def spread_fours(typing_context: Any, source: Any, at: Any) -> Any:
    """From sixteen values on, four groups of four: lanes i of the result hold value i of a group in its four lanes."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        data = context.make_array(typed.args[0])(context, builder, values[0]).data
        value = builder.load(builder.bitcast(builder.gep(data, [values[1]]), _VECTOR.as_pointer()), align=4)
        parts = []
        for i in range(4):
            turned = ir.Constant(_INTEGERS, [k // 4 * 4 + i for k in range(WIDTH)])
            parts.append(builder.shuffle_vector(value, value, turned))
        return context.make_tuple(builder, typed.return_type, parts)

    return FOUR_LANES(source, types.int64), emit


@instruction
def join_halves(typing_context: Any, left: Any, right: Any) -> Any:
    """Lanes that hold `left` in the first eight and `right` in the others."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        result = ir.Constant(_VECTOR, ir.Undefined)
        for k in range(2):
            result = builder.insert_element(result, values[k], ir.Constant(ir.IntType(32), k))
        return builder.shuffle_vector(result, result, ir.Constant(_INTEGERS, [k // 8 for k in range(WIDTH)]))

    return lanes_type(types.float32, types.float32), emit


@instruction
def times_levels(typing_context: Any, scale: Any) -> Any:
    """Lanes that hold the scale times 1, 3 to 15, twice."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), values[0], ir.Constant(ir.IntType(32), 0))
        every = builder.shuffle_vector(single, single, ir.Constant(_INTEGERS, [0] * WIDTH))
        return builder.fmul(every, ir.Constant(_VECTOR, [2.0 * (k % 8) + 1.0 for k in range(WIDTH)]))

    return lanes_type(types.float32), emit


@instruction
def numbers_of(typing_context: Any, point: Any) -> Any:
    """The four odd numbers of each lane's point, as float32."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        bits = builder.fptosi(values[0], _INTEGERS)
        parts = []
        for i in range(4):
            part = builder.lshr(bits, ir.Constant(_INTEGERS, [4 * i] * WIDTH))
            parts.append(builder.sitofp(builder.and_(part, ir.Constant(_INTEGERS, [15] * WIDTH)), _VECTOR))
        return context.make_tuple(builder, typed.return_type, parts)

    return FOUR_LANES(lanes_type), emit


@inlined
def round_level(inverse: Lanes, x: Lanes, plain: bool) -> tuple[Lanes, Lanes]:
    """The level, 0 to 7, that a magnitude is rounded to, and how far off that is in levels.

    plain: no value reaches 2**22 levels, where ggml's rounding wraps around.
    """
    exact = HALF * (inverse * x - ONE)
    bounded = select(exact > ZERO, exact, ZERO)
    bounded = select(bounded < SEVEN, bounded, SEVEN)
    if plain:
        level = (bounded + ROUND) - ROUND
    else:
        level = nearest_wrapped(exact)
        level = select(level > ZERO, level, ZERO)
        level = select(level < SEVEN, level, SEVEN)
    return level, magnitude(bounded - level)


@inlined
def fill_costs(values: Lanes, weight_root: Lanes, scale: Lanes, costs: Floats, line: int) -> None:
    """What each of the eight levels of one dimension adds to a distance: eight lines."""
    for level in range(8):
        off = scale * np.float32(2 * level + 1) - values
        store(costs, (line + level) * WIDTH, weight_root * off * off)


@inlined
def distance_to(point: int, costs: Floats) -> Lanes:
    """How far a lattice point is from each lane's group."""
    distance = load(costs, ((point >> 1) & 7) * WIDTH)
    distance = distance + load(costs, (8 + ((point >> 5) & 7)) * WIDTH)
    distance = distance + load(costs, (16 + ((point >> 9) & 7)) * WIDTH)
    return distance + load(costs, (24 + (point >> 13)) * WIDTH)


@inlined
def walk(begin: int, fours: int, neighbours: Points, costs: Floats) -> Lanes:
    """The nearest of the listed neighbours, of equally near ones the first."""
    best = spread(FARTHEST)
    nearest = spread(np.float32(item(neighbours, begin)))
    for four in range(fours):
        at = begin + 4 * four
        for i in range(4):
            candidate = int(item(neighbours, at + i))
            distance = distance_to(candidate, costs)
            nearer = distance < best
            best = select(nearer, distance, best)
            nearest = select(nearer, np.float32(candidate), nearest)
    return nearest


@inlined
def choose(
    x: tuple[Lanes, Lanes, Lanes, Lanes],
    weight_root: tuple[Lanes, Lanes, Lanes, Lanes],
    inverse: Lanes,
    scale: Lanes,
    plain: bool,
    lists: Integers,
    neighbours: Points,
    costs: Floats,
) -> tuple[Lanes, int]:
    """The chosen points, and a bit for each lane whose point rounding alone found.

    x and weight_root hold the four dimensions of each lane's group; costs is scratch for 33 lines.
    """
    code, away = round_level(inverse, x[0], plain)
    level, off = round_level(inverse, x[1], plain)
    code = code + level * np.float32(8)
    away = select(off > away, off, away)
    level, off = round_level(inverse, x[2], plain)
    code = code + level * np.float32(64)
    away = select(off > away, off, away)
    level, off = round_level(inverse, x[3], plain)
    code = code + level * np.float32(512)
    away = select(off > away, off, away)
    store(costs, 32 * WIDTH, code)
    whole_lists = 0 if bits_of(away < INSIDE) == ALL else CODES
    chosen = code
    on_grid = 0
    waiting = ALL
    fill_costs(x[0], weight_root[0], scale, costs, 0)
    fill_costs(x[1], weight_root[1], scale, costs, 8)
    fill_costs(x[2], weight_root[2], scale, costs, 16)
    fill_costs(x[3], weight_root[3], scale, costs, 24)
    while waiting != 0:
        own = item(costs, 32 * WIDTH + lowest_bit(waiting))
        same = code == own
        bits = bits_of(same)
        waiting &= ~bits
        entry = int(item(lists, whole_lists + int(own)))
        begin, fours = entry >> 8, entry & 255
        if fours == 0:
            on_grid |= bits
            chosen = select(same, np.float32(item(neighbours, begin)), chosen)
        else:
            chosen = select(same, walk(begin, fours, neighbours, costs), chosen)
    return chosen, on_grid


@inlined
def add_terms(point: Lanes, block: Floats, at: int, sum_xq: Lanes, sum_q2: Lanes) -> tuple[Lanes, Lanes]:
    """Add the four terms of w x q and of w q q of the group at `at`, in order."""
    numbers = numbers_of(point)
    sum_xq = sum_xq + item(block, 96 + at) * numbers[0]
    sum_q2 = sum_q2 + item(block, 32 + at) * numbers[0] * numbers[0]
    sum_xq = sum_xq + item(block, 97 + at) * numbers[1]
    sum_q2 = sum_q2 + item(block, 33 + at) * numbers[1] * numbers[1]
    sum_xq = sum_xq + item(block, 98 + at) * numbers[2]
    sum_q2 = sum_q2 + item(block, 34 + at) * numbers[2] * numbers[2]
    sum_xq = sum_xq + item(block, 99 + at) * numbers[3]
    sum_q2 = sum_q2 + item(block, 35 + at) * numbers[3] * numbers[3]
    return sum_xq, sum_q2


@inlined
def spread_group(values: Floats, at: int) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """Four neighbouring values, each in all lanes."""
    return (
        spread(item(values, at)),
        spread(item(values, at + 1)),
        spread(item(values, at + 2)),
        spread(item(values, at + 3)),
    )


@inlined
def try_scales(
    block: Floats,
    largest: np.float32,
    plain: bool,
    wide: bool,
    lists: Integers,
    neighbours: Points,
    inverses: Floats,
    work: Floats,
    flags: Integers,
) -> None:
    """Run the 31 (wide) or 19 trials of a sub-block: SUMS gets w x q in two lines, then w q q in two.

    block holds 32 magnitudes, their weights, the roots of these and the weighted magnitudes; work has WORK_LINES. flags
    gets, in the order of TRIALS, a bit for each trial whose point is not a neighbour.
    """
    for line in range(2 if wide else 1):
        inverse = load(inverses, line * WIDTH) / largest
        scale = ONE / inverse
        sum_xq, sum_q2 = spread(ZERO), spread(ZERO)
        for g in range(8):
            x, weight_root = spread_group(block, 4 * g), spread_group(block, 64 + 4 * g)
            point, on_grid = choose(x, weight_root, inverse, scale, plain, lists, neighbours, work)
            store(work, (TRIALS + 8 * line + g) * WIDTH, point)
            flags[8 * line + g] = on_grid
            sum_xq, sum_q2 = add_terms(point, block, 4 * g, sum_xq, sum_q2)
        store(work, (SUMS + line) * WIDTH, sum_xq)
        store(work, (SUMS + 2 + line) * WIDTH, sum_q2)
    if wide:
        return
    inverse = load(inverses, 2 * WIDTH) / largest
    scale = ONE / inverse
    for half in range(2):
        x, weight_root = spread_fours(block, half * WIDTH), spread_fours(block, 64 + half * WIDTH)
        point, on_grid = choose(x, weight_root, inverse, scale, plain, lists, neighbours, work)
        store(work, (TOGETHER + half) * WIDTH, point)
        for g in range(4):
            flags[8 + 4 * half + g] = (on_grid >> (4 * g)) & 15
    sum_xq, sum_q2 = spread(ZERO), spread(ZERO)
    for g in range(8):
        point = load(work, TOGETHER * WIDTH + 4 * g)
        store(work, (TRIALS + 8 + g) * WIDTH, point)
        sum_xq, sum_q2 = add_terms(point, block, 4 * g, sum_xq, sum_q2)
    store(work, (SUMS + 1) * WIDTH, sum_xq)
    store(work, (SUMS + 3) * WIDTH, sum_q2)


@inlined
def best_trial(work: Floats, count: int) -> int:
    """The trial that explains most of the block, the first of equals; -1 when none explains anything.

    The first two lines of SUMS become the scales.
    """
    for line in range(SUMS, SUMS + 2):
        sum_xq = load(work, line * WIDTH)
        scale = sum_xq / load(work, (line + 2) * WIDTH)
        store(work, line * WIDTH, scale)
        store(work, (line + 4) * WIDTH, sum_xq * sum_xq)
        store(work, (line + 6) * WIDTH, scale * sum_xq)
    best = ZERO
    found = -1
    for trial in range(count):
        sum_q2 = item(work, (SUMS + 2) * WIDTH + trial)
        if sum_q2 > ZERO and item(work, (SUMS + 4) * WIDTH + trial) > best * sum_q2:
            best = item(work, (SUMS + 6) * WIDTH + trial)
            found = trial
    return found


@inlined
def choose_one(block: Floats, at: int, begin: int, fours: int, points: Lanes, neighbours: Points, costs: Floats) -> int:
    """The nearest of the listed points for the group at `at`; points holds the levels times the scale twice.

    costs is scratch for two lines.
    """
    for pair in range(2):
        i = at + 2 * pair
        off = points - join_halves(item(block, i), item(block, i + 1))
        weight_root = join_halves(item(block, 64 + i), item(block, 65 + i))
        store(costs, pair * WIDTH, weight_root * off * off)
    best = FARTHEST
    nearest = int(item(neighbours, begin))
    for j in range(begin, begin + 4 * fours):
        candidate = int(item(neighbours, j))
        distance = item(costs, (candidate >> 1) & 7)
        distance = distance + item(costs, 8 + ((candidate >> 5) & 7))
        distance = distance + item(costs, 16 + ((candidate >> 9) & 7))
        distance = distance + item(costs, 24 + (candidate >> 13))
        if distance < best:
            best = distance
            nearest = candidate
    return nearest


@inlined
def refine(
    block: Floats,
    scale: np.float32,
    every: bool,
    flags: Integers,
    points: Integers,
    lists: Integers,
    neighbours: Points,
    scratch: Floats,
) -> np.float32:
    """Choose points again at `scale`, all or those whose flag, from 16 on, is 0; gives their least-squares scale."""
    level_points = times_levels(scale)
    inverse = spread(ONE / scale)
    inside = 0
    for half in range(2):
        level, away = round_level(inverse, load(block, half * WIDTH), False)
        store(scratch, (2 + half) * WIDTH, level)
        inside |= bits_of(away < INSIDE) << (half * WIDTH)
    for g in range(8):
        if every or flags[16 + g] == 0:
            at = 2 * WIDTH + 4 * g
            low = int(item(scratch, at)) + int(item(scratch, at + 1)) * 8
            code = low + int(item(scratch, at + 2)) * 64 + int(item(scratch, at + 3)) * 512
            entry = int(item(lists, code if (inside >> (4 * g)) & 15 == 15 else code + CODES))
            points[g] = int(item(neighbours, entry >> 8))
            if entry & 255 != 0:
                points[g] = choose_one(block, 4 * g, entry >> 8, entry & 255, level_points, neighbours, scratch)
    sum_xq, sum_q2 = ZERO, ZERO
    for g in range(8):
        point = points[g]
        for i in range(4):
            q = np.float32((point >> (4 * i)) & 15)
            sum_xq += item(block, 96 + 4 * g + i) * q
            sum_q2 += item(block, 32 + 4 * g + i) * q * q
    return sum_xq / sum_q2 if sum_q2 > ZERO else scale
