"""What stored bytes mean: types by name, ggml blocks, and whether values are numbers at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from converter.errors import NumericsError
from quantkernels import ggml

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", *ggml.TYPES})
CHUNK = 1 << 24  # elements looked at together, which bounds the memory of a check


def decoded(rows: Tensor, dtype: str) -> Tensor:
    """The values of stored rows: `rows` u8 [R, bytes a row] to [R, I] in the stored type, or f32 from ggml blocks."""
    if dtype in DTYPES:
        kind = DTYPES[dtype]
        return rows.reshape(-1).view(kind).reshape(len(rows), rows.shape[1] // kind.itemsize)
    return ggml.dequantize(rows, dtype)


def check_finite(tensor: Tensor, where: str, first_row: int = 0, shape: tuple[int, ...] | None = None) -> None:
    """Raise NumericsError when a floating tensor holds NaN or an infinity, saying how many and where the first is.

    `tensor` may be the rows from first_row on of a tensor of `shape`.
    """
    flat = tensor.reshape(-1)
    bad, first = 0, -1
    for start in range(0, flat.numel(), CHUNK):
        stored = flat[start : start + CHUNK]
        part = stored.float() if stored.element_size() == 1 else stored  # fp8 has no arithmetic of its own
        # Minimum and maximum carry NaN along and cost a tenth of isfinite on every value (10 against 195 ms per 16 M).
        if torch.stack(torch.aminmax(part)).isfinite().all():
            continue
        wrong = ~torch.isfinite(part)
        if first < 0:
            first = start + int(wrong.to(torch.uint8).argmax())
        bad += int(wrong.sum())
    if bad:
        whole = shape or tuple(tensor.shape)
        place = torch.tensor(first + first_row * (whole[-1] if whole else 1))
        index = [int(number) for number in torch.unravel_index(place, whole)]
        what = f"{bad} of {flat.numel()} values are not finite, the first at {index}"
        raise NumericsError(where, what, "The checkpoint is damaged or overflowed in training: take another revision")
