"""The truth for choosing codes column by column: the papers' algorithms without blocks.

# O out, I in, G groups of a row, L levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.int8]
# A code moves only where its distance to the best value falls by more than this share: far above what f32 leaves
# uncertain in a distance, so that exact ties, and a diagonal Hessian, leave every code as it was.
WORTH = np.float32(1 - 1e-4)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A frame as arrays: see Frame. group_I is the group of each column in the order of solving.

    levels_OGL: [1, 1, L] where all share a table, [1, 1, 0] where codes are integers.
    """

    scale_OG: Floats
    zero_OG: Floats
    offset_OG: Floats
    group_I: NDArray[np.int64]
    low: int
    high: int
    levels_OGL: Floats


def solve(weight_OI: Floats, shares_II: Floats, grid: Grid, codes_OI: Codes) -> None:
    """Fills codes_OI."""
    left_OI = weight_OI.copy()  # the best values, given what the columns before are off by
    for i in range(weight_OI.shape[1]):
        codes_OI[:, i], value_O = nearest(left_OI[:, i], grid, i)
        left_OI[:, i + 1 :] += np.outer(weight_OI[:, i] - value_O, shares_II[i, i + 1 :])


def refine(
    first: int, slope_OC: Floats, off_OI: Floats, value_OI: Floats, hessian_II: Floats, grid: Grid, codes_OI: Codes
) -> None:
    """Moves the codes of as many columns as slope_OC has, from `first` on, once.

    off_OI = value - weight, value_OI, what the codes mean, and codes_OI change in place. slope_OC is the columns' part
    of off hessian, kept up to date.
    """
    inside = slice(first, first + slope_OC.shape[1])
    for i in range(inside.start, inside.stop):
        best_O = value_OI[:, i] - slope_OC[:, i - first] / hessian_II[i, i]
        code_O, value_O = nearest(best_O, grid, i)
        moves_O = np.abs(value_O - best_O) < np.abs(value_OI[:, i] - best_O) * WORTH
        change_O = np.where(moves_O, value_O - value_OI[:, i], np.float32(0))
        codes_OI[:, i] = np.where(moves_O, code_O, codes_OI[:, i])
        value_OI[:, i] = np.where(moves_O, value_O, value_OI[:, i])
        off_OI[:, i] += change_O
        slope_OC += np.outer(change_O, hessian_II[i, inside])


def nearest(wanted_O: Floats, grid: Grid, i: int) -> tuple[Codes, Floats]:
    """The codes of column i whose values are nearest to wanted_O, and those values."""
    group = grid.group_I[i]
    scale_O, zero_O, offset_O = grid.scale_OG[:, group], grid.zero_OG[:, group], grid.offset_OG[:, group]
    steps_O = (wanted_O - offset_O) / np.where(scale_O == 0, np.float32(np.inf), scale_O)
    if grid.levels_OGL.shape[2]:
        own_OL = grid.levels_OGL[:, group if grid.levels_OGL.shape[1] > 1 else 0]
        middles_OL = (own_OL[:, 1:] + own_OL[:, :-1]) / 2
        last_O = (steps_O[:, None] + zero_O[:, None] > middles_OL).sum(1)
        own_OL = np.broadcast_to(own_OL, (len(last_O), own_OL.shape[1]))
        level_O1 = np.take_along_axis(own_OL, last_O[:, None], 1)
        code_O = (level_O1 > middles_OL).sum(1)  # the first of equal levels
        levels_O: Floats = level_O1[:, 0] - zero_O
        return code_O.astype(np.int8), levels_O * scale_O + offset_O
    whole_O: Floats = np.rint(np.clip(steps_O, grid.low - zero_O, grid.high - zero_O))
    return (whole_O + zero_O).astype(np.int8), whole_O * scale_O + offset_O
