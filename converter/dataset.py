"""Text from a data set on a hub: one column of its Parquet or JSON lines files.

Files are taken in the order of their names, each whole, at one commit and checked against the hub's checksum; the next
is fetched only when those before it hold too few tokens. The alternative, asking for the byte ranges of single row
groups, moves less but has no checksum. The price: a first file of 300 MB is fetched for the one megabyte that is read.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from converter import hub, hub_calls
from converter.calibration import Chat, conversation
from converter.errors import SourceError
from converter.folder import check_path
from converter.marks import closest, quoted

Split = Literal["calibration", "evaluation"]

PARQUET = (".parquet",)
JSON_LINES = (".jsonl", ".jsonl.gz", ".json.gz")
# A file belongs to a split when one of these words is in its path, as in data/train-00000-of-00002.parquet.
SPLITS: dict[Split, tuple[frozenset[str], ...]] = {
    "calibration": (frozenset({"train", "training"}),),
    "evaluation": (
        frozenset({"test", "testing", "eval", "evaluation"}),
        frozenset({"validation", "valid", "val", "dev"}),
    ),
}
AHEAD = 4  # times the tokens asked for are read where the files hold them, so that a seed has something to choose from
BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20  # Parquet is read through a buffer: a row group's column need not fit into memory
LINE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a data set, as a manifest's hub:org/dataset@revision#column names it."""

    repo: str
    revision: str
    name: str

    @property
    def text(self) -> str:
        return f"hub:{self.repo}@{self.revision}#{self.name}"


def parse(text: str) -> Column:
    """The column that a manifest's text names, which starts with hub:."""
    place, _, name = text.removeprefix("hub:").partition("#")
    repo, _, revision = place.partition("@")
    return Column(repo=repo, revision=revision or "main", name=name or "text")


def pin(text: str, cache: Path, where: str, *, endpoint: str | None = None, token: str | None = None) -> str:
    """The same text with the commit that its revision means now; anything but hub: is returned as it is.

    Whoever reads a pinned text later sees the same files, whatever is committed in between. Raises SourceError.
    """
    if not text.startswith("hub:"):
        return text
    column = parse(text)
    remote = _look(column, cache, f"{where} {column.repo}", endpoint, token)
    return Column(repo=column.repo, revision=remote.commit, name=column.name).text


def documents(
    text: str,
    split: Split,
    cache: Path,
    chat: Chat,
    count: Callable[[str], int],
    wanted: int,
    *,
    endpoint: str | None = None,
    token: str | None = None,
) -> list[str]:
    """The first documents of a column, with at least `wanted` tokens where the data set has as many.

    A row is a document; empty ones are left out. chat: messages -> text; count: document -> its number of tokens.
    Where names of files tell splits apart, calibration reads only training files, and evaluation only test files or,
    without those, validation files. Reading ends at AHEAD * wanted tokens, or with the file that brings `wanted`.
    Raises SourceError when the data set cannot be read or has no such column of text or messages.
    """
    column = parse(text)
    where = f"{split} text {column.repo}"
    remote = _look(column, cache, where, endpoint, token)
    found: list[str] = []
    tokens = 0
    for name in choose(remote.sizes, split, column, where):
        check_path(name, where)
        with hub_calls.explained(where, _page(column), endpoint):
            hub.bring(remote, [name], remote.folder(cache), where, None)
        for document in read_column(remote.folder(cache) / name, column.name, chat, f"{where}: {name}"):
            found.append(document)
            tokens += count(document)
            if tokens >= AHEAD * wanted:
                break
        if tokens >= wanted:
            break
    if not found:
        raise SourceError(where, f"there is no text in column '{column.name}'", "Name another column or data set")
    return found


def choose(files: Collection[str], split: Split, column: Column, where: str) -> list[str]:
    """The files to read, in the order of their names: Parquet before JSON lines, the split's own before any others.

    Raises SourceError when there are none.
    """
    of_kind = (
        [name for name in sorted(files) if name.lower().endswith(suffixes)] for suffixes in (PARQUET, JSON_LINES)
    )
    readable = next((names for names in of_kind if names), [])
    if not readable:
        converted = Column(repo=column.repo, revision="refs/convert/parquet", name=column.name)
        raise SourceError(
            where,
            f"the data set has no file that ends in {', '.join(PARQUET + JSON_LINES)}",
            f"Try the copy that the hub makes of many data sets: {converted.text}",
        )
    for words in SPLITS[split]:
        if own := [name for name in readable if words.intersection(re.split(r"[^a-z]+", name.lower()))]:
            return own
    return readable


