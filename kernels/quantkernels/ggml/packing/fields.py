"""Fields of blocks that several families share: float16 values, and small integers side by side in bytes.

Shapes: B blocks, P parts of a byte, N weights in a block. Source: the block structs of ggml (ggml-common.h).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.integer[Any]]  # bytes still: numpy keeps u8 through shifts by small ints, its stubs do not know


def as_half(values: Floats) -> Floats:
    """The float32 values that survive storing as float16."""
    return values.astype(np.float16).astype(np.float32)


def half_bytes(values: Floats) -> Bytes:
    """Values [B] as float16 fields [B, 2]."""
    return values.astype("<f2")[:, None].view(np.uint8)


def half_at(blocks: Bytes, offset: int) -> Floats:
    """The float16 field at `offset` of each block, [B, 1] f32."""
    field: NDArray[np.float16] = np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")
    return field.astype(np.float32)


def join(parts: Integers, width: int) -> Bytes:
    """Fold `parts` [B, P, N], each below 2**width, into bytes: part p takes bits p * width and up."""
    shifts = (np.arange(parts.shape[1], dtype=np.uint8) * width).astype(np.uint8)
    joined: Bytes = np.bitwise_or.reduce(parts << shifts[:, None], axis=1)
    return joined


def split(joined: Bytes, width: int, count: int) -> Bytes:
    """The inverse of `join`: [B, count, N]."""
    shifts = (np.arange(count, dtype=np.uint8) * width).astype(np.uint8)
    parts: Bytes = (joined[:, None, :] >> shifts[:, None]) & np.uint8((1 << width) - 1)
    return parts
