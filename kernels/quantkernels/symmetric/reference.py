"""The same in torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

STRIPE = 512  # rows that are mirrored at a time, so that no second matrix exists


def pack(matrix_II: Tensor, upper_P: Tensor) -> None:
    """Fills upper_P."""
    first = 0
    for i, row_I in enumerate(matrix_II):
        upper_P[first : first + len(row_I) - i] = row_I[i:]
        first += len(row_I) - i


def unpack(upper_P: Tensor, matrix_II: Tensor) -> None:
    """Fills matrix_II."""
    first = 0
    for i, row_I in enumerate(matrix_II):
        row_I[i:] = upper_P[first : first + len(row_I) - i]
        first += len(row_I) - i
    mirror(matrix_II)


def mirror(matrix_II: Tensor) -> None:
    """Fills what is below the diagonal, stripe by stripe."""
    for start in range(0, len(matrix_II), STRIPE):
        stop = start + STRIPE
        square = matrix_II[start:stop, start:stop]
        rows, places = torch.tril_indices(len(square), len(square), -1, device=square.device)
        square[rows, places] = square[places, rows]
        matrix_II[stop:, start:stop] = matrix_II[start:stop, stop:].T
