"""What a Parquet file claims of itself, held against its bytes before a library believes it.

pyarrow (26) ends the whole process on some damaged footers, and unfolds what a page claims, up to 2 GB of a few bytes.
So the footer and the head of every page are read here first: sizes lie in the file, counts agree, nothing is encrypted
or kept in another file. The price is a reader of Thrift's compact protocol, which the footer is written in.

Source: parquet-format (parquet.thrift), Thrift's compact protocol.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converter.errors import SourceError, said
from converter.marks import quoted

MAGIC = b"PAR1"
FOOTER_BYTES = 16 << 20  # a file of 5 GB has 600 groups of rows, of 1 kB each
PAGE_HEAD_BYTES = 1 << 16
MOST_VALUES = 1 << 20  # of a footer
MOST_DEPTH = 12
MOST_ROWS = 1 << 20  # a model of a trillion weights has 16,000 of 64 MB
MOST_ITEMS = 16  # of a list in a row, such as a shape
FACTS_BYTES = 64 << 20  # of everything but weights
DAMAGED = "It is cut short or damaged: write or fetch it again"
TRUE = 1  # a kind of value; the others are named where they are read
DATA_PAGE, INDEX_PAGE, DICTIONARY_PAGE, DATA_PAGE_2 = range(4)


class _BrokenError(ValueError):
    """The bytes are no Thrift, or not what the format says."""


class _Thrift:
    """Reads structs as mappings of field number to value; one use."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.left = MOST_VALUES

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise _BrokenError(f"{size} bytes are claimed behind its end")
        self.at += size
        return self.data[self.at - size : self.at]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise _BrokenError("a number does not end")

    def integer(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self.take(1)[0]:
            number = number + (head >> 4) if head >> 4 else self.integer()
            fields[number] = self.value(head & 15, depth + 1)
        return fields

    def value(self, kind: int, depth: int, inside: bool = False) -> Any:
        """One value; `inside` a list, truth takes a byte."""
        self.left -= 1
        if depth > MOST_DEPTH or self.left < 0:
            raise _BrokenError("more is nested, or listed, than a table has")
        match kind:
            case 1 | 2:  # true, false
                return self.take(1) == b"\1" if inside else kind == TRUE
            case 3:  # i8
                return self.take(1)[0]
            case 4 | 5 | 6:  # i16, i32, i64
                return self.integer()
            case 7:  # double
                return struct.unpack("<d", self.take(8))[0]
            case 8:  # binary
                return self.take(self.varint())
            case 9 | 10:  # list, set
                head = self.take(1)[0]
                size = self.varint() if head >> 4 == 15 else head >> 4
                return [self.value(head & 15, depth + 1, True) for _ in range(size)]
            case 11:  # map
                size = self.varint()
                kinds = self.take(1)[0] if size else 0
                pairs = [(self.value(kinds >> 4, depth + 1, True), self.value(kinds & 15, depth + 1, True))
                         for _ in range(size)]  # fmt: skip
                return pairs
            case 12:  # struct
                return self.struct(depth + 1)
        raise _BrokenError(f"a value is of the unknown kind {kind}")


def check_table(path: Path, facts: frozenset[str]) -> None:
    """Raise SourceError unless the file's footer and pages claim what the file holds, and as much as a model needs.

    facts: the columns that are unfolded for every row; the others are read row by row.
    """
    size = path.stat().st_size
    try:
        if size < 12:
            raise _BrokenError(f"it is only {size} bytes long")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            length = int.from_bytes(data[size - 8 : size - 4], "little")
            if data[:4] != MAGIC or data[size - 4 :] != MAGIC or not 0 < length <= min(FOOTER_BYTES, size - 12):
                raise _BrokenError("it does not begin and end as Parquet does")
            end = size - 8 - length
            footer = _Thrift(data[end : size - 8]).struct()
            _check(footer, data, end, facts)
    except (_BrokenError, LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"the table cannot be read: {said(error)}"
        raise SourceError(str(path), what, DAMAGED) from error


def _check(footer: dict[int, Any], data: mmap.mmap, end: int, facts: frozenset[str]) -> None:
    """Every group of rows and every column in it. Raises _BrokenError, or what a footer of another form leads to."""
    groups, rows, taken = footer[4], 0, 0
    leaves = sum(5 not in element for element in footer[2])
    for group in groups:
        rows += _within(group[3], MOST_ROWS)
        if len(group[1]) != leaves:
            raise _BrokenError(f"a group of rows has {len(group[1])} columns, and the table {leaves}")
        for chunk in group[1]:
            if {1, 8, 9} & chunk.keys():
                raise _BrokenError("a column is encrypted, or in another file")
            column = chunk[3]
            name = column[3][0].decode("utf-8")
            shown = quoted(name)
            listed = len(column[3]) > 1
            values = _within(column[5], MOST_ROWS * (MOST_ITEMS if listed else 1))
            if values < group[3]:
                raise _BrokenError(f"column {shown} has {values} values for {group[3]} rows")
            starts = [column[number] for number in (9, 11) if number in column]
            start, stored = min(starts), _within(column[7], end)
            if min(starts) < len(MAGIC) or start + stored > end:
                raise _BrokenError(f"column {shown} lies outside of the file")
            counted = unfolded = 0
            for page, many in _pages(data, start, start + stored):
                counted, unfolded = counted + many, unfolded + page
            if counted != values:
                raise _BrokenError(f"column {shown} claims {values} values, and its pages {counted}")
            taken += unfolded if name in facts else 0
    if rows > MOST_ROWS or taken > FACTS_BYTES:
        raise _BrokenError(f"it claims {rows:,} rows and {taken:,} bytes of facts, more than any model has")
    if footer[3] != rows:
        raise _BrokenError(f"it claims {footer[3]} rows, and its groups {rows}")


def _pages(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int]]:
    """For each page of a column its bytes once unfolded, and how many values it has (a dictionary: none)."""
    while at < end:
        reader = _Thrift(data[at : min(end, at + PAGE_HEAD_BYTES)])
        head = reader.struct()
        kind, unfolded, stored = head[1], _within(head[2], (1 << 31) - 1), _within(head[3], end)
        at += reader.at + stored
        if at > end:
            raise _BrokenError("a page lies outside of its column")
        inner = {DATA_PAGE: 5, DICTIONARY_PAGE: 7, DATA_PAGE_2: 8}
        if kind != INDEX_PAGE:
            many = _within(head[inner[kind]][1], MOST_ROWS * MOST_ITEMS)
            yield unfolded, 0 if kind == DICTIONARY_PAGE else many


def _within(number: object, most: int) -> int:
    """The number, unless it is none, negative, or larger than `most`."""
    if not isinstance(number, int) or not 0 <= number <= most:
        raise _BrokenError(f"it claims {quoted(str(number))} where at most {most:,} can be")
    return number
