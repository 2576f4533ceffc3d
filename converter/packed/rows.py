"""Rows of a weight in parts, a range at a time: as values, or as blocks of a ggml type that has the same grid."""

# N rows, I columns

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from torch import Tensor

from converter.packed.formats import FORMATS
from converter.packed.repack import evenly_spaced_blocks, mxfp4_blocks
from converter.packed.weight import Packed

if TYPE_CHECKING:
    from converter.source import Header

# Rows [first, first + count) of a part, as stored: the leading dimensions of its header count its rows.
Load = Callable[["Header", int, int], Tensor]
# First row and count to what there is of those rows.
Rows = Callable[[int, int], Tensor]


def rows_of(packed: Packed, load: Load, where: str) -> Rows:
    """What gives rows of the weight as values, f32 [count, I]."""
    parts, values = _parts(packed, load), FORMATS[packed.format].values
    return lambda first, count: values(packed, parts(first, count), first, count, where)


def blocks_of(packed: Packed, type: str, height: int, load: Load, where: str) -> Iterator[Tensor]:
    """All rows in order, `height` at a time, as blocks of a ggml type for which `same_grid` holds, u8 [n, bytes a row].

    Rows whose scales the blocks do not hold come as values, f32 [n, I].
    """
    rows, parts = math.prod(packed.shape[:-1]), _parts(packed, load)
    coded = FORMATS[packed.format].coded
    for first in range(0, rows, height):
        count = min(height, rows - first)
        own = parts(first, count)
        if coded is None:
            yield mxfp4_blocks(own["codes"], own["scale"][first : first + count])
            continue
        slab = coded(packed, own, first, count, where)
        blocks, held = evenly_spaced_blocks(slab, type)
        values = None if bool(held.all()) else slab.values()
        for holds, run in groupby(range(count), key=held.tolist().__getitem__):
            chosen = list(run)
            yield (blocks if holds or values is None else values)[chosen[0] : chosen[-1] + 1]


def _parts(packed: Packed, load: Load) -> Callable[[int, int], Mapping[str, Tensor]]:
    """What gives the parts for some rows, as Format.values takes them; those that are taken whole are read once."""
    by_row, codes = FORMATS[packed.format].by_row, packed.parts["codes"]
    counts = {role: math.prod(part.shape[:-1]) for role, part in packed.parts.items()}
    whole = {
        role: load(part, 0, counts[role]).reshape(counts[role], -1)
        for role, part in packed.parts.items()
        if not (by_row and role == "codes")
    }
    return lambda first, count: whole | ({"codes": load(codes, first, count)} if by_row else {})
