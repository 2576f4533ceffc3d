"""Importance of input columns, as files that llama.cpp's tools write, read, merge and quantize with.

Two forms exist. The GGUF form holds sums of squares and counts, so that files add up; the older `.dat` form holds
means times the number of chunks, from which counts cannot be had back. Only what a file declares is read when it is
opened, so that a plan can check what it covers; values are read weight by weight, since those of a model with many
experts take a gigabyte. What cannot weigh anything (zeros, NaN) is mended and told: blocks all of whose columns weigh
nothing get scales that are not finite.

Source: llama.cpp, tools/imatrix and its loader (the GGUF form, the older form, and what a count of 0 means).
"""

# M matrices of a weight (experts; 1 for most), I columns

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from converter.containers.gguf.header import MAGIC, compose, padded, place, read_head, string, strings, u32
from converter.errors import SourceError
from converter.methods.rtn import DARK, SEEN
from converter.tensor_file import read_range

SUMS, COUNTS = ".in_sum2", ".counts"
REMEDY = "Make it anew with llama-imatrix, or write imatrix: true"


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What was seen of one weight's inputs: sum_squares [M, I], and by matrix over how many rows, counts [M]."""

    sum_squares: Tensor
    counts: Tensor


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where the values of one weight lie: `values` f32 in all from byte `start`; counts, by matrix, are read already.

    A file in the older form has one count, the number of chunks, whatever the number of matrices.
    """

    start: int
    values: int
    counts: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Imatrix:
    """An imatrix file: its entries by the name of the weight, and what it was computed from.

    chunks is the number of chunks of chunk_size tokens; legacy: whether the file is in the older form, whose chunk_size
    is not known and 0.
    """

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    legacy: bool = False

    def read(self, name: str) -> Sums:
        """Sums and counts of one weight as stored; raises SourceError when the file became shorter."""
        entry = self.entries[name]
        raw = read_range(self.path, entry.start, 4 * entry.values)
        if len(raw) < 4 * entry.values:
            raise SourceError(self.path.name, f"the file ends inside the values of {name}", REMEDY)
        squares = raw.view(torch.float32).reshape(len(entry.counts), -1)
        return Sums(sum_squares=squares, counts=torch.tensor(entry.counts, dtype=torch.float64))

    def misfit(self, name: str, shape: Sequence[int]) -> str:
        """Why the entry cannot weigh a weight of `shape` [..., O, I]; empty when it can."""
        entry, matrices = self.entries.get(name), math.prod(shape[:-2])
        if entry is None:
            return "the imatrix has no entry for it"
        if entry.values != matrices * shape[-1]:
            return f"the imatrix has {entry.values} values for it, and it has {matrices * shape[-1]} columns"
        return ""

    def importance(self, name: str, shape: Sequence[int]) -> tuple[Tensor, str]:
        """The mean square [M, I] f32 of each input column of a weight of `shape`, and what had to be mended of it.

        As llama-quantize has it: sum / count in f32, and 1 for a matrix that no row reached. The caller has looked
        that the entry fits.
        """
        assert not self.misfit(name, shape), name
        sums = self.read(name)
        counts = sums.counts.to(torch.float32)[:, None]
        means = torch.where(counts > 0, sums.sum_squares / counts, sums.sum_squares if self.legacy else 1.0)
        return mended(means.reshape(-1, shape[-1]))


def mended(means_MI: Tensor) -> tuple[Tensor, str]:
    """Means that can weigh every column: positive and finite; and what was wrong, in words (empty: nothing).

    Zeros keep a millionth of their matrix' mean, what is negative or no number the mean itself; a matrix without any
    usable value weighs all columns alike.
    """
    broken = ~torch.isfinite(means_MI) | (means_MI < 0)
    dark = means_MI == 0
    said = []
    mended_MI = means_MI.clone()
    for m in torch.nonzero((broken | dark).any(1)).flatten().tolist():
        usable = means_MI[m][~(broken[m] | dark[m])].double()
        average = float(usable.mean()) if len(usable) else 0.0
        if not SEEN < average < math.inf:
            mended_MI[m] = 1
            continue
        mended_MI[m][dark[m]] = DARK * average
        mended_MI[m][broken[m]] = average
    if int(dark.sum()):
        said.append(f"{int(dark.sum())} of {dark.numel()} columns were never lit")
    if int(broken.sum()):
        said.append(f"{int(broken.sum())} of {broken.numel()} values are negative or no numbers")
    return mended_MI, f"in the imatrix {' and '.join(said)}; they were mended" if said else ""


def open_imatrix(path: Path) -> Imatrix:
    """The imatrix file at `path`, in either form. Raises SourceError when it is none, or was damaged or cut short."""
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                return _open_legacy(file, path)
        return _open_gguf(path)
    except OSError as error:
        raise SourceError(
            str(path), f"the imatrix cannot be read: {error.strerror}", "Check path and rights"
        ) from error


def _open_gguf(path: Path) -> Imatrix:
    head = read_head(path)
    kind = head.fields["general.type"].value if "general.type" in head.fields else None
    if kind != "imatrix":
        what = f"this GGUF file is of the type {kind!r}, not an imatrix"
        raise SourceError(path.name, what, "Name the file that llama-imatrix wrote")
    entries: dict[str, Entry] = {}
    for stored in head.tensors.values():
        name = stored.name.removesuffix(SUMS).removesuffix(COUNTS)
        sums, counts = head.tensors.get(name + SUMS), head.tensors.get(name + COUNTS)
        if name in entries or name == stored.name:
            continue
        if sums is None or counts is None or (sums.type, counts.type) != ("F32", "F32"):
            raise SourceError(path.name, f"{name} does not have sums and counts, both as F32", REMEDY)
        matrices, values = math.prod(counts.shape), math.prod(sums.shape)
        if not matrices or not values or values % matrices:
            raise SourceError(path.name, f"{name} has {values} sums for {matrices} counts", REMEDY)
        raw = read_range(path, head.data_start + counts.offset, counts.size_bytes).view(torch.float32)
        if not bool((torch.isfinite(raw) & (raw >= 0)).all()):
            raise SourceError(path.name, f"{name} has a count that is none", REMEDY)
        entries[name] = Entry(
            start=head.data_start + sums.offset, values=values, counts=tuple(raw.double().round().tolist())
        )
    if not entries:
        raise SourceError(path.name, "the imatrix has no entry", REMEDY)

    def number(key: str) -> int:
        value = head.fields[f"imatrix.{key}"].value if f"imatrix.{key}" in head.fields else 0
        return value if type(value) is int else 0

    datasets = head.fields["imatrix.datasets"].value if "imatrix.datasets" in head.fields else ()
    return Imatrix(
        path=path,
        entries=entries,
        datasets=tuple(map(str, datasets)) if isinstance(datasets, tuple) else (),
        chunks=number("chunk_count"),
        chunk_size=number("chunk_size"),
    )


def _open_legacy(file: BinaryIO, path: Path) -> Imatrix:
    """The older form: int32 number of entries; each int32 length and name, int32 chunks, int32 number of values, f32s;
    then, where it was written, int32 chunks, int32 length and name of the data set."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)

    def damaged(what: str) -> SourceError:
        return SourceError(path.name, f"this is no imatrix, or it was cut short: {what}", REMEDY)

    def number(what: str) -> int:
        data = file.read(4)
        if len(data) < 4:
            raise damaged(f"it ends where {what} should be")
        return int(struct.unpack("<i", data)[0])

    def text(what: str) -> str:
        length = number(f"the length of {what}")
        if not 0 < length <= size - file.tell():
            raise damaged(f"{what} claims {length} bytes")
        try:
            return file.read(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(f"{what} is not UTF-8") from error

    entries: dict[str, Entry] = {}
    count = number("the number of entries")
    for index in range(count):
        name = text(f"the name of entry {index + 1} of {count}")
        chunks, values = number(f"the count of {name}"), number(f"the length of {name}")
        if name in entries or not 0 < 4 * values <= size - file.tell():
            raise damaged(f"{name} claims {values} values" if name not in entries else f"{name} appears twice")
        entries[name] = Entry(start=file.tell(), values=values, counts=(float(max(0, chunks)),))
        file.seek(4 * values, os.SEEK_CUR)
    if not entries:
        raise damaged(f"it has {count} entries")
    ended = file.tell() == size
    return Imatrix(
        path=path,
        entries=entries,
        chunks=0 if ended else max(0, number("the number of chunks")),
        datasets=() if ended or file.tell() == size else (text("the name of the data set"),),
        legacy=True,
    )


def write_imatrix(path: Path, sums: Mapping[str, Sums], datasets: Sequence[str], chunks: int, chunk_size: int) -> None:
    """Write `sums` by GGUF tensor name ("blk.0.attn_q.weight"); chunks of `chunk_size` tokens were looked at."""
    fields = {
        "general.type": string("imatrix"),
        "imatrix.datasets": strings(list(datasets)),
        "imatrix.chunk_count": u32(chunks),
        "imatrix.chunk_size": u32(chunk_size),
    }
    data: dict[str, Tensor] = {}
    for name, entry in sorted(sums.items()):
        data[name + SUMS] = entry.sum_squares.to(torch.float32)
        data[name + COUNTS] = entry.counts.to(torch.float32).reshape(-1, 1)
        assert entry.sum_squares.ndim == 2 and len(entry.sum_squares) == len(entry.counts), name
    placed = place([(name, tuple(values.shape), "F32") for name, values in data.items()])
    with path.open("wb") as file:
        file.write(compose(fields, placed))
        for stored in placed:
            file.write(data[stored.name].contiguous().numpy().tobytes())
            file.write(bytes(padded(stored.size_bytes) - stored.size_bytes))
