"""AWQ, version gemm: 4 bits, row by row of [I, O], eight outputs in an int32 word, interleaved.

    qweight  I32 [I, O / 8], nibble k of a word (bits 4 k to 4 k + 3) is output ORDER[k] of its eight
    qzeros   I32 [G, O / 8], in the same order
    scales   F16 (or another) [G, O]

Codes are unsigned. value = (code - zero point) * scale; nothing is added to zero points. Readers compute in the type of
the scales.

Source: AutoAWQ 0.2.9 (awq/modules/linear/gemm.py, awq/utils/packing_utils.py).
"""

# O out, I in, G groups, R rows, N rows of the weight (columns of what is stored)

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converter.containers.packing import unpack_bytes
from converter.errors import UnsupportedError
from converter.packed.gptq import parts_of
from converter.packed.weight import Coded, Packed, ReadBytes, evenly, mismatch

if TYPE_CHECKING:
    from converter.source import Header

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
VERSION = "gemm"


def find(
    settings: Mapping[str, Any], found: Mapping[str, Header], read: ReadBytes, where: str
) -> Iterable[tuple[str, Packed]]:
    """Every AWQ weight, by name."""
    version = str(settings.get("version") or VERSION).lower()
    for name, codes in found.items():
        if not name.endswith(".qweight"):
            continue
        if version != VERSION:
            what = f"the checkpoint's layout of AWQ is '{version}'; '{VERSION}' is read"
            raise UnsupportedError(where, what, "Export it again in that one, or take the model it was made from")
        module = name.removesuffix(".qweight")
        parts = parts_of(module, codes, found, where)
        (columns, words), (groups, outs) = codes.shape, parts["scale"].shape
        if outs != 8 * words or parts["zero"].shape[1] != words or columns % groups:
            listed = ", ".join(f"{role} {list(part.shape)}" for role, part in parts.items())
            raise mismatch(where, f"{module}.weight", f"{listed} are not of 4 bits in the layout of AWQ")
        yield (
            f"{module}.weight",
            Packed(format="awq", shape=(outs, columns), parts=parts, bits=4, block=(1, columns // groups)),
        )


def coded(packed: Packed, parts: Mapping[str, Tensor], first: int, count: int, where: str) -> Coded:
    """See Format.coded."""
    codes = outputs(parts["codes"], first, count)
    zero = outputs(parts["zero"], first, count).float()
    scale = parts["scale"][:, first : first + count].T.float()
    return Coded(codes=codes, scale=scale, zero=zero, columns=packed.block[1])


def outputs(words_RW: Tensor, first: int, count: int) -> Tensor:
    """The codes of outputs [first, first + count): uint8 [count, R]."""
    word, last = first // 8, -(-(first + count) // 8)
    packed = words_RW[:, word:last].contiguous()
    eights = unpack_bytes(packed.view(torch.uint8), 4, 8 * (last - word)).reshape(len(packed), -1, 8)
    codes = eights[:, :, [ORDER.index(output) for output in range(8)]].reshape(len(packed), -1)
    return codes[:, first - 8 * word :][:, :count].T.contiguous()


AWQ = evenly("AWQ", False, coded)
