"""Scales: for each group of a row, the step (and zero point) with the least weighted squared error.

An error counts by the importance of its column and by sqrt(w^2 + mean w^2) of its weight w, the mean that of its group:
large weights tend to stand where inputs say more, and squares alone cut them off for the sake of the many small ones.
That is how ggml searches its scales, too. Beside squares alone it takes 9 % off the KL divergence of rounding to
nearest and 4 % off GPTQ's (geometric means of three models, seven grids of 2 to 4 bits), for 3 to 6 % more squares.
Behind a rotation a weight's size says nothing any more, and squares alone are better at 2 and 3 bits: by_size.

With codes c fixed, the best scale is sum(w x c) / sum(w c c), and it removes sum(w x c)^2 / sum(w c c) from the error:
one pass over a group scores a candidate *and* gives its closed-form scale. Some 70 candidates per group are tried, then
16 more around the best. The alternative, a list of shrink factors scored by their error, needs a pass per candidate too
and leaves the scale on the list; an exact search (every breakpoint of the rounding) has to sort each group.

# O out, I in, G groups of a row; a row's last group may be short.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkernels.rows import over_rows
from quantkernels.scales import reference, reference_floats
from quantkernels.scales.reference_floats import E2M1, E4M3, E5M2, Float

__all__ = ["E2M1", "E4M3", "E5M2", "Backend", "Float", "choose_float", "errors", "search", "search_floats"]

Backend = Literal["cpu", "reference"]


def search(
    weight: Tensor,
    importance: Tensor | None,
    *,
    group_size: int,
    low: int,
    high: int,
    symmetric: bool,
    signed: bool = False,
    by_size: bool = True,
    threads: int = 1,
    backend: Backend = "cpu",
) -> tuple[Tensor, Tensor]:
    """The scales [O, G] f32 and zero points [O, G] i8 with (about) the least weighted squared error.

    weight [O, I] f32, finite; importance [I] f32, not negative, counts the squared errors of a column (None: all alike;
    so does a group whose important weights are all zero); low and high bound the codes. symmetric: the zero points are
    0; signed: scales may be negative, so that the code low can stand for the largest weight of either sign; by_size:
    the size of a weight counts, too.
    A group of zeros gets scale 0. A code is round((w / scale)) + zero point, within low and high.
    """
    rows = _floats(weight)
    scale_OG = np.zeros((rows.shape[0], -(-rows.shape[1] // group_size)), np.float32)
    zero_OG = np.zeros(scale_OG.shape, np.float32)
    share_I = _share_of_group(importance, rows.shape[1], group_size)
    plan = reference.plan(low=low, high=high, symmetric=symmetric, signed=signed, by_size=by_size)
    if backend == "reference":
        reference.search(rows, share_I, group_size, plan, scale_OG, zero_OG)
    else:
        from quantkernels.scales import cpu  # here: numba is half a second and 110 MB, and plans do without

        over_rows(
            rows.shape[0],
            threads,
            lambda first, last: cpu.search(
                rows[first:last], share_I, group_size, scale_OG[first:last], zero_OG[first:last], *plan.numbers()
            ),
        )
    return torch.from_numpy(scale_OG), torch.from_numpy(zero_OG).to(torch.int8)


def errors(
    weight: Tensor,
    importance: Tensor | None,
    scale_OG: Tensor,
    zero_OG: Tensor,
    *,
    group_size: int,
    low: int,
    high: int,
    by_size: bool = True,
    threads: int = 1,
    backend: Backend = "cpu",
) -> Tensor:
    """The weighted squared error [O, G] f64 that each group has with these scales and its nearest codes.

    scale_OG f32, zero_OG any integer type; the other arguments as for `search`.
    """
    rows = _floats(weight)
    error_OG = np.zeros(tuple(scale_OG.shape), np.float64)
    scales, zeros = _floats(scale_OG), _floats(zero_OG)
    importance_I = np.ones(rows.shape[1], np.float32) if importance is None else _floats(importance)
    if backend == "reference":
        reference.errors(rows, importance_I, scales, zeros, group_size, low, high, by_size, error_OG)
    else:
        from quantkernels.scales import cpu

        bounds = (np.float32(low), np.float32(high))
        over_rows(
            rows.shape[0],
            threads,
            lambda first, last: cpu.errors(
                rows[first:last],
                importance_I,
                scales[first:last],
                zeros[first:last],
                group_size,
                *bounds,
                by_size,
                error_OG[first:last],
            ),
        )
    return torch.from_numpy(error_OG)


def search_floats(
    weight: Tensor,
    importance: Tensor | None,
    kind: Float,
    *,
    height: int,
    width: int,
    threads: int = 1,
    backend: Backend = "cpu",
) -> Tensor:
    """The scales [P, Q] f32 of blocks of height x width weights whose codes are floats of this kind.

    weight [O, I] f32, finite; importance [I] as for `search`. They have (about) the least weighted squared error among
    scales that bring a block's largest weight to between the largest code and half of that. A block of zeros gets scale
    0. A code is weight / scale rounded to nearest, and no larger than the largest.
    """
    rows = _floats(weight)
    scale_PQ = np.zeros((-(-rows.shape[0] // height), -(-rows.shape[1] // width)), np.float32)
    share_I = _share_of_group(importance, rows.shape[1], width)
    if backend == "reference":
        reference_floats.search(rows, share_I, height, width, kind, scale_PQ)
    else:
        from quantkernels.scales import cpu_floats

        inverse_K, (_, *numbers) = reference_floats.inverses(kind), kind.numbers()
        over_rows(
            len(scale_PQ),
            threads,
            lambda first, last: cpu_floats.search(
                rows[first * height : last * height], share_I, height, width, scale_PQ[first:last], inverse_K, *numbers
            ),
        )
    return torch.from_numpy(scale_PQ)


def choose_float(
    weight: Tensor,
    importance: Tensor | None,
    values_OGK: Tensor,
    kind: Float,
    *,
    fourth: bool = False,
    by_size: bool = True,
    threads: int = 1,
    backend: Backend = "cpu",
) -> Tensor:
    """Which of K scales, values_OGK f32, has the least weighted squared error in each group: [O, G] i64.

    weight [O, I] f32, finite, I a multiple of G; importance [I] as for `search`. Codes are the nearest floats of this
    kind. fourth: errors count by their fourth power, which shuns large ones, instead of by their square; by_size: as
    for `search`. The first of equals.
    """
    rows, values = _floats(weight), _floats(values_OGK)
    group_size = rows.shape[1] // values.shape[1]
    best_OG = np.zeros(values.shape[:2], np.int64)
    share_I = _share_of_group(importance, rows.shape[1], group_size)
    if backend == "reference":
        reference_floats.choose(rows, share_I, values, group_size, kind, fourth, by_size, best_OG)
    else:
        from quantkernels.scales import cpu_floats

        over_rows(
            rows.shape[0],
            threads,
            lambda first, last: cpu_floats.choose(
                rows[first:last],
                share_I,
                values[first:last],
                group_size,
                fourth,
                by_size,
                best_OG[first:last],
                *kind.numbers(),
            ),
        )
    return torch.from_numpy(best_OG)


def _floats(values: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(values.detach().to(torch.float32).numpy())


def _share_of_group(importance: Tensor | None, columns: int, group_size: int) -> NDArray[np.float32]:
    """Importance as a share of its group's largest: sums stay within f32, and a constant equals no importance."""
    if importance is None:
        return np.ones(columns, np.float32)
    starts = np.arange(0, columns, group_size)
    values = _floats(importance)
    largest = np.repeat(np.maximum.reduceat(values, starts), np.diff(np.append(starts, columns)))
    share: NDArray[np.float32] = np.divide(values, largest, out=np.ones_like(values), where=largest > 0)
    return share
