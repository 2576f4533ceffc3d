"""GPTQ: integers of 2, 3, 4 or 8 bits, column by column of [I, O], as a stream of bits in int32 words.

    qweight  I32 [I b / 32, O], element i of a column in bits [i b, i b + b), low bits first
    qzeros   I32 [G, O b / 32], packed the same way along O
    scales   F16 (or another) [G, O]
    g_idx    I32 [I], the group of each input; missing where inputs are in order

Codes are unsigned. value = scale * (code - zero point). checkpoint_format "gptq" (or none) keeps each zero point less
one, "gptq_v2" as it is. The ones are added to whole words, with carries, as the readers do it: a zero point of 0 was
stored with a borrow from its neighbour. At 3 bits, where codes straddle words, each is added to by itself, modulo 8.
AutoRound writes the first layout, too, without g_idx.

Readers compute in the type of the scales. Bits and group size are taken from the shapes, because `dynamic` and
`extra_config` give modules bits of their own.

Source: GPTQModel 7.7 (nn_modules/qlinear, utils/model.py); AutoRound 0.16 (export/export_to_autogptq).
"""

# O out, I in, G groups, N rows of the weight (columns of what is stored)

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converter.containers.packing import unpack_bytes
from converter.errors import UnsupportedError
from converter.packed.weight import Coded, Packed, ReadBytes, evenly, mismatch
from converter.packed.words import groups_of

if TYPE_CHECKING:
    from converter.source import Header

BITS = (2, 3, 4, 8)
V2 = "gptq_v2"
LAYOUTS = ("gptq", V2)


def find(
    settings: Mapping[str, Any], found: Mapping[str, Header], read: ReadBytes, where: str
) -> Iterable[tuple[str, Packed]]:
    """Every GPTQ weight, by name."""
    layout = str(settings.get("checkpoint_format") or "gptq")
    for name, codes in found.items():
        if not name.endswith(".qweight"):
            continue
        module = name.removesuffix(".qweight")
        parts = parts_of(module, codes, found, where)
        if layout not in LAYOUTS:
            what = f"the checkpoint's layout of GPTQ is '{layout}'; {' and '.join(LAYOUTS)} are read"
            raise UnsupportedError(where, what, "Export it again in one of those, or take the model it was made from")
        bits = _bits(module, parts, settings, where)
        columns, outs, groups = 32 * codes.shape[0] // bits, codes.shape[1], parts["scale"].shape[0]
        size = _group_size(settings, columns, groups)
        if size is None and "group" not in parts:
            raise mismatch(where, f"{module}.weight", f"{groups} groups for {columns} inputs and no g_idx")
        yield (
            f"{module}.weight",
            Packed(
                format="gptq",
                shape=(outs, columns),
                parts=parts,
                bits=bits,
                block=(1, size or columns),
                offset=0 if layout == V2 else 1,
            ),
        )


def parts_of(module: str, codes: Header, found: Mapping[str, Header], where: str) -> dict[str, Header]:
    """The parts of a module by role; codes, zero points and scales have two dimensions, and one number of groups."""
    missing = [end for end in ("qzeros", "scales") if f"{module}.{end}" not in found]
    if missing:
        raise mismatch(where, f"{module}.weight", f"there is no {module}.{missing[0]}")
    parts = {"codes": codes, "zero": found[f"{module}.qzeros"], "scale": found[f"{module}.scales"]}
    wrong = [part for part in parts.values() if len(part.shape) != 2 or 0 in part.shape]
    wrong += [parts[role] for role in ("codes", "zero") if parts[role].dtype != "I32"]
    if wrong or parts["zero"].shape[0] != parts["scale"].shape[0]:
        listed = ", ".join(f"{role} {part.dtype} {list(part.shape)}" for role, part in parts.items())
        raise mismatch(where, f"{module}.weight", listed)
    return parts | ({"group": found[f"{module}.g_idx"]} if f"{module}.g_idx" in found else {})


def _bits(module: str, parts: Mapping[str, Header], settings: Mapping[str, Any], where: str) -> int:
    """The bits of a code: those that the shapes are of, and of several the stated ones."""
    (packed, outs), words = parts["codes"].shape, parts["zero"].shape[1]
    fitting = [bits for bits in BITS if -(-outs * bits // 32) == words and packed % bits == 0]
    stated = settings.get("bits")
    if not fitting or parts["scale"].shape[1] != outs:
        listed = ", ".join(f"{role} {list(part.shape)}" for role, part in parts.items())
        raise mismatch(where, f"{module}.weight", f"{listed} are of no layout of {', '.join(map(str, BITS))} bits")
    if stated in fitting:
        return int(stated)
    if stated is not None and not settings.get("dynamic") and not settings.get("extra_config"):
        raise mismatch(where, f"{module}.weight", f"the shapes are of {fitting[0]} bits, config.json says {stated}")
    return fitting[0]


def _group_size(settings: Mapping[str, Any], columns: int, groups: int) -> int | None:
    """Inputs that share a scale, where they are in order."""
    stated = settings.get("group_size")
    if type(stated) is int and stated > 0 and -(-columns // stated) == groups:
        return stated
    return columns // groups if groups and columns % groups == 0 else None


def coded(packed: Packed, parts: Mapping[str, Tensor], first: int, count: int, where: str) -> Coded:
    """See Format.coded."""
    codes = stream(parts["codes"][:, first : first + count].T, packed.bits, packed.shape[1])
    zero = zero_points(packed, parts["zero"])[first : first + count].float()
    scale = parts["scale"][:, first : first + count].T.float().contiguous()
    stored = parts.get("group")
    if stored is not None and stored.numel() != packed.shape[1]:
        raise mismatch(where, "the weight", f"g_idx has {stored.numel()} entries for {packed.shape[1]} inputs")
    group = groups_of(stored, scale.shape[1], where)
    if group is not None and torch.equal(group, torch.arange(len(group)) // packed.block[1]):
        group = None  # in order after all, which is faster
    return Coded(codes=codes, scale=scale, zero=zero, columns=packed.block[1], group_I=group)


def zero_points(packed: Packed, stored_GW: Tensor) -> Tensor:
    """All zero points, as they count: [O, G]."""
    if packed.offset and packed.bits != 3:
        stored_GW = stored_GW + sum(1 << bit for bit in range(0, 32, packed.bits))
    zero = stream(stored_GW, packed.bits, packed.shape[0]).T
    if packed.offset and packed.bits == 3:
        zero = zero + 1 & 7
    return zero.contiguous()


def stream(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """The codes [R, count] uint8 of rows of words."""
    return unpack_bytes(words_RW.contiguous().view(torch.uint8), bits, count)


GPTQ = evenly("GPTQ", False, coded)
