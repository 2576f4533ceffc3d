"""What grids that fit scales have in common: weights looked at, scales as they are stored, rows a chunk at a time."""

# O out, I in, G groups of a row

from __future__ import annotations

import torch
from torch import Tensor

from converter.errors import NumericsError

CHUNK_WEIGHTS = 1 << 22  # rows are handled this many weights at a time, so that temporaries stay below some 100 MB


def check_weights(weight: Tensor) -> None:
    """Raise NumericsError when a weight is not finite."""
    # Minimum and maximum carry along what is not finite.
    if weight.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(weight))).all()):
        what = f"{int((~torch.isfinite(weight)).sum())} of its {weight.numel()} values are not finite"
        raise NumericsError("a tensor", what, "Mend the checkpoint, or exclude the tensor")


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale in the dtype it is stored in, never infinite and 0 only where it was 0 in f32."""
    limits = torch.finfo(dtype)
    smallest = torch.full_like(scale, limits.tiny * limits.eps).copysign(scale).to(dtype)
    cast = scale.clamp(limits.min, limits.max).to(dtype)
    return torch.where((cast == 0) & (scale != 0), smallest, cast)


def row_chunks(values_OI: Tensor) -> list[slice]:
    """Runs of rows of about CHUNK_WEIGHTS values each."""
    rows = max(1, CHUNK_WEIGHTS // max(1, values_OI.shape[1]))
    return [slice(first, first + rows) for first in range(0, len(values_OI), rows)]
