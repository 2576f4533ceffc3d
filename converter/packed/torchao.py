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

CODES, ANY_CODES = "._weight_qdata", "_qdata"
SCALED_INPUTS = "._weight_act_pre_scale"
# The names of its configs for int8.
WEIGHT_ONLY, DYNAMIC = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"


def find(
    settings: Mapping[str, Any], found: Mapping[str, Header], read: ReadBytes, where: str
) -> Iterable[tuple[str, Packed]]:
    """Every weight of a torchao class, by name. Raises UnsupportedError for those that are not decoded."""
    for name, codes in found.items():
        if not name.endswith(ANY_CODES):
            continue
        module = name.removesuffix(CODES)
        weight, scale = f"{module}.weight", found.get(f"{module}._weight_scale")
        zero = found.get(f"{module}._weight_zero_point")
        if reason := _unknown(name, codes, scale, zero, found):
            what = f"torchao stores {name} with {reason}; decoded are weights of int8 and fp8 with scales in floats"
            raise UnsupportedError(where, what, "Take the model it was made from")
        if scale is None or len(codes.shape) < 2:
            raise mismatch(where, weight, f"codes {list(codes.shape)}, and no scales beside them")
        yield weight, scaled(weight, codes, scale, zero, _block(codes, scale), where)


def _unknown(name: str, codes: Header, scale: Header | None, zero: Header | None, found: Mapping[str, Header]) -> str:
    """What of a weight's parts is not decoded here, in words; empty when all is."""
    if not name.endswith(CODES):
        return "codes of no weight"
    if codes.dtype not in FP8 | {"I8"}:
        return f"codes {codes.dtype}"
    if scale is not None and scale.dtype not in ("F32", "F16", "BF16"):
        return f"scales {scale.dtype}"
    if zero is not None and (zero.dtype != "I8" or codes.dtype != "I8"):
        return f"zero points {zero.dtype} of codes {codes.dtype}"
    return "factors for its inputs" if f"{name.removesuffix(CODES)}{SCALED_INPUTS}" in found else ""


def rounds_inputs(settings: Mapping[str, Any]) -> bool:
    """Whether config.json's quantization_config says that inputs are rounded to int8, token by token."""
    kinds = settings["quant_type"].values()
    return any(isinstance(kind, Mapping) and kind.get("_type") == DYNAMIC for kind in kinds)


def _block(codes: Header, scale: Header) -> tuple[int, int]:
    """How many rows and columns share a scale, from the shapes."""
    if len(scale.shape) < 2 or 0 in scale.shape:
        return 1, 1
    rows, columns = (-(-length // count) for length, count in zip(codes.shape[-2:], scale.shape[-2:], strict=True))
    return rows, columns
