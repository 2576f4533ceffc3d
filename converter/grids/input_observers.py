"""Observers of inputs: the range that the codes of a tensor's inputs cover, from what calibration saw of them.

One scale serves every token, so a few outliers decide how coarse all the rest becomes. minmax takes everything;
percentile leaves out the outermost ten-thousandth; kl keeps most of the distribution; mse has the least squared error
of rounding. The last three read the histogram of a tap, in place of rows that are never kept (converter/histogram.py).
The alternative, a running average of each row's range, depends on the order of rows.
"""

# B bins, E edges of bins, L levels of a grid, R ranges that are tried

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from converter.activations import fixed_levels
from converter.grids.observers import BINS, LEFT_OUT, Histogram, divergence
from converter.histogram import Distribution, distribution, magnitudes
from converter.schemes import Activations
from converter.schemes import Observer as Name
from converter.stats import TapStats

OCTAVES = 12  # below minmax's range in which mse looks: an outlier that leaves no code to the rest is 4096 times as far
COARSE, FINE = 4, 32  # ranges that it tries to the octave, at first and around the best
ALIKE = 1.01  # times the least error: of ranges with no more than that it takes the widest, which clips least
ROUNDS = 4  # in which it moves one end of a range and then the other
FEWEST_BINS, BIN_STEP = 128, 16  # of kl's 2048 bins: the narrowest range, and from one range to the next

Range = tuple[float, float]


def input_range(stats: TapStats, activations: Activations, observer: Name) -> Range:
    """The lowest and the largest input, zero between them, that the codes of `activations` shall cover.

    stats: of the tap as the linear reads it, with a histogram unless the observer is minmax. A symmetric one is -c, c.
    """
    assert observer == "minmax" or stats.histogram is not None, "this observer reads a histogram"
    return OBSERVERS[observer](stats, activations)


def minmax(stats: TapStats, activations: Activations) -> Range:
    """Everything that was seen."""
    largest = float(stats.abs_max.max())
    if activations.symmetric:
        return -largest, largest
    return min(0.0, float(stats.minimum.min())), max(0.0, float(stats.maximum.max()))


def percentile(stats: TapStats, activations: Activations) -> Range:
    """Everything but the ten-thousandth of the values that lies furthest out, or at either end where ends differ."""
    assert stats.histogram is not None
    if activations.symmetric:
        bound = magnitudes(stats.histogram, float(stats.abs_max.max())).quantile(1 - LEFT_OUT)
        return -bound, bound
    found = _distribution(stats)
    return min(0.0, found.quantile(LEFT_OUT)), max(0.0, found.quantile(1 - LEFT_OUT))


def kl(stats: TapStats, activations: Activations) -> Range:
    """The range whose codes keep most of the distribution, as `observers.divergence` measures it; the widest of equals.

    Ranges are shares of minmax's, from all of it down to a sixteenth, over 2048 equal bins.
    """
    lowest, largest = minmax(stats, activations)
    if largest - lowest == 0:
        return lowest, largest
    shares_R = torch.arange(BINS, FEWEST_BINS - 1, -BIN_STEP, dtype=torch.float64) / BINS
    edges_E = torch.linspace(lowest, largest, BINS + 1, dtype=torch.float64)
    below_E = _distribution(stats).below(edges_E)
    below_E[-1] = _distribution(stats).total
    filled_B = below_E.diff()
    pad = torch.nn.functional.pad
    found = Histogram(
        edges_OE=edges_E.float().repeat(len(shares_R), 1),
        below_OE=below_E.repeat(len(shares_R), 1),
        filled_OE=pad((filled_B > 0).cumsum(0), (1, 0)).repeat(len(shares_R), 1),
        log_OE=pad(torch.xlogy(filled_B, filled_B).cumsum(0), (1, 0)).repeat(len(shares_R), 1),
    )
    tried = [(lowest * share, largest * share) for share in shares_R.tolist()]
    borders = torch.stack([_borders(_levels(activations, one)).float() for one in tried])
    return tried[int(divergence(found, borders).argmin())]


def mse(stats: TapStats, activations: Activations) -> Range:
    """The range with the least squared error of rounding to its codes; one end after the other where they differ."""
    best = minmax(stats, activations)
    found = _distribution(stats)

    def error(one: Range) -> float:
        return squared_error(found, _levels(activations, one))

    if activations.symmetric:
        return _shrunk(best, error, lambda range, share: (range[0] * share, range[1] * share))
    for _ in range(ROUNDS):
        before = best
        best = _shrunk(best, error, lambda range, share: (range[0], range[1] * share))
        best = _shrunk(best, error, lambda range, share: (range[0] * share, range[1]))
        if best == before:
            break
    return best


OBSERVERS: dict[Name, Callable[[TapStats, Activations], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "kl": kl,
    "mse": mse,
}


def squared_error(of: Distribution, levels_L: Tensor) -> float:
    """The sum of (x - nearest level)^2 over the values x of a distribution; levels f64, rising.

    Exact for values that lie evenly in their bins: within a cell the square integrates to a cube.
    """
    borders_L = (levels_L[1:] + levels_L[:-1]) / 2
    # The integral up to x is start[cell] + (x - level)^3 / 3, its parts made to meet at the borders.
    ends_L = ((borders_L - levels_L[:-1]) ** 3 - (borders_L - levels_L[1:]) ** 3) / 3
    start_L = torch.nn.functional.pad(ends_L.cumsum(0), (1, 0))
    cell_E = torch.searchsorted(borders_L, of.edges_E)
    integral_E = start_L[cell_E] + (of.edges_E - levels_L[cell_E]) ** 3 / 3
    width_B = of.edges_E.diff()
    points_B = (of.edges_E[:-1] - levels_L[cell_E[:-1]]) ** 2  # of bins without width, whose values are one
    mean_B = torch.where(width_B > 0, integral_E.diff() / torch.where(width_B > 0, width_B, 1.0), points_B)
    return float((of.counts_B * mean_B).sum())


def _shrunk(range_: Range, error: Callable[[Range], float], by: Callable[[Range, float], Range]) -> Range:
    """The range shrunk by the share that has the least error, within OCTAVES; the widest of those that are alike."""

    def errors(steps: list[float]) -> dict[float, float]:
        return {step: error(by(range_, 2.0**-step)) for step in steps}

    found = errors([step / COARSE for step in range(OCTAVES * COARSE + 1)])
    coarse = min(found, key=lambda step: found[step])
    around = [coarse + step / FINE for step in range(-FINE // COARSE, FINE // COARSE + 1)]
    found |= errors([step for step in around if step > 0 and step not in found])
    least = min(found.values())
    return by(range_, 2.0 ** -min(step for step, one in found.items() if one <= ALIKE * least))


def _distribution(stats: TapStats) -> Distribution:
    assert stats.histogram is not None
    found = distribution(stats.histogram, float(stats.minimum.min()), float(stats.maximum.max()))
    held = found.counts_B.nonzero().flatten()
    first, last = int(held[0]), int(held[-1])
    return Distribution(edges_E=found.edges_E[first : last + 2], counts_B=found.counts_B[first : last + 1])


def _levels(activations: Activations, range_: Range) -> Tensor:
    return fixed_levels(replace(activations, lowest=range_[0], largest=range_[1]))


def _borders(levels_L: Tensor) -> Tensor:
    """Where the first level's cell begins and where each ends, the outermost as wide as towards their neighbours."""
    middles = (levels_L[1:] + levels_L[:-1]) / 2
    return torch.cat([2 * levels_L[:1] - middles[:1], middles, 2 * levels_L[-1:] - middles[-1:]])
