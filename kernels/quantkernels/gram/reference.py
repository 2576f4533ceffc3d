"""The truth: products and sums in f64, rounded to f32 where they are added."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def add(gram_II: NDArray[np.float32], rows_NI: NDArray[np.float64], first: int, last: int) -> None:
    """Adds to rows first to last of gram_II, on and right of the diagonal."""
    gram_II[first:last] += np.triu(rows_NI[:, first:last].T @ rows_NI, first).astype(np.float32)
