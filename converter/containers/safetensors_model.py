"""A model in safetensors files whose linears are stored in parts: what all formats of that kind have in common.

Everything outside the linears of the blocks keeps its type, the model's small files travel along, and config.json gets
a `quantization_config` that tells readers what they find. A format says which grids it stores, as which tensors, and
what stands in the config; it is a subclass with those answers. What engines accept narrows all of them: linears that
read one hidden state (qkv, gate/up) are fused, so they must be stored alike.
"""

# O out, I in (columns), G groups

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, Parts, TensorPlan, kept
from converter.containers.safetensors_file import Entry, FilePlan, SafetensorsWriter, plan_files
from converter.containers.safetensors_open import OpenedSafetensors, open_safetensors
from converter.containers.selection import Choice, choose, float_dtype, looks_linear
from converter.containers.small_files import copy_small_files, original_config
from converter.errors import UnsupportedError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.plain import PlainGrid
from converter.manifest import Target
from converter.schemes import Activations
from converter.source import Header, Snapshot

SMALLER_GROUPS = (64, 32)  # what engines' kernels take, beside 128 and whole rows


class SafetensorsModel(ABC):
    """A container of safetensors files; see `converter.containers.Container`."""

    @abstractmethod
    def choose_grid(self, header: Header, dtype: str, choice: Choice) -> tuple[Grid, str]:
        """The grid of a linear's weight [O, I], and why it is not the one asked for (empty: it is).

        dtype: the floating type that the weight would otherwise keep; a PlainGrid of it keeps the weight as it is.
        Raises UnsupportedError for what the format's readers load in no model.
        """

    @abstractmethod
    def entries(self, tensor: TensorPlan) -> tuple[Entry, ...]:
        """What a quantized weight becomes in the file: names, types and shapes, in the order of `values`."""

    @abstractmethod
    def values(self, tensor: TensorPlan, parts: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """The tensors that `entries` names, from the parts of the weight's grid."""

    @abstractmethod
    def settings(
        self, plan: ArtifactPlan, snapshot: Snapshot, architecture: Architecture | None, target: Target
    ) -> dict[str, Any]:
        """What config.json says under `quantization_config`."""

    def metadata(
        self, tensors: Sequence[TensorPlan], snapshot: Snapshot, architecture: Architecture | None
    ) -> Mapping[str, str]:
        """What the headers of the files say beside where the model comes from."""
        return {}

    def check(self, tensors: Sequence[TensorPlan], architecture: Architecture | None, target: Target) -> None:
        """Raise UnsupportedError when the plan as a whole is none that the format's readers load."""
        if architecture:
            _refuse_split_taps(tensors, architecture, target)
        for tensor in tensors:
            static = tensor.activations is not None and tensor.activations.static
            if static and not (architecture and architecture.tap_of(tensor.source)):
                what = f"{tensor.name} would need a scale of its inputs, and calibration does not see them"
                raise UnsupportedError(where_of(target), what, "Give it another scheme by rules, or keep it")

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
            tensors.append(self._plan_tensor(header, dtype, architecture, target))
        tensors.sort(key=lambda tensor: (-1 if tensor.block is None else tensor.block, tensor.name))
        if not any(tensor.quantized for tensor in tensors):
            what = f"{snapshot.repo} has no linear that {target.scheme} could be applied to"
            raise UnsupportedError(where_of(target), what, "Choose format parquet, or look at rules and group_size")
        self.check(tensors, architecture, target)
        tensors = [
            replace(tensor, size_bytes=sum(entry.size_bytes for entry in self._entries(tensor)))
            for tensor in kept.with_scales(tensors, snapshot, architecture, target, where_of(target))
        ]
        files = {file.name: file.size_bytes for file in self._files(tensors, snapshot, architecture)}
        notes = kept.notes(tensors, target, architecture)
        return ArtifactPlan(tensors=tuple(tensors), files=files, exact=True, dropped=dropped, notes=notes)

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
        config = original_config(snapshot)
        config["quantization_config"] = self.settings(plan, snapshot, architecture, target)
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        with SafetensorsWriter(self._files(plan.tensors, snapshot, architecture), folder) as writer:
            for tensor in plan.tensors:
                own = parts(tensor.name)
                values = self.values(tensor, own) if tensor.quantized else [own["values"]]
                values = [*values, *kept.values(tensor, own)]
                for entry, value in zip(self._entries(tensor), values, strict=True):
                    writer.write(entry.name, value)

    def open(self, folder: Path, architecture: Architecture | None) -> OpenedSafetensors:
        """The artifact in `folder`, decoded by our own reader; raises SourceError when it is damaged."""
        return open_safetensors(folder)

    def _plan_tensor(self, header: Header, dtype: str, architecture: Architecture | None, target: Target) -> TensorPlan:
        choice = choose(target, header.name)
        grid: Grid = PlainGrid(dtype=choice.keep or dtype)
        fallback = ""
        linear = architecture.is_linear(header.name) if architecture else looks_linear(header.name, header.shape)
        ruled_head = architecture and header.name == f"{architecture.head}.weight" and target.rule_for(header.name)
        if not choice.keep and (linear or ruled_head):
            if len(header.shape) == 2:
                grid, fallback = self.choose_grid(header, dtype, choice)
            else:
                fallback = f"kept: {len(header.shape)} dimensions, the format stores weights of linears only"
        quantized = not isinstance(grid, PlainGrid)
        return TensorPlan(
            name=header.name,
            source=header.name,
            shape=header.shape,
            grid=grid,
            block=architecture.block_of(header.name) if architecture else None,
            size_bytes=0,
            quantized=quantized,
            fallback=fallback,
            activations=_inputs(choice, grid) if quantized else None,
        )

    def _entries(self, tensor: TensorPlan) -> tuple[Entry, ...]:
        beside = kept.entries(tensor)
        if isinstance(tensor.grid, PlainGrid):
            return (Entry(name=tensor.name, dtype=tensor.grid.dtype, shape=tensor.shape), *beside)
        return (*self.entries(tensor), *beside)

    def _files(
        self, tensors: Sequence[TensorPlan], snapshot: Snapshot, architecture: Architecture | None
    ) -> tuple[FilePlan, ...]:
        metadata = {"format": "pt", "source": snapshot.repo, "commit": snapshot.commit}
        metadata |= self.metadata(tensors, snapshot, architecture)
        return plan_files([self._entries(tensor) for tensor in tensors], metadata)


def _inputs(choice: Choice, grid: Grid) -> Activations | None:
    """What happens to the inputs of a linear on this grid: integers in groups share scales as its columns do."""
    given = choice.scheme.activations
    if given and given.group_size and isinstance(grid, AffineGrid):
        return replace(given, group_size=grid.group_size)
    return given


def group_or_fallback(choice: Choice, columns: int) -> tuple[int | None, str]:
    """The group size for rows of so many columns, and why it is not the one asked for; None is a scale for a row."""
    asked = choice.target.group_size
    if not asked or columns % asked == 0:
        return asked, ""
    smaller = next((size for size in SMALLER_GROUPS if size < asked and columns % size == 0), None)
    stored = f"groups of {smaller}" if smaller else "one scale per row"
    return smaller, f"{stored}: groups of {asked} do not divide rows of {columns}"


def kept_linears(plan: ArtifactPlan, snapshot: Snapshot, architecture: Architecture | None) -> list[str]:
    """The modules that readers take for linears and that are stored as floating point, sorted; a tied head is one."""
    kept = [t for t in plan.tensors if not t.quantized and len(t.shape) == 2 and t.name.endswith(".weight")]
    if architecture is None:
        return sorted(t.name.removesuffix(".weight") for t in kept if looks_linear(t.name, t.shape))
    names = {t.name.removesuffix(".weight") for t in kept if t.name != f"{architecture.embedding}.weight"}
    if architecture.head and f"{architecture.head}.weight" not in snapshot.tensors:
        names.add(architecture.head)
    return sorted(names)


def module_of(tensor: TensorPlan) -> str:
    """The name of the linear whose weight this is."""
    return tensor.name.removesuffix(".weight")


def where_of(target: Target) -> str:
    """The target in words, for errors."""
    return f"{target.where}: target '{target.name}'" if target.where else f"target '{target.name}'"


def _refuse_split_taps(tensors: Sequence[TensorPlan], architecture: Architecture, target: Target) -> None:
    """Raise UnsupportedError when linears that read one hidden state differ: engines fuse them (qkv, gate/up)."""
    seen: dict[tuple[int | None, str], TensorPlan] = {}
    for tensor in tensors:
        tap = architecture.tap_of(tensor.source)
        if tap is None:
            continue
        first = seen.setdefault((tensor.block, tap.name), tensor)
        if (first.grid, first.activations) != (tensor.grid, tensor.activations):
            what = f"{first.name} is stored as {first.grid.name} and {tensor.name} as {tensor.grid.name}"
            remedy = f"vLLM fuses what reads one hidden state: let rules cover all of {', '.join(tap.linears)}"
            raise UnsupportedError(where_of(target), what, remedy)
