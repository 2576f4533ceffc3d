"""The head of a GGUF file: composed in memory to the byte, and read back with every length checked.

Everything the head says (names, types, shapes, offsets, metadata) follows from headers and small files, so its bytes
are known before any weight is read: that gives exact sizes in the plan and a file that is written front to back once.
gguf-py's own writer composes while writing and its reader trusts lengths; the price of a codec of our own is this file,
and the tests hold it against gguf-py in both directions.

Source: the GGUF specification, version 3 (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from converter.errors import SourceError
from converter.marks import quoted

ALIGNMENT = 32
MAGIC = b"GGUF"
VERSION = 3
MAX_DIMENSIONS = 4
# What a head may take: a vocabulary of 256k tokens with scores, types and merges has 1.3 million values in 16 MB. Once
# read, values take up to 32 times their bytes, so a head that lies would take all memory before the file ends.
HEAD_LIMIT_BYTES = 256 << 20
MOST_VALUES = 8 << 20
MOST_TENSORS = 1 << 17
MOST_ELEMENTS = 1 << 63  # of a tensor, were each of its dimensions at least 1
STRING, ARRAY = int(gguf.GGUFValueType.STRING), int(gguf.GGUFValueType.ARRAY)
# struct codes of the scalar kinds
CODES: dict[int, str] = {
    int(gguf.GGUFValueType.UINT8): "B",
    int(gguf.GGUFValueType.INT8): "b",
    int(gguf.GGUFValueType.UINT16): "H",
    int(gguf.GGUFValueType.INT16): "h",
    int(gguf.GGUFValueType.UINT32): "I",
    int(gguf.GGUFValueType.INT32): "i",
    int(gguf.GGUFValueType.FLOAT32): "f",
    int(gguf.GGUFValueType.BOOL): "?",
    int(gguf.GGUFValueType.UINT64): "Q",
    int(gguf.GGUFValueType.INT64): "q",
    int(gguf.GGUFValueType.FLOAT64): "d",
}
TYPE_NUMBERS: dict[str, int] = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}
TYPE_NAMES: dict[int, str] = {number: name for name, number in TYPE_NUMBERS.items()}
# weights and bytes of a block, by type name
BLOCKS: dict[str, tuple[int, int]] = {kind.name: tuple(sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One metadata value and its kind (a GGUF value type number); `item` is the kind of an array's elements."""

    kind: int
    value: Any
    item: int = 0


def u32(value: int) -> Field:
    return Field(kind=int(gguf.GGUFValueType.UINT32), value=int(value))


def u16(value: int) -> Field:
    return Field(kind=int(gguf.GGUFValueType.UINT16), value=int(value))


def i32(value: int) -> Field:
    return Field(kind=int(gguf.GGUFValueType.INT32), value=int(value))


def f32(value: float) -> Field:
    return Field(kind=int(gguf.GGUFValueType.FLOAT32), value=float(value))


def boolean(value: bool) -> Field:
    return Field(kind=int(gguf.GGUFValueType.BOOL), value=bool(value))


def string(value: str) -> Field:
    return Field(kind=STRING, value=str(value))


def strings(values: Sequence[str]) -> Field:
    return Field(kind=ARRAY, item=STRING, value=tuple(values))


def i32s(values: Sequence[int]) -> Field:
    return Field(kind=ARRAY, item=int(gguf.GGUFValueType.INT32), value=tuple(values))


def u8s(values: bytes) -> Field:
    return Field(kind=ARRAY, item=int(gguf.GGUFValueType.UINT8), value=tuple(values))


def booleans(values: Sequence[bool]) -> Field:
    return Field(kind=ARRAY, item=int(gguf.GGUFValueType.BOOL), value=tuple(values))


def f32s(values: Sequence[float]) -> Field:
    return Field(kind=ARRAY, item=int(gguf.GGUFValueType.FLOAT32), value=tuple(values))


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor in a file: its shape in rows-first order, its ggml type, and where its bytes lie from `data_start`."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a GGUF file says of itself; `data_start` is the byte where the first tensor's data begins."""

    fields: Mapping[str, Field]
    tensors: Mapping[str, Stored]
    data_start: int

    def value(self, key: str) -> Any:
        """The value of metadata `key`; raises KeyError when the file has none."""
        return self.fields[key].value

    def get(self, key: str) -> Any:
        """The value of metadata `key`, None when the file has none."""
        return self.fields[key].value if key in self.fields else None


