"""compressed-tensors: safetensors files with packed codes, and a config.json that says how to read them.

transformers and vLLM read it. Weight-only schemes are stored as "pack-quantized" (codes as a stream of bits in int32
words), W8A8 as "int-quantized" (plain int8, inputs quantized per token at run time). Everything outside the linears of
the blocks keeps its type. What the readers accept narrows what is written: a module of a fused projection must have
the scheme of its siblings, rows must fill whole words, and asymmetric codes load in transformers only where every
quantized linear has one and the same scheme, and then with `CompressedTensorsConfig(dequantize=True)`.

The alternative, handing tensors to the compressed-tensors library, would need a whole module in memory and ties every
artifact to its version; the price is that layout and config are ours to keep right, which the consumer tests do.
Format: compressed-tensors 0.20, `compressors/pack_quantized` and `quantization/quant_config.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, Parts, TensorPlan
from converter.containers.compressed_tensors_reader import OpenedCompressedTensors, open_compressed_tensors
from converter.containers.packing import pack_words
from converter.containers.safetensors_file import Entry, FilePlan, SafetensorsWriter, plan_files
from converter.containers.selection import Choice, choose, float_dtype, looks_linear
from converter.containers.small_files import copy_small_files
from converter.errors import UnsupportedError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.plain import PlainGrid
from converter.manifest import Target
from converter.source import Header, Snapshot

# O out, I in (columns), G groups

LAYOUT_VERSION = "0.20.0"  # of compressed-tensors, whose layout this is
SMALLER_GROUPS = (64, 32)  # what vLLM's Marlin kernels take, beside 128 and whole rows


class CompressedTensors:
    """The container of `format: compressed-tensors`."""

    def plan(self, snapshot: Snapshot, architecture: Architecture | None, target: Target) -> ArtifactPlan:
        """What the artifact will hold, its files exact to the byte.

        Raises UnsupportedError when the target asks for what the format's readers do not load, or nothing is quantized.
        """
        tensors: list[TensorPlan] = []
        dropped: dict[str, str] = {}
        for name, header in snapshot.tensors.items():
            dtype = float_dtype(header.dtype)
            if dtype is None:
                dropped[name] = f"a table of {header.dtype}, which is no weight"
                continue
            tensors.append(_plan_tensor(header, dtype, architecture, target))
        tensors.sort(key=lambda tensor: (-1 if tensor.block is None else tensor.block, tensor.name))
        if not any(tensor.quantized for tensor in tensors):
            what = f"{snapshot.repo} has no linear that {target.scheme} could be applied to"
            raise UnsupportedError(_where(target), what, "Choose format parquet, or look at rules and group_size")
        _refuse_mixed_asymmetric(tensors, target)
        if architecture:
            _refuse_split_taps(tensors, architecture, target)
        files = {file.name: file.size_bytes for file in _files(tensors, snapshot, target)}
        return ArtifactPlan(tensors=tuple(tensors), files=files, exact=True, dropped=dropped)

    def write(
        self,
        plan: ArtifactPlan,
        snapshot: Snapshot,
        architecture: Architecture | None,
        target: Target,
        parts: Parts,
        folder: Path,
    ) -> None:
        """Write weights, config.json and the model's small files into `folder`, one tensor in memory at a time."""
        copy_small_files(snapshot, folder, without=("config.json",))
        config = dict(snapshot.config)
        config["quantization_config"] = quantization_config(plan, snapshot, architecture, target)
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        with SafetensorsWriter(_files(plan.tensors, snapshot, target), folder) as writer:
            for tensor in plan.tensors:
                for name, value in _stored(tensor, target, parts(tensor.name)):
                    writer.write(name, value)

    def open(self, folder: Path, architecture: Architecture | None) -> OpenedCompressedTensors:
        """The artifact in `folder`, decoded by our own reader; raises SourceError when it is damaged."""
        return open_compressed_tensors(folder)


