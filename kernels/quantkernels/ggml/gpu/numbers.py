"""What all Triton kernels share: lanes in registers, rounding as ggml rounds, float16 fields.

A kernel works on tiles of lanes, one thread each. A lane is a sub-block or super-block in searches, and a weight or a
byte where codes are rounded, packed and read. The weights of a lane's sub-block are a tuple of tensors, so that loops
over them are unrolled, keep the weights in registers and add in ggml's order. A two-dimensional tile and `tl.sum` would
be shorter to write, and its order of adding is the compiler's.

Two traps. Division and square root must be `div_rn` and `sqrt_rn`, the plain ones are approximations; and launches must
switch off the fusing of multiply and add (`gpu/launch.py` does).
"""

# Triton knows no * in tuples, and mypy no tuples that grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def jitted(function: Callable[..., Any]) -> Any:
    """`function` as Triton code: a kernel, or a part of kernels."""
    return triton.jit(function)


@jitted
def lane_of(T: tl.constexpr) -> tl.tensor:
    """The number of each lane of this program's tile."""
    return tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)


@jitted
def nearest(value: tl.tensor) -> tl.tensor:
    """The nearest whole numbers, ties to even, with ggml's wrap-around at and above 2**22 and 0 for NaN.

    NaN needs a branch of its own here: that of a GPU has all mantissa bits set, where that of a CPU has one.
    """
    bits = (value + 12582912.0).to(tl.int32, bitcast=True)
    return tl.where(value == value, ((bits & 0x007FFFFF) - 0x00400000).to(tl.float32), 0.0)


@jitted
def bounded(value: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    """The nearest whole numbers in [low, high]; NaN becomes `low`."""
    value = tl.where(value > low, value, low)
    value = tl.where(value > high, high, value)
    return (value + 12582912.0) - 12582912.0


@jitted
def wrapped(value: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    """The nearest whole numbers, wrapped around as in ggml where they are huge, in [low, high]."""
    code = nearest(value)
    code = tl.where(code < low, low, code)
    return tl.where(code > high, high, code)


@jitted
def low_byte(value: tl.tensor) -> tl.tensor:
    """Whole numbers as a C uint8_t holds them."""
    return (value.to(tl.int32) & 255).to(tl.float32)


@jitted
def inverse_of(scale: tl.tensor) -> tl.tensor:
    """1 / scale, and 0 for 0."""
    return tl.where(scale == 0.0, 0.0, tl.math.div_rn(1.0, scale))


@jitted
def load_tuple(source: tl.tensor, start: tl.tensor, present: tl.tensor, N: tl.constexpr) -> tl.tuple:
    """N neighbouring values, a multiple of 4, from each lane's `start`, one too, as float32.

    Eight bytes at a time: the time to compile a kernel grows with its loads times its length (Triton's coalescing).
    """
    values = ()
    words = source.to(tl.pointer_type(tl.int64))
    if source.dtype.element_ty == tl.float32:
        for i in tl.static_range(N // 2):
            word = tl.load(words + start // 2 + i, mask=present, other=0)
            low = word.to(tl.int32).to(tl.float32, bitcast=True)
            high = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            values = values + (low, high)
    else:
        for i in tl.static_range(N // 4):
            word = tl.load(words + start // 4 + i, mask=present, other=0)
            for k in tl.static_range(4):
                half = (word >> (16 * k)).to(tl.int32) & 0xFFFF
                if source.dtype.element_ty == tl.bfloat16:
                    value = (half << 16).to(tl.float32, bitcast=True)
                else:
                    value = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
                values = values + (value,)
    return values


@jitted
def extreme_of(values: tl.tuple, N: tl.constexpr) -> tl.tensor:
    """The value of largest magnitude with its sign, the first of equals; 0 when all are 0."""
    largest = tl.abs(values[0])
    extreme = values[0] + 0.0
    for i in tl.static_range(1, N):
        larger = tl.abs(values[i]) > largest
        largest = tl.where(larger, tl.abs(values[i]), largest)
        extreme = tl.where(larger, values[i], extreme)
    return extreme


@jitted
def sum_of(values: tl.tuple, N: tl.constexpr) -> tl.tensor:
    """The sum of the values, added in order."""
    total = values[0]
    for i in tl.static_range(1, N):
        total += values[i]
    return total


@jitted
def not_a_number(values: tl.tuple, N: tl.constexpr) -> tl.tensor:
    """Whether any of the values is NaN."""
    wrong = values[0] != values[0]
    for i in tl.static_range(1, N):
        wrong = wrong | (values[i] != values[i])
    return wrong


@jitted
def load_byte(blocks: tl.tensor, at: tl.tensor, present: tl.tensor) -> tl.tensor:
    return tl.load(blocks + at, mask=present, other=0).to(tl.int32)


@jitted
def store_byte(blocks: tl.tensor, at: tl.tensor, value: tl.tensor, present: tl.tensor) -> None:
    tl.store(blocks + at, (value & 255).to(tl.uint8), mask=present)


@jitted
def load_half(blocks: tl.tensor, at: tl.tensor, present: tl.tensor) -> tl.tensor:
    """The float16 field at `at`, which is even."""
    return tl.load(blocks.to(tl.pointer_type(tl.float16)) + at // 2, mask=present, other=0.0).to(tl.float32)


@jitted
def store_half(blocks: tl.tensor, at: tl.tensor, value: tl.tensor, present: tl.tensor) -> None:
    """Write the float16 field at `at`, which is even, rounded to nearest even."""
    tl.store(blocks.to(tl.pointer_type(tl.float16)) + at // 2, value.to(tl.float16), mask=present)


@jitted
def store_pair(blocks: tl.tensor, at: tl.tensor, low: tl.tensor, high: tl.tensor, present: tl.tensor) -> None:
    """Write two bytes at `at`, which is even."""
    pair = (low & 255) | ((high & 255) << 8)
    tl.store(blocks.to(tl.pointer_type(tl.uint16)) + at // 2, pair.to(tl.uint16), mask=present)
