"""The column loops in Triton: a program holds some rows of a block of columns and goes through its columns in turn.

The operations and their order are those of `reference.py`, row by row, multiplied and added apart, so a weight of at
most one block gets the CPU's codes; beyond a block the matrix product that corrects the columns behind it rounds in
its own order. A column's values are taken out of the tile by a sum over it in which all others are zero: tensors of a
Triton program cannot be indexed by a number that changes, and a store and a load for each column would cost more.

Codes that name points of a lattice (PointFrame) have no kernel here and are solved on the CPU.

# O out, I in, G groups of a row, C columns of a block, T rows of a program, L levels of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkernels.columns.frame import Frame
from quantkernels.columns.reference import WORTH
from quantkernels.columns.root import Root

ROWS = 16  # of a program: with 128 columns, 16 values for each of 128 threads
INTERPRETED_ROWS = 512  # the interpreter runs a program's rows as one numpy operation
OPTIONS: Mapping[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
LARGE = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to nearest even, up to 2**22
SHARE = tl.constexpr(float(WORTH))


def jitted(function: Callable[..., Any]) -> Any:
    """`function` as Triton code."""
    return triton.jit(function)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel for `rows` rows: it takes the arguments, then the constants by name."""

    kernel: Any
    arguments: tuple[Any, ...]
    rows: int
    constants: Mapping[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Start the kernel on the device of its tensors; on the CPU only Triton's interpreter can."""
        height = ROWS if self.arguments[0].is_cuda else INTERPRETED_ROWS
        self.kernel[(triton.cdiv(self.rows, height),)](*self.arguments, **self.constants, T=height, **OPTIONS)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A frame on the device of the weight; group_I i64 is the group of each column in the order of solving."""

    scale_OG: Tensor
    zero_OG: Tensor
    offset_OG: Tensor
    group_I: Tensor
    low: float
    high: float
    table_L: Tensor
    middles_L: Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What both kernels take of it, in their order."""
        frame = self.scale_OG, self.zero_OG, self.offset_OG, self.group_I, self.table_L, self.middles_L
        return *frame, self.low, self.high

    @property
    def levels(self) -> int:
        """The length of the table; 0 without one."""
        return len(self.table_L)


def grid_of(frame: Frame, order_I: Tensor, device: torch.device) -> Grid:
    """The frame for columns in this order."""
    table = torch.tensor(frame.table, dtype=torch.float32)
    middles = (table[1:] + table[:-1]) / 2
    return Grid(
        scale_OG=_floats(frame.scale_OG, device),
        zero_OG=_floats(frame.zero_OG, device),
        offset_OG=_floats(frame.offset_OG, device),
        group_I=(order_I // frame.group_size).to(device),
        low=float(frame.low),
        high=float(frame.high),
        table_L=table.to(device),
        middles_L=middles.to(device),
    )


def solve(weight_OI: Tensor, root: Root, grid: Grid, *, block: int) -> Tensor:
    """The codes i8 [O, I] of weight_OI f32; the root is on its device."""
    rows, columns = weight_OI.shape
    offs_OI = torch.empty_like(weight_OI, dtype=root.rough_II.dtype)
    codes_OI = torch.empty((rows, columns), dtype=torch.int8, device=weight_OI.device)
    for first in range(0, columns, block):
        inside = slice(first, min(first + block, columns))
        left_OC = (weight_OI[:, inside] + offs_OI[:, :first] @ root.rough_II[:first, inside]).contiguous()
        off_OC = torch.empty_like(left_OC)
        shares_CC = root.shares_II[inside, inside].contiguous()
        solving(weight_OI, left_OC, shares_CC, grid, codes_OI, off_OC, first).run()
        offs_OI[:, inside] = off_OC
    return codes_OI


def refine(
    first: int, slope_OC: Tensor, off_OI: Tensor, value_OI: Tensor, hessian_II: Tensor, grid: Grid, codes_OI: Tensor
) -> None:
    """Moves the codes of the block of columns that begins at `first` once, in place; see `cpu.refine`."""
    inside = slice(first, first + slope_OC.shape[1])
    refining(off_OI, value_OI, hessian_II[inside, inside].contiguous(), grid, codes_OI, slope_OC, first).run()


def solving(
    weight_OI: Tensor, left_OC: Tensor, shares_CC: Tensor, grid: Grid, codes_OI: Tensor, off_OC: Tensor, first: int
) -> Launch:
    """What rounds the block of columns that begins at `first`: fills its codes and off_OC."""
    rows, columns = weight_OI.shape
    width, groups = off_OC.shape[1], grid.scale_OG.shape[1]
    tensors = weight_OI, left_OC, shares_CC, *grid.arguments, codes_OI, off_OC
    arguments = *tensors, rows, columns, groups, first, width
    return Launch(kernel=solve_kernel, arguments=arguments, rows=rows, constants=_constants(grid, width))


def refining(
    off_OI: Tensor, value_OI: Tensor, hessian_CC: Tensor, grid: Grid, codes_OI: Tensor, slope_OC: Tensor, first: int
) -> Launch:
    """What moves the codes of the block of columns that begins at `first`."""
    rows, columns = off_OI.shape
    width, groups = slope_OC.shape[1], grid.scale_OG.shape[1]
    tensors = off_OI, value_OI, hessian_CC, *grid.arguments, codes_OI, slope_OC
    return Launch(
        kernel=refine_kernel,
        arguments=(*tensors, rows, columns, groups, first, width),
        rows=rows,
        constants=_constants(grid, width),
    )


def _constants(grid: Grid, width: int) -> Mapping[str, Any]:
    return {"L": grid.levels, "C": triton.next_power_of_2(width)}


def _floats(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, torch.float32).contiguous()


@jitted
def to_levels(
    steps: tl.tensor,
    zero: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    table: tl.tensor,
    middles: tl.tensor,
    L: tl.constexpr,
) -> tl.tensor:
    """The nearest to `steps` that a code can mean, in units of the scale without the offset."""
    if L == 0:
        steps = tl.where(steps < low - zero, low - zero, steps)
        steps = tl.where(steps > high - zero, high - zero, steps)
        return (steps + LARGE) - LARGE
    steps = steps + zero
    level = tl.zeros_like(steps) + tl.load(table)
    for k in range(L - 1):
        level = tl.where(steps > tl.load(middles + k), tl.load(table + k + 1), level)
    return level - zero


@jitted
def code_of(steps: tl.tensor, zero: tl.tensor, table: tl.tensor, L: tl.constexpr) -> tl.tensor:
    """The codes of levels as to_levels gives them."""
    level = steps + zero
    if L == 0:
        return level.to(tl.int8)
    code = tl.zeros_like(level)
    for k in range(1, L):
        code += tl.where(tl.load(table + k) <= level, 1.0, 0.0)
    return code.to(tl.int8)


@jitted
def solve_kernel(
    weight: tl.tensor,
    left: tl.tensor,
    shares: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    offset: tl.tensor,
    group: tl.tensor,
    table: tl.tensor,
    middles: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    codes: tl.tensor,
    off: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    L: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """GPTQ's loop over a block of columns: see `solve_block` in cpu.py."""
    row_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    column_C = tl.arange(0, C)
    inside_T = row_T < rows
    inside_TC = inside_T[:, None] & (column_C < width)[None, :]
    tile_TC = tl.load(left + row_T[:, None] * width + column_C[None, :], mask=inside_TC, other=0.0)
    for i in range(width):
        at_T = row_T * groups + tl.load(group + first + i)
        scale_T = tl.load(scale + at_T, mask=inside_T, other=0.0)
        zero_T = tl.load(zero + at_T, mask=inside_T, other=0.0)
        offset_T = tl.load(offset + at_T, mask=inside_T, other=0.0)
        own_T = tl.sum(tl.where(column_C[None, :] == i, tile_TC, 0.0), axis=1)
        steps_T = tl.math.div_rn(own_T - offset_T, tl.where(scale_T == 0.0, float("inf"), scale_T))
        steps_T = to_levels(steps_T, zero_T, low, high, table, middles, L)
        place_T = row_T * columns + first + i
        off_T = tl.load(weight + place_T, mask=inside_T, other=0.0) - (steps_T * scale_T + offset_T)
        share_C = tl.load(shares + i * width + column_C, mask=(column_C > i) & (column_C < width), other=0.0)
        tile_TC = tile_TC + off_T[:, None] * share_C[None, :]
        tl.store(codes + place_T, code_of(steps_T, zero_T, table, L), mask=inside_T)
        tl.store(off + row_T * width + i, off_T, mask=inside_T)


@jitted
def refine_kernel(
    off: tl.tensor,
    value: tl.tensor,
    hessian: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    offset: tl.tensor,
    group: tl.tensor,
    table: tl.tensor,
    middles: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    codes: tl.tensor,
    slope: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    first: tl.tensor,
    width: tl.tensor,
    L: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Coordinate descent over a block of columns: see `refine_block` in cpu.py."""
    row_T = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    column_C = tl.arange(0, C)
    inside_T = row_T < rows
    inside_TC = inside_T[:, None] & (column_C < width)[None, :]
    slope_TC = tl.load(slope + row_T[:, None] * width + column_C[None, :], mask=inside_TC, other=0.0)
    for i in range(width):
        at_T = row_T * groups + tl.load(group + first + i)
        scale_T = tl.load(scale + at_T, mask=inside_T, other=0.0)
        zero_T = tl.load(zero + at_T, mask=inside_T, other=0.0)
        offset_T = tl.load(offset + at_T, mask=inside_T, other=0.0)
        place_T = row_T * columns + first + i
        old_T = tl.load(value + place_T, mask=inside_T, other=0.0)
        own_T = tl.sum(tl.where(column_C[None, :] == i, slope_TC, 0.0), axis=1)
        best_T = old_T - tl.math.div_rn(own_T, tl.zeros_like(own_T) + tl.load(hessian + i * width + i))
        steps_T = tl.math.div_rn(best_T - offset_T, tl.where(scale_T == 0.0, float("inf"), scale_T))
        steps_T = to_levels(steps_T, zero_T, low, high, table, middles, L)
        new_T = steps_T * scale_T + offset_T
        better_T = tl.abs(new_T - best_T) < tl.abs(old_T - best_T) * SHARE
        change_T = tl.where(better_T, new_T - old_T, 0.0)
        moved_T = inside_T & (change_T != 0.0)
        off_T = tl.load(off + place_T, mask=inside_T, other=0.0)
        tl.store(off + place_T, off_T + change_T, mask=moved_T)
        tl.store(value + place_T, new_T, mask=moved_T)
        tl.store(codes + place_T, code_of(steps_T, zero_T, table, L), mask=moved_T)
        share_C = tl.load(hessian + i * width + column_C, mask=column_C < width, other=0.0)
        slope_TC = slope_TC + change_T[:, None] * share_C[None, :]
