"""The files of a planned artifact, written front to back, each tensor once, and then read again.

Nothing is written twice and no 16-bit file stands between checkpoint and result; memory is one tensor, whose parts are
pages of a mapped file, or its rows in another order. llama.cpp's quantizer writes zeros where the head will be and the
head last, so a killed run leaves a file that looks almost whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from converter.containers import ArtifactPlan, Parts, TensorPlan
from converter.containers.gguf.header import Stored, padded
from converter.containers.gguf.shards import Entry, Shard
from converter.containers.gguf.tensors import file_rows
from converter.containers.gguf.verify import verify
from converter.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The files to write, to the byte. made: tensors that no part is asked for, as rows of bytes.

    notes: what readers do otherwise, what is left out.
    """

    shards: tuple[Shard, ...]
    notes: tuple[str, ...] = ()
    made: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, int]:
        """The size in bytes of each file by its name."""
        return {shard.name: shard.size_bytes for shard in self.shards}


def entries_of(tensors: Sequence[TensorPlan]) -> list[Entry]:
    """Name, shape and type of every tensor of the file; the slices of a stack become one tensor [slices, ...]."""
    entries: list[Entry] = []
    for name, group in groupby(tensors, key=lambda tensor: tensor.stack or tensor.name):
        first, *others = group
        shape = (1 + len(others), *first.shape) if first.stack else first.shape
        assert all((other.shape, other.grid) == (first.shape, first.grid) for other in others), name
        entries.append((name, shape, first.grid.name))
    return entries


def check_planned(plan: ArtifactPlan, layout: Layout, where: str) -> None:
    """Raise SourceError when the files would be others than were planned."""
    if dict(plan.files) != layout.files:
        what = f"the files would be {layout.files} and were planned as {dict(plan.files)}"
        raise SourceError(where, what, "The model's small files changed since planning: plan anew")


def write_files(layout: Layout, tensors: Sequence[TensorPlan], parts: Parts, folder: Path) -> None:
    """Write the files of `layout` into `folder` and verify them; parts gives `blocks` u8 by a tensor's name."""
    planned: dict[str, list[TensorPlan]] = {}
    for tensor in tensors:
        planned.setdefault(tensor.stack or tensor.name, []).append(tensor)
    for shard in layout.shards:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.head)
            for stored in shard.placed:
                slices = planned.get(stored.name, [])
                for tensor in slices:
                    file.write(_checked(file_rows(tensor, parts(tensor.name)["blocks"]), stored, len(slices)))
                if not slices:
                    file.write(_checked(layout.made[stored.name], stored))
                file.write(bytes(padded(stored.size_bytes) - stored.size_bytes))
            file.flush()
            os.fsync(file.fileno())
    verify(folder, layout.shards)


def _checked(rows: Tensor, stored: Stored, slices: int = 1) -> memoryview:
    data = memoryview(rows.contiguous().view(torch.uint8).numpy().data).cast("B")
    assert data.nbytes * slices == stored.size_bytes, (stored.name, data.nbytes, stored.size_bytes)
    return data
