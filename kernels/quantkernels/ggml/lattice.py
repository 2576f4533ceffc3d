"""The lattices that the 1, 2 and 3-bit types round groups of weights to, and ggml's lists of neighbours for the rest.

A group of 8 (or 4) weights is rounded level by level to a *code*, level i in bits 2i (or 3i) and up. The lattice holds
a few hundred of these codes; for each of the others ggml tries the lattice points in the nearest shells, in the order
of their distance and then of their index. The points come from the gguf package, everything else is derived here:
some 0.2 s for all, then kept on disk, also for machines that have no gguf. The alternative, tables in the source, would
be 20,000 lines that nobody can check.

Source: iq2xs_init_impl and iq3xs_init_impl of ggml-quants.c.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
import zipfile
from dataclasses import dataclass, fields
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNREACHABLE = -(2**31)  # in `index_of`: a code with a level that the type does not have


@dataclass(frozen=True, kw_only=True)
class Lattice:
    """A type's P points in D dimensions, in index order, and how codes outside it are rounded. Arrays are read-only.

    points i8 [P, D]: the levels that ggml searches with: 1 3 5 .. for 2 and 3 bits, -1 0 1 for 1 bit.
    values f32 [P, D]: what the decoder multiplies with the scale.
    index_of i32 [codes]: the index of a code's point, -(1 + row) for a code off the lattice, UNREACHABLE for one with a
    level too many.
    neighbours i32: point indices in ggml's order; those of a row are from neighbour_start[row] to that of row + 1.
    """

    points: NDArray[np.int8]
    values: NDArray[np.float32]
    index_of: NDArray[np.int32]
    neighbour_start: NDArray[np.int32]
    neighbours: NDArray[np.int32]

    def __post_init__(self) -> None:
        for field in fields(self):
            vars(self)[field.name].setflags(write=False)


# How many shells of equal distance ggml keeps as neighbours.
SHELLS = MappingProxyType({"IQ1": 3, "IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3})


@cache
def lattice(name: str) -> Lattice:
    """The lattice of IQ1 (IQ1_S and IQ1_M share it), IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS or IQ3_S.

    Read from the folder of the compiled kernels when it is there, else built and written there if that is possible.
    Raises KeyError for another name.
    """
    shells = SHELLS[name]
    path = _cache_path(name)
    arrays = _read(path)
    if arrays is None:
        arrays = build(*_levels(name), shells)
        _write(path, arrays)
    return Lattice(**arrays)


def build(levels_PD: NDArray[np.int64], values: tuple[int, ...], shells: int) -> dict[str, NDArray[Any]]:
    """The arrays of a `Lattice`: levels_PD are its points as positions in `values`, the decoder's levels."""
    dimensions = levels_PD.shape[1]
    shifts = (2 if dimensions == 8 else 3) * np.arange(dimensions)
    codes_P = (levels_PD << shifts).sum(axis=1)
    index_of = np.full((((len(values) - 1) << shifts).sum()) + 1, UNREACHABLE, np.int64)
    every_KD = (np.arange(len(index_of))[:, None] >> shifts) & ((1 << shifts[1]) - 1)
    reachable_K = (every_KD < len(values)).all(axis=1)
    index_of[codes_P] = np.arange(len(levels_PD))
    off_R = np.flatnonzero(reachable_K & (index_of < 0))
    index_of[off_R] = -1 - np.arange(len(off_R))

    counts, neighbours = [], []
    for first in range(0, len(off_R), 1024):  # 1024 x 2048 distances at a time: 8 MiB
        level_RD = every_KD[off_R[first : first + 1024]].astype(np.float32)
        point_PD = levels_PD.astype(np.float32)
        cross_RP = level_RD @ point_PD.T  # small integers: exact in float32, in whatever order they are added
        distance_RP = (level_RD**2).sum(axis=1)[:, None] + (point_PD**2).sum(axis=1) - 2 * cross_RP
        reach_R = distance_RP.min(axis=1)
        for _ in range(shells - 1):
            reach_R = np.where(distance_RP > reach_R[:, None], distance_RP, np.float32(np.inf)).min(axis=1)
        row, point = np.nonzero(distance_RP <= reach_R[:, None])
        order = np.lexsort((point, distance_RP[row, point], row))
        neighbours.append(point[order])
        counts.append(np.bincount(row, minlength=len(level_RD)))
    start = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    points_PD = levels_PD - 1 if values == (-1, 0, 1) else 2 * levels_PD + 1
    return {
        "points": points_PD.astype(np.int8),
        "values": np.array(values, np.float32)[levels_PD],
        "index_of": index_of.astype(np.int32),
        "neighbour_start": start.astype(np.int32),
        "neighbours": np.concatenate(neighbours).astype(np.int32),
    }


def _levels(name: str) -> tuple[NDArray[np.int64], tuple[int, ...]]:
    """The points of the gguf package as positions in its list of values, and that list."""
    from gguf import quants  # machines with a GPU may have the kept arrays and no gguf

    kind = {
        "IQ1": quants.IQ1_S,
        "IQ2_XXS": quants.IQ2_XXS,
        "IQ2_XS": quants.IQ2_XS,
        "IQ2_S": quants.IQ2_S,
        "IQ3_XXS": quants.IQ3_XXS,
        "IQ3_S": quants.IQ3_S,
    }[name]
    kind.init_grid()
    assert kind.grid is not None
    grid_PD = kind.grid.reshape(kind.grid_shape)
    values = tuple(int(value) for value in kind.grid_map)
    return np.searchsorted(values, grid_PD), values


def _cache_path(name: str) -> str:
    """Where the arrays are kept: a name that changes with this file."""
    import numba  # where kernels are kept, too; half a second that a plan does without

    digest = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()[:16]
    folder = numba.config.CACHE_DIR or os.path.join(os.path.expanduser("~"), ".cache", "quantkernels")
    return os.path.join(folder, f"lattice-{name}-{digest}.npz")


def _read(path: str) -> dict[str, NDArray[Any]] | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {field.name: kept[field.name] for field in fields(Lattice)}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # absent, cut off or another's file
        return None


def _write(path: str, arrays: dict[str, NDArray[Any]]) -> None:
    """Write under a name of its own and rename, so that processes starting together see all of it or nothing."""
    part = None
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), suffix=".part", delete=False) as file:
            part = file.name
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(part, path)
    except OSError:  # a folder that cannot be written costs a fraction of a second in each process, nothing else
        if part is not None and os.path.exists(part):
            os.remove(part)
