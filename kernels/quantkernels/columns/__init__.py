"""Columns: choosing a weight's codes one column after the other against a Hessian, on a frame that stays as it is.

`solve` is GPTQ's loop, which rounds a column and corrects those not yet rounded; `refine` is coordinate descent, which
goes back to columns that were, and to scales; `restore_gain` stretches rows that came out too small. Blocks of 128
columns are worked on in a kernel; in front of each, one matrix product corrects its columns for all blocks before it.
The alternative, the same loops in torch, launches some ten operations per column: 5 times the time and more on a CPU.

# O out, I in, G groups of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkernels.columns import points, reference, reference_points
from quantkernels.columns.descent import Descent, Move, begin, sweep
from quantkernels.columns.frame import AnyFrame, Frame, Ladder, PointFrame, join_code, on, split, split_code, stack
from quantkernels.columns.gain import restore_gain
from quantkernels.columns.root import Root, root_of

__all__ = [
    "AnyFrame",
    "Frame",
    "Ladder",
    "PointFrame",
    "Root",
    "join_code",
    "on",
    "refine",
    "restore_gain",
    "root_of",
    "solve",
    "split",
    "split_code",
    "stack",
]

Backend = Literal["cpu", "reference", "triton"]
BLOCK = 128  # columns per kernel call: a tile of 128 x 32 weights stays in the first-level cache


def solve(
    weight: Tensor,
    root: Root,
    frame: AnyFrame,
    order_I: Tensor,
    *,
    threads: int = 1,
    backend: Backend | None = None,
) -> Tensor:
    """The codes of the frame, i8 [O, I] or i32 [O, I / 8].

    weight [O, I] f32, finite; order_I the columns in the order to round them, those of a code following each other;
    root that of the Hessian in that order. Where a scale is 0 the code means the offset. What codes are chosen for is a
    small (w - w') H (w - w')^T, with w' what they mean. Where the root has its large products in bf16, what a column
    makes up for is off by some 2^-9 of itself. Rows do not depend on each other, so results do not depend on `threads`;
    the product in front of a block runs on torch's own threads. A weight on a GPU is solved there, and so are its
    results; points of lattices and levels of groups are on the CPU all the same.
    Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1, in the form of `Root`; for several columns as one Tseng
    et al. 2024, QuIP#, arXiv:2402.04396.
    """
    chosen = _chosen(weight, frame, backend)
    if chosen == "triton":
        return _solve_on_gpu(weight, root, frame, order_I)
    home = weight.device
    weight_OI = weight.detach().float().cpu().index_select(1, order_I).numpy()
    codes_order = order_I[:: frame.together] // frame.together
    shape = len(weight_OI), len(codes_order)
    shares, pivots, rough = _floats(root.shares_II), _floats(root.pivots_I), root.rough_II.cpu()
    codes: NDArray[np.int8] | NDArray[np.int32]
    if isinstance(frame, Frame):
        grid, codes = _grid(frame, order_I), np.zeros(shape, np.int8)
        if chosen == "cpu":
            from quantkernels.columns import cpu  # here: numba is half a second and 110 MB, and plans do without

            cpu.solve(weight_OI, shares, rough, grid, codes, block=BLOCK, threads=threads)
        else:
            reference.solve(weight_OI, shares, grid, codes)
    else:
        lattice, codes = _point_grid(frame, order_I), np.zeros(shape, np.int32)
        if chosen == "cpu":
            from quantkernels.columns import cpu_points

            cpu_points.solve(weight_OI, shares, pivots, rough, lattice, codes, block=BLOCK, threads=threads)
        else:
            reference_points.solve(weight_OI, shares, pivots, lattice, codes)
    return torch.from_numpy(codes).index_select(1, codes_order.argsort()).to(home)


def refine(
    weight: Tensor,
    hessian: Tensor,
    frame: AnyFrame,
    codes: Tensor,
    *,
    sweeps: int,
    rough_hessian: Tensor | None = None,
    threads: int = 1,
    backend: Backend | None = None,
) -> tuple[AnyFrame, Tensor]:
    """A frame and codes with no more error than those given: scales and codes each move to where it is least.

    weight [O, I] f32; hessian [I, I] f32, symmetric and positive definite; the error is what `solve` makes small. With
    P = (w' - w) H kept up to date, the best value of column j is w'_j - P_j / H_jj, and likewise for the columns that
    share a code; ties and a diagonal Hessian leave every code that was nearest as it was. Scales and offsets move as
    far as the frame's ladders allow, so without ladders not at all. Columns go in their own order, `sweeps` times:
    descent forgets the order it began with. rough_hessian: the same in bf16, for the large products, where those are
    fast; the error is then less only as far as they can tell. Where it runs is as for `solve`.
    Source: Behdin et al. 2023, QuantEase, arXiv:2309.01885.
    """
    chosen, home = _chosen(weight, frame, backend), weight.device
    device, rough = (
        home if chosen == "triton" else torch.device("cpu"),
        hessian if rough_hessian is None else rough_hessian,
    )
    state = begin(weight, hessian, frame, codes, device, rough)
    move, block = _move(state, chosen, threads), weight.shape[1] if chosen == "reference" else BLOCK
    for _ in range(sweeps):
        sweep(state, move, block)
    return on(state.frame, home), state.codes.to(home)


def _move(state: Descent, chosen: Backend, threads: int) -> Move:
    """What moves the codes of a block of columns."""
    frame, order_I = state.frame, torch.arange(state.weight_OI.shape[1])
    if chosen == "triton":
        from quantkernels.columns import gpu

        assert isinstance(frame, Frame), "no GPU kernel solves lattices"
        tensors = state.off_OI, state.value_OI, state.hessian_II, gpu.grid_of(frame, order_I, state.off_OI.device)
        return lambda first, slope_OC: gpu.refine(first, slope_OC, *tensors, state.codes)
    arrays = state.off_OI.numpy(), state.value_OI.numpy(), state.hessian_II.numpy()
    codes = state.codes.numpy()
    if isinstance(frame, Frame):
        grid = _grid(frame, order_I)
        if chosen == "reference":
            return lambda first, slope_OC: reference.refine(first, slope_OC.numpy(), *arrays, grid, codes)
        from quantkernels.columns import cpu

        return lambda first, slope_OC: cpu.refine(first, slope_OC.numpy(), *arrays, grid, codes, threads=threads)
    lattice = _point_grid(frame, order_I)
    if chosen == "reference":
        return lambda first, slope_OC: reference_points.refine(first, slope_OC.numpy(), *arrays, lattice, codes)
    from quantkernels.columns import cpu_points

    metrics = points.metric_of_hessian(points.blocks_of(arrays[2]))
    return lambda first, slope_OC: cpu_points.refine(
        first, slope_OC.numpy(), *arrays, metrics, lattice, codes, threads=threads
    )


def _chosen(weight: Tensor, frame: AnyFrame, backend: Backend | None) -> Backend:
    """The backend asked for, or that of the weight's device; lattices and levels of groups have none on a GPU."""
    if backend is not None:
        return backend
    return "triton" if weight.is_cuda and isinstance(frame, Frame) and frame.levels_OGL is None else "cpu"


def _solve_on_gpu(weight: Tensor, root: Root, frame: AnyFrame, order_I: Tensor) -> Tensor:
    from quantkernels.columns import gpu  # triton, which machines without a GPU can do without

    assert isinstance(frame, Frame), "no GPU kernel solves lattices"
    there = weight.device
    weight_OI = weight.detach().float()[:, order_I].contiguous()
    moved = replace(root, shares_II=root.shares_II.to(there), rough_II=root.rough_II.to(there))
    ordered_OI = gpu.solve(weight_OI, moved, gpu.grid_of(frame, order_I, there), block=BLOCK)
    codes_OI = torch.empty_like(ordered_OI)
    codes_OI[:, order_I] = ordered_OI
    return codes_OI


def _grid(frame: Frame, order_I: Tensor) -> reference.Grid:
    levels_OGL = torch.tensor([[frame.table]]) if frame.levels_OGL is None else frame.levels_OGL
    return reference.Grid(
        scale_OG=_floats(frame.scale_OG),
        zero_OG=_floats(frame.zero_OG),
        offset_OG=_floats(frame.offset_OG),
        group_I=_groups(order_I, frame.group_size),
        low=frame.low,
        high=frame.high,
        levels_OGL=_floats(levels_OGL),
    )


def _point_grid(frame: PointFrame, order_I: Tensor) -> points.Grid:
    return points.Grid(
        scale_OG=_floats(frame.scale_OG),
        zero_OG=_floats(frame.zero_OG),
        group_I=_groups(order_I, frame.group_size),
        points=points.ordered(_floats(frame.points_PD), frame.signs),
    )


def _groups(order_I: Tensor, group_size: int) -> NDArray[np.int64]:
    return np.ascontiguousarray((order_I // group_size).numpy(), np.int64)


def _floats(values: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(values.detach().to("cpu", torch.float32).numpy())
