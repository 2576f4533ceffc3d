"""The lattice of IQ1 inside kernels: ggml's lists of neighbours, walked sixteen neighbours at a time.

`cpu/lanes_lattice.py` says how errors are added up; here the levels are -1, 0, 1 and a shift.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.types.containers import UniTuple
from numpy.typing import NDArray

from quantkernels.compiling import inlined, instruction
from quantkernels.ggml.cpu.lanes_lattice import errors_of, first_least, one_of
from quantkernels.ggml.cpu.search import ZERO
from quantkernels.ggml.lattice import lattice
from quantkernels.lanes import WIDTH, lanes_type, select, spread

Floats = NDArray[np.float32]

LARGEST = np.float32(3.4028235e38)
_F32 = ir.VectorType(ir.FloatType(), WIDTH)
_I32 = ir.VectorType(ir.IntType(32), WIDTH)


class Tables(NamedTuple):
    """What kernels ask about cells, the 3^8 groups of eight levels, numbered in base 3 with the first level lowest.

    index_of i32 [6561]: a cell's point, or -(1 + row). A row's neighbours: chunks start[row] to start[row + 1] of
    sixteen codes u16 and points u16. Neighbour j of C chunks lies in chunk j % C, lane j // C, so that the first of
    equals is in the first lane; the last one fills up the row. levels f32 [2048 * 8]: 0, 1, 2.
    """

    index_of: NDArray[np.int32]
    start: NDArray[np.int32]
    codes: NDArray[np.uint16]
    points: NDArray[np.uint16]
    levels: Floats


@cache
def tables() -> Tables:
    """The tables, made once in a process."""
    known = lattice("IQ1")
    digits = np.arange(3**8)[:, None] // 3 ** np.arange(8) % 3
    index_of = known.index_of[(digits << (2 * np.arange(8))).sum(axis=1)].astype(np.int32)
    counts = np.diff(known.neighbour_start)
    chunks = (counts + WIDTH - 1) // WIDTH
    start = np.concatenate([[0], np.cumsum(chunks)]).astype(np.int32)
    row = np.repeat(np.arange(len(counts)), chunks * WIDTH)
    chunk, lane = np.divmod(np.arange(len(row)) - start[row] * WIDTH, WIDTH)
    neighbour = np.minimum(lane * chunks[row] + chunk, counts[row] - 1)
    points = known.neighbours[known.neighbour_start[row] + neighbour].astype(np.uint16)
    levels = known.points.astype(np.int64) + 1
    codes = (levels << (2 * np.arange(8))).sum(axis=1).astype(np.uint16)
    return Tables(index_of, start, codes[points], points, levels.reshape(-1).astype(np.float32))


@instruction
def level_tables(typing_context: Any, x: Any, weight: Any, at: Any, scale: Any, shift: Any) -> Any:
    """A table for each of eight weights: what level 0, 1, 2 adds to the weighted square error, over and over.

    Weight i lies at at + 16 * i of `x` and of `weight`.
    """

    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        def spread_out(value: Any) -> Any:
            empty = ir.Constant(_F32, ir.Undefined)
            single = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
            return builder.shuffle_vector(single, empty, ir.Constant(_I32, [0] * WIDTH))

        steps = ir.Constant(_F32, [(-1.0, 0.0, 1.0, 1.0)[k % 4] for k in range(WIDTH)])
        target = builder.fmul(spread_out(values[3]), builder.fadd(steps, spread_out(values[4])))
        data = [context.make_array(typed.args[k])(context, builder, values[k]).data for k in (0, 1)]
        made = []
        for i in range(8):
            place = builder.add(values[2], ir.Constant(ir.IntType(64), i * WIDTH))
            value, factor = (spread_out(builder.load(builder.gep(part, [place]))) for part in data)
            difference = builder.fsub(target, value)
            made.append(builder.fmul(builder.fmul(factor, difference), difference))
        return context.make_tuple(builder, typed.return_type, made)

    return UniTuple(lanes_type, 8)(x, weight, types.int64, types.float32, types.float32), emit


@inlined
def nearest_neighbour(
    known: Tables, row: int, x: Floats, weight: Floats, at: int, scale: np.float32, shift: np.float32
) -> int:
    """The point of least error among the neighbours of a row, the first of equals; -1 where no error is finite."""
    errors = level_tables(x, weight, at, scale, shift)
    first = known.start[row]
    best = spread(LARGEST)
    where = spread(ZERO)
    for chunk in range(known.start[row + 1] - first):
        error = errors_of(known.codes, (first + chunk) * WIDTH, errors)
        better = error < best
        best = select(better, error, best)
        where = select(better, np.float32(chunk), where)
    lane = first_least(best)
    if one_of(best, lane) == LARGEST:
        return -1
    return int(known.points[(first + int(one_of(where, lane))) * WIDTH + lane])
