"""The thorough search of IQ3_XXS and IQ3_S, as `thorough/reference/iq3.py` defines it, one super-block after another.

All lattice points compete for each of 64 groups, so lanes hold sixteen points, or sixteen scales when the curves of
the gain are drawn.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, inlined, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.iq3 import quantize_iq3, store_sub_block, store_sub_scale
from quantkernels.ggml.cpu.iq3_search import HALF
from quantkernels.ggml.cpu.search import ONE, ZERO
from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.layout import SUPER_BLOCK, TYPES
from quantkernels.ggml.thorough.cpu_iq3_gain import (
    GROUPS,
    LEAST,
    LINEAR,
    SQUARE,
    TURNED,
    draw_curve,
    fill_magnitudes,
    fill_sums,
    gain_of,
    top_gain,
    top_point,
)
from quantkernels.lanes import WIDTH, bits_of, buffer, load, store

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.int32]

# See `thorough/reference/iq3.py`.
SAMPLES = 16
LOWEST, STEP = np.float32(0.03), np.float32(0.0042)
FIRST_D, D_RATIO, D_COUNT = np.float32(0.94 / 31), np.float32(1.02), 32
TURNS = 4
SURELY = 1 - 1e-12
FROM, TO = -1, 2  # the sub-scales tried after the first turn lie this far away


@cache
def value_tables(name: str) -> tuple[Floats, Floats]:
    """The decoder's values without scales, [4 * P], dimension by dimension, and the sixteen lowest whole numbers."""
    values = lattice(name).values * np.float32(0.25 if name == "IQ3_XXS" else 1)
    return np.ascontiguousarray(values.T).reshape(-1), np.arange(WIDTH, dtype=np.float32)


def quantize_thorough(rows: Floats, importance: Floats | None, name: str, out: Bytes) -> None:
    """IQ3_XXS or IQ3_S of `rows` [R, C] f32, contiguous, into `out` [R, bytes], at no block worse than ggml's.

    importance [C] f32 or None. "Worse" is the square error of the decoded weights times importance, or without.
    """
    flat, target, columns = rows.reshape(-1), out.reshape(-1), rows.shape[1]
    weights = np.empty(0, np.float32) if importance is None else importance
    quantize_iq3(flat, weights, columns, name, target)
    values, numbers = value_tables(name)
    halves = np.ascontiguousarray(target.reshape(-1, TYPES[name].size_bytes)[:, :2]).view("<f2")
    old_ds = halves[:, 0].astype(np.float32)
    improve_rows(flat, weights, columns, name == "IQ3_XXS", values, numbers, old_ds, target)


@inlined
def sub_scale_below(scale: np.float32, d: np.float32) -> int:
    """The sub-scale, 0 to 15, whose scale is the next below."""
    position = (scale / d - ONE) * HALF
    if position >= np.float32(15):
        return 15
    return int(position) if position > ZERO else 0


@inlined
def read_curve(curves: Floats, j: int, largest: np.float32, scale: np.float32) -> np.float32:
    """The gain of sub-block j at a scale between the samples, by a parabola through the nearest three."""
    position = (scale / largest - LOWEST) / STEP
    rounded = position + HALF
    middle = 1
    if rounded >= np.float32(SAMPLES - 2):
        middle = SAMPLES - 2
    elif rounded > ONE:
        middle = int(rounded)
    low, own, high = curves[j * WIDTH + middle - 1], curves[j * WIDTH + middle], curves[j * WIDTH + middle + 1]
    away = position - np.float32(middle)
    value: np.float32 = own + HALF * away * ((high - low) + away * ((high - own) - (own - low)))
    return value


@compiled
def start(curves: Floats, largest: Floats, best_scales: Floats) -> np.float32:
    """The d whose multiples suit the gains of all sub-blocks best; fills `best_scales` with the best of each alone."""
    top = ZERO
    for j in range(8):
        best = 0
        for t in range(1, SAMPLES):
            if curves[j * WIDTH + t] > curves[j * WIDTH + best]:
                best = t
        best_scales[j] = largest[j] * (LOWEST + STEP * np.float32(best))
        top = max(top, best_scales[j])
    d = top * FIRST_D
    best_d = d
    best_total = LEAST
    for _ in range(D_COUNT):
        total = ZERO
        for j in range(8):
            below = sub_scale_below(best_scales[j], d)
            gain = read_curve(curves, j, largest[j], d * np.float32(2 * below + 1))
            next_gain = read_curve(curves, j, largest[j], d * np.float32(2 * min(below + 1, 15) + 1))
            gain = next_gain if next_gain > gain else gain
            total = gain if j == 0 else total + gain
        if total > best_total:
            best_total = total
            best_d = d
        d = d * D_RATIO
    return best_d


