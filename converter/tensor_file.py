"""Tensors in a file that is either whole or not there: what one step leaves for the next.

Written under a temporary name, then renamed: a kill at any moment leaves no half file under the final name, and two
writers of the same file do not meet. Who wants it on the disk before it goes on brings it there (see jobs/store.py). A
read tensor is a view of the mapped file, so that rows of a hidden state can be read one by one; the price is that the
pages read stay charged until memory is wanted elsewhere.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from converter.errors import SourceError


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name, each read when asked for; `metadata` is what was saved with them."""

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        self._names: tuple[str, ...] = tuple(self._file.keys())
        self.metadata: Mapping[str, str] = self._file.metadata() or {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_range(path: Path, start: int, size_bytes: int) -> Tensor:
    """The bytes [start, start + size_bytes) of a file, u8, in memory of their own; fewer where the file ends before.

    Raises OSError when it cannot be read.
    """
    raw = torch.empty(size_bytes, dtype=torch.uint8)
    view, done = raw.numpy().data, 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while done < len(view) and (count := file.readinto(view[done:])):  # one read() stops at 2 GiB on Linux
            done += count
    return raw[:done]


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and metadata to `path`, which then holds all of them or, after a kill, what it held before."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        safetensors.torch.save_file(
            {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, part, dict(metadata or {})
        )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_rows(path: Path, name: str, shape: tuple[int, int], slabs: Iterable[Tensor]) -> None:
    """Write one u8 tensor [R, B] to `path` from slabs of its rows, in order, as `save` would write it whole.

    The library wants a tensor whole; its header, which is all that stands in front, follows from the shape.
    """
    size = shape[0] * shape[1]
    header = json.dumps({name: {"dtype": "U8", "shape": list(shape), "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            start = file.tell()
            for slab in slabs:
                assert slab.dtype == torch.uint8 and slab.shape[1] == shape[1], (name, slab.shape, shape)
                file.write(slab.contiguous().numpy().data)
            assert file.tell() - start == size, (name, file.tell() - start, size)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        what = f"the file cannot be read: {error}"
        raise SourceError(str(path), what, "Delete it and run again: it is computed anew") from error


def load(path: Path) -> TensorFile:
    """The tensors in `path`, read when asked for. Raises SourceError when it is missing or no safetensors file."""
    return TensorFile(path)
