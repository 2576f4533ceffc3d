"""Sixteen float32 values as one number inside numba kernels: lane k belongs to block k.

A kernel written with `Lanes` reads like the scalar algorithm for one block and runs it for sixteen. Each operation
becomes one LLVM vector instruction without fast-math flags, so nothing is reordered or fused and every lane's result
equals the scalar one on any processor: one AVX-512 register, two of AVX2, four of SSE or NEON. The alternative, plain
inner loops over 16 and LLVM's auto-vectoriser, keeps the sums in memory and leaves the speed to chance.

For compiled code only. Operators: + - * / between lanes, or lanes and a float32; < > >= == give a `Mask`, which knows
& | and ~.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model
from numpy.typing import NDArray

from quantkernels.compiling import compiled, instruction

WIDTH = 16


# numba, not mypy, checks the types inside compiled code.
Lanes: TypeAlias = Any  # sixteen float32 values
Mask: TypeAlias = Any  # sixteen yes-or-no answers


class _LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


class _MaskType(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Mask")


lanes_type = _LanesType()
mask_type = _MaskType()
_F32 = ir.VectorType(ir.FloatType(), WIDTH)
_I32 = ir.VectorType(ir.IntType(32), WIDTH)
_I8 = ir.VectorType(ir.IntType(8), WIDTH)
_I1 = ir.VectorType(ir.IntType(1), WIDTH)


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _F32)


@register_model(_MaskType)
class _MaskModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _I1)


def _constant(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * WIDTH)


def _spread(builder: Any, value: Any) -> Any:
    """A vector with the scalar `value` in every lane; a vector as it is."""
    if isinstance(value.type, ir.VectorType):
        return value
    single = builder.insert_element(ir.Constant(_F32, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, ir.Constant(_F32, ir.Undefined), _constant(_I32, 0))


def _define_operator(symbol: Any, result: Any, emit: Callable[[Any, Any, Any], Any], scalars: bool = True) -> None:
    """Teach numba `symbol` for lanes; `emit(builder, left, right)` gives the LLVM value."""
    operand = lanes_type if scalars else mask_type
    pairs: list[tuple[Any, Any]] = [(operand, operand)]
    if scalars:
        pairs += [(operand, types.float32), (types.float32, operand)]

    def lower(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return emit(builder, *(_spread(builder, value) for value in values))

    for pair in pairs:
        lower_builtin(symbol, *pair)(lower)
    cases = [signature(result, *pair) for pair in pairs]
    infer_global(symbol)(type(f"_{symbol.__name__}_lanes", (ConcreteTemplate,), {"cases": cases}))


def _define_unary(symbol: Any, operand: Any, emit: Callable[[Any, Any], Any]) -> None:
    lower_builtin(symbol, operand)(lambda context, builder, typed, values: emit(builder, values[0]))
    cases = [signature(operand, operand)]
    infer_global(symbol)(type(f"_{symbol.__name__}_{operand.name}", (ConcreteTemplate,), {"cases": cases}))


_define_operator(operator.add, lanes_type, lambda builder, left, right: builder.fadd(left, right))
_define_operator(operator.iadd, lanes_type, lambda builder, left, right: builder.fadd(left, right))
_define_operator(operator.sub, lanes_type, lambda builder, left, right: builder.fsub(left, right))
_define_operator(operator.mul, lanes_type, lambda builder, left, right: builder.fmul(left, right))
_define_operator(operator.truediv, lanes_type, lambda builder, left, right: builder.fdiv(left, right))
_define_operator(operator.lt, mask_type, lambda builder, left, right: builder.fcmp_ordered("<", left, right))
_define_operator(operator.gt, mask_type, lambda builder, left, right: builder.fcmp_ordered(">", left, right))
_define_operator(operator.ge, mask_type, lambda builder, left, right: builder.fcmp_ordered(">=", left, right))
_define_operator(operator.eq, mask_type, lambda builder, left, right: builder.fcmp_ordered("==", left, right))
_define_operator(operator.and_, mask_type, lambda builder, left, right: builder.and_(left, right), scalars=False)
_define_operator(operator.or_, mask_type, lambda builder, left, right: builder.or_(left, right), scalars=False)
_define_unary(operator.neg, lanes_type, lambda builder, value: builder.fneg(value))
_define_unary(operator.invert, mask_type, lambda builder, value: builder.not_(value))


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: ir.VectorType) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


@instruction
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """Sixteen neighbouring float32 values of a contiguous array, from `index` on."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, typed.args[0], values[0], values[1], _F32)
        return builder.load(pointer, align=4)

    return lanes_type(array, types.int64), emit


