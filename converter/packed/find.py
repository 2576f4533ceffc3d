"""Which weights of a checkpoint are stored in parts, from headers, config.json, and what few bytes shapes stand in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from converter.errors import SourceError, UnsupportedError
from converter.packed import awq, bitsandbytes, fp4, gptq, scaled, torchao, words
from converter.packed.weight import Packed, ReadBytes

if TYPE_CHECKING:
    from converter.source import Header

Find = Callable[[Mapping[str, Any], Mapping[str, "Header"], ReadBytes, str], Iterable[tuple[str, Packed]]]

# By quant_method in config.json; None: it says nothing, and the names of tensors speak.
FINDERS: Mapping[str | None, tuple[Find, ...]] = {
    None: (scaled.find, fp4.find),
    "fp8": (scaled.find,),
    "fbgemm_fp8": (scaled.find,),
    "compressed-tensors": (scaled.find, words.find, fp4.find),
    "modelopt": (scaled.find, fp4.find),
    "gptq": (gptq.find,),
    "awq": (awq.find,),
    "auto-round": (gptq.find,),
    "auto-round awq": (awq.find,),
    "bitsandbytes": (bitsandbytes.find, scaled.find),
    "mxfp4": (fp4.find,),
    "torchao": (torchao.find,),
}
# Formats inside a method that are read, in the words of config.json.
MODELOPT: tuple[str, ...] = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
COMPRESSED: tuple[str, ...] = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mixed-precision",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
)
# What stands beside weights for whoever runs the model quantized: scales of inputs, outputs and caches.
BESIDE = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "activation_scale",
    "weight_shape",
    "weight_format",
    "weight_zero_point",  # of symmetric codes, for which no reader looks at it
    "weight_g_idx",
    "_weight_act_quant_scale",
    "_weight_act_quant_zero_point",
)
ANYWHERE = (".k_scale", ".v_scale", ".q_scale", ".output_scale", ".output_zero_point")
# What only a part of a weight is called.
PARTS = (
    *(".qweight", ".qzeros", ".weight_packed", ".weight_zero_point", ".weight_g_idx", ".weight.absmax", ".SCB"),
    *("._weight_qdata", "._weight_scale", "._weight_zero_point"),
)
TYPES = {"float16": "F16", "half": "F16", "float32": "F32", "float": "F32", "bfloat16": "BF16"}


def find_packed(
    config: Mapping[str, Any], found: Mapping[str, Header], read: ReadBytes, where: str
) -> tuple[dict[str, Packed], frozenset[str]]:
    """Weights in parts by name, and the names of all tensors that are no weights of their own then.

    found: every tensor of the checkpoint. Raises SourceError for parts without the others, and UnsupportedError.
    """
    settings = config.get("quantization_config") or {}
    packed: dict[str, Packed] = {}
    for find in FINDERS[method_of(config)]:
        packed |= find(settings, found, read, where)
    hidden = {part.name for weight in packed.values() for part in weight.parts.values()}
    for name in packed:
        module = name.removesuffix("weight")
        hidden |= {module + end for end in BESIDE}
    if settings:
        hidden |= {name for name in found if name.endswith(ANYWHERE)}
        _refuse_orphans(found, hidden, where)
    if clash := sorted(packed.keys() & found.keys() - hidden):
        what = f"{clash[0]} is there as it is and in parts"
        raise SourceError(where, what, "Remove the file that does not belong")
    return packed, frozenset(hidden)


def _refuse_orphans(found: Mapping[str, Header], hidden: set[str], where: str) -> None:
    """Raise SourceError for parts that belong to no weight: what they are of would be missing or wrong."""
    for name, header in found.items():
        if name in hidden:
            continue
        integers = name.endswith(".weight") and header.dtype in ("I8", "U8", "I32")
        if integers or name.endswith(PARTS):
            what = f"{name} ({header.dtype} {list(header.shape)}) is part of a quantized weight and the rest is missing"
            raise SourceError(where, what, "Fetch the model again; config.json may be of another export, too")


def method_of(config: Mapping[str, Any]) -> str | None:
    """The key of FINDERS for what config.json says."""
    settings = config.get("quantization_config") or {}
    method = settings.get("quant_method")
    if method == "auto-round" and "awq" in str(settings.get("packing_format")):
        return "auto-round awq"
    return None if method is None else str(method)


def check_quantization(config: Mapping[str, Any], where: str) -> None:
    """Raise UnsupportedError for a checkpoint whose quantization is not decoded here, saying which it is."""
    settings = config.get("quantization_config")
    if not settings:
        return
    remedy = "Take the model it was made from"
    if not isinstance(settings, dict):
        raise UnsupportedError(where, "quantization_config is not an object", remedy)
    method = method_of(config)
    if method not in FINDERS or method is None:
        names = ", ".join(sorted({str(name).partition(" ")[0] for name in FINDERS if name}))
        what = f"the checkpoint is already quantized by '{method or 'unknown'}'; decoded are {names}"
        raise UnsupportedError(where, what, remedy)
    stated, known = None, COMPRESSED
    if method == "compressed-tensors":
        stated = settings.get("format")
        if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
            stated = f"sparse {settings['sparsity_config']['format']}"
        if (settings.get("transform_config") or {}).get("config_groups"):
            raise UnsupportedError(where, "the checkpoint's weights are rotated (transform_config)", remedy)
    elif method == "modelopt":
        stated, known = settings.get("quant_algo"), MODELOPT
    if stated is not None and stated not in known:
        what = f"the checkpoint is already quantized by '{method}' as '{stated}'; decoded are {', '.join(known)}"
        raise UnsupportedError(where, what, remedy)


def kept_type(config: Mapping[str, Any]) -> str:
    """The floating type in which an artifact keeps a decoded weight that it does not quantize: the model's."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        stated = part.get("dtype") or part.get("torch_dtype")
        if stated:
            return TYPES.get(str(stated).removeprefix("torch."), "BF16")
    return "BF16"
