"""Vector instructions for lattice searches over groups of 8: sixteen neighbours at a time, each in its own lane.

The error of a neighbour is a sum of eight terms, and there are only three levels, so a term is one of three numbers.
They are computed once for a group and a scale, as a table for each of the eight weights, and a lane picks its terms by
the bits of its code: the same float32 sum in the same order as ggml's, without a multiplication per neighbour. Codes
hold level i in bits 2i and 2i + 1. With AVX-512 picking is one permutation, elsewhere two selections.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types

from quantkernels.compiling import inlined, instruction
from quantkernels.lanes import _F32, _I32, WIDTH, _call, _constant, _pointer, _spread, lanes_type

_I16 = ir.VectorType(ir.IntType(16), WIDTH)
_TUPLE: Any = types.UniTuple  # type: ignore[attr-defined]
_EIGHT = _TUPLE(lanes_type, 8)
_LEVELS = (1.0, 3.0, 5.0, 5.0)  # the fourth is never picked


@inlined
def whole(value: Any) -> int:
    """A stored integer with its sign and 64 bits: beside those, numba makes floats of unsigned ones."""
    return np.int64(value)  # type: ignore[return-value]


def _shuffled(builder: Any, value: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), ir.Constant(_I32, lanes))


def _twice(builder: Any, position: Any) -> Any:
    """The shift that brings a level to the lowest bits, in all lanes."""
    whole = ir.IntType(32)
    shift = builder.shl(builder.trunc(position, whole), ir.Constant(whole, 1))
    single = builder.insert_element(ir.Constant(_I32, ir.Undefined), shift, ir.Constant(whole, 0))
    return _shuffled(builder, single, [0] * WIDTH)


@instruction
def tables_of(typing_context: Any, x: Any, roots: Any, at: Any, scale: Any) -> Any:
    """A table for each of eight weights: what level 0, 1, 2 adds to the error, over and over.

    That is roots[i] * difference * difference for the difference of scale * (1, 3, 5) and x[i], for i = at + 16 k.
    """

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        levels = ir.Constant(_F32, [_LEVELS[k % 4] for k in range(WIDTH)])
        target = builder.fmul(_spread(builder, values[3]), levels)
        data = [context.make_array(typed.args[k])(context, builder, values[k]).data for k in (0, 1)]
        tables = []
        for i in range(8):
            index = builder.add(values[2], ir.Constant(ir.IntType(64), i * WIDTH))
            value, factor = (_spread(builder, builder.load(builder.gep(part, [index]))) for part in data)
            difference = builder.fsub(target, value)
            tables.append(builder.fmul(builder.fmul(factor, difference), difference))
        return context.make_tuple(builder, typed.return_type, tables)

    return _EIGHT(x, roots, types.int64, types.float32), emit


@instruction
def errors_of(typing_context: Any, codes: Any, at: Any, tables: Any) -> Any:
    """The errors of the sixteen u16 codes from `at` on: the sum of their terms in `tables`, first weight first."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        code = builder.load(_pointer(context, builder, typed.args[0], values[0], values[1], _I16), align=2)
        parts = [builder.extract_value(values[2], i) for i in range(8)]
        if "+avx512f" in context.codegen().magic_tuple()[2].split(","):
            return _permuted(builder, builder.zext(code, _I32), parts)
        return _selected(builder, code, parts)

    return lanes_type(codes, types.int64, _EIGHT), emit


