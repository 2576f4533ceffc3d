"""A GGUF model in one file or in several: how tensors are divided among files, and how the files are read as one.

Names, keys and the places of the cuts are those of llama.cpp's gguf-split: all metadata in the first file, a count of
files and of tensors in each, a cut before the tensor that would exceed the limit. So our shards load where its shards
do, and each tool merges what the other wrote.

Source: llama.cpp, tools/gguf-split and llama_split_path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from converter.containers.gguf.header import (
    Field,
    Head,
    Stored,
    compose,
    file_size,
    i32,
    padded,
    place,
    read_head,
    size_of,
    u16,
)
from converter.errors import SourceError
from converter.tensor_file import read_range

NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
MOST_FILES = 65_535  # split.count is 16 bits wide
Entry = tuple[str, tuple[int, ...], str]  # name, shape, type


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file as it will be written: its head and where its tensors lie."""

    name: str
    head: bytes
    placed: tuple[Stored, ...]

    @property
    def size_bytes(self) -> int:
        return file_size(self.head, self.placed)


def divide(entries: Sequence[Entry], most_tensors: int | None, most_bytes: int | None) -> list[list[Entry]]:
    """The tensors of each file: at most most_tensors of them, taking at most most_bytes without the heads.

    A tensor that is larger than most_bytes has a file of its own.
    """
    files: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = padded(size_of(entry[1], entry[2]))
        full = most_tensors is not None and len(files[-1]) >= most_tensors
        if files[-1] and (full or (most_bytes is not None and filled + size > most_bytes)):
            files.append([])
            filled = 0
        files[-1].append(entry)
        filled += size
    return files


def lay_out_files(
    stem: str, fields: Mapping[str, Field], entries: Sequence[Entry], most_tensors: int | None, most_bytes: int | None
) -> tuple[Shard, ...]:
    """The files that hold all entries in their order: stem.gguf, or stem-00001-of-00002.gguf and so on.

    Raises SourceError when there would be more files than their names and keys can count.
    """
    files = divide(entries, most_tensors, most_bytes)
    if len(files) == 1:
        placed = place(entries)
        return (Shard(name=f"{stem}.gguf", head=compose(fields, placed), placed=placed),)
    if len(files) > MOST_FILES:
        what = f"{len(files)} files are more than GGUF can count"
        raise SourceError(stem, what, "Raise split_tensors or split_size")
    shards = []
    for number, part in enumerate(files):
        own = dict(fields) if number == 0 else {}
        own |= {NUMBER: u16(number), COUNT: u16(len(files)), TENSORS: i32(len(entries))}
        placed = place(part)
        shards.append(Shard(name=shard_name(stem, number, len(files)), head=compose(own, placed), placed=placed))
    return tuple(shards)


def too_large(shards: Sequence[Shard], most_bytes: int | None) -> tuple[str, ...]:
    """Why files hold more than was asked for, in words."""
    over = [
        shard.name for shard in shards if most_bytes and sum(padded(s.size_bytes) for s in shard.placed) > most_bytes
    ]
    return (f"a tensor is never divided, so {', '.join(over)} exceeds split_size",) if over else ()


