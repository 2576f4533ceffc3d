"""AWQ: columns that large activations meet are stretched before rounding, so that the grid is finer where it counts.

What is in front of a tap absorbs the inverse (see folding.py). How far to stretch is searched on the target's own grid
by the error of the linears' outputs, which the tap's Gram matrix H holds: ||X dW^T||^2 = tr(dW H dW^T). So no
activations are kept and no forward is repeated; one trial costs what one rounding and one product with H cost. The
paper's loss looks through attention and the whole MLP instead, at the price of both. Not stretching is among the
trials, so by this measure it is never worse than rounding alone.

# O out, I in, N columns of a group, S rows of a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converter.architecture import Folding
from converter.errors import NumericsError
from converter.grids import Grid, observers
from converter.grids.affine import AffineGrid
from converter.grids.levels import LevelGrid
from converter.methods import Block, Options
from converter.methods.folding import fold, rows_of, scaled_by
from converter.methods.rtn import importance_of, is_quantized, nearest
from converter.stats import TapStats

RATIOS = 20  # trials, half of them with the weights' part
LEAST = 1e-4  # of a scale, and what is added to the weights' part, as published
SAMPLED_ROWS = 1024  # of each linear that trials are scored on


def awq(block: Block, grids: Mapping[str, Grid], options: Options) -> Block:
    """The block with every folding of its architecture carried out at the scales of least output error.

    Scales are x^r, or x^r / w^(1 - r) with the weights' part ("duo scaling"), in ten steps of r from 0 to 1 each: x is
    the mean |activation| of a column, w the mean |weight| over the largest of its group. The trial is rounded to
    nearest on each linear's grid. A tap without a linear on a grid of codes keeps its scale. One that no calibration
    row reached does, too, and is noted.
    Raises NumericsError when nothing was measured of the block, a Gram matrix is missing, or a value is not finite.
    Source: Lin et al. 2023, arXiv:2306.00978; the weights' part is AutoAWQ's.
    """
    notes = dict(block.notes)
    for folding in block.foldings:
        names = [name for name in scaled_by(block, folding) if is_quantized(block.tensors[name], grids[name])]
        if not names:
            continue
        where = f"{block.where} {folding.tap}"
        stats = block.stats.get(folding.tap)
        if not block.stats or (stats is not None and stats.gram is None):
            what = "awq needs the Gram matrix of the activations, and this tap has none"
            raise NumericsError(where, what, "Calibrate the model, or leave awq out of the target's methods")
        if stats is None or not bool(stats.abs_sum.any()):
            notes |= dict.fromkeys(names, "no calibration row reached it: not scaled by awq")
            continue
        block = fold(block, folding, search(block, folding, names, grids, options), grids)
    return replace(block, notes=notes)


def search(block: Block, folding: Folding, names: Sequence[str], grids: Mapping[str, Grid], options: Options) -> Tensor:
    """The scale [I] f32 of the tap's columns under which the weights `names`, rounded, err least on their outputs."""
    stats = block.stats[folding.tap]
    rows_I = rows_of(folding, len(stats.abs_sum))
    activations_I = _shared((stats.abs_sum / stats.rows).float(), rows_I)
    weights_I = _shared(weight_part([block.tensors[name] for name in names], [grids[name] for name in names]), rows_I)
    trials = [
        Trial(
            where=f"{block.where} {name}",
            weight_SI=_sample(block.tensors[name].float()),
            grid=grids[name],
            importance_I=importance_of(block, name) if options.importance else None,
        )
        for name in names
    ]
    best_I, least = torch.ones_like(activations_I), float("inf")
    for scale_I in candidates(activations_I, weights_I):
        error = sum(trial.error(scale_I, stats) for trial in trials)
        if error < least:
            best_I, least = scale_I, error
    return best_I


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A linear that scales are tried on: some of its rows, its grid, and what weighs its columns in rounding."""

    where: str
    weight_SI: Tensor
    grid: Grid
    importance_I: Tensor | None

    def error(self, scale_I: Tensor, stats: TapStats) -> float:
        """The squared error of the outputs over the rows that `stats` saw: tr(dW H dW^T), dW = Q(W s) / s - W."""
        importance_I = None if self.importance_I is None else self.importance_I / scale_I.square()
        coded = nearest(self.where, self.weight_SI * scale_I, self.grid, importance_I)
        off_SI = coded.decode().div_(scale_I).sub_(self.weight_SI)
        assert stats.gram is not None
        return float((off_SI @ stats.gram).mul_(off_SI).sum(dtype=torch.float64))


def candidates(activations_I: Tensor, weights_I: Tensor) -> Iterator[Tensor]:
    """The scales [I] f32 to try, ones first; columns without activations or weights always keep theirs.

    Each is divided by the root of its largest times its least, as published, so that norms keep their size.
    """
    used_I = (activations_I > 0) & (weights_I > 0)
    for ratio in torch.linspace(0, 1, RATIOS // 2).tolist():
        part_I = activations_I.pow(ratio)
        for scale_I in (part_I, part_I / (weights_I.pow(1 - ratio) + LEAST)):
            used = scale_I[used_I].clamp(min=LEAST)
            if len(used):
                used /= (used.max() * used.min()).sqrt()
            yield torch.ones_like(activations_I).masked_scatter_(used_I, used)


def weight_part(weights: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
    """The mean [I] f32, over the rows of all weights [O, I], of |w| over the largest |w| that shares its scale."""
    total_I = torch.zeros(weights[0].shape[1])
    for weight_OI, grid in zip(weights, grids, strict=True):
        columns = weight_OI.shape[1]
        size = grid.columns_per_scale(columns) if isinstance(grid, AffineGrid | LevelGrid) else columns
        size_OGN = observers.grouped(weight_OI.float().abs(), size)
        share_OGN = size_OGN / size_OGN.amax(2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        total_I += share_OGN.sum(0).flatten()[:columns]
    return total_I / sum(len(weight_OI) for weight_OI in weights)


def _shared(values_I: Tensor, rows_I: Tensor) -> Tensor:
    """The values with the mean in columns that are multiples of the same row."""
    count = int(rows_I.max()) + 1
    mean_O = torch.zeros(count).index_add_(0, rows_I, values_I) / torch.bincount(rows_I, minlength=count)
    return mean_O[rows_I]


def _sample(weight_OI: Tensor) -> Tensor:
    """Every k-th row of the weight, about SAMPLED_ROWS of them."""
    return weight_OI[:: max(1, len(weight_OI) // SAMPLED_ROWS)]
