"""Codebooks: levels fitted to weights, and weights' scales fitted to levels, at the least weighted squared error.

Weights on a line are a simple case of what is hard in the plane: groups of an optimal clustering follow each other in
sorted order, and an optimal scale is one of finitely many at which a weight changes its level. So `levels` (k-means)
and `scales` are exact, for sorting each group. The alternative, Lloyd's steps and lists of candidate scales, stops near
the optimum and depends on where it began. With an offset beside the scale (`offsets`) exactness would cost a product
of both; there Lloyd's steps from 36 starts are taken.

# O out, I in, G groups of a row, L levels; a row's last group may be short.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkernels.codebooks import reference
from quantkernels.rows import over_rows

__all__ = ["errors", "levels", "offsets", "scales"]

Backend = Literal["cpu", "reference"]


def levels(
    weight: Tensor,
    importance: Tensor | None,
    *,
    count: int,
    group_size: int,
    threads: int = 1,
    backend: Backend = "cpu",
) -> Tensor:
    """The `count` levels of each group [O, G, L] f32, rising, with the least weighted squared error.

    weight [O, I] f32, finite; importance [I] f32, not negative, counts the squared errors of a column (None: all alike;
    so does a group without any). A group of fewer weights than levels repeats its last one.
    Source: Wang and Song 2011, Ckmeans.1d.dp; that its table can be filled by halves, Gronlund et al. 2017,
    arXiv:1701.07204.
    """
    rows, share_I = _floats(weight), _share(importance, weight.shape[1])
    found = np.zeros((len(rows), -(-rows.shape[1] // group_size), count), np.float32)
    _each(backend, "levels", len(rows), threads, lambda run, own: run(rows[own], share_I, group_size, found[own]))
    return torch.from_numpy(found)


def scales(
    weight: Tensor,
    importance: Tensor | None,
    table: Sequence[float],
    *,
    group_size: int,
    threads: int = 1,
    backend: Backend = "cpu",
) -> Tensor:
    """The scales [O, G] f32, not negative, at which the nearest of table * scale has the least weighted squared error.

    table rises; the rest is as for `levels`. Every inverse scale at which a weight changes its level is visited in
    order; between two of them the best scale follows from two sums.
    """
    rows, share_I = _floats(weight), _share(importance, weight.shape[1])
    found, levels_L = np.zeros((len(rows), -(-rows.shape[1] // group_size)), np.float32), np.array(table, np.float64)
    _each(
        backend,
        "scales",
        len(rows),
        threads,
        lambda run, own: run(rows[own], share_I, levels_L, group_size, found[own]),
    )
    return torch.from_numpy(found)


def offsets(
    weight: Tensor,
    importance: Tensor | None,
    *,
    count: int,
    group_size: int,
    threads: int = 1,
    backend: Backend = "cpu",
) -> tuple[Tensor, Tensor]:
    """Scales and offsets [O, G] f32, with about the least weighted squared error, for `count` levels one scale apart.

    The middle of the levels is at the offset. Starts are shares of the range at three places in it; four times each
    weight goes to its nearest level and the two numbers to their least-squares values. The rest is as for `levels`.
    """
    rows, share_I = _floats(weight), _share(importance, weight.shape[1])
    scale_OG = np.zeros((len(rows), -(-rows.shape[1] // group_size)), np.float32)
    offset_OG = np.zeros_like(scale_OG)
    _each(
        backend,
        "offsets",
        len(rows),
        threads,
        lambda run, own: run(rows[own], share_I, count, group_size, scale_OG[own], offset_OG[own]),
    )
    return torch.from_numpy(scale_OG), torch.from_numpy(offset_OG)


def errors(
    weight: Tensor,
    importance: Tensor | None,
    table: Sequence[float],
    scale_OG: Tensor,
    offset_OG: Tensor,
    *,
    group_size: int,
    threads: int = 1,
    backend: Backend = "cpu",
) -> Tensor:
    """The weighted squared error [O, G] f64 of the nearest of table * scale + offset, computed in f32 as readers do."""
    rows, share_I = _floats(weight), _share(importance, weight.shape[1])
    found = np.zeros(tuple(scale_OG.shape), np.float64)
    levels_L, scales_OG, offsets_OG = np.array(table, np.float32), _floats(scale_OG), _floats(offset_OG)
    _each(
        backend,
        "errors",
        len(rows),
        threads,
        lambda run, own: run(rows[own], share_I, levels_L, scales_OG[own], offsets_OG[own], group_size, found[own]),
    )
    return torch.from_numpy(found)


def _each(
    backend: Backend, name: str, rows: int, threads: int, call: Callable[[Callable[..., None], slice], None]
) -> None:
    """Call the backend's function `name` for pieces of the rows."""
    module: Any = reference
    if backend == "cpu":
        from quantkernels.codebooks import cpu  # here: numba is half a second and 110 MB, and plans do without

        module = cpu
    run = getattr(module, name)
    over_rows(rows, threads if backend == "cpu" else 1, lambda first, last: call(run, slice(first, last)))


def _floats(values: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(values.detach().to(torch.float32).numpy())


def _share(importance: Tensor | None, columns: int) -> NDArray[np.float32]:
    return np.ones(columns, np.float32) if importance is None else _floats(importance)
