"""Observers: how the range that a group's codes cover is read off its weights.

minmax takes everything; percentile leaves out the outermost ten-thousandth at either end; kl picks, among shrunken
ranges, the one whose codes keep most of the weights' distribution. A fourth, mse, is `quantkernels.scales` and the
default: at 2 bits it has a quarter of minmax's error (0.13 against 0.51 on Gaussian rows). The other three are what
other tools offer, and what a comparison with them needs.

# O out, I in, G groups of a row, N columns of a group, K histogram bins, L codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEFT_OUT = 1e-4  # the share of a group's weights that percentile leaves out at each end
BINS = 2048
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


def histogram(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """How many weights of each row lie in each of 2048 equal bins from its minimum to its maximum, and the centres.

    Both [O, K]: counts i64 and centres f32.
    """
    minimum_O1, maximum_O1 = (end[:, None] for end in weight_OI.aminmax(dim=1))
    width_O1 = maximum_O1 / BINS - minimum_O1 / BINS  # each divided first: their difference may overflow
    divisor_O1 = torch.where(width_O1 > 0, width_O1, 1.0)
    counts_OK = torch.zeros(len(weight_OI), BINS, dtype=torch.int64)
    for part_ON in torch.split(weight_OI, SLICE_COLUMNS, dim=1):
        bins_ON = (part_ON / divisor_O1 - minimum_O1 / divisor_O1).long().clamp_(0, BINS - 1)
        counts_OK.scatter_add_(1, bins_ON, torch.ones_like(bins_ON))
    return counts_OK, minimum_O1 + (torch.arange(BINS) + 0.5) * width_O1


def divergence(counts_OK: Tensor, steps_OK: Tensor, levels: int) -> Tensor:
    """The KL divergence [O] f64, in nats, between the weights' distribution and what is left of it after rounding.

    counts_OK is a histogram; steps_OK i64 is the code of each bin's centre, from 0 to levels - 1. Rounding merges the
    bins of one code: each of them that is not empty is left with an equal part of their weights.
    Source: Migacz, 8-bit inference with TensorRT, GTC 2017; here clipped weights stay in the outermost code on both
    sides of the comparison, so that the divergences of different ranges can be compared.
    """
    wide_OK = counts_OK.double()
    zeros_OL = wide_OK.new_zeros(len(wide_OK), levels)
    weights_OL = zeros_OL.scatter_add(1, steps_OK, wide_OK)
    bins_OL = zeros_OL.scatter_add(1, steps_OK, (wide_OK > 0).double())
    merged_OK = (weights_OL / bins_OL.clamp(min=1)).gather(1, steps_OK)
    terms_OK = torch.where(wide_OK > 0, wide_OK * (wide_OK / merged_OK.clamp(min=0.5)).log(), 0.0)
    return terms_OK.sum(1) / wide_OK.sum(1)
