"""What is refused, on the CPU and on a GPU alike: values that are not finite, and scales that a block cannot hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantkernels.ggml.layout import BlockType

BEYOND_HALF = 1e11


def check_scales(blocks: NDArray[np.uint8] | torch.Tensor, known: BlockType, first_row: int) -> None:
    """Raise ValueError where a scale is infinite or NaN: the file would hold weights that are not finite.

    blocks [R, bytes] u8 of `known`; first_row is the number of the first of them, for the message.
    """
    size = known.size_bytes
    fields: list[tuple[Any, int, int, str]] = [
        (blocks[:, offset + 1 :: size], 0x7C, 0x7C, "float16") for offset in known.half_fields
    ]
    fields += [(blocks[:, at::size], 0xFF, known.byte_nan, "its one byte") for at in known.byte_fields]
    if known.half_nibbles:
        third, fourth = (blocks[:, offset::size] for offset in known.half_nibbles[2:])
        fields.append(((third >> 4) | (fourth & 0xF0), 0x7C, 0x7C, "float16"))
    for field, mask, value, form in fields:
        wrong = (field & mask) == value
        if wrong.any():
            row, block = divmod(_first(wrong), wrong.shape[1])
            start = block * known.weights
            raise ValueError(
                f"the scale of row {first_row + row} columns {start} to {start + known.weights - 1} "
                f"is beyond {form}, so {known.name} cannot hold it"
            )


def magnitude_limit(known: BlockType) -> float:
    """What no weight of this type may reach; infinite where only its kind of float is the limit.

    The searches square weights and sum over a block: from about 1e18 on they overflow, and ggml then stores zeros and
    says nothing. A block with a float16 scale holds 3e8 at most, so the limit refuses nothing that could be stored.
    """
    return BEYOND_HALF if known.weights > 1 and (known.half_fields or known.half_nibbles) else math.inf


def check_values(rows: NDArray[np.float32] | torch.Tensor, known: BlockType, first_row: int) -> None:
    """Raise ValueError where a value of `rows` [R, C] is infinite, NaN, or too large for `known`."""
    sizes: Any = abs(rows)
    for limit in (math.inf, magnitude_limit(known)):
        wrong = ~(sizes < limit)
        if not wrong.any():
            continue
        row, column = divmod(_first(wrong), rows.shape[1])
        held = rows[row, column].item()
        if limit == math.inf:
            raise ValueError(f"rows must be finite; row {first_row + row} column {column} holds {held}")
        start = column // known.weights * known.weights
        raise ValueError(
            f"the scale of row {first_row + row} columns {start} to {start + known.weights - 1} "
            f"is beyond float16, so {known.name} cannot hold it"
        )


def _first(wrong: NDArray[np.bool_] | torch.Tensor) -> int:
    return int(np.argmax(wrong.cpu().numpy() if isinstance(wrong, torch.Tensor) else wrong))
