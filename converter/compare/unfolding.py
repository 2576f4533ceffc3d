"""Foldings undone, so that what a transform moved between tensors does not count as an error of the weights.

What a folding divided is known exactly where it was a norm, which is stored as it is. A linear was rounded behind it,
so each row's factor is the one that brings it nearest to the original's row: of so many weights that the factor itself
is off by the rounding's relative error over the root of their number.

# O out, I in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from converter.architecture import Folding, Tap
from converter.methods import Block
from converter.methods.folding import folded_rows, rows_of, scaled_by


def unfold(
    taps: tuple[Tap, ...],
    foldings: Sequence[Folding],
    original: Mapping[str, Tensor],
    copy: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The copy's tensors with `foldings`, those that may have been carried out, undone; norms stay as they are.

    original and copy: a block's tensors by their names relative to it.
    """
    tensors = dict(copy)
    before = Block(where="", tensors=original, stats={}, taps=taps)
    for folding in foldings:
        names = scaled_by(before, folding)
        if not names:
            continue
        columns = original[names[0]].shape[1]
        if folding.norm:
            name = f"{folding.norm}.weight"
            gain_I, gain_copy_I = folding.offset + original[name], folding.offset + copy[name]
            back_I = torch.where(gain_I == 0, 1.0, gain_copy_I / gain_I)
        else:
            name = f"{folding.linear}.weight"
            rows = folded_rows(folding, columns, len(original[name]))
            grown_O = _nearest_factors(original[name][rows], tensors[name][rows])
            tensors[name] = tensors[name].clone()
            tensors[name][rows] *= grown_O[:, None]
            back_I = 1 / grown_O[rows_of(folding, columns)]
        for scaled in names:
            tensors[scaled] = tensors[scaled] * back_I
    return tensors


def _nearest_factors(original_OI: Tensor, copy_OI: Tensor) -> Tensor:
    """The factor [O] f32 that brings each row of the copy nearest to the original's; 1 where there is none above 0."""
    found_O = (original_OI.double() * copy_OI).sum(1) / copy_OI.double().square().sum(1)
    return torch.where(found_O.isfinite() & (found_O > 0), found_O, 1.0).float()
