"""Foldings carried out: columns of a tap's linears are multiplied, what comes in front of them is divided.

The block computes the same, and the statistics follow (H' = D^-1 H D^-1), so no second forward is needed. What absorbs
the scales is a norm, or the linear whose rows the columns come from: up to down projection in gated MLPs, value to
output projection.

# O out, I in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from converter.architecture import Folding
from converter.caches import MAKERS, VALUES
from converter.grids import Grid
from converter.methods import Block
from converter.methods.rtn import nearest


def scaled_by(block: Block, folding: Folding) -> tuple[str, ...]:
    """The weights of the block whose columns the folding scales; none where the block has no place for the inverse."""
    names = tuple(
        name
        for tap in block.taps
        if tap.name == folding.tap
        for linear in tap.linears
        if (name := f"{linear}.weight") in block.tensors
    )
    source = block.tensors.get(f"{folding.norm or folding.linear}.weight")
    if not names or source is None:
        return ()
    columns = block.tensors[names[0]].shape[1]
    if folding.norm:
        return names if len(source) == columns else ()
    wanted = columns * folding.counts[1] // folding.counts[0]
    return names if (len(source) > wanted if folding.fused else len(source) == wanted) else ()


def rows_of(folding: Folding, columns: int) -> Tensor:
    """The number [I] of the row, among those the folding means, that each of the tap's columns is a multiple of."""
    column_heads, row_heads = folding.counts
    width = columns // column_heads
    column_I = torch.arange(columns)
    return column_I // width * row_heads // column_heads * width + column_I % width


def folded_rows(folding: Folding, columns: int, rows: int) -> slice:
    """Which of a linear's rows the folding divides: all, or the last where others are stacked in front of them."""
    return slice(rows - columns * folding.counts[1] // folding.counts[0], rows)


def fold(block: Block, folding: Folding, scale_I: Tensor, grids: Mapping[str, Grid]) -> Block:
    """The block with the columns of the folding's tap multiplied by scale_I [I] > 0, equal where they share a row.

    A norm is divided first and stored as its grid says, and the columns take what it really became: its rounding would
    otherwise be an error of up to 2^-9 in every column, and far more where a gain of 1 + weight is small.
    """
    tensors, stats = dict(block.tensors), dict(block.stats)
    if folding.norm:
        name = f"{folding.norm}.weight"
        tensors[name], scale_I = _divided_norm(block, folding, scale_I, grids[name])
        divided = {f"{folding.norm}.bias": scale_I}
    else:
        rows = len(tensors[f"{folding.linear}.weight"])
        scale_O = scale_I.new_ones(rows)
        scale_O[folded_rows(folding, len(scale_I), rows)][rows_of(folding, len(scale_I))] = scale_I
        divided = {f"{folding.linear}.weight": scale_O[:, None], f"{folding.linear}.bias": scale_O}
    for name, scale in divided.items():
        if name in tensors:
            tensors[name] = tensors[name] / scale.to(tensors[name].dtype)
    for name in scaled_by(block, folding):
        tensors[name] = tensors[name] * scale_I.to(tensors[name].dtype)
    if folding.tap in stats:
        stats[folding.tap] = stats[folding.tap].scaled(scale_I)
    if VALUES in stats and folding.linear.rpartition(".")[2] in MAKERS[VALUES]:  # its rows are the values' columns
        stats[VALUES] = stats[VALUES].scaled(scale_O[folded_rows(folding, len(scale_I), rows)])
    return replace(block, tensors=tensors, stats=stats)


def _divided_norm(block: Block, folding: Folding, scale_I: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The norm's weight as it will be stored, and the scales that it really divides by; 1 where a gain would vanish."""
    name = f"{folding.norm}.weight"
    gain_I = folding.offset + block.tensors[name]

    def stored(by_I: Tensor) -> Tensor:
        coded = nearest(f"{block.where} {name}", gain_I / by_I - folding.offset, grid, None)
        return coded.decode().to(gain_I.dtype)

    scale_I = scale_I.to(gain_I.dtype)
    vanished_I = (folding.offset + stored(scale_I) == 0) & (gain_I != 0)
    weight_I = stored(torch.where(vanished_I, 1.0, scale_I))
    kept_I = folding.offset + weight_I
    return weight_I, torch.where(kept_I == 0, 1.0, gain_I / kept_I)