@compiled
def take_turn(
    d: np.float32,
    first: bool,
    points: int,
    odd: int,
    sums: Floats,
    sub_scales: Integers,
) -> np.float32:
    """Move each sub-scale to the best beside it (first: itself or the next above); gives the gain of all."""
    total = ZERO
    for j in range(8):
        own = sub_scales[j]
        gain = gain_of(j, points, odd, sums, d * np.float32(2 * own + 1))
        for step in range(1 if first else FROM, TO):
            trial = own + step
            if step == 0 or trial < 0 or trial > 15:
                continue
            other = gain_of(j, points, odd, sums, d * np.float32(2 * trial + 1))
            if other > gain:
                gain = other
                sub_scales[j] = trial
        total = gain if j == 0 else total + gain
    return total


@compiled
def choose_points(
    d: np.float32,
    points: int,
    odd: int,
    sums: Floats,
    sub_scales: Integers,
    numbers: Floats,
    chosen: Integers,
) -> np.float32:
    """Fill `chosen` with the best points at d, those of turned groups less 4096; gives the d of least squares."""
    top, bottom = ZERO, ZERO
    for octet in range(32):
        factor = np.float32(2 * sub_scales[octet // 4] + 1)
        scale = d * factor
        turned_group = -1
        if (odd >> octet) & 1:
            left = top_gain(sums, TURNED, 2 * octet, points, scale)
            left = left + top_gain(sums, LINEAR, 2 * octet + 1, points, scale)
            right = top_gain(sums, LINEAR, 2 * octet, points, scale)
            right = right + top_gain(sums, TURNED, 2 * octet + 1, points, scale)
            turned_group = 2 * octet + 1 if right > left else 2 * octet
        for group in range(2 * octet, 2 * octet + 2):
            kind = TURNED if group == turned_group else LINEAR
            point = top_point(sums, kind, group, points, scale, numbers)
            chosen[group] = point - 4096 if kind == TURNED else point
            top = top + factor * sums[(kind * GROUPS + group) * points + point]
            bottom = bottom + factor * factor * sums[(SQUARE * GROUPS + group) * points + point]
    return HALF * top / bottom


@compiled
def pack_block(
    d: np.float32,
    sub_scales: Integers,
    chosen: Integers,
    rows: Floats,
    start: int,
    block: Floats,
    values: Floats,
    points: int,
    xxs: bool,
    indices: Integers,
    out: Bytes,
) -> None:
    """Write the super-block into `out`."""
    out[:] = 0
    store_half(out, 0, d)
    for j in range(8):
        signs = bits_of(load(rows, start + 32 * j) < ZERO)
        signs |= bits_of(load(rows, start + 32 * j + WIDTH) < ZERO) << WIDTH
        for g in range(8):
            point = chosen[8 * j + g]
            if point < 0:
                point += 4096
                cheapest = 0
                least = ZERO
                for i in range(4):
                    term = block[2 * SUPER_BLOCK + 32 * j + 4 * g + i] * values[i * points + point]
                    if i == 0 or term < least:
                        least = term
                        cheapest = i
                signs ^= 1 << (4 * g + cheapest)
            indices[g] = point
        store_sub_block(indices, signs, xxs, j, j, out, 0)
        store_sub_scale(sub_scales[j], xxs, j, out, 0)


@compiled
def error_of(
    rows: Floats,
    start: int,
    block: Floats,
    d: np.float32,
    values: Floats,
    points: int,
    xxs: bool,
    packed: Bytes,
    at: int,
) -> float:
    """The weighted square error of the decoded weights."""
    error = 0.0
    for j in range(8):
        if xxs:
            word = 0
            for k in range(4):
                word |= int(packed[at + 66 + 4 * j + k]) << (8 * k)
            code = word >> 28
        else:
            code = (packed[at + 106 + j // 2] >> (4 * (j % 2))) & 15
        scale = d * np.float32(2 * code + 1)
        for octet in range(4):
            if xxs:
                signs = (word >> (7 * octet)) & 127
                folded = signs ^ (signs >> 4)
                folded ^= folded >> 2
                signs |= ((folded ^ (folded >> 1)) & 1) << 7
            else:
                signs = int(packed[at + 74 + 4 * j + octet])
            for g in range(2 * octet, 2 * octet + 2):
                point = int(packed[at + 2 + 8 * j + g])
                if not xxs:
                    point |= ((packed[at + 66 + j] >> g) & 1) << 8
                for i in range(4):
                    value = scale * values[i * points + point]
                    if (signs >> (4 * (g % 2) + i)) & 1:
                        value = -value
                    n = 32 * j + 4 * g + i
                    off = np.float64(rows[start + n]) - np.float64(value)
                    error += np.float64(block[SUPER_BLOCK + n]) * off * off
    return error


@kernel
def improve_rows(
    rows: Floats,
    importance: Floats,
    columns: int,
    xxs: bool,
    values: Floats,
    numbers: Floats,
    old_ds: Floats,
    out: Bytes,
) -> None:
    """Replace ggml's super-blocks in flat `out` wherever a better one is found.

    The tables are those of `value_tables`, old_ds the d that are in `out`.
    """
    points = len(values) // 4
    size = 98 if xxs else 110
    sums = buffer(3 * GROUPS * points // WIDTH)
    block, curves = buffer(3 * SUPER_BLOCK // WIDTH), buffer(8)
    largest, best_scales = np.empty(8, np.float32), np.empty(8, np.float32)
    sub_scales, best_sub_scales, before = np.empty(8, np.int32), np.empty(8, np.int32), np.empty(8, np.int32)
    chosen, best_chosen, indices = np.empty(GROUPS, np.int32), np.empty(GROUPS, np.int32), np.empty(8, np.int32)
    packed, half = np.empty(size, np.uint8), np.empty(2, np.uint8)
    for number in range(len(rows) // SUPER_BLOCK):
        begin, at = number * SUPER_BLOCK, number * size
        fill_magnitudes(rows, begin, importance, begin % columns, block, largest)
        old = error_of(rows, begin, block, old_ds[number], values, points, xxs, out, at)
        if not 0.0 < old < np.inf:  # nothing to gain, or a scale that ggml cannot hold, which the caller refuses
            continue
        odd = 0
        if xxs:
            for octet in range(0, 32, 2):
                signs = bits_of(load(rows, begin + 8 * octet) < ZERO)
                signs ^= signs >> 4
                signs ^= signs >> 2
                signs ^= signs >> 1
                odd |= ((signs & 1) | ((signs >> 7) & 2)) << octet
        for group in range(GROUPS):
            fill_sums(block, group, values, points, (odd >> (group // 2)) & 1 == 1, sums)
        for j in range(8):
            scale = largest[j] * (LOWEST + STEP * load(numbers, 0))
            store(curves, j * WIDTH, draw_curve(j, points, odd, sums, scale))
        d = store_half(half, 0, start(curves, largest, best_scales))
        for j in range(8):
            sub_scales[j] = sub_scale_below(best_scales[j], d)
        best_d, best_total = d, LEAST
        best_sub_scales[:] = sub_scales
        best_chosen[:] = 0
        for turn in range(TURNS):
            before[:] = sub_scales
            total = take_turn(d, turn == 0, points, odd, sums, sub_scales)
            next_d = choose_points(d, points, odd, sums, sub_scales, numbers, chosen)
            if total > best_total:
                best_d, best_total = d, total
                best_sub_scales[:] = sub_scales
                best_chosen[:] = chosen
            next_d = store_half(half, 0, next_d)
            same = turn > 0 and next_d == d
            for j in range(8):
                same = same and before[j] == sub_scales[j]
            if same:
                break
            d = next_d
        pack_block(best_d, best_sub_scales, best_chosen, rows, begin, block, values, points, xxs, indices, packed)
        if error_of(rows, begin, block, best_d, values, points, xxs, packed, 0) < old * SURELY:
            out[at : at + size] = packed
