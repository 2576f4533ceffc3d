"""IQ4_NL and IQ4_XS: sixteen blocks or super-blocks at a time, one per lane.

The nearest of the sixteen levels is found by comparing with all fifteen middles between them: 15 comparisons and 15
selections for sixteen weights at once, where a binary search takes four branches for each. A table look-up would take
fewer instructions, but only through intrinsics of one processor family.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkernels.compiling import compiled, instruction, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.legacy import inverse_of
from quantkernels.ggml.cpu.legacy import place as place_blocks
from quantkernels.ggml.cpu.pack import place
from quantkernels.ggml.cpu.search import (
    ONE,
    TINY,
    ZERO,
    extreme_of,
    gather,
    sum_of_squares,
    wrapped_codes,
)
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.iq4 import LEVELS, MIDDLES
from quantkernels.lanes import (
    WIDTH,
    Lanes,
    buffer,
    lanes_type,
    load,
    magnitude,
    root,
    select,
    spread,
    store,
    store_bytes,
)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 32
COUNT = SUPER_BLOCK // BLOCK
NOT_A_NUMBER = np.float32(np.nan)


def _stairs(builder: Any, value: Any, results: tuple[float, ...]) -> Any:
    """The k-th of `results` where k middles are at most `value`, the last one for NaN."""
    vector = ir.VectorType(ir.FloatType(), WIDTH)
    chosen = ir.Constant(vector, [float(results[0])] * WIDTH)
    for k in range(len(MIDDLES)):
        below = builder.fcmp_ordered("<", value, ir.Constant(vector, [MIDDLES[k]] * WIDTH))
        chosen = builder.select(below, chosen, ir.Constant(vector, [float(results[k + 1])] * WIDTH))
    return chosen


@instruction
def nearest_level(typing_context: Any, value: Any) -> Any:
    """The nearest level, the upper one half-way between two and the highest one for NaN."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return _stairs(builder, values[0], LEVELS)

    return lanes_type(lanes_type), emit


