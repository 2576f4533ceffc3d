"""Rotation: weights in a basis without outliers, which the model computes the same in.

The residual stream is turned by a random Hadamard matrix R: what reads the stream is multiplied by R, what adds to it
by R^T, embedding and head included. RMS norms see lengths only, so they do not notice once their gains have gone into
the linears behind them. Inside attention each head's values are turned alike, and the output projection undoes that.
All of it is merged into the weights, before anything is rounded: no reader needs to know, and nothing is computed at
run time. What it costs: a head that was the embedding is stored by itself, as the last norm's gains go into it alone.

Rotations that must be computed at run time (queries and keys behind their positions, the middle of the MLP) are left
out: no format here can say them.

Source: Ashkboos et al. 2024, QuaRot, arXiv:2404.00456; the names R1 and R2 are SpinQuant's, arXiv:2405.16406.

# O out, I in, D width of what is turned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

from converter.architecture import Architecture, Folding
from converter.caches import MAKERS, VALUES
from converter.grids import Grid
from converter.methods import Block, Options
from converter.methods.folding import folded_rows, scaled_by
from converter.residual import Residual
from converter.stats import TapStats
from quantkernels import hadamard

PIECE_VALUES = 1 << 22  # turned at a time, beside the result
SHOWN = 4  # of the problems of a model
VANISHED = 1e-12  # of the largest gain: what a smaller one leaves of a column cannot be divided out again


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Vectors v of one width become v R: random signs, then a Hadamard matrix (see quantkernels.hadamard)."""

    sign_D: Tensor

    def turn(self, values: Tensor, dim: int = -1) -> Tensor:
        """`values` with the vectors along `dim` times R, f32; their width divides the size of `dim`."""
        return self._along(values, dim, inverse=False)

    def back(self, values: Tensor, dim: int = -1) -> Tensor:
        """The inverse of `turn`: the vectors times the transpose of R."""
        return self._along(values, dim, inverse=True)

    def _along(self, values: Tensor, dim: int, inverse: bool) -> Tensor:
        width = len(self.sign_D)
        turned = torch.empty(values.shape, device=values.device)
        given_ND, turned_ND = (
            moved.view(*moved.shape[:-1], moved.shape[-1] // width, width)
            for moved in (values.movedim(dim, -1), turned.movedim(dim, -1))
        )
        step = max(1, PIECE_VALUES * len(given_ND) // max(1, values.numel()))
        for given, out in zip(torch.split(given_ND, step), torch.split(turned_ND, step), strict=True):
            rows = given.float().cpu()  # where the kernel is
            signed = (rows if inverse else rows * self.sign_D).reshape(-1, width)
            rows = hadamard.spread(signed, inverse=inverse, threads=torch.get_num_threads()).reshape(given.shape)
            out.copy_(rows * self.sign_D if inverse else rows)
        return turned


@cache
def rotation_of(seed: str, place: str, width: int) -> Rotation:
    """The rotation of vectors of `width` at a place of the model, "residual" or "head"; signs follow from the three."""
    digest = hashlib.shake_256(f"hubmill rotation {place} {width} {seed}".encode()).digest(-(-width // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8))[:width]
    return Rotation(sign_D=1 - 2 * torch.from_numpy(bits).float())


def rotation(block: Block, grids: Mapping[str, Grid], options: Options) -> Block:
    """The block, or what lies outside the blocks, in the basis that options.seed gives; statistics follow.

    A norm's gains become 1, as stored in its family. What is no part of the residual stream stays as it is.
    Source: QuaRot, sections 4.1 (residual stream) and 4.2 (values).
    """
    tensors, stats = dict(block.tensors), dict(block.stats)
    residual = block.residual
    assert residual is not None and not residual.fixed, "the plan refuses models whose stream cannot be turned"
    for norm, names in _readers(residual, tensors):
        gain_D = _gain(residual, norm, tensors)
        turn = rotation_of(options.seed, "residual", tensors[names[0]].shape[1]).turn
        for name in names:
            tensors[name] = turn(tensors[name] if gain_D is None else tensors[name] * gain_D)
        for tap in block.taps:
            if tap.name in stats and gain_D is not None and any(f"{one}.weight" in names for one in tap.linears):
                stats[tap.name] = _normed(stats[tap.name], gain_D).turned(turn)
        if gain_D is not None:
            tensors[f"{norm}.weight"] = torch.full_like(gain_D, 1 - residual.offset)
    for name in _written(residual, tensors):
        tensors[name] = rotation_of(options.seed, "residual", len(tensors[name])).turn(tensors[name], 0)
    for folding, names, width in _heads(block):
        turn = rotation_of(options.seed, "head", width).turn
        for name in (f"{folding.linear}.weight", f"{folding.linear}.bias"):
            if name in tensors:
                tensors[name] = _with_rows(tensors[name], folding, len(tensors[names[0]][0]), turn)
        for name in names:
            tensors[name] = turn(tensors[name])
        values = VALUES if folding.linear.rpartition(".")[2] in MAKERS[VALUES] else ""
        for turned, heads in zip((folding.tap, values), folding.counts, strict=True):
            if turned in stats:
                stats[turned] = stats[turned].turned(turn, heads)
    return replace(block, tensors=tensors, stats=stats)


def why_fixed(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why the residual stream of a model cannot be turned; empty when it can. architecture is fitted, shapes by name.

    Outside of the blocks only the embedding, the final norm and the head are known: what else there is, a tower for
    pictures or a block that predicts further tokens, would read the stream or add to it.
    """
    if architecture.residual.fixed:
        return architecture.residual.fixed
    width = shapes[f"{architecture.embedding}.weight"][-1]
    blocks: dict[int | None, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        b = architecture.block_of(name)
        local = name.removeprefix(architecture.prefix(b)) if b is not None else name
        blocks.setdefault(b, {})[local] = shape
    inner, outer = architecture.inner_residual, architecture.outer_residual
    found = [problem for b, own in blocks.items() for problem in (outer if b is None else inner).problems(own, width)]
    return "; ".join(dict.fromkeys(found[:SHOWN]))


def unrotated(block: Block, copy: Mapping[str, Tensor], seed: str) -> dict[str, Tensor]:
    """The tensors `copy` of a rotated block in the original's basis, gains back in their norms; block: the original's.

    A column whose gain is 0 is the original's: nothing tells what it was, and nothing reads it.
    """
    tensors = dict(copy)
    residual = block.residual
    assert residual is not None
    for folding, names, width in _heads(block):
        back = rotation_of(seed, "head", width).back
        for name in (f"{folding.linear}.weight", f"{folding.linear}.bias"):
            if name in tensors:
                tensors[name] = _with_rows(tensors[name], folding, len(tensors[names[0]][0]), back)
        for name in names:
            tensors[name] = back(tensors[name])
    for name in _written(residual, tensors):
        tensors[name] = rotation_of(seed, "residual", len(tensors[name])).back(tensors[name], 0)
    for norm, names in _readers(residual, tensors):
        gain_D, stored_D = _gain(residual, norm, block.tensors), _gain(residual, norm, tensors)
        back = rotation_of(seed, "residual", tensors[names[0]].shape[1]).back
        for name in names:
            if gain_D is None or stored_D is None:
                tensors[name] = back(tensors[name])
                continue
            lit_D = _lit(gain_D)
            values = back(tensors[name] * stored_D) / torch.where(lit_D, gain_D, 1.0)
            tensors[name] = torch.where(lit_D, values, block.tensors[name])
    norms = {f"{norm}.weight" for norm in residual.reads}
    return tensors | {name: values for name, values in block.tensors.items() if name in norms}


def _readers(residual: Residual, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every norm with the weights that read the stream behind it, of those that are there."""
    for norm, linears in residual.reads.items():
        if names := tuple(name for linear in linears if (name := f"{linear}.weight") in tensors):
            yield norm, names


def _written(residual: Residual, tensors: Mapping[str, Tensor]) -> list[str]:
    """The weights and biases whose rows are added to the stream, of those that are there."""
    own = [f"{linear}.{kind}" for linear in residual.writes for kind in ("weight", "bias")]
    return [name for name in own if name in tensors]


def _heads(block: Block) -> Iterator[tuple[Folding, tuple[str, ...], int]]:
    """The foldings of whole heads, the weights whose columns they are about, and the width of a head."""
    for folding in block.foldings:
        if folding.linear and folding.heads and (names := scaled_by(block, folding)):
            yield folding, names, block.tensors[names[0]].shape[1] // folding.counts[0]


def _with_rows(values: Tensor, folding: Folding, columns: int, turn: Callable[[Tensor, int], Tensor]) -> Tensor:
    """A weight [O, I] or bias [O] with the rows turned that the folding means."""
    rows = folded_rows(folding, columns, len(values))
    turned = values.clone()
    turned[rows] = turn(values[rows], 0)
    return turned


def _gain(residual: Residual, norm: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """What a norm multiplies the stream's columns by; None where nothing does, as behind no norm."""
    name = f"{norm}.weight"
    return residual.offset + tensors[name] if norm and name in tensors else None


def _lit(gain_D: Tensor) -> Tensor:
    return gain_D.abs() > VANISHED * gain_D.abs().max()


def _normed(stats: TapStats, gain_D: Tensor) -> TapStats:
    """The statistics in front of the gains; columns without one share what the length of normed rows leaves to them."""
    lit_D = _lit(gain_D)
    normed = stats.scaled(torch.where(lit_D, gain_D, 1.0))
    if bool(lit_D.all()):
        return normed
    width = len(gain_D)
    left = normed.rows * width - float(normed.sum_squares[lit_D].sum())
    squares_D = torch.where(lit_D, normed.sum_squares, max(0.0, left) / int((~lit_D).sum()))
    gram = normed.gram
    if gram is not None:
        gram = gram * lit_D * lit_D[:, None] + torch.where(lit_D, 0.0, squares_D).float().diag()
    largest_D = torch.where(lit_D, normed.abs_max, width**0.5)
    return replace(normed, sum_squares=squares_D, abs_max=largest_D, gram=gram)
