"""SmoothQuant: column scales move from activations into weights, so that outliers in activations shrink.

The norm in front of a tap divides each column by s, the linears behind it multiply theirs by s: the block computes the
same, the statistics follow (H' = D^-1 H D^-1), and no second forward is needed. Only norm-to-linears pairs fold; scales
between two linears (value to output projection) would need equal head counts, which grouped-query attention lacks.

# O out, I in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from converter.errors import NumericsError
from converter.methods import Block, Options

SMALLEST = 1e-5  # no column of the norm grows by more than 1e5


def smoothquant(block: Block, options: Options) -> Block:
    """The block with every folding of its architecture applied at options.smoothing_strength.

    s_j = max|x_j|^strength / max|w_j|^(1 - strength), at least 1e-5; a column without activations or weights keeps its
    scale. A block without foldings (what lies outside the blocks, an unknown architecture) comes back as it is.
    Raises NumericsError when a folding's tap has no statistics, or a scale is not finite.
    Source: Xiao et al. 2022, arXiv:2211.10438.
    """
    tensors = dict(block.tensors)
    stats = dict(block.stats)
    taps = {tap.name: tap for tap in block.taps}
    for folding in block.foldings:
        norm = f"{folding.norm}.weight"
        linears = [f"{linear}.weight" for linear in taps[folding.tap].linears]
        present = [name for name in linears if name in tensors]
        if norm not in tensors or not present:
            continue
        where = f"{block.where} {folding.tap}"
        if folding.tap not in stats:
            what = "smoothquant needs activation statistics, and this tap has none"
            raise NumericsError(where, what, "Calibrate the model, or leave smoothquant out of the target's methods")
        activations_I = stats[folding.tap].abs_max
        scale_I = column_scale(activations_I, [tensors[name] for name in present], options.smoothing_strength)
        if not bool(torch.isfinite(scale_I).all()):
            what = f"{int((~torch.isfinite(scale_I)).sum())} of {len(scale_I)} smoothing scales are not finite"
            raise NumericsError(where, what, "Check the model's weights for values that are not finite")
        for name in present:
            tensors[name] = tensors[name] * scale_I.to(tensors[name].dtype)
        gain_I = folding.offset + tensors[norm]
        tensors[norm] = gain_I / scale_I.to(gain_I.dtype) - folding.offset
        bias = f"{folding.norm}.bias"
        if bias in tensors:
            tensors[bias] = tensors[bias] / scale_I.to(tensors[bias].dtype)
        stats[folding.tap] = stats[folding.tap].scaled(scale_I)
    return replace(block, tensors=tensors, stats=stats)


def column_scale(activations_I: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """The scale [I] f32 that weights are multiplied and activations divided by.

    activations_I holds the largest |x| of each column; weights [O, I] are those of all linears that read it.
    """
    largest_I = torch.stack([weight_OI.abs().amax(0) for weight_OI in weights]).amax(0).float()
    used_I = (activations_I > 0) & (largest_I > 0)
    scale_I = activations_I.float() ** strength / torch.where(used_I, largest_I, 1.0) ** (1 - strength)
    return torch.where(used_I, scale_I.clamp(min=SMALLEST), 1.0)
