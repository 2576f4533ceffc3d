"""How the values of a tap are distributed: counts in bins that are the same for every tap, row and worker.

A bin holds the f32 values that share their sign, exponent and first five bits of mantissa: 32 to the octave, each at
most 1/32 of its lower edge wide. So no range is needed beforehand, counts are whole numbers, and they add up exactly in
any order and however rows are sharded. The usual 2048 equal bins need the range first, and adding two of them moves
counts between bins. The price is that wide bins hold the largest values: within a bin values are taken to lie evenly.

A column scale moves values between bins, each column's by its own, so what is to follow one is counted for each column
apart: 22 kB a column in memory, where a row of the Gram matrix of 4096 columns takes 16. Otherwise a tap has one row
of counts.
"""

# N rows (tokens), I columns, C rows of counts (1 for a whole tap, or I), B bins, E edges of bins
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MANTISSA_BITS = 5  # bins to the octave: 2^5
DROPPED_BITS = 23 - MANTISSA_BITS
SMALLEST_POWER = -24  # magnitudes below 2^-24 are counted as zero
LARGEST_POWER = 20  # those from 2^20 on are in the last bin
LOWEST = (127 + SMALLEST_POWER) << MANTISSA_BITS  # of an f32 without its sign and its dropped bits
HALF = (LARGEST_POWER - SMALLEST_POWER) << MANTISSA_BITS  # bins of one sign
BINS = 2 * HALF + 1  # from the most negative to the most positive; the middle one is zero's
CHUNK_COLUMNS = 256  # whose counts are moved at a time


def bins_of(values: Tensor) -> Tensor:
    """The number i32 of the bin that each value f32 is in; values are finite."""
    # The shift and the arithmetic on the sign bit take a seventh of the time of a torch.where.
    magnitude = values.abs().view(torch.int32).bitwise_right_shift_(DROPPED_BITS).sub_(LOWEST - 1).clamp_(0, HALF)
    sign = values.view(torch.int32) >> 31
    return magnitude.bitwise_xor_(sign).sub_(sign).add_(HALF)


def edges() -> Tensor:
    """Where each bin begins and the last one ends: [B + 1] f64, rising."""
    bits_E = torch.arange(HALF + 1, dtype=torch.int32).add_(LOWEST).bitwise_left_shift_(DROPPED_BITS)
    positive_E = bits_E.view(torch.float32).double()
    return torch.cat([-positive_E.flip(0), positive_E])


def counts(hidden: Tensor, by_column: bool) -> Tensor:
    """How many values of hidden [N, I] f32 each bin holds: i64 [I, B] by column, otherwise [1, B]."""
    bins = bins_of(hidden.contiguous())
    if not by_column:
        return torch.bincount(bins.flatten(), minlength=BINS)[None]
    columns = hidden.shape[1]
    places = bins + torch.arange(columns, device=hidden.device) * BINS
    return torch.bincount(places.flatten(), minlength=columns * BINS).reshape(columns, BINS)


def divided(counts_IB: Tensor, scale_I: Tensor) -> Tensor:
    """The counts [I, B] of x / scale_I, every value taken for the middle of its bin; none of scale_I is 0.

    What is counted thereby lies at most 1/32 of itself from where it is.
    """
    edges_E = edges()
    middles_B = (edges_E[1:] + edges_E[:-1]) / 2
    moved_IB = torch.zeros_like(counts_IB)
    for columns in torch.split(torch.arange(len(scale_I)), CHUNK_COLUMNS):
        places = bins_of((middles_B / scale_I[columns, None].double()).float()).long()
        moved_IB[columns] = torch.zeros_like(counts_IB[columns]).scatter_add_(1, places, counts_IB[columns])
    return moved_IB


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Values, evenly spread within bins that may have different widths, or none: edges_E f64 rising, counts_B f64."""

    edges_E: Tensor
    counts_B: Tensor

    @property
    def total(self) -> float:
        return float(self.counts_B.sum())

    def below(self, points: Tensor) -> Tensor:
        """How many values f64 lie below each of the points f64."""
        below_E = torch.nn.functional.pad(self.counts_B.cumsum(0), (1, 0))
        bin = (torch.searchsorted(self.edges_E, points, right=True) - 1).clamp(0, len(self.counts_B) - 1)
        width = self.edges_E[bin + 1] - self.edges_E[bin]
        past = points - self.edges_E[bin]
        share = torch.where(width > 0, past / torch.where(width > 0, width, 1.0), torch.sign(past)).clamp(0, 1)
        return below_E[bin] + share * self.counts_B[bin]

    def quantile(self, share: float) -> float:
        """The point below which this share of the values lies."""
        below_E = torch.nn.functional.pad(self.counts_B.cumsum(0), (1, 0))
        wanted = share * float(below_E[-1])
        bin = int((torch.searchsorted(below_E, wanted) - 1).clamp(0, len(self.counts_B) - 1))
        start, stop, inside = (float(one) for one in (self.edges_E[bin], self.edges_E[bin + 1], self.counts_B[bin]))
        return start + (stop - start) * min(1.0, max(0.0, (wanted - float(below_E[bin])) / max(inside, 1.0)))


def distribution(counts_CB: Tensor, minimum: float, maximum: float) -> Distribution:
    """The values that were counted, of all columns together; they lie between minimum and maximum, which are exact."""
    counts_B = counts_CB.sum(0).double().cpu()
    edges_E = edges()
    edges_E[0], edges_E[-1] = -torch.inf, torch.inf  # the outermost bins hold whatever is beyond, too
    return Distribution(edges_E=edges_E.clamp(minimum, maximum), counts_B=counts_B)


def magnitudes(counts_CB: Tensor, maximum: float) -> Distribution:
    """The magnitudes of the values that were counted, of all columns together; the largest is exact."""
    counts_B = counts_CB.sum(0).double().cpu()
    one_sided_B = torch.cat([counts_B[HALF : HALF + 1], counts_B[HALF + 1 :] + counts_B[:HALF].flip(0)])
    edges_E = edges()[HALF + 1 :]
    edges_E[-1] = torch.inf
    edges_E = torch.cat([torch.zeros(1, dtype=torch.float64), edges_E])
    return Distribution(edges_E=edges_E.clamp(max=maximum), counts_B=one_sided_B)
