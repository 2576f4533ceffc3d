"""Loops over rows, which become copies; what is turned goes tile by tile, so that its lines stay in the first cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel

TILE = 32  # rows and columns: two tiles are 8 kB

Floats = NDArray[np.float32]


@kernel
def pack(matrix_II: Floats, upper_P: Floats) -> None:
    """Fills upper_P."""
    first = 0
    for i in range(len(matrix_II)):
        row, line = matrix_II[i, i:], upper_P[first:]
        for k in range(len(row)):
            line[k] = row[k]
        first += len(row)


@compiled
def _mirror(matrix_II: Floats) -> None:
    columns = len(matrix_II)
    for top in range(0, columns, TILE):
        for left in range(0, top + 1, TILE):
            for i in range(top, min(top + TILE, columns)):
                for j in range(left, min(left + TILE, i)):
                    matrix_II[i, j] = matrix_II[j, i]


@kernel
def mirror(matrix_II: Floats) -> None:
    """Fills what is below the diagonal."""
    _mirror(matrix_II)


@kernel
def unpack(upper_P: Floats, matrix_II: Floats) -> None:
    """Fills matrix_II."""
    first = 0
    for i in range(len(matrix_II)):
        row, line = matrix_II[i, i:], upper_P[first:]
        for k in range(len(row)):
            row[k] = line[k]
        first += len(row)
    _mirror(matrix_II)