def _permuted(builder: Any, code: Any, tables: list[Any]) -> Any:
    """One permutation per term; it looks at four bits, so the first picks the sum of two."""
    pairs = builder.fadd(tables[0], _shuffled(builder, tables[1], [k // 4 for k in range(WIDTH)]))
    total = _call(builder, "llvm.x86.avx512.permvar.sf.512", _F32, [pairs, code])
    for i in range(2, 8):
        index = builder.lshr(code, _constant(_I32, 2 * i))
        total = builder.fadd(total, _call(builder, "llvm.x86.avx512.permvar.sf.512", _F32, [tables[i], index]))
    return total


def _selected(builder: Any, code: Any, tables: list[Any]) -> Any:
    """Two selections per term, by the two bits of a level."""
    total = None
    for i, table in enumerate(tables):
        low, middle, high = (_shuffled(builder, table, [level] * WIDTH) for level in range(3))
        bits = [
            builder.icmp_unsigned("!=", builder.and_(code, _constant(_I16, 1 << bit)), _constant(_I16, 0))
            for bit in (2 * i, 2 * i + 1)
        ]
        term = builder.select(bits[1], high, builder.select(bits[0], middle, low))
        total = term if total is None else builder.fadd(total, term)
    return total


@instruction
def first_least(typing_context: Any, value: Any) -> Any:
    """The first lane that holds the smallest value; 0 where no value is a number."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        least = values[0]
        for step in (8, 4, 2, 1):
            turned = _shuffled(builder, least, [k ^ step for k in range(WIDTH)])
            least = builder.select(builder.fcmp_ordered("<", turned, least), turned, least)
        short = ir.IntType(WIDTH)
        bits = builder.bitcast(builder.fcmp_ordered("==", values[0], least), short)
        lane = builder.cttz(bits, ir.Constant(ir.IntType(1), 0))
        return builder.zext(builder.and_(lane, ir.Constant(short, WIDTH - 1)), ir.IntType(64))

    return types.int64(lanes_type), emit


@instruction
def store_whole(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write lanes that hold whole numbers to sixteen neighbouring u32, from `index` on."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, typed.args[0], values[0], values[1], _I32)
        builder.store(builder.fptosi(values[2], _I32), pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes_type), emit


@instruction
def one_of(typing_context: Any, value: Any, lane: Any) -> Any:
    """The value of a single lane."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.extract_element(values[0], builder.trunc(values[1], ir.IntType(32)))

    return types.float32(lanes_type, types.int64), emit


@instruction
def odd_level(typing_context: Any, code: Any, position: Any) -> Any:
    """2 level + 1 for the level at `position` of each lane's code."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        whole = builder.shl(builder.fptosi(values[0], _I32), _constant(_I32, 1))
        bits = builder.lshr(whole, _twice(builder, values[1]))
        return builder.sitofp(builder.or_(builder.and_(bits, _constant(_I32, 6)), _constant(_I32, 1)), _F32)

    return lanes_type(lanes_type, types.int64), emit


@instruction
def raised(typing_context: Any, best: Any, scales: Any, linear: Any, square: Any) -> Any:
    """The larger of `best` and linear - scale * square, for each of a tuple of scales."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        higher = []
        for k in range(len(best)):
            old, scale = (builder.extract_value(values[part], k) for part in (0, 1))
            new = builder.fsub(values[2], builder.fmul(scale, values[3]))
            higher.append(builder.select(builder.fcmp_ordered(">", new, old), new, old))
        return context.make_tuple(builder, typed.return_type, higher)

    return best(best, scales, lanes_type, lanes_type), emit


@instruction
def picked(typing_context: Any, best: Any, codes: Any, scales: Any, linear: Any, square: Any, code: Any) -> Any:
    """Like `raised`, followed by the codes that the values belong to: `code` wherever it raised one."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        higher, chosen = [], []
        for k in range(len(best)):
            old, old_code, scale = (builder.extract_value(values[part], k) for part in (0, 1, 2))
            new = builder.fsub(values[3], builder.fmul(scale, values[4]))
            better = builder.fcmp_ordered(">", new, old)
            higher.append(builder.select(better, new, old))
            chosen.append(builder.select(better, _spread(builder, values[5]), old_code))
        return context.make_tuple(builder, typed.return_type, higher + chosen)

    result = _TUPLE(lanes_type, 2 * len(best))
    return result(best, codes, scales, lanes_type, lanes_type, types.float32), emit


@instruction
def value_of(typing_context: Any, code: Any, position: Any) -> Any:
    """The decoder's value, 1, 3.125 or 5.375, of the level at `position` of each lane's code."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        bits = builder.lshr(builder.fptosi(values[0], _I32), _twice(builder, values[1]))
        low, high = (
            builder.icmp_unsigned("!=", builder.and_(bits, _constant(_I32, bit)), _constant(_I32, 0)) for bit in (1, 2)
        )
        middle = builder.select(low, _constant(_F32, 3.125), _constant(_F32, 1.0))
        return builder.select(high, _constant(_F32, 5.375), middle)

    return lanes_type(lanes_type, types.int64), emit