def shard_name(stem: str, number: int, count: int) -> str:
    """The name of the file with this number, counted from 0; names count from 1."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One tensor on the disk: the file that holds it, and the byte where it begins there."""

    file: str
    start: int
    stored: Stored


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A GGUF model whatever the number of its files: metadata without what is about the split, tensors in order."""

    files: tuple[str, ...]
    fields: Mapping[str, Field]
    pieces: Mapping[str, Piece]

    def get(self, key: str) -> Any:
        """The value of metadata `key`, None when there is none."""
        return self.fields[key].value if key in self.fields else None


def read_rows(folder: Path, piece: Piece) -> Tensor:
    """The bytes of a tensor, [rows, bytes a row] u8. Raises SourceError when the file became shorter."""
    stored = piece.stored
    raw = read_range(folder / piece.file, piece.start, stored.size_bytes)
    if len(raw) < stored.size_bytes:
        raise SourceError(piece.file, f"the file ends inside tensor {stored.name}", "Write or fetch it again")
    rows = math.prod(stored.shape[:-1])
    return raw.reshape(rows, stored.size_bytes // max(1, rows))


def models_in(names: Sequence[str], where: str) -> dict[str, tuple[str, ...]]:
    """The files of each GGUF model among these names, by the model's first file.

    Raises SourceError when a file of several is missing.
    """
    models: dict[str, tuple[str, ...]] = {}
    there = set(names)
    for name in sorted(name for name in names if name.endswith(".gguf")):
        match = NAME.fullmatch(name)
        if match is None:
            models[name] = (name,)
            continue
        stem, count = match["stem"], int(match["count"])
        wanted = tuple(shard_name(stem, number, count) for number in range(count))
        if name not in wanted:
            what = f"{name} calls itself file {int(match['number'])} of {count}"
            raise SourceError(where, what, "Give it the name that it was written with")
        missing = [other for other in wanted if other not in there]
        if missing:
            what = f"{name} is one of {count} files, and {missing[0]} is not there"
            raise SourceError(where, what, "Fetch the missing files; a download may have stopped half-way")
        models[wanted[0]] = wanted
    return models


def join(heads: Mapping[str, Head], where: str) -> Bundle:
    """The model whose files have these heads, by name and in order.

    Raises SourceError when they are not the files of one model: wrong numbers or counts, tensors twice or too few.
    """
    pieces: dict[str, Piece] = {}
    for number, (name, head) in enumerate(heads.items()):
        said = (head.get(NUMBER) or 0, head.get(COUNT) or 1)
        if said != (number, len(heads)):
            own = (
                f"file {said[0] + 1} of {said[1]}"
                if all(isinstance(one, int) for one in said)
                else "no file of a number"
            )
            what = f"{name} says it is {own}, not {number + 1} of {len(heads)}"
            raise SourceError(
                where, what, "Name the first of the files, and keep the names that they were written with"
            )
        for stored in head.tensors.values():
            if stored.name in pieces:
                what = f"{name} and {pieces[stored.name].file} both hold {stored.name}"
                raise SourceError(where, what, "The files are of different models: fetch all of them again")
            pieces[stored.name] = Piece(file=name, start=head.data_start + stored.offset, stored=stored)
    first = next(iter(heads.values()))
    if len(heads) > 1 and first.get(TENSORS) != len(pieces):
        what = f"the first file counts {first.get(TENSORS)} tensors, and together the files hold {len(pieces)}"
        raise SourceError(where, what, "The files are of different models: fetch all of them again")
    fields = {key: entry for key, entry in first.fields.items() if key not in (NUMBER, COUNT, TENSORS)}
    return Bundle(files=tuple(heads), fields=fields, pieces=pieces)


def open_bundle(folder: Path, files: Sequence[str]) -> Bundle:
    """The model in these files of `folder`, given in order. Raises SourceError as read_head and join do."""
    return join({name: read_head(folder / name) for name in files}, files[0])


def siblings(first: Path) -> tuple[str, ...]:
    """The names of all files of the model whose first file this is. Raises SourceError when one is not there."""
    match = NAME.fullmatch(first.name)
    if match is None:
        return (first.name,)
    if int(match["number"]) != 1:
        what = "this is not the first of the files of a model"
        raise SourceError(str(first), what, f"Name {shard_name(match['stem'], 0, int(match['count']))}")
    around = [NAME.fullmatch(path.name) for path in first.parent.glob("*.gguf")]
    own = [other[0] for other in around if other and (other["stem"], other["count"]) == (match["stem"], match["count"])]
    return models_in(own, str(first.parent))[first.name]


def copied(folder: Path, piece: Piece, chunk_bytes: int = 1 << 24) -> Iterator[Tensor]:
    """The bytes of a tensor as they lie in the file, u8, a chunk at a time."""
    size = piece.stored.size_bytes
    for done in range(0, size, chunk_bytes):
        raw = read_range(folder / piece.file, piece.start + done, min(chunk_bytes, size - done))
        if len(raw) < min(chunk_bytes, size - done):
            what = f"the file ends inside tensor {piece.stored.name}"
            raise SourceError(piece.file, what, "Write or fetch it again")
        yield raw