@instruction
def nearest_code(typing_context: Any, value: Any) -> Any:
    """The code, from 0 to 15, of the nearest level."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return _stairs(builder, values[0], tuple(range(16)))

    return lanes_type(lanes_type), emit


@compiled
def weigh_levels(x: Floats, weight: Floats, count: int, weighed: bool) -> None:
    """Search weights: x * x, or importance, which `weight` holds, times sqrt(2 * mean square + x * x)."""
    if weighed:
        mean_square = sum_of_squares(x, 0, count) * (np.float32(2) / np.float32(count))
        for i in range(count):
            value = load(x, i * WIDTH)
            store(weight, i * WIDTH, load(weight, i * WIDTH) * root(mean_square + value * value))
    else:
        for i in range(count):
            value = load(x, i * WIDTH)
            store(weight, i * WIDTH, value * value)


@compiled
def search_levels(x: Floats, weight: Floats, at: int) -> Lanes:
    """The scale of least weighted square error among 16 for a block of 32; 0 for a block below TINY."""
    extreme = extreme_of(x, at, BLOCK)
    scale = spread(ZERO)
    best = spread(ZERO)
    for trial in range(16):
        inverse = ONE / (extreme / np.float32(127))
        if trial > 0:
            inverse = np.float32(trial - 8 - 127) / extreme
        sum_xl = spread(ZERO)
        sum_l2 = spread(ZERO)
        for i in range(at, at + BLOCK):
            value = load(x, i * WIDTH)
            level = nearest_level(inverse * value)
            weighted = load(weight, i * WIDTH) * level
            sum_xl += weighted * value
            sum_l2 += weighted * level
        ratio = sum_xl / sum_l2
        if trial == 0:
            scale = select(sum_l2 > ZERO, ratio, ZERO)
            best = scale * sum_xl
        else:
            better = (sum_l2 > ZERO) & (sum_xl * sum_xl > best * sum_l2)
            scale = select(better, ratio, scale)
            best = select(better, ratio * sum_xl, best)
    return select(magnitude(extreme) < TINY, ZERO, scale)


@compiled
def store_codes(rows: Floats, start: int, inverse: np.float32, target: Bytes, at: int) -> None:
    """The sixteen bytes of 32 codes."""
    first = nearest_code(inverse * load(rows, start))
    second = nearest_code(inverse * load(rows, start + WIDTH))
    store_bytes(target, at, first + second * np.float32(16))


@kernel
def quantize_iq4_nl(rows: Floats, importance: Floats, columns: int, out: Bytes) -> None:
    """IQ4_NL of flat `rows` into flat `out`; importance may be empty."""
    x = buffer(BLOCK)
    weight = buffer(BLOCK)
    found = buffer(2)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // BLOCK
    weighed = len(importance) > 0
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place_blocks(group, blocks, offsets)
        gather(rows, offsets, BLOCK, x)
        if weighed:
            for k in range(WIDTH):
                importance_offsets[k] = offsets[k] % columns
            gather(importance, importance_offsets, BLOCK, weight)
        weigh_levels(x, weight, BLOCK, weighed)
        scale = search_levels(x, weight, 0)
        store(found, 0, scale)
        store(found, WIDTH, inverse_of(scale))
        for k in range(present):
            at = (group * WIDTH + k) * 18
            store_half(out, at, found[k])
            store_codes(rows, offsets[k], found[WIDTH + k], out, at + 2)


@compiled
def fit_scales(found: Floats, codes: Floats, inverses: Floats) -> Lanes:
    """Six-bit codes for the scales and the inverses of what they stand for; gives d, NaN where a scale is NaN."""
    wrong = spread(ZERO) > ZERO
    for j in range(COUNT):
        scale = load(found, j * WIDTH)
        wrong = wrong | ~(scale == scale)
    d = extreme_of(found, 0, COUNT) / np.float32(-32)
    inverse = inverse_of(d)
    for j in range(COUNT):
        code = wrapped_codes(inverse * load(found, j * WIDTH), np.float32(-32), np.float32(31))
        store(codes, j * WIDTH, code)
        store(inverses, j * WIDTH, inverse_of(d * code))
    return select(wrong, NOT_A_NUMBER, d)


@kernel
def quantize_iq4_xs(rows: Floats, importance: Floats, columns: int, out: Bytes) -> None:
    """IQ4_XS of flat `rows` into flat `out`; importance may be empty."""
    x = buffer(SUPER_BLOCK)
    weight = buffer(SUPER_BLOCK)
    found = buffer(COUNT + 1)
    codes = buffer(COUNT)
    inverses = buffer(COUNT)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // SUPER_BLOCK
    weighed = len(importance) > 0
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, x)
        if weighed:
            gather(importance, importance_offsets, SUPER_BLOCK, weight)
        weigh_levels(x, weight, SUPER_BLOCK, weighed)
        for j in range(COUNT):
            store(found, j * WIDTH, search_levels(x, weight, j * BLOCK))
        store(found, COUNT * WIDTH, fit_scales(found, codes, inverses))
        for k in range(present):
            at = (group * WIDTH + k) * 136
            store_half(out, at, found[COUNT * WIDTH + k])
            high = 0
            for j in range(0, COUNT, 2):
                first = int(codes[j * WIDTH + k]) + 32
                second = int(codes[(j + 1) * WIDTH + k]) + 32
                high |= ((first >> 4) | ((second >> 4) << 2)) << (2 * j)
                out[at + 4 + j // 2] = (first & 15) | ((second & 15) << 4)
            out[at + 2] = high & 255
            out[at + 3] = high >> 8
            for j in range(COUNT):
                store_codes(rows, offsets[k] + j * BLOCK, inverses[j * WIDTH + k], out, at + 8 + j * 16)
