"""torchao's weights of one byte: int8, asymmetric or not, and fp8, with a scale for each row, group, block or all.

    X._weight_qdata       I8 or F8_E4M3 [O, I]
    X._weight_scale       F32, F16 or BF16 [O, Q], or one number
    X._weight_zero_point  I8 [O, Q], in some int8 files

Q scales of a row are for as many columns each. Other classes are refused, such as int4 in the layouts of kernels, and
MX, whose scales may lie in such an order, too; so are inputs with factors of their own (_weight_act_pre_scale), which
the weights alone do not say.
Source: torchao 0.18 (prototype/safetensors; quantize_/workflows).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from converter.errors import UnsupportedError
from converter.packed.scaled import FP8, scaled
from converter.packed.weight import Packed, ReadBytes, mismatch

if TYPE_CHECKING:
    from converter.source import Header

CODES = "._weight_qdata"
SCALED_INPUTS = "._weight_act_pre_scale"
# The names of its configs for int8.
WEIGHT_ONLY, DYNAMIC = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"


def find(
    settings: Mapping[str, Any], found: Mapping[str, Header], read: ReadBytes, where: str
) -> Iterable[tuple[str, Packed]]:
    """Every weight of a torchao class, by name. Raises UnsupportedError for those that are not decoded."""
    for name, codes in found.items():
        if not name.endswith(CODES):
            continue
        module = name.removesuffix(CODES)
        weight, scale = f"{module}.weight", found.get(f"{module}._weight_scale")
        if scale is None or len(codes.shape) < 2:
            raise mismatch(where, weight, f"codes {list(codes.shape)}, and no scales beside them")
        known = codes.dtype in FP8 | {"I8"} and scale.dtype in ("F32", "F16", "BF16")
        if not known or f"{module}{SCALED_INPUTS}" in found:
            kind = "codes with factors for its inputs" if known else f"{codes.dtype} with scales {scale.dtype}"
            what = f"{weight} is stored by torchao as {kind}; decoded are int8 and fp8 with scales in floating point"
            raise UnsupportedError(where, what, "Take the model it was made from")
        zero = found.get(f"{module}._weight_zero_point") if codes.dtype == "I8" else None
        yield weight, scaled(weight, codes, scale, zero, _block(codes, scale), where)


def _block(codes: Header, scale: Header) -> tuple[int, int]:
    """How many rows and columns share a scale, from the shapes."""
    if len(scale.shape) < 2 or 0 in scale.shape:
        return 1, 1
    rows, columns = (-(-length // count) for length, count in zip(codes.shape[-2:], scale.shape[-2:], strict=True))
    return rows, columns
