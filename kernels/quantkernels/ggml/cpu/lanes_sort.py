"""Sorting the weights of sixteen blocks at once: lane k belongs to block k, as in `lanes.py`.

A weight and its place make one 64-bit integer, the weight's order-preserving bits above and its place below. So equal
weights keep their order, as in the C library's stable sort, and a sorting network needs only minimum and maximum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numpy.typing import NDArray

from quantkernels.compiling import compiled, instruction
from quantkernels.lanes import WIDTH, lanes_type, mask_type

HALF_WIDTH = WIDTH // 2
_F32 = ir.VectorType(ir.FloatType(), WIDTH)
_I32 = ir.VectorType(ir.IntType(32), WIDTH)
_KEYS = ir.VectorType(ir.IntType(64), WIDTH)
_HALF = ir.VectorType(ir.IntType(64), HALF_WIDTH)  # as many keys as an AVX-512 register holds: 32 of them, no spills
_I64 = ir.IntType(64)


def network(count: int) -> list[tuple[int, int]]:
    """Which places to compare, in order: Batcher's odd-even merge sort; count is a power of two.

    Source: Knuth, The Art of Computer Programming 3, algorithm 5.2.2M.
    """
    pairs: list[tuple[int, int]] = []
    size = 1
    while size < count:
        reach = size
        while reach >= 1:
            for first in range(reach % size, count - reach, 2 * reach):
                lows = range(first, min(first + reach, count - reach))
                pairs += [(low, low + reach) for low in lows if low // (2 * size) == (low + reach) // (2 * size)]
            reach //= 2
        size *= 2
    return pairs


def _constant(vector: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, pointed: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), pointed.as_pointer())


def _key(builder: Any, values: Any, half: int, place: int) -> Any:
    """Keys of half the lanes of `values`: bits in the order of the numbers, 0.0 and -0.0 alike, then place and lane."""
    bits = builder.bitcast(builder.fadd(values, _constant(_F32, 0.0)), _I32)
    flipped = builder.and_(builder.ashr(bits, _constant(_I32, 31)), _constant(_I32, 0x7FFFFFFF))
    ordered = builder.xor(bits, flipped)
    lanes = list(range(half * HALF_WIDTH, (half + 1) * HALF_WIDTH))
    chosen = ir.Constant(ir.VectorType(ir.IntType(32), HALF_WIDTH), lanes)
    wide = builder.sext(builder.shuffle_vector(ordered, ir.Constant(_I32, ir.Undefined), chosen), _HALF)
    places = ir.Constant(_HALF, [place * WIDTH + lane for lane in lanes])
    return builder.or_(builder.shl(wide, _constant(_HALF, 32)), places)


def _sorter(count: int) -> Callable[..., Any]:
    @instruction
    def sort(typing_context: Any, values: Any, index: Any, keys: Any) -> Any:
        """Keys of `count` lines of lanes from values[index] on, sorted in each lane, to the start of `keys`."""

        def emit(context: Any, builder: Any, typed: Any, arguments: Any) -> Any:
            def line(array: int, start: Any, place: int, pointed: Any) -> Any:
                at = builder.add(start, ir.Constant(_I64, place))
                return _pointer(context, builder, typed.args[array], arguments[array], at, pointed)

            zero = ir.Constant(_I64, 0)
            for half in range(2):
                found = []
                for place in range(count):
                    pointer = line(0, arguments[1], place * WIDTH, _F32)
                    found.append(_key(builder, builder.load(pointer, align=4), half, place))
                for low, high in network(count):
                    first, second = found[low], found[high]
                    less = builder.icmp_signed("<", first, second)
                    found[low] = builder.select(less, first, second)
                    found[high] = builder.select(less, second, first)
                for place in range(count):
                    pointer = line(2, zero, place * WIDTH + half * HALF_WIDTH, _HALF)
                    builder.store(found[place], pointer, align=8)
            return context.get_dummy_value()

        return types.void(values, types.int64, keys), emit

    return sort


sort_16 = _sorter(16)
sort_32 = _sorter(32)


@instruction
def value_of(typing_context: Any, keys: Any, index: Any) -> Any:
    """The sixteen values whose keys stand from keys[index] on; -0.0 has become 0.0."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        wide = builder.load(_pointer(context, builder, typed.args[0], values[0], values[1], _KEYS), align=8)
        ordered = builder.trunc(builder.ashr(wide, _constant(_KEYS, 32)), _I32)
        flipped = builder.and_(builder.ashr(ordered, _constant(_I32, 31)), _constant(_I32, 0x7FFFFFFF))
        return builder.bitcast(builder.xor(ordered, flipped), _F32)

    return lanes_type(keys, types.int64), emit


