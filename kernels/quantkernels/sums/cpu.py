"""Row by row over as many columns as have their sums in the first cache; the inner loop becomes vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import kernel

COLUMNS = 512  # 24 bytes of sums and extremes each


@kernel
def of_columns(
    rows_NI: NDArray[np.float32],
    squares_I: NDArray[np.float64],
    magnitudes_I: NDArray[np.float64],
    least_I: NDArray[np.float32],
    largest_I: NDArray[np.float32],
) -> None:
    """Adds to the sums, and moves the extremes."""
    count, columns = rows_NI.shape
    for first in range(0, columns, COLUMNS):
        last = min(first + COLUMNS, columns)
        squares, magnitudes = squares_I[first:last], magnitudes_I[first:last]
        least, largest = least_I[first:last], largest_I[first:last]
        for n in range(count):
            row = rows_NI[n, first:last]  # slices from 0 on, or LLVM takes no vectors
            for i in range(len(row)):
                value = row[i]
                wide = np.float64(value)
                squares[i] += wide * wide
                magnitudes[i] += abs(wide)
                least[i] = value if value < least[i] else least[i]
                largest[i] = value if value > largest[i] else largest[i]
