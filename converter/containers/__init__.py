"""Containers: how coded tensors are stored, planned to the byte before any weight is read.

A container answers three questions: what will be in the artifact (`plan`, from headers and small files alone), how it
is written (`write`, streaming part by part), and what a reader of the files computes with (`open`, decoding what lies
on disk). Everything measured goes through `open`, never through memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from converter.architecture import Architecture
from converter.caches import Cached, CacheRounding
from converter.grids import Grid
from converter.manifest import Target
from converter.schemes import Activations

if TYPE_CHECKING:
    from converter.source import Snapshot  # which reads weights in parts, some of them by `packing`


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """One tensor of an artifact: where it comes from, how it is stored, how many bytes that takes.

    name: in the artifact. source: the checkpoint tensor it is made of. operation: what is done to its rows on the way,
    such as "rope_permute:8" (empty: nothing). prepare: what is made of its values before they are rounded, such as
    "halves:1"; several tensors may then have one source. fallback: why its grid is not the one asked for (empty: it
    is). quantized: whether the target's method rounds it (otherwise it is stored as floating point). stack: the tensor
    of the file that this is one slice of, such as an expert's; slices follow each other (empty: it is a tensor itself).
    activations: how the artifact says that what the linear reads is quantized (None: it is not). cached: scales that
    stand beside it of the keys and values that it makes (None: readers keep those as they are).
    """

    name: str
    source: str
    shape: tuple[int, ...]
    grid: Grid
    block: int | None
    size_bytes: int
    quantized: bool
    operation: str = ""
    prepare: str = ""
    fallback: str = ""
    stack: str = ""
    activations: Activations | None = None
    cached: Cached | None = None


@dataclass(frozen=True, kw_only=True)
class ArtifactPlan:
    """One artifact: its tensors in the order they are stored, and its weight files with their sizes.

    exact: whether sizes are to the byte; compressed Parquet can only be bounded from above.
    dropped: checkpoint tensors that are left out, with the reason. notes: where readers of the artifact compute
    something else than transformers does with the original, a sentence each without full stop. imatrix_sha256: of the
    file that importance is taken from (empty: there is none).
    """

    tensors: tuple[TensorPlan, ...]
    files: Mapping[str, int]
    exact: bool
    dropped: Mapping[str, str]
    notes: tuple[str, ...] = ()
    imatrix_sha256: str = ""


# Gives the parts (see converter/grids) of a planned tensor, by its name in the artifact.
Parts = Callable[[str], Mapping[str, Tensor]]


class Opened(Protocol):
    """An artifact as its files hold it; names are those of the checkpoint."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def read(self, name: str) -> Tensor:
        """The weight that a reader computes with: f32, in the checkpoint's shape and row order."""
        ...

    def stored(self, name: str) -> tuple[str, int]:
        """The type it is stored as ("Q4_K", "int4 g128") and the bytes it takes in the file, scales included."""
        ...

    def activations(self, name: str) -> Activations | None:
        """How the artifact says that the linear's input is quantized; None when inputs keep their precision."""
        ...

    def keeps(self, prefix: str) -> CacheRounding | None:
        """How keys and values are kept in the block whose tensors' names begin with `prefix`; None: as they are."""
        ...


class Container(Protocol):
    """One way to store a model."""

    def plan(self, snapshot: Snapshot, architecture: Architecture | None, target: Target) -> ArtifactPlan:
        """What the artifact will hold. Raises UnsupportedError or SourceError when it cannot be made."""
        ...

    def write(
        self,
        plan: ArtifactPlan,
        snapshot: Snapshot,
        architecture: Architecture | None,
        target: Target,
        parts: Parts,
        folder: Path,
    ) -> None:
        """Write the artifact's files into `folder`, which exists and is empty; the caller makes it visible."""
        ...

    def open(self, folder: Path, architecture: Architecture | None) -> Opened:
        """The artifact in `folder`, its headers checked."""
        ...