def size_of(shape: Sequence[int], type: str) -> int:
    """Bytes of a tensor of `shape` stored as ggml `type`; its rows must hold whole blocks."""
    weights, size_bytes = BLOCKS[type]
    assert shape[-1] % weights == 0, (tuple(shape), type)
    return math.prod(shape) // weights * size_bytes


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def place(tensors: Sequence[tuple[str, tuple[int, ...], str]]) -> tuple[Stored, ...]:
    """Tensors given as (name, shape, type) laid out one after the other, each beginning at a multiple of 32 bytes."""
    placed: list[Stored] = []
    offset = 0
    for name, shape, type in tensors:
        size = size_of(shape, type)
        placed.append(Stored(name=name, shape=shape, type=type, offset=offset, size_bytes=size))
        offset += padded(size)
    return tuple(placed)


def compose(fields: Mapping[str, Field], tensors: Sequence[Stored]) -> bytes:
    """The head of a file with these metadata and tensors, padded to where the data begins."""
    out = bytearray(MAGIC)
    out += struct.pack("<IQQ", VERSION, len(tensors), len(fields))
    for key, entry in fields.items():
        try:
            out += _text(key) + struct.pack("<I", entry.kind) + _payload(entry)
        except (struct.error, OverflowError) as error:
            what = f"{key} is {quoted(str(entry.value))}, which its kind of number cannot hold"
            raise SourceError("GGUF metadata", what, "Mend config.json, or what else says it") from error
    for tensor in tensors:
        out += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))  # GGUF lists the row length first
        out += struct.pack("<IQ", TYPE_NUMBERS[tensor.type], tensor.offset)
    out += bytes(padded(len(out)) - len(out))
    return bytes(out)


def file_size(head: bytes, tensors: Sequence[Stored]) -> int:
    """Bytes of the whole file: the head, then every tensor padded to the alignment, the last one too."""
    return len(head) + sum(padded(tensor.size_bytes) for tensor in tensors)


def _text(value: str) -> bytes:
    try:
        data = value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can say it
        what = f"{value[:40]!r} holds half a character (a surrogate without its other half), which no GGUF file can say"
        raise SourceError("GGUF metadata", what, "Mend the tokenizer's files, or what else says it") from error
    return struct.pack("<Q", len(data)) + data


def _payload(entry: Field) -> bytes:
    if entry.kind == STRING:
        return _text(entry.value)
    if entry.kind != ARRAY:
        return struct.pack("<" + CODES[entry.kind], entry.value)
    start = struct.pack("<IQ", entry.item, len(entry.value))
    if entry.item == STRING:
        return start + b"".join(map(_text, entry.value))
    return start + struct.pack(f"<{len(entry.value)}{CODES[entry.item]}", *entry.value)


class HeadIncompleteError(Exception):
    """The bytes at hand end inside the head, and the file goes on: bring more of it."""


class _Cursor:
    """Reads forward through a file's first bytes; raises SourceError instead of reading past the end of the file."""

    def __init__(self, data: mmap.mmap | bytes, size_bytes: int, where: str) -> None:
        self.data = data
        self.size_bytes = size_bytes  # of the whole file
        self.where = where
        self.position = 0
        self.values = 0  # of metadata, so far

    def fail(self, what: str) -> SourceError:
        return SourceError(self.where, what, "The file is damaged or was cut short: write or fetch it again")

    def take(self, size: int) -> bytes:
        if size > self.size_bytes - self.position:
            raise self.fail(f"the file ends at byte {self.size_bytes}, inside its own header")
        if self.position + size > HEAD_LIMIT_BYTES:
            what = f"the head of the file does not end within {HEAD_LIMIT_BYTES >> 20} MiB"
            raise SourceError(self.where, what, "Choose another file: this one holds no model")
        if size > len(self.data) - self.position:
            raise HeadIncompleteError
        start, self.position = self.position, self.position + size
        return self.data[start : self.position]

    def count(self, number: int, what: str, most: int) -> int:
        """The number, which the head claims to hold of something, unless it is more than any model has."""
        if number > most:
            raise self.fail(f"the header claims {number:,} {what}, and no model has more than {most:,}")
        return number

    def unpack(self, codes: str) -> tuple[Any, ...]:
        return struct.unpack("<" + codes, self.take(struct.calcsize("<" + codes)))

    def text(self) -> str:
        (size,) = self.unpack("Q")
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("the header holds a text that is not UTF-8") from error

    def scalars(self, kind: int, count: int) -> tuple[Any, ...]:
        self.values = self.count(self.values + count, "values", MOST_VALUES)
        if kind == STRING:
            return tuple(self.text() for _ in range(count))
        if kind not in CODES:
            raise self.fail(f"the header holds a value of the unknown kind {kind}")
        size = struct.calcsize("<" + CODES[kind])
        return struct.unpack(f"<{count}{CODES[kind]}", self.take(size * count))

    def field(self) -> Field:
        (kind,) = self.unpack("I")
        if kind != ARRAY:
            return Field(kind=kind, value=self.scalars(kind, 1)[0])
        item, count = self.unpack("IQ")
        return Field(kind=kind, item=item, value=self.scalars(item, count))


