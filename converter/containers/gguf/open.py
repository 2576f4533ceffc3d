"""A GGUF artifact as its reader sees it, under the checkpoint's names and in the checkpoint's row order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from converter.architecture import Architecture
from converter.caches import CacheRounding
from converter.containers.gguf.family import family_of
from converter.containers.gguf.hyper import WHOLE
from converter.containers.gguf.operations import undo_operation, undo_preparation
from converter.containers.gguf.shards import Bundle, Piece, models_in, open_bundle, read_rows
from converter.containers.gguf.tensors import Named, named
from converter.errors import SourceError
from converter.schemes import Activations
from converter.values import decoded


@dataclass(frozen=True, kw_only=True)
class OpenedGGUF:
    """An opened artifact; `entries` gives by checkpoint name what it is called here and what was done to its rows.

    numbers: tensors of the checkpoint that the file has as metadata, f32.
    """

    folder: Path
    bundle: Bundle
    entries: Mapping[str, tuple[Named, ...]]
    numbers: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.entries, *self.numbers)

    def read(self, name: str) -> Tensor:
        """See Opened.read: the checkpoint's tensor `name`, decoded, f32."""
        if name in self.numbers:
            return self.numbers[name].clone()
        parts = [self._part(entry) for entry in self.entries[name]]
        prepare = self.entries[name][0].prepare
        return undo_preparation(prepare, parts) if prepare else parts[0]

    def _part(self, entry: Named) -> Tensor:
        piece = self._piece(entry)
        weight = decoded(read_rows(self.folder, piece), piece.stored.type).float().reshape(piece.stored.shape)
        return undo_operation(entry.operation, weight)

    def stored(self, name: str) -> tuple[str, int]:
        """See Opened.stored; several types are those of the tensors that the file has in its place."""
        if name in self.numbers:
            return "F32", self.numbers[name].nbytes
        pieces = [self._piece(entry).stored for entry in self.entries[name]]
        types = dict.fromkeys(stored.type for stored in pieces)
        return "+".join(types), sum(stored.size_bytes for stored in pieces)

    def activations(self, name: str) -> Activations | None:
        """Always None: GGUF stores weights and says nothing of activations."""
        return None

    def keeps(self, prefix: str) -> CacheRounding | None:
        """Always None, as above."""
        return None

    def _piece(self, entry: Named) -> Piece:
        piece = self.bundle.pieces[entry.stored_as]
        return slice_of(piece, entry.slot) if entry.stack else piece


def slice_of(piece: Piece, slot: int) -> Piece:
    """Slice `slot` of a stacked tensor, such as one expert's weight."""
    stored = piece.stored
    size_bytes = stored.size_bytes // stored.shape[0]
    own = replace(stored, shape=stored.shape[1:], offset=stored.offset + slot * size_bytes, size_bytes=size_bytes)
    return replace(piece, start=piece.start + slot * size_bytes, stored=own)


def open_file(folder: Path, architecture: Architecture | None) -> OpenedGGUF:
    """Open the one GGUF model in `folder`, in one file or several; without an architecture, under the file's names.

    Raises SourceError when there is not one, or when it is of another family.
    """
    models = models_in([path.name for path in folder.glob("*.gguf")], folder.name)
    if len(models) != 1:
        what = f"the folder holds {len(models)} GGUF models, and an artifact is one"
        raise SourceError(folder.name, what, "Convert the model again into an empty folder")
    (files,) = models.values()
    bundle = open_bundle(folder, files)
    if architecture is None:
        own = {name: (Named(source=name, name=name),) for name in bundle.pieces}
        return OpenedGGUF(folder=folder, bundle=bundle, entries=own)
    family = family_of(architecture, files[0])
    written = str(bundle.get("general.architecture") or "nothing")
    if written != family.architecture:
        what = f"the file is of the architecture {written}, and the model of {family.architecture}"
        raise SourceError(files[0], what, "Convert the model again into an empty folder")
    prefix = written + "."
    integers = {
        key.removeprefix(prefix): entry.value
        for key, entry in bundle.fields.items()
        if key.startswith(prefix) and isinstance(entry.value, int)
    }
    entries: dict[str, tuple[Named, ...]] = {}
    for tensor in named(family, architecture, integers):
        if tensor.stored_as in bundle.pieces:
            entries[tensor.source] = (*entries.get(tensor.source, ()), tensor)
    numbers = {
        architecture.prefix(b) + number.tensor: torch.tensor(value, dtype=torch.float32).reshape(number.shape)
        for key, number in family.from_tensors.items()
        for b, value in enumerate(bundle.get(key if key.startswith(WHOLE) else prefix + key) or ())
    }
    return OpenedGGUF(folder=folder, bundle=bundle, entries=entries, numbers=numbers)
