"""Tiles of 8 x 32 sums that stay in registers while vdpbf16ps adds two rows' products to each.

The instruction wants, in 32 bits, a column's values in two rows that follow each other. Columns are packed like that in
panels of 32, and one panel serves both sides of the product: two vectors of it are the right side, single values, each
spread over a vector, the left. 16 of the 32 registers hold sums, which hides the six cycles that an instruction takes
from the next to the same sum. numba would keep the sums of such a loop in memory, so it is written in LLVM's terms.

Measured on Zen 4: 220 GFLOP/s, counting the triangle only, where that core's peak is about 230.

# N rows, I columns, P panels of columns, K pairs of rows, W columns of a panel
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.registry import cpu_target
from numpy.typing import NDArray

from quantkernels.compiling import compiled, instruction, kernel

Floats = NDArray[np.float32]
Pairs = NDArray[np.uint32]  # two bf16 values: that of the earlier row in the lower half

LANES = 16
VECTORS = 2  # of a tile's row
WIDTH = LANES * VECTORS  # columns of a tile and of a panel
HEIGHT = 8  # rows of a tile; a whole number of tiles is as high as a panel is wide
# Rows that are summed before they are added to the matrix: a panel of them fills the first cache, a stripe of 512
# columns half the second. A longer piece would load and store the matrix less often, which costs 2 % as it is.
ROWS = 512
ZERO = np.float32(0)

_F32 = ir.VectorType(ir.FloatType(), LANES)
_I32 = ir.VectorType(ir.IntType(32), LANES)
_INT32, _INT64 = ir.IntType(32), ir.IntType(64)


@cache
def is_compiled_for_it() -> bool:
    """Whether numba compiles for a processor with AVX512_BF16: it can be told to compile for others."""
    return "+avx512bf16" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")


def _number(value: int) -> ir.Constant:
    return ir.Constant(_INT64, value)


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _vector(builder: Any, data: Any, index: Any, vector: ir.VectorType) -> Any:
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
    return builder.call(function, arguments)


@instruction
def _add_tile(
    typing_context: Any, packed: Any, left: Any, right: Any, pairs: Any, gram: Any, first: Any, stride: Any
) -> Any:
    """Adds the products of a panel from `right` on with HEIGHT columns from `left` on to a tile of gram.

    packed and gram are flat; the tile begins at `first` and its rows are `stride` apart.
    """

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        packed, left, right, pairs, gram, first, stride = values
        packed_data = _data(context, builder, typed.args[0], packed)
        gram_data = _data(context, builder, typed.args[4], gram)
        tile = []
        for row in range(HEIGHT):
            start = builder.add(first, builder.mul(stride, _number(row)))
            tile += [_vector(builder, gram_data, builder.add(start, _number(LANES * v)), _F32) for v in range(VECTORS)]
        for place in tile:  # to be written, and at hand when the sums are done
            byte = builder.bitcast(place, ir.IntType(8).as_pointer())
            how = [ir.Constant(_INT32, number) for number in (1, 3, 1)]
            _call(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, *how])

        before, loop, behind = builder.block, *(builder.append_basic_block(name) for name in ("pairs", "behind"))
        builder.branch(loop)
        builder.position_at_end(loop)
        pair = builder.phi(_INT64)
        pair.add_incoming(_number(0), before)
        sums = [builder.phi(_F32) for _ in tile]
        for one in sums:
            one.add_incoming(ir.Constant(_F32, [0.0] * LANES), before)
        line = builder.mul(pair, _number(WIDTH))
        panel = builder.add(right, line)
        columns = [
            builder.load(_vector(builder, packed_data, builder.add(panel, _number(LANES * v)), _I32), align=64)
            for v in range(VECTORS)
        ]
        added = []
        for row in range(HEIGHT):
            place = builder.gep(packed_data, [builder.add(builder.add(left, line), _number(row))])
            single = builder.insert_element(ir.Constant(_I32, ir.Undefined), builder.load(place), _number(0))
            spread = builder.shuffle_vector(single, ir.Constant(_I32, ir.Undefined), ir.Constant(_I32, [0] * LANES))
            for v in range(VECTORS):
                operands = [sums[row * VECTORS + v], spread, columns[v]]
                added.append(_call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", _F32, operands))
        following = builder.add(pair, _number(1))
        pair.add_incoming(following, loop)
        for one, later in zip(sums, added, strict=True):
            one.add_incoming(later, loop)
        builder.cbranch(builder.icmp_signed("<", following, pairs), loop, behind)

        builder.position_at_end(behind)
        for place, one in zip(tile, added, strict=True):
            builder.store(builder.fadd(builder.load(place, align=4), one), place, align=4)
        return context.get_dummy_value()

    number = types.int64
    return types.void(packed, number, number, number, gram, number, number), emit


@instruction
def _pack_lanes(typing_context: Any, rows: Any, earlier: Any, later: Any, packed: Any, at: Any) -> Any:
    """Rounds LANES values of two rows, from `earlier` and `later` on, to bf16, ties to even, and packs them."""

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        rows, earlier, later, packed, at = values
        data = _data(context, builder, typed.args[0], rows)

        def number(value: int) -> ir.Constant:
            return ir.Constant(_I32, [value] * LANES)

        def rounded(index: Any) -> Any:
            bits = builder.load(_vector(builder, data, index, _I32), align=4)
            odd = builder.and_(builder.lshr(bits, number(16)), number(1))
            return builder.add(bits, builder.add(odd, number(0x7FFF)))

        low = builder.lshr(rounded(earlier), number(16))
        high = builder.and_(rounded(later), number(0xFFFF0000))
        place = _vector(builder, _data(context, builder, typed.args[3], packed), at, _I32)
        builder.store(builder.or_(low, high), place, align=64)
        return context.get_dummy_value()

    number = types.int64
    return types.void(rows, number, number, packed, number), emit


@compiled
def _pack(rows: Floats, start: int, count: int, columns: tuple[int, int], edge: Floats, packed: Pairs, at: int) -> None:
    """The panel of `count` rows that begins at rows[start], flat; what lies outside of the rows is 0.

    columns: how many there are from `start` on, and in all; edge: room for two rows of a panel.
    """
    within, width = columns
    for pair in range((count + 1) // 2):
        earlier, later, to = start + 2 * pair * width, start + (2 * pair + 1) * width, at + pair * WIDTH
        if within >= WIDTH and 2 * pair + 1 < count:
            for lane in range(0, WIDTH, LANES):
                _pack_lanes(rows, earlier + lane, later + lane, packed, to + lane)
        else:
            for j in range(WIDTH):
                edge[j] = rows[earlier + j] if j < within else ZERO
                edge[WIDTH + j] = rows[later + j] if j < within and 2 * pair + 1 < count else ZERO
            for lane in range(0, WIDTH, LANES):
                _pack_lanes(edge, lane, WIDTH + lane, packed, to + lane)


@compiled
def _add_part(
    packed: Pairs,
    left: int,
    right: int,
    pairs: int,
    gram: Floats,
    corner: tuple[int, int],
    end: tuple[int, int],
    tile: Floats,
) -> None:
    """As _add_tile for a tile that begins at `corner` and of which gram [I, I], flat, takes what lies before `end`."""
    for i in range(HEIGHT * WIDTH):
        tile[i] = ZERO
    _add_tile(packed, left, right, pairs, tile, 0, WIDTH)
    for i in range(min(HEIGHT, end[0] - corner[0])):
        for j in range(min(WIDTH, end[1] - corner[1])):
            gram[(corner[0] + i) * end[1] + corner[1] + j] += tile[i * WIDTH + j]


@compiled
def _room(size: int) -> Pairs:
    """Room for panels, not initialized, at an address that is a multiple of 64."""
    room = np.empty(size + LANES, np.uint32)
    start = (-room.ctypes.data % 64) // 4
    return room[start : start + size]


@kernel
def add(gram_II: Floats, rows_NI: Floats, first: int, last: int) -> None:
    """Adds to rows `first` to `last` of gram_II, on and right of the diagonal; both arrays are contiguous."""
    count, columns = rows_NI.shape
    gram, rows = gram_II.reshape(-1), rows_NI.reshape(-1)
    own = (last - first + WIDTH - 1) // WIDTH  # panels that are left sides, too; one more is a right side only
    panel = (min(count, ROWS) + 1) // 2 * WIDTH
    packed = _room((own + 1) * panel)
    edge = np.empty(2 * WIDTH, np.float32)
    tile = np.empty(HEIGHT * WIDTH, np.float32)
    for start in range(0, count, ROWS):
        some = min(ROWS, count - start)
        for p in range(own):
            column = first + p * WIDTH
            _pack(rows, start * columns + column, some, (columns - column, columns), edge, packed, p * panel)
        for p in range((columns - first + WIDTH - 1) // WIDTH):
            column = first + p * WIDTH
            if p >= own:
                _pack(rows, start * columns + column, some, (columns - column, columns), edge, packed, own * panel)
            right = min(p, own) * panel
            for row in range(first, min(last, column + WIDTH), HEIGHT):
                left = (row - first) // WIDTH * panel + (row - first) % WIDTH
                if row + HEIGHT <= last and column + WIDTH <= columns:
                    _add_tile(packed, left, right, (some + 1) // 2, gram, row * columns + column, columns)
                else:
                    _add_part(packed, left, right, (some + 1) // 2, gram, (row, column), (last, columns), tile)
