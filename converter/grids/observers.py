"""Observers: how the range that a group's codes cover is read off its weights.

minmax takes everything; percentile leaves out the outermost ten-thousandth at either end; kl picks, among shrunken
ranges, the one whose codes keep most of the weights' distribution. A fourth, mse, is `quantkernels.scales` and the
default: at 2 bits it has a quarter of minmax's error (0.13 against 0.51 on Gaussian rows). The other three are what
other tools offer, and what a comparison with them needs.

# O out, I in, G groups of a row, N columns of a group, K histogram bins,
# E edges of bins, C codes, B borders of codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LEFT_OUT = 1e-4  # the share of a group's weights that percentile leaves out at each end
BINS = 2048
WEIGHTS_PER_BIN = 16
SLICE_COLUMNS = 1 << 20  # columns per step of a histogram, whose indices take eight bytes a weight


def grouped(weight_OI: Tensor, group_size: int) -> Tensor:
    """The weights as [O, G, N]; a short last group is filled with zeros, which no range minds: it holds zero anyway."""
    missing = -weight_OI.shape[1] % group_size
    if missing:
        weight_OI = functional.pad(weight_OI, (0, missing))
    return weight_OI.reshape(len(weight_OI), -1, group_size)


def minmax(weight_OGN: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of each group [O, G], zero included."""
    minimum_OG, maximum_OG = weight_OGN.aminmax(dim=2)
    return minimum_OG.clamp(max=0), maximum_OG.clamp(min=0)


def percentile(weight_OGN: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Each group's range [O, G] once floor(N / 10000) weights at each end are left out; zero included.

    With symmetric it is the floor(N / 10000) largest magnitudes. Groups below 10000 weights keep minmax's range.
    """
    left_out = int(weight_OGN.shape[2] * LEFT_OUT)
    if left_out == 0:
        return minmax(weight_OGN)
    if symmetric:
        largest_OG = weight_OGN.abs().topk(left_out + 1, dim=2).values[:, :, -1]
        return -largest_OG, largest_OG
    maximum_OG = weight_OGN.topk(left_out + 1, dim=2).values[:, :, -1]
    minimum_OG = weight_OGN.topk(left_out + 1, dim=2, largest=False).values[:, :, -1]
    return minimum_OG.clamp(max=0), maximum_OG.clamp(min=0)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How the weights of each row lie in K equal bins from its minimum to its maximum.

    edges_OE f32: where each bin begins, and the end. below_OE and filled_OE i64: how many weights, and how many bins
    that hold any, lie below each edge. log_OE f64: the sum of count * log(count) over the bins below each edge.
    """

    edges_OE: Tensor
    below_OE: Tensor
    filled_OE: Tensor
    log_OE: Tensor


def histogram(weight_OI: Tensor) -> Histogram:
    """The histogram of each row: 2048 bins, or fewer in rows that would leave less than 16 weights for each.

    With fewer weights than that a histogram shows their noise, and keeping it would cost most of the range.
    """
    bins = min(BINS, max(1, weight_OI.shape[1] // WEIGHTS_PER_BIN))
    minimum_O1, maximum_O1 = (end[:, None] for end in weight_OI.aminmax(dim=1))
    width_O1 = maximum_O1 / bins - minimum_O1 / bins  # each divided first: their difference may overflow
    divisor_O1 = torch.where(width_O1 > 0, width_O1, 1.0)
    counts_OK = torch.zeros(len(weight_OI), bins, dtype=torch.int64)
    for part_ON in torch.split(weight_OI, SLICE_COLUMNS, dim=1):
        bins_ON = (part_ON / divisor_O1 - minimum_O1 / divisor_O1).long().clamp_(0, bins - 1)
        counts_OK.scatter_add_(1, bins_ON, torch.ones_like(bins_ON))
    wide_OK = counts_OK.double()
    return Histogram(
        edges_OE=minimum_O1 + torch.arange(bins + 1) * width_O1,
        below_OE=functional.pad(counts_OK.cumsum(1), (1, 0)),
        filled_OE=functional.pad((counts_OK > 0).cumsum(1), (1, 0)),
        log_OE=functional.pad(torch.xlogy(wide_OK, wide_OK).cumsum(1), (1, 0)),
    )


def divergence(of: Histogram, borders_OB: Tensor) -> Tensor:
    """The KL divergence [O] f64, in nats, between the weights' distribution and what rounding leaves of it.

    borders_OB f32, not falling along a row: where the first code begins, where each ends, and where the last ends; a
    bin belongs to the code that its centre lies in. On one side, weights beyond the borders are counted with the
    outermost bin inside that holds any. On the other they are missing, and the bins of one code that hold any share its
    weights equally. A range without weights is infinitely far.
    Source: Migacz, 8-bit inference with TensorRT, GTC 2017.
    """
    centres_OK = (of.edges_OE[:, 1:] + of.edges_OE[:, :-1]) / 2
    ends_OB = torch.searchsorted(centres_OK, borders_OB.contiguous())
    below_OB, filled_OB, log_OB = (sums_OE.gather(1, ends_OB) for sums_OE in (of.below_OE, of.filled_OE, of.log_OE))
    total_O1 = of.below_OE[:, -1:].double()
    inside_O1 = (below_OB[:, -1:] - below_OB[:, :1]).double()
    weights_OC, bins_OC = below_OB.diff(dim=1).double(), filled_OB.diff(dim=1)
    # With p = count / total and q = (code's weights / its bins) / inside, the sum of p log(p / q) over all bins but for
    # the weights beyond the borders, which raise the outermost two bins and are added behind it.
    shared_O1 = torch.xlogy(weights_OC, weights_OC / bins_OC.clamp(min=1)).sum(1, keepdim=True)
    sum_O1 = (log_OB[:, -1:] - log_OB[:, :1]) - shared_O1 + inside_O1 * (inside_O1 / total_O1).log()
    for outermost_O1, beyond_O1 in (
        (torch.searchsorted(of.filled_OE, filled_OB[:, :1] + 1), below_OB[:, :1]),
        (torch.searchsorted(of.filled_OE, filled_OB[:, -1:].contiguous()), of.below_OE[:, -1:] - below_OB[:, -1:]),
    ):
        outermost_O1 = outermost_O1.clamp(1, of.below_OE.shape[1] - 1)
        count_O1 = (of.below_OE.gather(1, outermost_O1) - of.below_OE.gather(1, outermost_O1 - 1)).double()
        code_O1 = (torch.searchsorted(ends_OB, outermost_O1) - 1).clamp(0, bins_OC.shape[1] - 1)
        mean_O1 = weights_OC.gather(1, code_O1) / bins_OC.gather(1, code_O1).clamp(min=1)
        raised_O1 = count_O1 + beyond_O1
        sum_O1 += torch.xlogy(raised_O1, raised_O1) - torch.xlogy(count_O1, count_O1)
        sum_O1 -= beyond_O1 * (mean_O1 * total_O1 / inside_O1).log()
    divergence_O: Tensor = torch.where(inside_O1 > 0, sum_O1 / total_O1, torch.inf)[:, 0]
    return divergence_O
