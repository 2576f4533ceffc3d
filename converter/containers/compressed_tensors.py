"""compressed-tensors: safetensors files with packed codes, and a config.json that says how to read them.

transformers and vLLM read it. What a weight becomes (O out, I in, G groups):

    pack-quantized        integers whose inputs keep their precision, and W4A8 and W8A8 in groups (inputs int8):
                          weight_packed i32 [O, I b / 32], a stream of bits; weight_scale [O, G]; weight_shape;
                          asymmetric: weight_zero_point i32 [O b / 32, G]
    int-quantized         W8A8 by row or tensor: weight i8, weight_scale [O, 1]; a static input_scale [1] and, where
                          inputs are not symmetric, input_zero_point i8 [1]
    float-quantized       fp8: weight, weight_scale [1], [O, 1] or [O / 128, I / 128]; a static input_scale [1]
    nvfp4-pack-quantized  weight_packed u8 [O, I / 2], weight_scale fp8 [O, I / 16], weight_global_scale f32 [1], which
                          scales are divided by; with inputs in fp4 an input_global_scale f32 [1] as well
    mxfp4-pack-quantized  weight_packed u8 [O, I / 2], weight_scale u8 [O, I / 32], a power of two plus 127
    mxfp8-quantized       weight fp8, weight_scale u8 [O, I / 32]

`kv_cache_scheme` tells how keys and values are kept, by scales beside the linears that make them (see kept.py).

A module of a fused projection must have the scheme of its siblings, rows must fill whole words, and asymmetric codes
load in transformers only where every quantized linear has one and the same scheme.

`dequantize` asks transformers to decode the weights when it loads them, which it otherwise does when the model is first
called: it then fails on asymmetric codes, and sentence-transformers never calls an encoder, but its `forward`. It turns
the rounding of inputs off, too, so that an encoder whose inputs are quantized goes without.

The alternative, handing tensors to the compressed-tensors library, would need a whole module in memory and ties every
artifact to its version; the price is that layout and config are ours to keep right, which the consumer tests do.
Format: compressed-tensors 0.20, `compressors/` and `quantization/quant_config.py`.
"""

# O out, I in (columns), G groups

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from converter.activations import FP4_MAX, FP8_MAX, fixed_scale
from converter.architecture import Architecture
from converter.containers import ArtifactPlan, TensorPlan, kept
from converter.containers.packing import pack_words
from converter.containers.safetensors_file import Entry
from converter.containers.safetensors_model import (
    SafetensorsModel,
    group_or_fallback,
    kept_linears,
    module_of,
    where_of,
)
from converter.containers.selection import Choice
from converter.errors import UnsupportedError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.floats import Fp8Grid
from converter.grids.micro import MIDDLE, MicroGrid
from converter.grids.plain import PlainGrid
from converter.manifest import Target
from converter.schemes import Activations, Granularity
from converter.source import Header, Snapshot

LAYOUT_VERSION = "0.20.0"  # of compressed-tensors, whose layout this is
MICRO_FORMATS = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized"}


