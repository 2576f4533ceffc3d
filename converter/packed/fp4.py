"""Four-bit floats (E2M1): MXFP4 with a power of two for 32 of them, NVFP4 with an fp8 scale for 16 and one for all.

The first of two weights is the low nibble; a code is a sign and an index into 0, .5, 1, 1.5, 2, 3, 4, 6.

    gpt-oss              X_blocks U8 [..., O, G, 16], X_scales U8 [..., O, G]: 2^(x - 127); X is [..., O, 32 G]
    compressed-tensors   weight_packed U8 [O, I / 2], weight_scale U8 [O, I / 32]              mxfp4-pack-quantized
                         weight_packed, weight_scale F8_E4M3 [O, I / 16], weight_global_scale F32 [1], which scales
                         are divided by                                                         nvfp4-pack-quantized
    ModelOpt             weight U8 [O, I / 2], weight_scale F8_E4M3 [O, I / 16], weight_scale_2 F32, which scales are
                         multiplied by

value = level * scale of the group. For NVFP4 that scale is rounded to f32 once, as the readers do.

Sources: OCP Microscaling Formats (MX) Specification 1.0; transformers 5.23 (integrations/mxfp4.py); compressed-tensors
0.20 (compressors/nvfp4, mxfp4); TensorRT Model Optimizer (export/quant_utils.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converter.packed.weight import Format, Packed, ReadBytes, dequantize, mismatch

if TYPE_CHECKING:
    from converter.source import Header

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MX, NV = 32, 16  # weights that share a scale


@cache
def pair_table() -> Tensor:
    """The two weights of every byte, f32 [256, 2]."""
    return torch.tensor([(LEVELS[byte & 15], LEVELS[byte >> 4]) for byte in range(256)])


def find(
    settings: Mapping[str, Any], found: Mapping[str, Header], read: ReadBytes, where: str
) -> Iterable[tuple[str, Packed]]:
    """Every weight of four-bit floats, by name."""
    for name, codes in found.items():
        if codes.dtype != "U8" or len(codes.shape) < 2:
            continue
        if name.endswith("_blocks") and len(codes.shape) > 2:
            weight = name.removesuffix("_blocks")
            if settings or f"{weight}_scales" in found:
                yield weight, _mx(weight, codes, found.get(f"{weight}_scales"), where)
        elif name.endswith(".weight_packed"):
            weight = f"{name.removesuffix('.weight_packed')}.weight"
            whole = found.get(f"{weight}_global_scale")
            if whole is None:
                yield weight, _mx(weight, codes, found.get(f"{weight}_scale"), where)
            else:
                yield weight, _nv(weight, codes, found.get(f"{weight}_scale"), whole, "divisor", where)
        elif name.endswith(".weight") and f"{name}_scale_2" in found:
            yield name, _nv(name, codes, found.get(f"{name}_scale"), found[f"{name}_scale_2"], "factor", where)


def _mx(weight: str, codes: Header, scale: Header | None, where: str) -> Packed:
    if scale is None or scale.dtype not in ("U8", "F8_E8M0") or not scale.shape:
        raise mismatch(where, weight, "there is no scale of one byte beside its codes")
    groups = scale.shape[-1]
    leading = codes.shape[:-2] if codes.shape[-2:] == (groups, MX // 2) else codes.shape[:-1]
    if scale.shape[:-1] != leading or 2 * math.prod(codes.shape) != MX * math.prod(scale.shape):
        raise mismatch(where, weight, f"codes {list(codes.shape)}, scales {list(scale.shape)}")
    codes = replace(codes, shape=(*leading, groups * MX // 2))
    return Packed(
        format="mxfp4", shape=(*leading, groups * MX), parts={"codes": codes, "scale": scale}, bits=4, block=(1, MX)
    )


def _nv(weight: str, codes: Header, scale: Header | None, whole: Header, role: str, where: str) -> Packed:
    if scale is None or scale.dtype != "F8_E4M3" or not scale.shape:
        raise mismatch(where, weight, "there is no fp8 scale beside its codes")
    rows, columns = math.prod(codes.shape[:-1]), 2 * codes.shape[-1]
    fits = scale.shape[:-1] == codes.shape[:-1] and scale.shape[-1] * NV == columns
    if not fits or math.prod(whole.shape) not in (1, rows):
        what = f"codes {list(codes.shape)}, scales {list(scale.shape)}, scale of all {list(whole.shape)}"
        raise mismatch(where, weight, what)
    parts = {"codes": codes, "scale": scale, role: replace(whole, shape=(math.prod(whole.shape), 1))}
    return Packed(format="nvfp4", shape=(*codes.shape[:-1], columns), parts=parts, bits=4, block=(1, NV))


def values(packed: Packed, parts: Mapping[str, Tensor], first: int, count: int, where: str) -> Tensor:
    """See Format.values."""
    scale = parts["scale"][first : first + count]
    factor = scale.view(torch.float8_e8m0fnu).float() if scale.dtype == torch.uint8 else scale.float()
    for role, change in (("divisor", torch.div), ("factor", torch.mul)):
        if role in parts:
            whole = parts[role].float()
            factor = change(factor, whole if len(whole) == 1 else whole[first : first + count])
    return dequantize(pairs_of(parts["codes"], pair_table()), factor, None, packed.block[1])


def pairs_of(bytes_NB: Tensor, pairs: Tensor) -> Tensor:
    """The two values of each byte, by a table [256, 2]: f32 [N, 2 B]."""
    return pairs.index_select(0, bytes_NB.reshape(-1).int()).reshape(len(bytes_NB), -1)


MXFP4 = Format(title="MXFP4", by_row=True, values=values)
NVFP4 = Format(title="NVFP4", by_row=True, values=values)