def quantization_config(
    plan: ArtifactPlan, snapshot: Snapshot, architecture: Architecture | None, target: Target
) -> dict[str, Any]:
    """What config.json says under `quantization_config`.

    One scheme for all linears of a known architecture is written as the target "Linear" with every other module in
    `ignore`; otherwise modules are named one by one, because readers differ in which of two matching targets wins.
    """
    groups: dict[str, dict[str, Any]] = {}
    modules: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        if tensor.quantized:
            settings = _group_settings(tensor, target)
            key = json.dumps(settings, sort_keys=True)
            groups[key] = settings
            modules.setdefault(key, []).append(tensor.name.removesuffix(".weight"))
    ignore: list[str] = []
    if architecture is not None:
        kept = [t for t in plan.tensors if not t.quantized and len(t.shape) == 2 and t.name.endswith(".weight")]
        ignore = [t.name.removesuffix(".weight") for t in kept if t.name != f"{architecture.embedding}.weight"]
        if f"{architecture.head}.weight" not in snapshot.tensors:
            ignore.append(architecture.head)  # a head tied to the embedding is still a Linear to the readers
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
        "kv_cache_scheme": None,
        "ignore": sorted(ignore),
        "config_groups": config_groups,
    }


def _group_settings(tensor: TensorPlan, target: Target) -> dict[str, Any]:
    assert isinstance(tensor.grid, AffineGrid)
    grid, activation_bits = tensor.grid, choose(target, tensor.source).scheme.activation_bits
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": grid.granularity,
        "group_size": grid.group_size,
        "dynamic": False,
    }
    per_token = {"num_bits": activation_bits, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "weights": weights,
        "input_activations": per_token if activation_bits else None,
        "output_activations": None,
        "format": "int-quantized" if activation_bits else "pack-quantized",
    }


def _plan_tensor(header: Header, dtype: str, architecture: Architecture | None, target: Target) -> TensorPlan:
    grid, fallback = _choose_grid(header, dtype, architecture, target)
    tensor = TensorPlan(
        name=header.name,
        source=header.name,
        shape=header.shape,
        grid=grid,
        block=architecture.block_of(header.name) if architecture else None,
        size_bytes=0,
        quantized=isinstance(grid, AffineGrid),
        fallback=fallback,
    )
    size = sum(entry.size_bytes for entry in _entries(tensor, target))
    return replace(tensor, size_bytes=size)


def _choose_grid(header: Header, dtype: str, architecture: Architecture | None, target: Target) -> tuple[Grid, str]:
    """The grid of one tensor, and why it is not the one asked for (empty: it is)."""
    choice = choose(target, header.name)
    plain = PlainGrid(dtype=choice.keep or dtype)
    linear = architecture.is_linear(header.name) if architecture else looks_linear(header.name, header.shape)
    ruled_head = architecture and header.name == f"{architecture.head}.weight" and target.rule_for(header.name)
    if choice.keep or not (linear or ruled_head):
        return plain, ""
    if len(header.shape) != 2:
        return plain, f"kept: {len(header.shape)} dimensions, the format stores weights of linears only"
    _check_granularity(choice)
    columns, group_size, fallback = header.shape[1], choice.target.group_size, ""
    if choice.scheme.activation_bits:
        return choice.grid(group_size=None, scale_dtype=dtype), ""
    if columns * choice.scheme.bits % 32:
        return plain, f"kept: rows of {columns} values do not fill whole 32-bit words"
    if group_size and columns % group_size:
        if not choice.target.symmetric:
            return plain, f"kept: groups of {group_size} do not divide rows of {columns}"
        smaller = next((size for size in SMALLER_GROUPS if size < group_size and columns % size == 0), None)
        stored = f"groups of {smaller}" if smaller else "one scale per row"
        fallback = f"{stored}: groups of {group_size} do not divide rows of {columns}"
        group_size = smaller
    return choice.grid(group_size=group_size, scale_dtype=dtype), fallback


def _check_granularity(choice: Choice) -> None:
    target, activations = choice.target, choice.scheme.activation_bits
    if activations and (target.granularity == "group" or not target.symmetric):
        what = f"{target.scheme} with {target.granularity} scales, symmetric: {str(target.symmetric).lower()}"
        raise UnsupportedError(
            _where(target), f"no reader runs {what}", "Use symmetric weights with one scale per channel or per tensor"
        )
    if not activations and target.granularity == "tensor":
        what = f"vLLM does not load {target.scheme} with one scale per tensor"
        raise UnsupportedError(_where(target), what, "Use granularity channel or group")