def read_head(path: Path) -> Head:
    """The head of the GGUF file at `path`; raises SourceError as parse_head does, naming the file."""
    size_bytes = path.stat().st_size
    if not size_bytes:  # which cannot be mapped
        raise SourceError(path.name, "this is not a GGUF file: it is empty", "Write or fetch it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return parse_head(data, size_bytes, path.name)


def parse_head(data: mmap.mmap | bytes, size_bytes: int, where: str) -> Head:
    """The head of a GGUF file of size_bytes, of which `data` are the first bytes.

    Raises SourceError when it is no GGUF file, ends too early, or places tensors outside the file or over one another,
    and HeadIncompleteError when `data` is too short to tell.
    """
    cursor = _Cursor(data, size_bytes, where)
    if size_bytes < 24:
        raise SourceError(where, "this is not a GGUF file: it has no header", "Write or fetch it again")
    if cursor.take(4) != MAGIC:
        raise SourceError(where, "this is not a GGUF file: its first bytes are others", "Write or fetch it again")
    version, tensor_count, field_count = cursor.unpack("IQQ")
    if version != VERSION:
        raise SourceError(where, f"this is GGUF version {version}", f"Convert it to version {VERSION}")
    cursor.count(tensor_count, "tensors", MOST_TENSORS)
    cursor.count(field_count, "keys", MOST_VALUES)
    fields: dict[str, Field] = {}
    for _ in range(field_count):
        key = cursor.text()
        if key in fields:
            raise cursor.fail(f"the header holds {quoted(key)} twice")
        fields[key] = cursor.field()
    alignment = fields["general.alignment"].value if "general.alignment" in fields else ALIGNMENT
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.fail(f"the header declares an alignment of {alignment!r} bytes")
    tensors = [_tensor(cursor) for _ in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    _check_places(tensors, size_bytes - start, cursor)
    return Head(fields=fields, tensors={tensor.name: tensor for tensor in tensors}, data_start=start)


def _tensor(cursor: _Cursor) -> Stored:
    name = cursor.text()
    said = quoted(name)
    (dimensions,) = cursor.unpack("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {said} claims {dimensions} dimensions")
    shape = tuple(reversed(cursor.unpack(f"{dimensions}Q")))
    if math.prod(max(1, size) for size in shape) >= MOST_ELEMENTS:
        raise cursor.fail(f"tensor {said} claims the shape {list(shape)}")
    number, offset = cursor.unpack("IQ")
    if number not in TYPE_NAMES:
        raise cursor.fail(f"tensor {said} is of the unknown type {number}")
    type = TYPE_NAMES[number]
    if shape[-1] % BLOCKS[type][0]:
        raise cursor.fail(f"tensor {said} has rows of {shape[-1]} weights, which no {type} blocks fill")
    return Stored(name=name, shape=shape, type=type, offset=offset, size_bytes=size_of(shape, type))


def _check_places(tensors: Sequence[Stored], available: int, cursor: _Cursor) -> None:
    end = 0
    for tensor in sorted(tensors, key=lambda item: item.offset):
        if tensor.offset < end:
            raise cursor.fail(f"tensor {quoted(tensor.name)} lies over the one before it")
        end = tensor.offset + tensor.size_bytes
        if end > available:
            raise cursor.fail(f"tensor {quoted(tensor.name)} ends {end - available} bytes behind the end of the file")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise cursor.fail("two tensors have the same name")
