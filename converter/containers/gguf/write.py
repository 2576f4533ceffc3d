"""Plan and write a GGUF file: the head is composed first, then each tensor is streamed behind it.

Nothing is written twice and no 16-bit file stands between checkpoint and result; memory is one tensor. Parts arrive in
the checkpoint's row order and are brought into the file's on the way (see tensors). llama.cpp's quantizer writes zeros
where the head will be and the head last, so a killed run leaves a file that looks almost whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, Parts, TensorPlan
from converter.containers.gguf.family import (
    Family,
    RopeScaling,
    check_requirements,
    family_of,
    hyper_parameters,
    rope_scaling,
    unread,
)
from converter.containers.gguf.header import Stored, compose, file_size, padded, place, read_head
from converter.containers.gguf.metadata import general_fields, hyper_fields, model_name, read_card
from converter.containers.gguf.mixture import MIXTURES
from converter.containers.gguf.tensors import FREQUENCIES, file_rows, plan_tensors, torch_bytes
from converter.containers.gguf.tokenizer import describe_tokenizer
from converter.errors import SourceError, UnsupportedError
from converter.manifest import Target
from converter.source import Snapshot


@dataclass(frozen=True, kw_only=True)
class Known:
    """What config.json says, in GGUF's words."""

    family: Family
    integers: Mapping[str, int]
    floats: Mapping[str, float]
    scaling: RopeScaling


def know(snapshot: Snapshot, architecture: Architecture | None, target: Target) -> Known:
    """The hyper-parameters of the model; raises UnsupportedError or SourceError when GGUF cannot say them."""
    where = f"{snapshot.repo} (target {target.name})"
    family = family_of(architecture, where)
    if target.type not in MIXTURES:
        raise UnsupportedError(where, f"GGUF files of type {target.type} are not made", f"Choose {', '.join(MIXTURES)}")
    integers, floats = hyper_parameters(family, snapshot.config, where)
    check_requirements(family, snapshot.config, integers["block_count"], where)
    scaling = rope_scaling(
        family,
        snapshot.config,
        floats["rope.freq_base"],
        integers["rope.dimension_count"],
        integers["context_length"],
        where,
    )
    return Known(family=family, integers=integers, floats=floats, scaling=scaling)


def file_name(snapshot: Snapshot, target: Target) -> str:
    """Name of the artifact's file, such as "quickstart-Q4_K_M.gguf"."""
    return f"{model_name(snapshot)}-{target.type}.gguf"


def plan(snapshot: Snapshot, architecture: Architecture | None, target: Target) -> ArtifactPlan:
    """See Container.plan; the file's size is exact."""
    known = know(snapshot, architecture, target)
    assert architecture is not None  # know() has refused it
    tensors, dropped = plan_tensors(snapshot, architecture, known.family, target, known.integers)
    layout = lay_out(snapshot, known, target, tensors)
    files = {file_name(snapshot, target): file_size(layout.head, layout.placed)}
    notes = unread(known.family, snapshot.config, known.integers["context_length"]) + layout.notes
    return ArtifactPlan(tensors=tensors, files=files, exact=True, dropped=dropped, notes=notes)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The file's head and the places of its tensors; notes: what readers do otherwise, what is left out."""

    head: bytes
    placed: tuple[Stored, ...]
    notes: tuple[str, ...]


def lay_out(snapshot: Snapshot, known: Known, target: Target, tensors: Sequence[TensorPlan]) -> Layout:
    """The layout of the file, tensors that have no source in the checkpoint first."""
    where = f"{snapshot.repo} (target {target.name})"
    fields = general_fields(snapshot, known.family, target, tensors)
    fields |= hyper_fields(known.family, known.integers, known.floats, known.scaling)
    tokenizer = describe_tokenizer(snapshot.folder, snapshot.config, known.integers["vocab_size"], where)
    fields |= tokenizer.fields
    entries = [(tensor.name, tensor.shape, tensor.grid.name) for tensor in tensors]
    if known.scaling.divisors:
        entries.insert(0, (FREQUENCIES, (len(known.scaling.divisors),), "F32"))
    placed = place(entries)
    unreadable = "the front matter of README.md cannot be read, so licence, languages and tags are left out"
    notes = tokenizer.notes + ((unreadable,) if read_card(snapshot.folder) is None else ())
    return Layout(head=compose(fields, placed), placed=placed, notes=notes)


def write(
    plan: ArtifactPlan,
    snapshot: Snapshot,
    architecture: Architecture | None,
    target: Target,
    parts: Parts,
    folder: Path,
) -> None:
    """See Container.write; `parts` gives `blocks` [O, bytes a row] u8 in the checkpoint's row order.

    Raises SourceError when the model's small files are no longer those that were planned.
    """
    known = know(snapshot, architecture, target)
    layout = lay_out(snapshot, known, target, plan.tensors)
    name, size = file_name(snapshot, target), file_size(layout.head, layout.placed)
    if plan.files != {name: size}:
        what = f"the file would have {size} bytes and was planned with {plan.files.get(name)}"
        raise SourceError(snapshot.repo, what, "The model's small files changed since planning: plan anew")
    planned = {tensor.name: tensor for tensor in plan.tensors}
    path = folder / name
    with path.open("wb") as file:
        file.write(layout.head)
        for stored in layout.placed:
            tensor = planned.get(stored.name)
            rows = file_rows(tensor, parts(stored.name)["blocks"]) if tensor else torch_bytes(known.scaling.divisors)
            file.write(_checked(rows, stored))
            file.write(bytes(padded(stored.size_bytes) - stored.size_bytes))
        file.flush()
        os.fsync(file.fileno())
    verify(path, layout.placed, size)


def _checked(rows: Tensor, stored: Stored) -> memoryview:
    data = memoryview(rows.contiguous().view(torch.uint8).numpy().data).cast("B")
    assert data.nbytes == stored.size_bytes, (stored.name, data.nbytes, stored.size_bytes)
    return data


def verify(path: Path, placed: Sequence[Stored], size: int) -> None:
    """Read the file's head back; raises SourceError unless file and plan agree on size, names, types and places."""
    head = read_head(path)
    if path.stat().st_size != size or tuple(head.tensors.values()) != tuple(placed):
        raise SourceError(path.name, "the written file is not what was planned", "Check the disk, and convert again")
