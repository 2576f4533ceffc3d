"""One byte a weight, as it is, and scales beside it: fp8 of all kinds, int8 of compressed-tensors and of LLM.int8().

    weight        F8_E4M3, F8_E5M2 or I8 [..., O, I]
    weight_scale  one number, or one for each row [..., O] or [..., O, 1], each group of columns [..., O, Q], or each
                  block [..., P, Q]; also called weight_scale_inv (DeepSeek; the inverse of what was divided by, so a
                  factor too) and, in LLM.int8(), SCB: 127 times the factor. U8 and F8_E8M0 mean a power of two.
    weight_zero_point  I8 [..., O, Q], where int8 is asymmetric

value = (code - zero point) * scale, in f32. Readers compute it in the type of the scale, mostly BF16.

Sources: DeepSeek-V3 (README_WEIGHTS.md); compressed-tensors 0.20 (compressors/naive_quantized, mxfp8); transformers
5.23 (integrations/finegrained_fp8, fbgemm_fp8); bitsandbytes 0.50 (functional.int8_vectorwise_dequant).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converter.errors import UnsupportedError
from converter.packed.schemes import Scheme, block_of, scheme_of
from converter.packed.weight import Coded, Format, Packed, ReadBytes, dequantize, evenly, mismatch, scale_rows

if TYPE_CHECKING:
    from converter.source import Header

BLOCK = (128, 128)  # of fp8, where config.json does not say
FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
# What int8_vectorwise_dequant multiplies by: 1 / 127.
INT8_FACTOR = 0.007874015718698502


def find(
    settings: Mapping[str, Any], found: Mapping[str, Header], read: ReadBytes, where: str
) -> Iterable[tuple[str, Packed]]:
    """Every fp8 or int8 weight with a scale, by name."""
    for name, header in found.items():
        if header.dtype not in FP8 and header.dtype != "I8":
            continue
        scale = found.get(f"{name}_scale") or found.get(f"{name}_scale_inv")
        module = name.removesuffix(".weight")
        if scale is None and header.dtype == "I8" and name.endswith(".weight"):
            if scb := found.get(f"{module}.SCB"):
                yield name, _vectorwise(name, header, scb, found.get(f"{module}.weight_format"), where)
        elif scale is not None:
            scheme = scheme_of(settings, module, where) if settings.get("config_groups") else None
            zero = found.get(f"{name}_zero_point") if header.dtype == "I8" else None
            yield name, scaled(name, header, scale, zero, _block(settings, scheme), where)


def _block(settings: Mapping[str, Any], scheme: Scheme | None) -> tuple[int, int]:
    if scheme is not None:
        return scheme.block or (1, scheme.group_size or BLOCK[1])
    return block_of(settings.get("weight_block_size")) or BLOCK


def scaled(name: str, codes: Header, scale: Header, zero: Header | None, block: tuple[int, int], where: str) -> Packed:
    """The weight of these parts; block decides how many rows and columns share a scale where shapes do not.

    Raises SourceError when the parts do not go together.
    """
    rows, columns = fitted(name, codes.shape, scale.shape, block, where)
    parts = {"codes": codes, "scale": _table(scale, codes.shape, (rows, columns))}
    if zero is not None:
        if zero.dtype != "I8" or math.prod(zero.shape) != math.prod(scale.shape):
            raise mismatch(where, name, f"zero points {zero.dtype} {list(zero.shape)}, scales {list(scale.shape)}")
        parts["zero"] = replace(zero, shape=parts["scale"].shape)
    return Packed(
        format="int8" if codes.dtype == "I8" else "fp8", shape=codes.shape, parts=parts, block=(rows, columns)
    )


def fitted(
    name: str, weight: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int], where: str
) -> tuple[int, int]:
    """How many rows and columns share a scale, from the shapes; `block` decides where it is not each one or all.

    Raises SourceError when the shapes do not fit.
    """
    outs, columns = (weight[-2] if len(weight) > 1 else 1), weight[-1]
    if 0 in (*weight, *scale):
        raise mismatch(where, name, f"a weight of shape {list(weight)}, scales of shape {list(scale)}")
    if math.prod(scale) == 1:
        return math.prod(weight[:-1]), columns
    if len(scale) == len(weight) - 1:
        scale = (*scale, 1)
    fits, shared = len(scale) == len(weight) and scale[:-2] == weight[:-2], []
    for count, length, step in zip(scale[-2:], (outs, columns), block, strict=False):
        if count == 1 or count == length:
            shared.append(length // count)
        else:
            fits = fits and step > 0 and count == -(-length // step)
            shared.append(step)
    if not fits or len(shared) != 2:
        what = f"scales of shape {list(scale)} do not fit a weight of shape {list(weight)} in blocks of {list(block)}"
        raise mismatch(where, name, f"{what}; see weight_block_size in config.json")
    return shared[0], shared[1]


def _table(scale: Header, weight: tuple[int, ...], block: tuple[int, int]) -> Header:
    """`scale` as a table [R, Q], a row for each block of rows of each matrix."""
    columns = -(-weight[-1] // block[1])
    return replace(scale, shape=(math.prod(scale.shape) // columns, columns))


def _vectorwise(name: str, codes: Header, scale: Header, layout: Header | None, where: str) -> Packed:
    if len(codes.shape) != 2 or math.prod(scale.shape) != codes.shape[0]:
        raise mismatch(where, name, f"{list(scale.shape)} SCB for {list(codes.shape)} codes")
    parts = {"codes": codes, "scale": replace(scale, shape=(codes.shape[0], 1))}
    if layout is not None:
        parts["layout"] = replace(layout, shape=(1, 1))
    return Packed(format="llm.int8", shape=codes.shape, parts=parts, block=(1, codes.shape[1]))


def values(packed: Packed, parts: Mapping[str, Tensor], first: int, count: int, where: str) -> Tensor:
    """See Format.values; for fp8."""
    scale = _own(packed, parts["scale"], first, count)
    return dequantize(parts["codes"].float(), scale, None, packed.block[1])


def coded(packed: Packed, parts: Mapping[str, Tensor], first: int, count: int, where: str) -> Coded:
    """See Format.coded; for int8."""
    scale = _own(packed, parts["scale"], first, count)
    zero = _own(packed, parts["zero"], first, count) if "zero" in parts else None
    return Coded(codes=parts["codes"], scale=scale, zero=zero, columns=packed.block[1])


def _own(packed: Packed, table_RQ: Tensor, first: int, count: int) -> Tensor:
    """The rows of scales or zero points that these rows of the weight use, f32 [count, Q]."""
    numbers = table_RQ.view(torch.float8_e8m0fnu) if table_RQ.dtype == torch.uint8 else table_RQ
    one = len(numbers) == 1
    return numbers.float().expand(count, -1) if one else scale_rows(packed, numbers.float(), first, count)


def vectorwise_values(packed: Packed, parts: Mapping[str, Tensor], first: int, count: int, where: str) -> Tensor:
    """See Format.values. In the order of bitsandbytes: times SCB, times 1 / 127."""
    if "layout" in parts and int(parts["layout"]) != 0:
        what = f"int8 weights in layout {int(parts['layout'])}, made for one kind of GPU"
        raise UnsupportedError(where, what, "Save the model again with a present bitsandbytes, or take the original")
    scale = scale_rows(packed, parts["scale"].float(), first, count)
    return dequantize(parts["codes"].float(), scale, None, packed.block[1]).mul_(INT8_FACTOR)


FP8_SCALED = Format(title="fp8", by_row=True, values=values)
INT8 = evenly("int8", True, coded)
VECTORWISE = Format(title="LLM.int8()", by_row=True, values=vectorwise_values)
