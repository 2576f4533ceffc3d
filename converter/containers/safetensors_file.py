"""Safetensors files written as they stream in, every byte of their headers planned before the first weight is read.

The header of a safetensors file holds nothing but names, types, shapes and offsets, so it follows from a plan. Tensors
then go straight to their place in the file, in any order, and one at a time is in memory. The safetensors library does
it the other way round: it wants all tensors of a file at once. Layout and header are the same as the library's (tensors
by falling alignment, then by name), byte for byte, so nothing that reads its files can tell.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from converter.errors import SourceError
from converter.source import Header, header_length, parse_header
from converter.tensor_file import read_range
from converter.values import DTYPES

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
# The library's order: by its list of types from the last to the first, which is by alignment, then by name.
_ORDER = (
    "U64",
    "I64",
    "F64",
    "F32",
    "U32",
    "I32",
    "BF16",
    "F16",
    "U16",
    "I16",
    "F8_E4M3",
    "F8_E5M2",
    "I8",
    "U8",
    "BOOL",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file: dtype as safetensors calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class FilePlan:
    """One file: its header as written (length, JSON, padding), where each tensor starts, and its length in bytes."""

    name: str
    header: bytes
    entries: Mapping[str, Entry]
    starts: Mapping[str, int]
    size_bytes: int


def plan_files(
    groups: Sequence[Sequence[Entry]], metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> tuple[FilePlan, ...]:
    """The files that hold all entries, in the order given; the entries of a group stay in one file.

    A file is closed before its tensors exceed `shard_bytes`; a single larger group makes a larger file.
    """
    shards: list[list[Entry]] = [[]]
    filled = 0
    for group in groups:
        size = sum(entry.size_bytes for entry in group)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].extend(group)
        filled += size
    if len(shards) == 1:
        return (_plan_file("model.safetensors", shards[0], metadata),)
    count = len(shards)
    return tuple(
        _plan_file(f"model-{number:05}-of-{count:05}.safetensors", shard, metadata)
        for number, shard in enumerate(shards, start=1)
    )


def _plan_file(name: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> FilePlan:
    ordered = sorted(entries, key=lambda entry: (_ORDER.index(entry.dtype), entry.name))
    declared: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    ends: dict[str, int] = {}
    position = 0
    for entry in ordered:
        ends[entry.name] = position + entry.size_bytes
        offsets = [position, ends[entry.name]]
        declared[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        position = ends[entry.name]
    text = json.dumps(declared, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    return FilePlan(
        name=name,
        header=len(text).to_bytes(8, "little") + text,
        entries={entry.name: entry for entry in ordered},
        starts={entry.name: begin + ends[entry.name] - entry.size_bytes for entry in ordered},
        size_bytes=begin + position,
    )


class SafetensorsWriter:
    """Writes planned files into a folder: `write` each tensor once, in any order, inside `with`."""

    def __init__(self, plans: Sequence[FilePlan], folder: Path) -> None:
        self._plans = plans
        self._folder = folder
        self._place = {name: plan for plan in plans for name in plan.entries}
        self._open: dict[str, BinaryIO] = {}
        self._written: set[str] = set()

    def __enter__(self) -> SafetensorsWriter:
        for plan in self._plans:
            file = (self._folder / plan.name).open("wb")
            self._open[plan.name] = file
            file.write(plan.header)
            file.truncate(plan.size_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.close()
        missing = sorted(set(self._place) - self._written)
        assert kind is not None or not missing, f"planned but never written: {missing}"
        if kind is None and len(self._plans) > 1:
            (self._folder / INDEX).write_text(index_json(self._plans), "utf-8")

    def write(self, name: str, tensor: Tensor) -> None:
        """Put `tensor` at its place; its type and shape are those planned."""
        plan = self._place[name]
        entry = plan.entries[name]
        fits = tensor.dtype == DTYPES[entry.dtype] and tuple(tensor.shape) == entry.shape
        assert fits, f"{name}: {tensor.dtype} {tuple(tensor.shape)} instead of {entry.dtype} {entry.shape}"
        assert name not in self._written, f"{name} is written twice"
        self._written.add(name)
        file = self._open[plan.name]
        file.seek(plan.starts[name])
        file.write(tensor_bytes(tensor))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they lie in memory, without a copy when it is contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def index_json(plans: Sequence[FilePlan]) -> str:
    """The index of a model in several files."""
    total = sum(entry.size_bytes for plan in plans for entry in plan.entries.values())
    weight_map = {name: plan.name for plan in plans for name in plan.entries}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )


def read_headers(folder: Path) -> dict[str, Header]:
    """The tensors of all safetensors files in a folder, by name, each header checked against its file's length.

    Raises SourceError when there is none, one is truncated, or one claims what its file does not hold.
    """
    headers: dict[str, Header] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise SourceError(str(folder), "there is no safetensors file", "Check that the artifact was written to its end")
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(8), size, path.name, str(folder))
            found = parse_header(file.read(length), size, path.name, str(folder))
        headers.update((header.name, header) for header in found)
    return headers


def read_tensor(folder: Path, header: Header) -> Tensor:
    """One tensor in its stored type. Raises SourceError when the file has become shorter than its header said."""
    raw = read_range(folder / header.file, header.start, header.end - header.start)
    if len(raw) < header.end - header.start:
        what = f"the file ends inside tensor '{header.name}'"
        raise SourceError(str(folder / header.file), what, "Write the artifact again")
    return raw.view(DTYPES[header.dtype]).reshape(header.shape)