def _refuse_mixed_asymmetric(tensors: list[TensorPlan], target: Target) -> None:
    grids = {(t.grid, choose(target, t.source).scheme) for t in tensors if t.quantized}
    if len(grids) > 1 and any(isinstance(grid, AffineGrid) and not grid.symmetric for grid, _ in grids):
        names = ", ".join(sorted({grid.name for grid, _ in grids}))
        what = f"asymmetric codes beside another scheme ({names}) do not load in transformers"
        raise UnsupportedError(_where(target), what, "Use one scheme for all linears, or symmetric ones only")


def _refuse_split_taps(tensors: list[TensorPlan], architecture: Architecture, target: Target) -> None:
    """Raise UnsupportedError when linears that read one hidden state differ: engines fuse them (qkv, gate/up)."""
    seen: dict[tuple[int | None, str], TensorPlan] = {}
    for tensor in tensors:
        tap = architecture.tap_of(tensor.source)
        if tap is None:
            continue
        first = seen.setdefault((tensor.block, tap.name), tensor)
        if (first.grid, choose(target, first.source).scheme) != (tensor.grid, choose(target, tensor.source).scheme):
            what = f"{first.name} is stored as {first.grid.name} and {tensor.name} as {tensor.grid.name}"
            remedy = f"vLLM fuses what reads one hidden state: let rules cover all of {', '.join(tap.linears)}"
            raise UnsupportedError(_where(target), what, remedy)


def _where(target: Target) -> str:
    return f"{target.where}: target '{target.name}'" if target.where else f"target '{target.name}'"


def _files(
    tensors: tuple[TensorPlan, ...] | list[TensorPlan], snapshot: Snapshot, target: Target
) -> tuple[FilePlan, ...]:
    metadata = {"format": "pt", "source": snapshot.repo, "commit": snapshot.commit}
    return plan_files([_entries(tensor, target) for tensor in tensors], metadata)


def _entries(tensor: TensorPlan, target: Target) -> tuple[Entry, ...]:
    """What a tensor becomes in the file: names, types and shapes, in the order of `_stored`."""
    if not isinstance(tensor.grid, AffineGrid):
        assert isinstance(tensor.grid, PlainGrid)
        return (Entry(name=tensor.name, dtype=tensor.grid.dtype, shape=tensor.shape),)
    grid, (out, columns) = tensor.grid, tensor.shape
    groups = columns // grid.group_size if grid.group_size else 1
    scale = (1,) if grid.granularity == "tensor" else (out, groups)
    module = tensor.name.removesuffix(".weight")
    if choose(target, tensor.source).scheme.activation_bits:
        return (
            Entry(name=tensor.name, dtype="I8", shape=tensor.shape),
            Entry(name=f"{module}.weight_scale", dtype=grid.scale_dtype, shape=scale),
        )
    entries = (
        Entry(name=f"{module}.weight_packed", dtype="I32", shape=(out, columns * grid.bits // 32)),
        Entry(name=f"{module}.weight_scale", dtype=grid.scale_dtype, shape=scale),
        Entry(name=f"{module}.weight_shape", dtype="I64", shape=(2,)),
    )
    if grid.symmetric:
        return entries
    words = -(-out * grid.bits // 32)
    return (*entries, Entry(name=f"{module}.weight_zero_point", dtype="I32", shape=(words, groups)))


def _stored(tensor: TensorPlan, target: Target, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of everything that a tensor becomes in the file."""
    values: list[Tensor] = []
    if not isinstance(tensor.grid, AffineGrid):
        values = [parts["values"]]
    elif choose(target, tensor.source).scheme.activation_bits:
        scale = parts["scale"]
        values = [parts["codes"], scale.reshape(1) if tensor.grid.granularity == "tensor" else scale]
    else:
        bits = tensor.grid.bits
        shape = parts["codes"].new_tensor(tensor.shape, dtype=torch.int64)
        values = [pack_words(parts["codes"], bits), parts["scale"], shape]
        if not tensor.grid.symmetric:  # packed along the output dimension, one stream for each group
            values.append(pack_words(parts["zero_point"].T, bits).T)
    entries = _entries(tensor, target)
    yield from ((entry.name, value) for entry, value in zip(entries, values, strict=True))
