"""What the thorough kernels share: weights, float16 as it is stored, the error that a decoder will make.

Everything is in lane order as in `cpu/search.py`: value i of the block in lane k lies at i * 16 + k. A candidate is a
buffer of lanes whose first line is its error, then what is stored; `take_better` keeps the lower of two, lane by lane.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numpy.typing import NDArray

from quantkernels.compiling import compiled, instruction
from quantkernels.ggml.cpu.search import ONE, ROUND, ZERO, gather
from quantkernels.lanes import WIDTH, Lanes, lanes_type, load, select, spread, store

Floats = NDArray[np.float32]
Offsets = NDArray[np.int64]

HIGHEST = np.float32(3e38)  # an error that any finite candidate beats
LEAST_WEIGHT = np.float32(2.0**-30)
HALF = np.float32(0.5)
_F32 = ir.VectorType(ir.FloatType(), WIDTH)
_I32 = ir.VectorType(ir.IntType(32), WIDTH)


def _all(value: int) -> ir.Constant:
    return ir.Constant(_I32, [value] * WIDTH)


@instruction
def as_half(typing_context: Any, value: Any) -> Any:
    """What a reader finds after lanes were stored as float16: rounded to nearest even, infinite from 65520 on."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        bits = builder.bitcast(values[0], _I32)
        size = builder.and_(bits, _all(0x7FFFFFFF))
        odd = builder.and_(builder.lshr(size, _all(13)), _all(1))
        normal = builder.and_(builder.add(builder.add(size, _all(0xFFF)), odd), _all(0x7FFFE000))
        normal = builder.select(builder.icmp_unsigned(">=", normal, _all(0x47800000)), _all(0x7F800000), normal)
        half = ir.Constant(_F32, [0.5] * WIDTH)  # adding it leaves multiples of 2**-24, float16's smallest step
        small = builder.fsub(builder.fadd(builder.bitcast(size, _F32), half), half)
        below = builder.icmp_unsigned("<", size, _all(0x38800000))
        stored = builder.select(below, builder.bitcast(small, _I32), normal)
        return builder.bitcast(builder.or_(stored, builder.and_(bits, _all(-0x80000000))), _F32)

    return lanes_type(lanes_type), emit


@compiled
def place(group: int, blocks: int, columns: int, size: int, offsets: Offsets, importance_offsets: Offsets) -> int:
    """Where the sixteen blocks of `group` start in the rows and in the importance; gives how many there are.

    Past the end the last block is repeated: its lanes are computed and thrown away.
    """
    first = group * WIDTH
    for k in range(WIDTH):
        block = min(first + k, blocks - 1)
        offsets[k] = block * size
        importance_offsets[k] = block * size % columns
    return min(WIDTH, blocks - first)


@compiled
def weigh(importance: Floats, offsets: Offsets, count: int, weight: Floats) -> None:
    """Importance over the block's largest, so that no sum overflows; ones where there is none.

    Never below 2**-30, so that a sub-block of no importance is still fitted to its weights.
    """
    if len(importance) > 0:
        gather(importance, offsets, count, weight)
    high = spread(ZERO)
    if len(importance) > 0:
        for i in range(count):
            value = load(weight, i * WIDTH)
            high = select(value > high, value, high)
    for i in range(count):
        share = load(weight, i * WIDTH) / high
        share = select(share > LEAST_WEIGHT, share, LEAST_WEIGHT)
        store(weight, i * WIDTH, select(high > ZERO, share, ONE))


@compiled
def inverse_of(scale: Lanes) -> Lanes:
    """1 / scale, and 0 for 0: then every code is that of 0."""
    return select(scale == ZERO, ZERO, ONE / scale)


@compiled
def whole_within(value: Lanes, low: np.float32, high: np.float32) -> Lanes:
    """The nearest integers in [low, high]; low for NaN."""
    value = select(value > low, value, low)
    value = select(value > high, high, value)
    return (value + ROUND) - ROUND


@compiled
def largest(values: Floats, at: int, count: int) -> Lanes:
    """The largest of `count` values from `at` on, at least 0."""
    high = spread(ZERO)
    for j in range(count):
        value = load(values, (at + j) * WIDTH)
        high = select(value > high, value, high)
    return high


@compiled
def clear(candidate: Floats, lines: int) -> None:
    """Make `candidate` one that any other beats and that stands for zeros."""
    store(candidate, 0, spread(HIGHEST))
    for line in range(1, lines):
        store(candidate, line * WIDTH, spread(ZERO))


@compiled
def take_better(candidate: Floats, best: Floats, lines: int) -> None:
    """Copy `candidate` over `best` in the lanes where its error is lower."""
    better = load(candidate, 0) < load(best, 0)
    for line in range(lines):
        store(best, line * WIDTH, select(better, load(candidate, line * WIDTH), load(best, line * WIDTH)))
