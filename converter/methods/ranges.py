"""Ranges that several tensors share, or that only activations tell: taken from a block after its transforms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from converter.errors import NumericsError
from converter.grids import Grid
from converter.grids.micro import MicroGrid
from converter.methods import Block


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


def largest_input(block: Block, name: str) -> Tensor:
    """The largest magnitude f32 [1] that the linear with weight `name` read; raises NumericsError when nothing did."""
    stats = block.stats_of(name)
    if stats is None:
        what = "its inputs are quantized with a fixed scale, and calibration never saw them"
        remedy = "Take a longer calibration text, or a scheme with scales for each token"
        raise NumericsError(f"{block.where} {name}", what, remedy)
    return stats.abs_max.max().reshape(1)
