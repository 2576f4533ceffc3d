"""compressed-tensors' pack-quantized: integers of 1 to 8 bits as a stream of bits in int32 words.

    weight_packed      I32 [O, ceil(I b / 32)], element i in bits [i b, i b + b) of its row, low bits first
    weight_scale       [O, G], [O, 1] or [1], in the model's type
    weight_shape       I64 [2]: O and I
    weight_zero_point  I32 [ceil(O b / 32), G], packed along O; or I8 [O, G]; only where codes are asymmetric
    weight_g_idx       I32 [I], the group of each column, where columns were taken in another order (older files)

Codes and zero points are signed and stored plus 2^(b - 1). value = (code - zero point) * scale. Files from before 2026
hold floor(32 / b) whole elements in a word, which for 3, 5, 6 and 7 bits takes more words and is told by that.

Source: compressed-tensors 0.20 (compressors/pack_quantized) and 0.12 for the older words.
"""

# O out, I in (columns), G groups, W words

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converter.containers.packing import unpack_words
from converter.packed.schemes import scheme_of
from converter.packed.weight import Coded, Packed, ReadBytes, evenly, mismatch

if TYPE_CHECKING:
    from converter.source import Header

UNUSED = -1  # in g_idx: no order was taken note of


def find(
    settings: Mapping[str, Any], found: Mapping[str, Header], read: ReadBytes, where: str
) -> Iterable[tuple[str, Packed]]:
    """Every weight in words, by name. Looks at weight_shape, where scales do not count the columns."""
    for name, codes in found.items():
        if not name.endswith(".weight_packed") or codes.dtype != "I32":
            continue
        module = name.removesuffix(".weight_packed")
        weight = f"{module}.weight"
        scheme = scheme_of(settings, module, where)
        scale = found.get(f"{module}.weight_scale")
        if scale is None or len(codes.shape) != 2:
            raise mismatch(where, weight, "there is no weight_scale" if scale is None else f"codes {list(codes.shape)}")
        rows, groups = codes.shape[0], scale.shape[-1] if len(scale.shape) > 1 else 1
        if scheme.group_size:
            columns = groups * scheme.group_size
        else:
            columns = _columns(weight, found.get(f"{module}.weight_shape"), read, where)
        words = {-(-columns * scheme.bits // 32), -(-columns // (32 // scheme.bits))}
        if codes.shape[1] not in words or math.prod(scale.shape) not in (1, rows * groups):
            what = f"{list(codes.shape)} words of {scheme.bits} bits, scales {list(scale.shape)}, {columns} columns"
            raise mismatch(where, weight, what)
        one = math.prod(scale.shape) == 1
        parts = {"codes": codes, "scale": replace(scale, shape=(1 if one else rows, groups))}
        roles = {"zero": "weight_zero_point", "group": "weight_g_idx", "shape": "weight_shape"}
        parts |= {role: found[f"{module}.{end}"] for role, end in roles.items() if f"{module}.{end}" in found}
        if scheme.symmetric:
            parts.pop("zero", None)  # some files hold zeros that no reader looks at
        elif "zero" not in parts:
            raise mismatch(where, weight, "codes are asymmetric and there is no weight_zero_point")
        yield (
            weight,
            Packed(
                format="pack-quantized",
                shape=(rows, columns),
                parts=parts,
                bits=scheme.bits,
                block=(1, scheme.group_size or columns),
            ),
        )


def _columns(weight: str, shape: Header | None, read: ReadBytes, where: str) -> int:
    if shape is None or shape.dtype != "I64" or shape.shape != (2,):
        raise mismatch(where, weight, "there is no weight_shape of two numbers")
    return int.from_bytes(read([shape])[0][8:16], "little", signed=True)


def coded(packed: Packed, parts: Mapping[str, Tensor], first: int, count: int, where: str) -> Coded:
    """See Format.coded."""
    if "shape" in parts and tuple(parts["shape"].flatten().tolist()) != packed.shape:
        what = f"weight_shape is {parts['shape'].flatten().tolist()} and the rest makes it {list(packed.shape)}"
        raise mismatch(where, "the weight", what)
    codes = unpack(parts["codes"], packed.bits, packed.shape[1])
    scale, zero = parts["scale"].float(), None
    if "zero" in parts:
        zero = zero_points(packed, parts["zero"], where)[first : first + count].float()
    scale = scale.expand(count, -1) if len(scale) == 1 else scale[first : first + count]
    group = groups_of(parts.get("group"), scale.shape[1], where)
    return Coded(codes=codes, scale=scale, zero=zero, columns=packed.block[1], group_I=group)


def zero_points(packed: Packed, stored: Tensor, where: str) -> Tensor:
    """All zero points, signed: int8 [O, G]."""
    rows = packed.shape[0]
    if stored.dtype == torch.int8:
        return stored.reshape(rows, -1)
    words = {-(-rows * packed.bits // 32), -(-rows // (32 // packed.bits))}
    if stored.dtype != torch.int32 or stored.ndim != 2 or len(stored) not in words:
        raise mismatch(where, "the weight", f"zero points {list(stored.shape)} for {rows} rows")
    return unpack(stored.T.contiguous(), packed.bits, rows).T


def unpack(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """Signed codes [R, count] int8, of either layout."""
    if words_RW.shape[1] == -(-count * bits // 32):
        return unpack_words(words_RW, bits, count)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = words_RW[:, :, None].bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1).sub_(1 << (bits - 1))
    return codes.to(torch.int8).reshape(len(words_RW), -1)[:, :count]


def groups_of(stored: Tensor | None, groups: int, where: str) -> Tensor | None:
    """The group of each column, int64 [I], or None where columns are in order; SourceError when one is not there."""
    if stored is None or bool((stored == UNUSED).all()):
        return None
    if int(stored.min()) < 0 or int(stored.max()) >= groups:
        what = f"g_idx goes from {int(stored.min())} to {int(stored.max())}, and there are {groups} groups"
        raise mismatch(where, "the weight", what)
    return stored.long().reshape(-1)


WORDS = evenly("pack-quantized", True, coded)
