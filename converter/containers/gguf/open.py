"""A GGUF file as its reader sees it, under the checkpoint's names and in the checkpoint's row order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from converter.architecture import Architecture
from converter.containers.gguf.family import family_of
from converter.containers.gguf.header import Head, Stored, read_head
from converter.containers.gguf.tensors import Named, named, undo_operation
from converter.errors import SourceError
from converter.tensor_file import read_range
from quantkernels import ggml


@dataclass(frozen=True, kw_only=True)
class OpenedGGUF:
    """An opened file; `entries` gives by checkpoint name what it is called here and what was done to its rows."""

    path: Path
    head: Head
    entries: Mapping[str, Named]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    def read(self, name: str) -> Tensor:
        """See Opened.read: the checkpoint's tensor `name`, decoded, f32."""
        stored = self._stored(name)
        rows = read_rows(self.path, self.head, stored)
        decoded = ggml.dequantize(rows, stored.type).reshape(stored.shape)
        return undo_operation(self.entries[name].operation, decoded)

    def stored(self, name: str) -> tuple[str, int]:
        """See Opened.stored."""
        stored = self._stored(name)
        return stored.type, stored.size_bytes

    def activation_bits(self, name: str) -> int | None:
        """Always None: GGUF stores weights and says nothing of activations."""
        return None

    def _stored(self, name: str) -> Stored:
        return self.head.tensors[self.entries[name].name]


def read_rows(path: Path, head: Head, stored: Stored) -> Tensor:
    """The bytes of one tensor, [O, bytes a row] u8, in memory of their own."""
    raw = read_range(path, head.data_start + stored.offset, stored.size_bytes)
    if len(raw) < stored.size_bytes:
        raise SourceError(path.name, f"the file ends inside tensor {stored.name}", "Write or fetch it again")
    rows = 1
    for size in stored.shape[:-1]:
        rows *= size
    return raw.reshape(rows, -1)


def open_file(folder: Path, architecture: Architecture | None) -> OpenedGGUF:
    """Open the one GGUF file in `folder`; raises SourceError when there is not one, or when it is of another family."""
    found = sorted(folder.glob("*.gguf"))
    if len(found) != 1:
        what = f"the folder holds {len(found)} GGUF files, and an artifact has one"
        raise SourceError(folder.name, what, "Convert the model again into an empty folder")
    path = found[0]
    family = family_of(architecture, path.name)
    assert architecture is not None  # family_of() has refused it
    head = read_head(path)
    written = str(head.fields["general.architecture"].value) if "general.architecture" in head.fields else "nothing"
    if written != family.architecture:
        what = f"the file is of the architecture {written}, and the model of {family.architecture}"
        raise SourceError(path.name, what, "Convert the model again into an empty folder")
    prefix = written + "."
    integers = {
        key.removeprefix(prefix): entry.value
        for key, entry in head.fields.items()
        if key.startswith(prefix) and isinstance(entry.value, int)
    }
    tensors = named(family, architecture, integers["block_count"], integers)
    entries = {tensor.source: tensor for tensor in tensors if tensor.name in head.tensors}
    return OpenedGGUF(path=path, head=head, entries=entries)
