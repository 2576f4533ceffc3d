"""What calibration sums of each column of some rows, in one pass over them where four operations would make ten.

# N rows, I columns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quantkernels.sums import reference

Backend = Literal["cpu", "reference"]


def of_columns(rows: Tensor, *, backend: Backend = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sums of squares and of magnitudes [I] f64, the least and the largest value [I] f32 of rows [N, I] f32.

    Sums are made in f64, on the CPU in the order of the rows. A column with a value that is not finite has a sum of
    squares that is not, and no other. Without rows the extremes are inf and -inf. Rows on a GPU take the reference.
    """
    if rows.ndim != 2 or rows.dtype != torch.float32:
        raise ValueError(f"rows are [N, I] of f32, not {list(rows.shape)} of {rows.dtype}")
    columns = rows.shape[1]
    squares_I, magnitudes_I = (torch.zeros(columns, dtype=torch.float64, device=rows.device) for _ in range(2))
    least_I, largest_I = (torch.full((columns,), end, device=rows.device) for end in (torch.inf, -torch.inf))
    found = squares_I, magnitudes_I, least_I, largest_I
    if backend == "reference" or rows.device.type != "cpu":
        reference.of_columns(rows, *found)
        return found
    from quantkernels.sums import cpu  # here: numba is half a second and 110 MB, and plans do without

    cpu.of_columns(rows.contiguous().numpy(), *(one.numpy() for one in found))
    return found
