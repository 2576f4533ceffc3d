"""What stored bytes mean: types by name, fp8 with its scales, ggml blocks, and whether values are numbers at all."""

# O out, I in (columns), P rows of a scale, Q columns of a scale

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from converter.errors import NumericsError, SourceError
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
FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
CHUNK = 1 << 24  # elements looked at together, which bounds the memory of a check


def decoded(rows: Tensor, dtype: str) -> Tensor:
    """The values of stored rows: `rows` u8 [R, bytes a row] to [R, I] in the stored type, or f32 from ggml blocks."""
    if dtype in DTYPES:
        kind = DTYPES[dtype]
        return rows.reshape(-1).view(kind).reshape(len(rows), rows.shape[1] // kind.itemsize)
    return ggml.dequantize(rows, dtype)


def multiply_scale(weight: Tensor, scale: Tensor, block: Iterable[int] | None, where: str) -> Tensor:
    """The values of an fp8 weight: weight times scale, in f32.

    weight [..., O, I] fp8; scale is one number, [..., O], [..., O, 1] or [..., P, Q] with one number per block of
    `block` = (rows, columns) elements, by default 128 x 128. Raises SourceError when the shapes do not fit.
    Both endings mean a factor: DeepSeek's `weight_scale_inv` is the inverse of the scale that was divided by.
    """
    factor = scale.float()
    if factor.numel() == 1:
        return weight.float() * factor.reshape(())
    if factor.ndim == weight.ndim - 1:
        factor = factor.unsqueeze(-1)
    fits = factor.ndim == weight.ndim and factor.shape[:-2] == weight.shape[:-2]
    for dimension, step in zip((-2, -1), block or (128, 128), strict=True):
        length = weight.shape[dimension]
        if not fits or factor.shape[dimension] in (1, length):
            continue
        fits = factor.shape[dimension] == -(-length // step)
        if fits:
            factor = factor.repeat_interleave(step, dimension).narrow(dimension, 0, length)
    if not fits:
        what = f"a scale of shape {list(scale.shape)} does not fit a weight of shape {list(weight.shape)}"
        raise SourceError(where, what, "Check weight_block_size in config.json")
    return weight.float().mul_(factor)


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
