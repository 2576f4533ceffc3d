"""IQ1_S and IQ1_M: sixteen super-blocks at a time, one per lane; only the lists of neighbours are walked one by one.

Sorting, the fits of all cuts (`cpu/iq1_split.py`) and the last fits run in lanes. Buffers are in lane order, as in
`cpu/search.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, inlined, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.iq1_lattice import Tables, nearest_neighbour
from quantkernels.ggml.cpu.iq1_split import SHIFT, split_halves, split_whole
from quantkernels.ggml.cpu.k_symmetric import square
from quantkernels.ggml.cpu.lanes_sort import sort_16, sort_32
from quantkernels.ggml.cpu.pack import place, weigh
from quantkernels.ggml.cpu.search import ONE, ZERO, extreme_of, gather, wrapped_codes
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.lanes import WIDTH, Lanes, Mask, bits_of, buffer, load, magnitude, select, spread, store

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Keys = NDArray[np.int64]

TINY_S = np.float32(1e-12)  # a sub-block whose largest magnitude is below this is stored as zeros
TINY_M = np.float32(1e-7)
FUDGE_S = np.float32(1.125)  # what ggml multiplies d with
FUDGE_M = np.float32(1.1125)
TWO = np.float32(2)
THREE = np.float32(3)
HALF = np.float32(0.5)
TOP = np.float32(7)
GROUPS = SUPER_BLOCK // 8


@compiled
def read_choices(x: Floats, at: int, count: int, keys: Keys, shifts: int, choices: Floats) -> None:
    """Choices, in the first line of `choices`, to what the next lines hold.

    Lines 1 and 2: the first value above each cut, infinite where none is, lines 3 and 4: its place; line 5: the shifts.
    """
    for k in range(WIDTH):
        number = int(choices[k])
        chosen = number >= 0
        choices[5 * WIDTH + k] = np.float32(number % shifts if chosen else 0)
        for cut in range(2):
            after = number // shifts // (count + 1) if cut == 0 else number // shifts % (count + 1)
            if chosen and after < count:
                where = keys[after * WIDTH + k] & 0xFFFFFFFF
                choices[(1 + cut) * WIDTH + k] = x[at * WIDTH + where]
                choices[(3 + cut) * WIDTH + k] = np.float32(where // WIDTH)
            else:
                choices[(1 + cut) * WIDTH + k] = np.inf
                choices[(3 + cut) * WIDTH + k] = ZERO


@compiled
def is_above(value: Lanes, i: int, choices: Floats, cut: int) -> Mask:
    """Whether the value at place i comes after a cut; equal values are in the order of their places."""
    bound = load(choices, (1 + cut) * WIDTH)
    place_of_bound = load(choices, (3 + cut) * WIDTH)
    return (value > bound) | ((value == bound) & ~(place_of_bound > np.float32(i)))


@compiled
def make_levels(x: Floats, at: int, count: int, scale: Lanes, choices: Floats, levels: Floats, shift: Floats) -> Lanes:
    """Levels 0, 1, 2 and the shifts of the groups for the choices read; gives the scale without its sign.

    A negative scale turns levels and shifts around.
    """
    turned = scale < ZERO
    for i in range(count):
        value = load(x, (at + i) * WIDTH)
        level = select(is_above(value, i, choices, 0), ONE, ZERO) + select(is_above(value, i, choices, 1), ONE, ZERO)
        store(levels, (at + i) * WIDTH, select(turned, spread(TWO) - level, level))
    shifts = load(choices, 5 * WIDTH)
    if count == 16:
        first_minus = shifts >= TWO
        second_minus = (shifts == ONE) | (shifts >= THREE)
    else:
        first_minus = shifts >= ONE
        second_minus = first_minus
    for group in range(count // 8):
        value = select(first_minus if group == 0 else second_minus, -SHIFT, SHIFT)
        store(shift, (at // 8 + group) * WIDTH, select(turned, -value, value))
    return select(turned, -scale, scale)


@compiled
def cell_of(levels: Floats, at: int) -> Lanes:
    """The cells of the eight levels from value `at` on."""
    cell = spread(ZERO)
    for i in range(7, -1, -1):
        cell = cell * THREE + load(levels, (at + i) * WIDTH)
    return cell


@inlined
def to_lattice(
    known: Tables,
    x: Floats,
    weight: Floats,
    at: int,
    active: int,
    state: Floats,
    levels: Floats,
    shift: Floats,
    indices: NDArray[np.int64],
) -> None:
    """Points for the group of eight from value `at` on in the `active` lanes, and their levels where they moved.

    Lines of state: how many groups moved so far, the cells, the scales. The first gets NaN in lanes where no neighbour
    is at a finite distance.
    """
    group = at // 8
    for k in range(WIDTH):
        point = 0
        if (active >> k) & 1 == 1:
            point = int(known.index_of[int(state[WIDTH + k])])
            if point >= 0:
                indices[group * WIDTH + k] = point
                continue
            scale, offset = state[2 * WIDTH + k], shift[group * WIDTH + k]
            point = nearest_neighbour(known, -1 - point, x, weight, at * WIDTH + k, scale, offset)
            state[k] += ONE
            if point < 0:
                state[k] = np.nan
                point = 0
        indices[group * WIDTH + k] = point
        for i in range(8):
            levels[(at + i) * WIDTH + k] = known.levels[point * 8 + i]


@compiled
def fit(
    x: Floats, weight: Floats, at: int, count: int, levels: Floats, shift: Floats, factor: Lanes, sum_qx: Lanes,
    sum_q2: Lanes
) -> tuple[Lanes, Lanes]:  # fmt: skip
    """The sums so far and, added one by one, w q x and w q q of `count` values; q is `factor` times the level."""
    for i in range(at, at + count):
        q = (load(levels, i * WIDTH) - ONE + load(shift, i // 8 * WIDTH)) * factor
        weighted = load(weight, i * WIDTH) * q
        sum_qx += weighted * load(x, i * WIDTH)
        sum_q2 += weighted * q
    return sum_qx, sum_q2


@compiled
def settle(
    known: Tables, x: Floats, weight: Floats, at: int, count: int, scale: Lanes, chosen: Mask, choices: Floats,
    levels: Floats, shift: Floats, indices: NDArray[np.int64]
) -> Lanes:  # fmt: skip
    """Take one sub-block from its best split to the lattice; gives its scale, 0 or NaN where nothing was chosen."""
    otherwise = select(scale == scale, ZERO, scale)
    scale = make_levels(x, at, count, scale, choices, levels, shift)
    state = choices
    store(state, 0, spread(ZERO))
    store(state, 2 * WIDTH, scale)
    active = bits_of(chosen)
    for first in range(at, at + count, 8):
        line = first // 8 * WIDTH
        store(shift, line, select(chosen, load(shift, line), SHIFT))
        store(state, WIDTH, cell_of(levels, first))
        to_lattice(known, x, weight, first, active, state, levels, shift, indices)
    sum_qx, sum_q2 = fit(x, weight, at, count, levels, shift, spread(ONE), spread(ZERO), spread(ZERO))
    moved = load(state, 0)
    again = (moved > ZERO) & (sum_qx > ZERO) & (sum_q2 > ZERO)
    scale = select(again, sum_qx / sum_q2, scale)
    return select(chosen, select(moved >= ZERO, scale, moved), otherwise)


@compiled
def largest_scale(found: Floats, count: int) -> Lanes:
    """The largest of `count` scales; NaN where one is infinite or NaN."""
    largest = spread(ZERO)
    wrong = spread(ZERO)
    for j in range(count):
        scale = load(found, j * WIDTH)
        largest = select(scale > largest, scale, largest)
        wrong += scale - scale
    return largest + wrong


@compiled
def round_scales(found: Floats, count: int, largest: Lanes) -> None:
    """Scales to codes from 0 to 7 for 1, 3 .. 15 fifteenths of the largest; 0 where that is 0."""
    inverse = ONE / (largest / np.float32(15))
    for j in range(count):
        code = wrapped_codes(HALF * (inverse * load(found, j * WIDTH) - ONE), ZERO, TOP)
        store(found, j * WIDTH, select(largest == ZERO, ZERO, code))


@kernel
def quantize_iq1_s(rows: Floats, importance: Floats, columns: int, known: Tables, out: Bytes) -> None:
    """IQ1_S of flat `rows` into flat `out`."""
    x = buffer(SUPER_BLOCK)
    weight = buffer(SUPER_BLOCK)
    levels = buffer(SUPER_BLOCK)
    shift = buffer(GROUPS)
    sums = buffer(6 * 33)
    choices = buffer(6)
    found = buffer(9)
    keys = np.empty(32 * WIDTH, np.int64)
    indices = np.empty(GROUPS * WIDTH, np.int64)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // SUPER_BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, x)
        gather(importance, importance_offsets, SUPER_BLOCK, weight)
        weigh(x, weight, TWO)
        for j in range(8):
            at = j * 32
            sort_32(x, at * WIDTH, keys)
            scale, choice = split_whole(x, weight, at, keys, sums)
            chosen = (choice >= ZERO) & (magnitude(extreme_of(x, at, 32)) >= TINY_S)
            store(choices, 0, choice)
            read_choices(x, at, 32, keys, 2, choices)
            scale = settle(known, x, weight, at, 32, scale, chosen, choices, levels, shift, indices)
            store(found, j * WIDTH, scale)
        largest = largest_scale(found, 8)
        round_scales(found, 8, largest)
        store(found, 8 * WIDTH, largest / np.float32(15) * FUDGE_S)
        for k in range(present):
            at = (group * WIDTH + k) * 50
            store_half(out, at, found[8 * WIDTH + k])
            for j in range(8):
                word = int(found[j * WIDTH + k]) << 12
                if found[8 * WIDTH + k] != ZERO and shift[4 * j * WIDTH + k] < ZERO:
                    word |= 0x8000
                for i in range(4):
                    point = indices[(4 * j + i) * WIDTH + k]
                    out[at + 2 + 4 * j + i] = point & 255
                    word |= (point >> 8) << (3 * i)
                out[at + 34 + 2 * j] = word & 255
                out[at + 35 + 2 * j] = word >> 8


@kernel
def quantize_iq1_m(rows: Floats, importance: Floats, columns: int, known: Tables, out: Bytes) -> None:
    """IQ1_M of flat `rows` into flat `out`; importance may be empty."""
    x = buffer(SUPER_BLOCK)
    weight = buffer(SUPER_BLOCK)
    levels = buffer(SUPER_BLOCK)
    shift = buffer(GROUPS)
    sums = buffer(8 * 17)
    choices = buffer(6)
    found = buffer(17)
    half = np.empty(2, np.uint8)
    keys = np.empty(16 * WIDTH, np.int64)
    indices = np.empty(GROUPS * WIDTH, np.int64)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // SUPER_BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, x)
        if len(importance) > 0:
            gather(importance, importance_offsets, SUPER_BLOCK, weight)
            weigh(x, weight, TWO)
        else:
            square(x, weight)
        for j in range(16):
            at = j * 16
            sort_16(x, at * WIDTH, keys)
            scale, choice = split_halves(x, weight, at, keys, sums)
            chosen = (choice >= ZERO) & (magnitude(extreme_of(x, at, 16)) >= TINY_M)
            store(choices, 0, choice)
            read_choices(x, at, 16, keys, 4, choices)
            scale = settle(known, x, weight, at, 16, scale, chosen, choices, levels, shift, indices)
            store(found, j * WIDTH, scale)
        largest = largest_scale(found, 16)
        round_scales(found, 16, largest)
        sum_qx = spread(ZERO)
        sum_q2 = spread(ZERO)
        for j in range(16):
            factor = load(found, j * WIDTH) * TWO + ONE
            sum_qx, sum_q2 = fit(x, weight, j * 16, 16, levels, shift, factor, sum_qx, sum_q2)
        d = select(sum_q2 > ZERO, sum_qx / sum_q2, largest / np.float32(15))
        store(found, 16 * WIDTH, select(largest == ZERO, ZERO, d * FUDGE_M + (largest - largest)))
        store(choices, 0, largest)
        for k in range(present):
            at = (group * WIDTH + k) * 56
            store_half(half, 0, found[16 * WIDTH + k])
            for j in range(16):
                nibbles = 0
                for i in range(2):
                    line = (2 * j + i) * WIDTH + k
                    out[at + 2 * j + i] = indices[line] & 255
                    minus = choices[k] != ZERO and shift[line] < ZERO
                    nibbles |= ((indices[line] >> 8) | (8 if minus else 0)) << (4 * i)
                out[at + 32 + j] = nibbles
            for j in range(4):
                word = ((int(half[j // 2]) >> (4 * (j % 2))) & 15) << 12
                for i in range(4):
                    word |= int(found[(4 * j + i) * WIDTH + k]) << (3 * i)
                out[at + 48 + 2 * j] = word & 255
                out[at + 49 + 2 * j] = word >> 8