@instruction
def taken(typing_context: Any, source: Any, start: Any, keys: Any, index: Any) -> Any:
    """Lanes of source[start:], in lane order, from the places that the sixteen keys from keys[index] on name."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        found = ir.Constant(_F32, ir.Undefined)
        key_data = context.make_array(typed.args[2])(context, builder, values[2]).data
        data = context.make_array(typed.args[0])(context, builder, values[0]).data
        base = builder.gep(data, [values[1]])
        for k in range(WIDTH):
            key = builder.load(builder.gep(key_data, [builder.add(values[3], ir.Constant(_I64, k))]))
            place = builder.and_(key, ir.Constant(_I64, 0xFFFFFFFF))
            value = builder.load(builder.gep(base, [place]))
            found = builder.insert_element(found, value, ir.Constant(ir.IntType(32), k))
        return found

    return lanes_type(source, types.int64, keys, types.int64), emit


@instruction
def placed_below(typing_context: Any, keys: Any, index: Any, limit: Any) -> Any:
    """Whether the places that the sixteen keys from keys[index] on name lie below `limit`."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        wide = builder.load(_pointer(context, builder, typed.args[0], values[0], values[1], _KEYS), align=8)
        places = builder.trunc(wide, _I32)
        bound = builder.trunc(builder.mul(values[2], ir.Constant(_I64, WIDTH)), ir.IntType(32))
        single = builder.insert_element(ir.Constant(_I32, ir.Undefined), bound, ir.Constant(ir.IntType(32), 0))
        spread = builder.shuffle_vector(single, ir.Constant(_I32, ir.Undefined), _constant(_I32, 0))
        return builder.icmp_signed("<", places, spread)

    return mask_type(keys, types.int64, types.int64), emit


@instruction
def pair_keys(typing_context: Any, above: Any, below: Any, keys: Any, index: Any) -> Any:
    """Write sixteen keys from keys[index] on: the bits of `above`, never negative, over those of `below`."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        high, low = (builder.zext(builder.bitcast(value, _I32), _KEYS) for value in values[:2])
        pointer = _pointer(context, builder, typed.args[2], values[2], values[3], _KEYS)
        builder.store(builder.or_(builder.shl(high, _constant(_KEYS, 32)), low), pointer, align=8)
        return context.get_dummy_value()

    return types.void(lanes_type, lanes_type, keys, types.int64), emit


@instruction
def below_of(typing_context: Any, keys: Any, index: Any) -> Any:
    """The sixteen values in the low halves of the keys from keys[index] on."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        wide = builder.load(_pointer(context, builder, typed.args[0], values[0], values[1], _KEYS), align=8)
        return builder.bitcast(builder.trunc(wide, _I32), _F32)

    return lanes_type(keys, types.int64), emit


@instruction
def put_in_order(typing_context: Any, keys: Any, low: Any, high: Any) -> Any:
    """Swap, lane by lane, the keys from keys[low] and from keys[high] on where the first are greater."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        places = [_pointer(context, builder, typed.args[0], values[0], index, _KEYS) for index in values[1:]]
        first, second = (builder.load(place, align=8) for place in places)
        less = builder.icmp_signed("<", first, second)
        builder.store(builder.select(less, first, second), places[0], align=8)
        builder.store(builder.select(less, second, first), places[1], align=8)
        return context.get_dummy_value()

    return types.void(keys, types.int64, types.int64), emit


@compiled
def sort_keys(keys: NDArray[np.int64], count: int) -> None:
    """Sort `count` lines of keys, lane by lane, in memory; count is a power of two, the pairs are `network`'s."""
    size = 1
    while size < count:
        reach = size
        while reach >= 1:
            for first in range(reach % size, count - reach, 2 * reach):
                for low in range(first, min(first + reach, count - reach)):
                    if low // (2 * size) == (low + reach) // (2 * size):
                        put_in_order(keys, low * WIDTH, (low + reach) * WIDTH)
            reach //= 2
        size *= 2
