"""SmoothQuant: column scales move from activations into weights, so that outliers in activations shrink.

The norm in front of a tap divides each column by s, the linears behind it multiply theirs by s (see folding.py). Only
norms absorb scales here, as in the paper: what stands between two linears has outliers of another kind, and a scale
there would change the rows of the first one, too.

# O out, I in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from converter.errors import NumericsError
from converter.grids import Grid
from converter.methods import Block, Options
from converter.methods.folding import fold, scaled_by

SMALLEST = 1e-5  # no column of the norm grows by more than 1e5


def smoothquant(block: Block, grids: Mapping[str, Grid], options: Options) -> Block:
    """The block with every norm's folding of its architecture applied at options.smoothing_strength.

    s_j = max|x_j|^strength / max|w_j|^(1 - strength), at least 1e-5; a column without activations or weights keeps its
    scale. A block without foldings (what lies outside the blocks, an unknown architecture) comes back as it is.
    Raises NumericsError when a folding's tap has no statistics, or a scale is not finite.
    Source: Xiao et al. 2022, arXiv:2211.10438.
    """
    for folding in block.foldings:
        names = scaled_by(block, folding)
        if not folding.norm or not names:
            continue
        where = f"{block.where} {folding.tap}"
        if folding.tap not in block.stats:
            what = "smoothquant needs activation statistics, and this tap has none"
            raise NumericsError(where, what, "Calibrate the model, or leave smoothquant out of the target's methods")
        activations_I = block.stats[folding.tap].abs_max
        scale_I = column_scale(activations_I, [block.tensors[name] for name in names], options.smoothing_strength)
        if not bool(torch.isfinite(scale_I).all()):
            what = f"{int((~torch.isfinite(scale_I)).sum())} of {len(scale_I)} smoothing scales are not finite"
            raise NumericsError(where, what, "Check the model's weights for values that are not finite")
        block = fold(block, folding, scale_I, grids)
    return block


def column_scale(activations_I: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """The scale [I] f32 that weights are multiplied and activations divided by.

    activations_I holds the largest |x| of each column; weights [O, I] are those of all linears that read it.
    """
    largest_I = torch.stack([weight_OI.abs().amax(0) for weight_OI in weights]).amax(0).float()
    used_I = (activations_I > 0) & (largest_I > 0)
    scale_I = activations_I.float() ** strength / torch.where(used_I, largest_I, 1.0) ** (1 - strength)
    return torch.where(used_I, scale_I.clamp(min=SMALLEST), 1.0)
