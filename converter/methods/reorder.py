"""Reordering: columns of like range stand side by side, so that those with a scale in common are alike.

Only the middle of an MLP is reordered: each of its columns comes from one row of what widens, so rows and columns
change places together and the block computes the same. That is merged into the weights; no reader needs to know. Behind
a norm the columns' order is that of the residual stream: RPTQ gathers there at run time, which no format here can say.
Its clusters are found by k-means over minimum and maximum; here groups have a fixed size and a symmetric scale, for
which the order of the largest magnitude is the best one.

Source: Yuan et al. 2023, RPTQ, arXiv:2304.01089.

# O out, I in, P parts of a linear that is several in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from converter.errors import NumericsError
from converter.grids import Grid
from converter.methods import Block, Options

COMPARED_ROWS = 1024  # at a time with all others
SHOWN_COLUMNS = 512  # of a row, by which it is known again: by then the products of other rows are small


def reorder(block: Block, grids: Mapping[str, Grid], options: Options) -> Block:
    """The block with the columns of every middle in the order of falling max|x|; statistics follow.

    A block without middles (what lies outside the blocks, a state-space mixer) comes back as it is.
    Raises NumericsError when a middle has no statistics.
    """
    tensors, stats = dict(block.tensors), dict(block.stats)
    for tap, readers, makers in _middles(block):
        if tap not in stats:
            what = "reorder needs activation statistics, and this tap has none"
            raise NumericsError(
                f"{block.where} {tap}", what, "Calibrate the model, or leave reorder out of the methods"
            )
        order_I = stats[tap].abs_max.argsort(descending=True, stable=True)
        stats[tap] = stats[tap].reordered(order_I)
        _arrange(tensors, readers, makers, order_I)
    return replace(block, tensors=tensors, stats=stats)


def restored(block: Block, copy: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors `copy` of a reordered block with middles in the order of `block`, the original's.

    A row of the copy is known by the one of the original that it is most like; where that leaves any out, the order
    stays as it is.
    """
    tensors = dict(copy)
    for _, readers, makers in _middles(block):
        columns = block.tensors[readers[0]].shape[1]
        of_original, of_copy = (_shown(own, makers, columns) for own in (block.tensors, tensors))
        some = torch.split(of_original, COMPARED_ROWS)
        place_I = torch.cat([(rows @ of_copy.T).argmax(1) for rows in some])  # of the original's columns in the copy
        if bool((place_I.bincount(minlength=columns) == 1).all()):
            _arrange(tensors, readers, makers, place_I)
    return tensors


def _middles(block: Block) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """By tap, the weights that read it and the linears that make it; those that the block has."""
    linears = {tap.name: tap.linears for tap in block.taps}
    for tap, makers in block.middles.items():
        readers = tuple(name for linear in linears[tap] if (name := f"{linear}.weight") in block.tensors)
        made = tuple(linear for linear in makers if f"{linear}.weight" in block.tensors)
        if readers and made:
            yield tap, readers, made


def _arrange(tensors: dict[str, Tensor], readers: Sequence[str], makers: Sequence[str], order_I: Tensor) -> None:
    """Put columns of the readers, and rows of the makers, in this order."""
    for name in readers:
        tensors[name] = tensors[name][:, order_I]
    for name in (f"{linear}.{kind}" for linear in makers for kind in ("weight", "bias")):
        if name in tensors:
            rows = tensors[name]
            parts = rows.reshape(-1, len(order_I), *rows.shape[1:])
            tensors[name] = parts[:, order_I].reshape(rows.shape)


def _shown(tensors: Mapping[str, Tensor], makers: Sequence[str], columns: int) -> Tensor:
    """The beginnings of the rows that make each column, each of length 1: [I, P x SHOWN_COLUMNS]."""
    own = []
    for linear in makers:
        rows = tensors[f"{linear}.weight"][:, :SHOWN_COLUMNS].float()
        own += list(torch.nn.functional.normalize(rows, dim=1).reshape(-1, columns, rows.shape[1]))
    return torch.cat(own, 1)
