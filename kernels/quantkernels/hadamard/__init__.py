"""Rows times an orthogonal matrix whose entries are all about as large, in D log D steps: M = (H (x) F) / root of D.

H is Sylvester's Hadamard matrix of 2^k rows, F a small factor for what is left of the width (see factors.py). Whatever
a row holds comes out spread over all of its columns: an outlier becomes a little in every one. The alternative, a
product with a dense matrix, takes D^2 steps a row and the matrix: 64 MB at a width of 4096.

# N rows, D columns, P = 2^k, F = D / P the factor's width; column f P + p belongs to row f of the factor.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from quantkernels.hadamard import reference
from quantkernels.hadamard.factors import factor
from quantkernels.rows import over_rows

Backend = Literal["cpu", "reference"]


def spread(rows: Tensor, *, inverse: bool = False, threads: int = 1, backend: Backend = "cpu") -> Tensor:
    """`rows` [N, D] f32 times M, or times its transpose, which undoes that; f32, in memory of its own.

    Sums are made in the same order on every machine and with any number of threads.
    """
    if rows.ndim != 2 or rows.dtype != torch.float32:
        raise ValueError(f"rows are [N, D] of f32, not {list(rows.shape)} of {rows.dtype}")
    width = rows.shape[1]
    small = factor(width)
    small = np.ascontiguousarray(small.T if inverse else small)
    given = np.ascontiguousarray(rows.detach().numpy())
    if backend == "reference":
        return torch.from_numpy(reference.spread(given, small))
    from quantkernels.hadamard import cpu  # here: numba is half a second and 110 MB, and plans do without

    out = np.empty_like(given)
    scaled = (small / math.sqrt(width // len(small))).astype(np.float32)
    over_rows(len(given), threads, lambda first, last: cpu.spread(given[first:last], scaled, out[first:last]))
    return torch.from_numpy(out)