def read_column(path: Path, column: str, chat: Chat, where: str) -> Iterator[str]:
    """The documents in a column of one file, a few rows at a time; empty ones are left out.

    Raises SourceError, naming the columns there are when `column` is none of them.
    """
    parquet = path.name.lower().endswith(PARQUET)
    try:
        values = _parquet_values(path, column, where) if parquet else _json_values(path, column, where)
        for row, value in enumerate(values, start=1):
            if document := _document(value, chat, f"{where} {'row' if parquet else 'line'} {row}"):
                yield document
    except (pa.ArrowException, OSError, EOFError, zlib.error, UnicodeError) as error:
        raise SourceError(where, f"the file cannot be read: {error}", "Name another data set or revision") from error


def _look(column: Column, cache: Path, where: str, endpoint: str | None, token: str | None) -> hub.Remote:
    with hub_calls.explained(where, _page(column), endpoint):
        return hub.look_once(column.repo, "dataset", column.revision, cache, endpoint, token)


def _page(column: Column) -> str:
    """The address of a data set below its hub, to be shown where something is to be done there."""
    return f"datasets/{column.repo}"


def _parquet_values(path: Path, column: str, where: str) -> Iterator[object]:
    with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
        kinds = {field.name: field.type for field in file.schema_arrow}
        if column not in kinds:
            raise _no_column(column, [name for name, kind in kinds.items() if _is_readable(kind)] or list(kinds), where)
        if not _is_readable(kinds[column]):
            raise _no_text(f"column '{column}' holds {quoted(str(kinds[column]))}", where)
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                yield from batch.column(column).to_pylist()


def _is_readable(kind: pa.DataType) -> bool:
    """Whether values of this type can be documents: strings, or lists of messages with role and content."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        message = kind.value_type
        return bool(pa.types.is_struct(message)) and {"role", "content"} <= {field.name for field in message}
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _json_values(path: Path, column: str, where: str) -> Iterator[object]:
    """The values line by line, None for an empty line or one without the column; the first must have it."""
    first = True
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                what = f"line {number} is longer than {LINE_BYTES >> 20} MiB"
                raise SourceError(where, what, "Name a data set with one JSON object per line")
            if not line.strip():
                yield None
                continue
            try:
                entry: Any = json.loads(line)
            except (ValueError, RecursionError) as error:
                what = f"line {number} is not JSON: {error}"
                raise SourceError(where, what, "Name a data set with one JSON object per line") from error
            if not isinstance(entry, dict):
                what = f"line {number} is not a JSON object"
                raise SourceError(where, what, "Name a data set with one JSON object per line")
            if first and column not in entry:
                raise _no_column(column, list(entry), where)
            first = False
            yield entry.get(column)


def _document(value: object, chat: Chat, where: str) -> str:
    """The text of one value, "" when there is none."""
    match value:
        case None:
            return ""
        case str(text):
            pass
        case [*messages]:
            # Parquet has every field in every message; a chat template must not see those that are not there
            kept = [
                {key: item for key, item in message.items() if item is not None}
                for message in messages
                if isinstance(message, dict)
            ]
            if len(kept) < len(messages) or not all({"role", "content"} <= set(message) for message in kept):
                raise _no_text("a message lacks role or content", where)
            text = conversation(chat, kept, where) if kept else ""
        case _:
            raise _no_text(f"the value is of type {type(value).__name__}", where)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise SourceError(where, f"the text is not Unicode: {error.reason}", "Name another data set") from error
    return text if text.strip() else ""


def _no_column(column: str, columns: list[str], where: str) -> SourceError:
    near = closest(column, columns)
    shown = ", ".join(columns[:12]) + (", ..." if len(columns) > 12 else "")
    remedy = f"Did you mean #{near}?" if near else "Name one of them after the #"
    return SourceError(where, f"there is no column '{column}'; there is {shown or 'none'}", remedy)


def _no_text(what: str, where: str) -> SourceError:
    wanted = "strings, or lists of messages with role and content, are needed"
    return SourceError(where, f"{what}, and {wanted}", "Name another column after the #")
