"""GGUF: a file that llama.cpp and its relatives load, with weights, hyper-parameters and tokenizer inside.

The door for gguf-py, of which we take the names (tensors, types, keys) but not the writer: see header.
"""

from __future__ import annotations

from pathlib import Path

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, Opened, Parts
from converter.containers.gguf import requantize
from converter.containers.gguf import write as writing
from converter.containers.gguf.open import open_file
from converter.manifest import Target
from converter.source import Snapshot


class GGUFContainer:
    """See Container: one `.gguf` file or several shards. Parts are `blocks` of ggml rows, in the source's row order."""

    def plan(self, snapshot: Snapshot, architecture: Architecture | None, target: Target) -> ArtifactPlan:
        if snapshot.gguf:
            return requantize.plan(snapshot, target)
        return writing.plan(snapshot, architecture, target)

    def write(
        self,
        plan: ArtifactPlan,
        snapshot: Snapshot,
        architecture: Architecture | None,
        target: Target,
        parts: Parts,
        folder: Path,
    ) -> None:
        if snapshot.gguf:
            requantize.write(plan, snapshot, target, parts, folder)
        else:
            writing.write(plan, snapshot, architecture, target, parts, folder)

    def open(self, folder: Path, architecture: Architecture | None) -> Opened:
        return open_file(folder, architecture)


GGUF = GGUFContainer()
