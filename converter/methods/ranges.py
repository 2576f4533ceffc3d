"""Ranges that several tensors share, or that only activations tell: taken from a block after its transforms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from converter.caches import Cached
from converter.errors import NumericsError
from converter.grids import Grid
from converter.grids.input_observers import input_range
from converter.grids.micro import MicroGrid
from converter.methods import Block
from converter.schemes import Activations, Observer


def share_ranges(block: Block, grids: Mapping[str, Grid]) -> Mapping[str, Grid]:
    """The grids, those of NVFP4 with one unit for all linears that read one hidden state: engines fuse those."""
    shared = dict(grids)
    for tap in block.taps:
        names = [f"{linear}.weight" for linear in tap.linears if f"{linear}.weight" in block.tensors]
        own = {name: grids[name] for name in names}
        units = {name: grid for name, grid in own.items() if isinstance(grid, MicroGrid) and grid.values == "nvfp4"}
        if units:
            largest = max(float(block.tensors[name].abs().max()) for name in units)
            shared |= {name: replace(grid, largest=largest) for name, grid in units.items()}
    return shared


def fix_inputs(block: Block, given: Mapping[str, Activations], observer: Observer) -> dict[str, Activations]:
    """The static ones of `given`, by the name of the weight behind, with the range that the linear's inputs have.

    Linears that read one hidden state have one range. Raises NumericsError when nothing reached it, or what the
    observer reads is not there.
    """
    fixed: dict[str, Activations] = {}
    found: dict[tuple[int, Activations], tuple[float, float]] = {}  # by statistics: a search takes a tenth of a second
    for name, activations in given.items():
        if not activations.static:
            continue
        stats = block.stats_of(name)
        if stats is None:
            what = "its inputs are quantized with a fixed scale, and calibration never saw them"
            remedy = "Take a longer calibration text, or a scheme with scales for each token"
            raise NumericsError(f"{block.where} {name}", what, remedy)
        if observer != "minmax" and stats.histogram is None:
            what = f"observer {observer} reads a histogram of its inputs, which does not follow the target's transforms"
            raise NumericsError(f"{block.where} {name}", what, "Write activation_observer: minmax, or leave them out")
        key = id(stats), activations
        if key not in found:
            found[key] = input_range(stats, activations, observer)
        lowest, largest = found[key]
        fixed[name] = replace(activations, lowest=lowest, largest=largest)
    return fixed


def largest_kept(block: Block, cached: Mapping[str, Cached]) -> dict[str, dict[str, Tensor]]:
    """By name of a weight and by tap, the largest magnitude f32 of each head, or [1] of all, of keys and values.

    Raises NumericsError when calibration saw none of them.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, one in cached.items():
        for tap in one.of:
            if tap not in block.stats:
                what = f"{tap.replace('_', ' ')} get a fixed scale, and calibration never saw them"
                raise NumericsError(f"{block.where} {name}", what, "Remove kv_cache for this model")
            found.setdefault(name, {})[tap] = block.stats[tap].abs_max.reshape(one.heads, -1).amax(1)
    return found