class CompressedTensors(SafetensorsModel):
    """The container of `format: compressed-tensors`."""

    def choose_grid(self, header: Header, dtype: str, choice: Choice) -> tuple[Grid, str]:
        plain, columns, scheme = PlainGrid(dtype=dtype), header.shape[1], choice.scheme
        if scheme.values in MICRO_FORMATS:
            if columns % (scheme.group_size or 1):
                return plain, f"kept: groups of {scheme.group_size} do not divide rows of {columns}"
            return choice.grid(group_size=scheme.group_size, scale_dtype=dtype), ""
        if scheme.values != "int":
            _check_float_granularity(choice)
            return choice.grid(group_size=None, scale_dtype=dtype), ""
        _check_granularity(choice)
        if is_plain_int8(scheme.bits, scheme.activations, choice.target.granularity):
            return choice.grid(group_size=None, scale_dtype=dtype), ""
        if columns * scheme.bits % 32:
            return plain, f"kept: rows of {columns} values do not fill whole 32-bit words"
        group_size, fallback = group_or_fallback(choice, columns)
        if fallback and not choice.target.symmetric:
            return plain, f"kept: groups of {choice.target.group_size} do not divide rows of {columns}"
        return choice.grid(group_size=group_size, scale_dtype=dtype), fallback

    def check(self, tensors: Sequence[TensorPlan], architecture: Architecture | None, target: Target) -> None:
        _refuse_mixed_asymmetric(tensors, target)
        super().check(tensors, architecture, target)

    def entries(self, tensor: TensorPlan) -> tuple[Entry, ...]:
        grid, (out, columns), module = tensor.grid, tensor.shape, module_of(tensor)
        match grid:
            case MicroGrid(values="mxfp8"):
                codes = Entry(name=tensor.name, dtype="F8_E4M3", shape=tensor.shape)
                return codes, Entry(name=f"{module}.weight_scale", dtype="U8", shape=(out, columns // grid.group_size))
            case MicroGrid():
                scale_dtype = "F8_E4M3" if grid.values == "nvfp4" else "U8"
                found = [
                    Entry(name=f"{module}.weight_packed", dtype="U8", shape=(out, columns // 2)),
                    Entry(name=f"{module}.weight_scale", dtype=scale_dtype, shape=(out, columns // grid.group_size)),
                ]
                if grid.values == "nvfp4":
                    found.append(Entry(name=f"{module}.weight_global_scale", dtype="F32", shape=(1,)))
                if _is_static(tensor):
                    found.append(Entry(name=f"{module}.input_global_scale", dtype="F32", shape=(1,)))
                return tuple(found)
            case Fp8Grid():
                shape = (1,) if grid.granularity == "tensor" else grid.scale_shape(out, columns)
                found = [
                    Entry(
                        name=tensor.name, dtype="F8_E4M3" if grid.values == "e4m3" else "F8_E5M2", shape=tensor.shape
                    ),
                    Entry(name=f"{module}.weight_scale", dtype=grid.scale_dtype, shape=shape),
                ]
                if _is_static(tensor):
                    found.append(Entry(name=f"{module}.input_scale", dtype=grid.scale_dtype, shape=(1,)))
                return tuple(found)
        assert isinstance(grid, AffineGrid)
        groups = columns // grid.group_size if grid.group_size else 1
        scale = Entry(
            name=f"{module}.weight_scale",
            dtype=grid.scale_dtype,
            shape=(1,) if grid.granularity == "tensor" else (out, groups),
        )
        if is_plain_int8(grid.bits, tensor.activations, grid.granularity):
            found = [Entry(name=tensor.name, dtype="I8", shape=tensor.shape), scale]
            if _is_static(tensor):
                found.append(Entry(name=f"{module}.input_scale", dtype=grid.scale_dtype, shape=(1,)))
                if tensor.activations and not tensor.activations.symmetric:
                    found.append(Entry(name=f"{module}.input_zero_point", dtype="I8", shape=(1,)))
            return tuple(found)
        entries = (
            Entry(name=f"{module}.weight_packed", dtype="I32", shape=(out, columns * grid.bits // 32)),
            scale,
            Entry(name=f"{module}.weight_shape", dtype="I64", shape=(2,)),
        )
        if grid.symmetric:
            return entries
        words = -(-out * grid.bits // 32)
        return (*entries, Entry(name=f"{module}.weight_zero_point", dtype="I32", shape=(words, groups)))

    def values(self, tensor: TensorPlan, parts: Mapping[str, Tensor]) -> Sequence[Tensor]:
        grid, codes, scale = tensor.grid, parts["codes"], parts["scale"]
        match grid:
            case MicroGrid():
                found = [codes if grid.values == "mxfp8" else pack_fp4(codes), scale]
                found += [parts["divisor"]] if grid.values == "nvfp4" else []
                if _is_static(tensor):
                    found.append(FP4_MAX * FP8_MAX / parts["input_range"].float()[1:])
                return found
            case Fp8Grid():
                found = [codes, scale.reshape(1) if grid.granularity == "tensor" else scale]
                return found + _input_parts(tensor, parts, scale.dtype)
        assert isinstance(grid, AffineGrid)
        scale = scale.reshape(1) if grid.granularity == "tensor" else scale
        if is_plain_int8(grid.bits, tensor.activations, grid.granularity):
            return [codes, scale, *_input_parts(tensor, parts, scale.dtype)]
        found = [pack_words(codes, grid.bits), scale, torch.tensor(tensor.shape)]
        if not grid.symmetric:  # packed along the output dimension, one stream for each group
            found.append(pack_words(parts["zero_point"].T, grid.bits).T)
        return found

    def settings(
        self, plan: ArtifactPlan, snapshot: Snapshot, architecture: Architecture | None, target: Target
    ) -> dict[str, Any]:
        """One scheme for all linears of a known architecture is written as the target "Linear" with every other module
        in `ignore`; otherwise modules are named one by one, because readers differ in which of two targets wins."""
        groups: dict[str, dict[str, Any]] = {}
        modules: dict[str, list[str]] = {}
        for tensor in plan.tensors:
            if tensor.quantized:
                settings = _group_settings(tensor)
                key = json.dumps(settings, sort_keys=True)
                groups[key] = settings
                modules.setdefault(key, []).append(as_readers_name(module_of(tensor), architecture))
        unquantized = kept_linears(plan, snapshot, architecture) if architecture else []
        broad = architecture is not None and len(groups) == 1
        config_groups = {
            f"group_{number}": {"targets": ["Linear"] if broad else modules[key], **settings}
            for number, (key, settings) in enumerate(groups.items())
        }
        formats = {str(settings["format"]) for settings in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "version": LAYOUT_VERSION,
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": kept.settings(target),
            **({"dequantize": True} if _decoded_on_load(plan.tensors, architecture) else {}),
            "ignore": sorted({as_readers_name(name, architecture) for name in unquantized}),
            "config_groups": config_groups,
        }


def is_plain_int8(bits: int, activations: Activations | None, granularity: Granularity | None) -> bool:
    """Whether integers are stored as they are: where inputs are integers, too, and codes take a byte.

    In groups they are packed all the same: transformers reads both, and vLLM's kernels for groups that only.
    """
    return bits == 8 and activations is not None and granularity != "group"


def pack_fp4(codes_OI: Tensor) -> Tensor:
    """Indices i8 [O, I] into the levels of E2M1 as sign and magnitude, two in a byte, the first low: u8 [O, I / 2]."""
    signed = codes_OI.int() - MIDDLE
    nibbles = (signed.abs() + 8 * (signed < 0)).to(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def as_readers_name(module: str, architecture: Architecture | None) -> str:
    """What finds a module of the checkpoint in the reader's model: its name, or a pattern ("re:...").

    Readers call modules as transformers has them now. Where the checkpoint spells them otherwise, as models of pictures
    and text do, the pattern takes what both have in common; the other parts of such a model are ignored as a whole.
    """
    if architecture is None or not architecture.spelling:
        return module
    if module == architecture.head:
        own = architecture.canonical(f"{module}.").removesuffix(".")
        return rf"re:(.*\.)?{re.escape(own)}$"
    for ours, theirs in architecture.spelling.items():
        if module.startswith(theirs):
            part = next((part for part in theirs.split(".") if part not in ours.split(".")), "")
            inside = rf"{part}\.(.*\.)?" if part else ""
            return rf"re:(.*\.)?{inside}{re.escape(module.removeprefix(theirs))}$"
    if architecture.block_of(module) is not None:
        return module
    part, _, rest = module.removeprefix("model.").partition(".")
    return rf"re:(.*\.)?{part}\..*" if rest else module


def _decoded_on_load(tensors: Sequence[TensorPlan], architecture: Architecture | None) -> bool:
    quantized = [tensor for tensor in tensors if tensor.quantized]
    if any(isinstance(tensor.grid, AffineGrid) and not tensor.grid.symmetric for tensor in quantized):
        return True
    encodes = architecture is not None and architecture.runs == "encoder"
    return encodes and not any(tensor.activations for tensor in quantized)


def _is_static(tensor: TensorPlan) -> bool:
    return tensor.activations is not None and tensor.activations.static


def _input_parts(tensor: TensorPlan, parts: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The scale [1] of a static range of inputs, in the type it is stored in, and the zero point that goes with it."""
    activations = tensor.activations
    if activations is None or not activations.static:
        return []
    lowest, largest = parts["input_range"].tolist()
    scale = torch.tensor([fixed_scale(replace(activations, lowest=lowest, largest=largest))[0]]).to(dtype)
    if activations.symmetric:
        return [scale]
    low, high = -(1 << (activations.bits - 1)), (1 << (activations.bits - 1)) - 1
    zero = (low - lowest / scale.float()).round().clamp(low, high)
    return [scale, zero.to(torch.int8)]


def _group_settings(tensor: TensorPlan) -> dict[str, Any]:
    """What a config group says of linears stored like this one, but for their names."""
    grid, activations = tensor.grid, tensor.activations
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "dynamic": False}
    match grid:
        case MicroGrid():
            format = MICRO_FORMATS[grid.values]
            weights |= {"num_bits": 8 if grid.values == "mxfp8" else 4, "group_size": grid.group_size}
            weights |= {"strategy": "tensor_group" if grid.values == "nvfp4" else "group"}
            weights |= {"scale_dtype": "torch.float8_e4m3fn" if grid.values == "nvfp4" else "torch.uint8"}
        case Fp8Grid():
            format = "float-quantized" if activations else "naive-quantized"
            weights |= {"strategy": grid.granularity, "block_structure": list(grid.block) if grid.block else None}
        case _:
            assert isinstance(grid, AffineGrid)
            format = "int-quantized" if is_plain_int8(grid.bits, activations, grid.granularity) else "pack-quantized"
            weights |= {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric}
            weights |= {"strategy": grid.granularity, "group_size": grid.group_size}
    return {
        "weights": weights,
        "input_activations": _input_settings(activations) if activations else None,
        "output_activations": None,
        "format": format,
    }


def _input_settings(activations: Activations) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_bits": activations.bits,
        "type": "int" if activations.values == "int" else "float",
        "symmetric": activations.symmetric,
        "strategy": "group" if activations.group_size else "token",
        "group_size": activations.group_size,
        "dynamic": not activations.static,
    }
    if activations.scale == "fp8":
        found |= {"strategy": "tensor_group", "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
    elif activations.scale == "power of two":
        found |= {"scale_dtype": "torch.uint8"}
    elif activations.static:
        found |= {"strategy": "tensor"}
    return found


def _check_float_granularity(choice: Choice) -> None:
    block, asked = choice.scheme.block, choice.target.granularity
    if asked == "group" or (asked == "block") != bool(block):
        what = f"no reader runs {choice.target.scheme} with granularity {asked}"
        remedy = "Choose scheme FP8_BLOCK for blocks, FP8_DYNAMIC for channels, FP8 for one scale per tensor"
        raise UnsupportedError(where_of(choice.target), what, remedy)


def _check_granularity(choice: Choice) -> None:
    target, activations = choice.target, choice.scheme.activations
    bytewise = activations is not None and choice.scheme.bits == 8
    if bytewise and not target.symmetric:
        remedy = "Use symmetric weights: in groups, or with one scale per channel or per tensor"
        raise UnsupportedError(where_of(target), f"no reader runs {target.scheme} with asymmetric weights", remedy)
    if activations and activations.static and target.granularity == "group":
        remedy = "Use scheme W8A8, whose inputs have a scale for each token, or one scale per channel"
        raise UnsupportedError(where_of(target), f"no reader runs {target.scheme} with weights in groups", remedy)
    if not bytewise and target.granularity == "tensor":
        what = f"vLLM does not load {target.scheme} with one scale per tensor"
        raise UnsupportedError(where_of(target), what, "Use granularity channel or group")


def _refuse_mixed_asymmetric(tensors: Sequence[TensorPlan], target: Target) -> None:
    kinds = {(t.grid, t.activations) for t in tensors if t.quantized}
    if len(kinds) > 1 and any(isinstance(grid, AffineGrid) and not grid.symmetric for grid, _ in kinds):
        names = ", ".join(sorted({grid.name for grid, _ in kinds}))
        what = f"asymmetric codes beside another scheme ({names}) do not load in transformers"
        raise UnsupportedError(where_of(target), what, "Use one scheme for all linears, or symmetric ones only")