@instruction
def store(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write lanes to sixteen neighbouring float32 values, from `index` on."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, typed.args[0], values[0], values[1], _F32)
        builder.store(values[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), emit


@instruction
def store_bytes(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Write lanes that hold whole numbers from -128 to 255 to sixteen neighbouring bytes, from `index` on."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        pointer = _pointer(context, builder, typed.args[0], values[0], values[1], _I8)
        builder.store(builder.trunc(builder.fptosi(values[2], _I32), _I8), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), emit


@instruction
def spread(typing_context: Any, value: Any) -> Any:
    """Lanes that all hold the scalar `value`."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return _spread(builder, values[0])

    return lanes_type(types.float32), emit


@instruction
def select(typing_context: Any, mask: Any, yes: Any, no: Any) -> Any:
    """`yes` where the mask is true, `no` elsewhere; either may be a float32."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.select(values[0], _spread(builder, values[1]), _spread(builder, values[2]))

    return lanes_type(mask, yes, no), emit


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, function_type, name)
    return builder.call(function, arguments)


@instruction
def root(typing_context: Any, value: Any) -> Any:
    """The square root, correctly rounded."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return _call(builder, f"llvm.sqrt.v{WIDTH}f32", _F32, [values[0]])

    return lanes_type(lanes_type), emit


@instruction
def magnitude(typing_context: Any, value: Any) -> Any:
    """The absolute value."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return _call(builder, f"llvm.fabs.v{WIDTH}f32", _F32, [values[0]])

    return lanes_type(lanes_type), emit


@instruction
def whole(typing_context: Any, value: Any) -> Any:
    """The value without its fraction, towards zero."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return _call(builder, f"llvm.trunc.v{WIDTH}f32", _F32, [values[0]])

    return lanes_type(lanes_type), emit


@instruction
def bits_of(typing_context: Any, mask: Any) -> Any:
    """The mask as a whole number, lane 0 in the lowest bit."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.zext(builder.bitcast(values[0], ir.IntType(WIDTH)), ir.IntType(64))

    return types.int64(mask_type), emit


@instruction
def nearest_wrapped(typing_context: Any, value: Any) -> Any:
    """The nearest whole numbers, ties to even, with ggml's wrap-around at and above 2**22 and 0 for NaN."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        shifted = builder.fadd(values[0], _constant(_F32, 12582912.0))
        bits = builder.and_(builder.bitcast(shifted, _I32), _constant(_I32, 0x007FFFFF))
        return builder.sitofp(builder.sub(bits, _constant(_I32, 0x00400000)), _F32)

    return lanes_type(lanes_type), emit


@instruction
def low_byte(typing_context: Any, value: Any) -> Any:
    """Whole numbers as a C uint8_t holds them."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.uitofp(builder.and_(builder.fptosi(values[0], _I32), _constant(_I32, 255)), _F32)

    return lanes_type(lanes_type), emit


@instruction
def transpose(typing_context: Any, source: Any, offsets: Any, first: Any, target: Any, row: Any) -> Any:
    """Copy a 16 x 16 tile so that lanes become blocks.

    source[offsets[k] + first + i] goes to target[(row + i) * 16 + k] for i and k from 0 to 15. Four rounds of
    interleaving halves: 64 register shuffles in place of 256 scalar copies.
    """

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        i64 = ir.IntType(64)
        offset_data = context.make_array(typed.args[1])(context, builder, values[1]).data
        tile = []
        for k in range(WIDTH):
            offset = builder.load(builder.gep(offset_data, [ir.Constant(i64, k)]))
            index = builder.add(offset, values[2])
            tile.append(builder.load(_pointer(context, builder, typed.args[0], values[0], index, _F32), align=4))
        low = ir.Constant(_I32, [k // 2 + WIDTH * (k % 2) for k in range(WIDTH)])
        high = ir.Constant(_I32, [WIDTH // 2 + k // 2 + WIDTH * (k % 2) for k in range(WIDTH)])
        half = WIDTH // 2
        for _ in range(4):
            pairs = [(tile[k], tile[k + half]) for k in range(half)]
            tile = [builder.shuffle_vector(*pair, mask) for pair in pairs for mask in (low, high)]
        for i in range(WIDTH):
            index = builder.mul(builder.add(values[4], ir.Constant(i64, i)), ir.Constant(i64, WIDTH))
            builder.store(tile[i], _pointer(context, builder, typed.args[3], values[3], index, _F32), align=4)
        return context.get_dummy_value()

    return types.void(source, offsets, types.int64, target, types.int64), emit


@compiled
def buffer(lines: int) -> NDArray[np.float32]:
    """Room for `lines` stores of lanes, not initialized, at an address that is a multiple of 64.

    There a 64-byte load never touches two cache lines; with numpy's own 16 bytes most do.
    """
    room = np.empty((lines + 1) * WIDTH, np.float32)
    start = (-room.ctypes.data % 64) // 4
    return room[start : start + lines * WIDTH]
