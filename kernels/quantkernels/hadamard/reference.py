"""The transform as its definition says: rows times one dense matrix, in f64."""

# N rows, D columns, P a power of two, F width of the factor

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Matrix = NDArray[np.float64]


def spread(rows_ND: Floats, factor_FF: Matrix) -> Floats:
    """rows_ND times matrix(D, factor_FF)."""
    product: Floats = (rows_ND.astype(np.float64) @ matrix(rows_ND.shape[1], factor_FF)).astype(np.float32)
    return product


def matrix(width: int, factor_FF: Matrix) -> Matrix:
    """The orthogonal matrix [D, D]: the factor, in every place of it a Sylvester matrix."""
    return np.asarray(np.kron(factor_FF, sylvester(width // len(factor_FF))), np.float64)


def sylvester(order: int) -> Matrix:
    """Sylvester's Hadamard matrix [P, P], over the root of P: (-1)^(ones that the numbers of row and column share)."""
    shared = np.arange(order)[:, None] & np.arange(order)
    signs = np.where(np.bitwise_count(shared) % 2, -1.0, 1.0)
    matrix: Matrix = signs / np.sqrt(order)
    return matrix
