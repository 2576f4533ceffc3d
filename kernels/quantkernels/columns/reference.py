"""The truth for the column loop: the paper's algorithm without blocks.

# O out, I in, G groups of a row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def solve(
    left_OI: Floats,
    factor_II: Floats,
    scale_OG: Floats,
    zero_OG: Floats,
    group_I: NDArray[np.int64],
    low: int,
    high: int,
    codes_OI: NDArray[np.int8],
    error_O: NDArray[np.float64],
) -> None:
    """Fills codes_OI and error_O; left_OI, the weights still to be rounded, is corrected in place."""
    for i in range(left_OI.shape[1]):
        scale_O, zero_O = scale_OG[:, group_I[i]], zero_OG[:, group_I[i]]
        divisor_O = np.where(scale_O == 0, np.float32(np.inf), scale_O)
        steps_O = np.rint(np.clip(left_OI[:, i] / divisor_O, low - zero_O, high - zero_O))
        codes_OI[:, i] = (steps_O + zero_O).astype(np.int8)
        push_O = (left_OI[:, i] - steps_O * scale_O) / factor_II[i, i]
        left_OI[:, i + 1 :] -= np.outer(push_O, factor_II[i, i + 1 :])
        error_O += push_O.astype(np.float64) ** 2
