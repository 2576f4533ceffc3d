"""Statistics of experts that few calibration rows reached, filled up with those of their layer.

A Gram matrix of fewer rows than columns is singular: what an expert was not shown costs GPTQ nothing, and the few rows
it was shown are fitted at the price of all others. So an expert with n rows of n* wanted ones gets n* - n more that
look as the layer's do:

    H' = H + (n* - n) M        M: the mean of x x^T over the rows of all experts of the layer

and the sums alike. Inputs are one hidden state, so M is theirs and n* the number of columns. What an expert has in its
middle is its own, and no column of one means what it does in another: M is the layer's mean square times the identity,
and n* a quarter of the columns, since that says so little (both measured, docs/results.md). Largest magnitudes become
the layer's. With n >= n* everything stays as it is, bit for bit.

The alternatives: letting every expert see all rows takes a forward of all experts; rounding rare ones to nearest
forgets what was seen.
"""

# I columns
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from converter.architecture import EXPERT_INPUT, EXPERT_MIDDLE, Tap
from converter.stats import TapStats

ROWS_PER_COLUMN = {EXPERT_INPUT: 1.0, EXPERT_MIDDLE: 0.25}  # that make an expert's statistics its own


def blended(stats: Mapping[str, TapStats], taps: Sequence[Tap]) -> tuple[dict[str, TapStats], dict[str, str]]:
    """The statistics, those of rare experts filled up, and what was done, by tap.

    taps: the block's. Kinds of taps of which nothing was seen stay as they are.
    """
    found, notes = dict(stats), dict[str, str]()
    for kind, rows_per_column in ROWS_PER_COLUMN.items():
        names = [tap.name for tap in taps if tap.name.startswith(f"{kind}.")]
        seen = [stats[name] for name in names if name in stats]
        if not seen:
            continue
        wanted = math.ceil(rows_per_column * len(seen[0].sum_squares))
        rare = [name for name in names if name not in stats or stats[name].rows < wanted]
        if not rare:
            continue
        layer = _layer(seen, shared=kind == EXPERT_INPUT)
        for name in rare:
            found[name] = _filled(stats.get(name), layer, wanted)
            few = "few calibration rows" if name in stats else "no calibration row"
            notes[name] = f"{few} reached it: statistics filled up to {wanted} with its layer's"
    return found, notes


def _layer(seen: Sequence[TapStats], shared: bool) -> TapStats:
    """All rows of a layer's experts together. Unless the columns are shared, each is the mean of all of them."""
    with_gram = seen[0].gram is not None
    total = seen[0] if shared else replace(seen[0], gram=None)
    for one in seen[1:]:
        total = total + one
    if shared:
        return total
    columns = len(total.sum_squares)
    mean_square = float(total.sum_squares.mean())
    return replace(
        total,
        sum_squares=torch.full_like(total.sum_squares, mean_square),
        abs_sum=torch.full_like(total.abs_sum, float(total.abs_sum.mean())),
        abs_max=torch.full_like(total.abs_max, float(total.abs_max.max())),
        minimum=torch.full_like(total.minimum, float(total.minimum.min())),
        maximum=torch.full_like(total.maximum, float(total.maximum.max())),
        gram=torch.eye(columns) * mean_square if with_gram else None,
        histogram=None if total.histogram is None else _even(total.histogram),
    )


def _even(histogram: Tensor) -> Tensor:
    """Counts of columns that mean nothing to each other: of each, those of all."""
    return histogram.sum(0, keepdim=True).expand_as(histogram)


def _filled(own: TapStats | None, layer: TapStats, wanted: int) -> TapStats:
    """`own`, with as many rows like the layer's as are missing; magnitudes and counts are the layer's, too."""
    missing = wanted - (own.rows if own else 0)
    share = missing / layer.rows
    more = replace(
        layer,
        rows=missing,
        sum_squares=layer.sum_squares * share,
        abs_sum=layer.abs_sum * share,
        gram=None if layer.gram is None else layer.gram * share,
    )
    return own + more if own else more
