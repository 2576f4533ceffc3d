"""Tables of weights as their reader sees them, of Schema V3, V2 or V1, whoever wrote them.

What a table says of itself is held against its bytes first (parquet_footer.py): a run of a billion equal rows takes a
few bytes in a file. Texts stay behind their dictionary until their length is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch import Tensor

from converter.caches import CacheRounding
from converter.containers import TensorPlan
from converter.containers.parquet_footer import DAMAGED, MOST_ROWS, check_table
from converter.containers.parquet_layout import bits_of, grid_of
from converter.containers.parquet_rows import (
    BLOBS,
    COLUMNS,
    MORE_COLUMNS,
    chunks,
    decode_rows,
    row_shape,
)
from converter.errors import SourceError
from converter.marks import quoted
from converter.schemes import Activations

FACTS = {column.name: column.kind for column in (*COLUMNS, *MORE_COLUMNS) if column.name not in BLOBS}
NEEDED = {"layer_name", "shape", "dtype", "data"}
TEXT_BYTES = 4096
BATCH_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where one row of the tables lies, and its facts without the values."""

    path: Path
    row_group: int
    row: int
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class OpenedParquet:
    """The tables of a Parquet artifact: for each tensor its rows, in the order of their chunks."""

    places: Mapping[str, tuple[_Place, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.places)

    def read(self, name: str) -> Tensor:
        """The weight in f32. Raises SourceError when bytes are missing or not those that were written."""
        rows = []
        for place in self.places[name]:
            with _opened(place.path) as file:
                blobs = [column for column in BLOBS if column in file.schema_arrow.names]
                table = file.read_row_group(place.row_group, columns=blobs).slice(place.row, 1)
            rows.append({**place.facts, **{blob: _bytes(table.column(blob)[0]) for blob in blobs}})
        return decode_rows(rows)

    def stored(self, name: str) -> tuple[str, int]:
        """The type and the bytes before compression."""
        return _stored(self.places[name][0].facts)

    def activations(self, name: str) -> Activations | None:
        return None

    def keeps(self, prefix: str) -> CacheRounding | None:
        return None


def open_parquet(folder: Path) -> OpenedParquet:
    """Read the facts of every row, and no values. Raises SourceError when a table is damaged, or a tensor not whole."""
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise SourceError(str(folder), "there is no .parquet file", "Check that the artifact was written to its end")
    places: dict[str, list[_Place]] = {}
    for path in paths:
        with _opened(path) as file:
            for group in range(file.metadata.num_row_groups):
                for row, facts in enumerate(_facts(file, group, path)):
                    place = _Place(path=path, row_group=group, row=row, facts=facts)
                    places.setdefault(facts["layer_name"], []).append(place)
    for name, found in places.items():
        found.sort(key=lambda place: place.facts.get("chunk_index", 0))
        wanted = list(range(min(found[0].facts.get("num_chunks", 1), MOST_ROWS)))
        if [place.facts.get("chunk_index", 0) for place in found] != wanted:
            what = f"tensor {quoted(name)} has {len(found)} rows instead of {len(wanted)}"
            raise SourceError(str(folder), what, "Check that all files of the artifact are there, and no others")
    return OpenedParquet(places={name: tuple(found) for name, found in places.items()})


def _facts(file: pq.ParquetFile, group: int, path: Path) -> Iterator[dict[str, Any]]:
    """The facts of the rows of one row group; raises SourceError when they are none, or take too much."""
    names = [name for name in file.schema_arrow.names if name in FACTS]
    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=names):
        for name in names:
            values = batch.column(name)
            if isinstance(values, pa.DictionaryArray):
                values = values.dictionary
            if pa.types.is_string(values.type) and (pc.max(pc.binary_length(values)).as_py() or 0) > TEXT_BYTES:
                what = f"column {name} holds a text of more than {TEXT_BYTES} bytes"
                raise SourceError(str(path), what, DAMAGED)
        for facts in batch.to_pylist():
            try:
                row_shape(facts)
                whole = all(type(facts.get(key, 0)) is int for key in ("chunk_index", "num_chunks"))
                if not whole or not isinstance(facts["layer_name"], str):
                    raise ValueError("a name or a number is missing")
                if facts.get("chunk_index", 0) == 0:  # those behind it are as many as it says, or refused
                    _stored(facts)
            except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError) as error:
                wrong = quoted(f"{type(error).__name__} {error}")
                what = f"the row of tensor {quoted(str(facts.get('layer_name')))} does not describe one: {wrong}"
                raise SourceError(str(path), what, DAMAGED) from error
            yield facts


def _stored(facts: Mapping[str, Any]) -> tuple[str, int]:
    """See OpenedParquet.stored."""
    name, grid, shape = facts["layer_name"], grid_of(facts), row_shape(facts)
    if not 1 <= bits_of(grid) <= 64:
        raise ValueError(f"{bits_of(grid)} bits")
    stand_in = TensorPlan(name=name, source=name, shape=shape, grid=grid, block=None, size_bytes=0, quantized=False)
    return grid.name, sum(chunk.size_bytes for chunk in chunks(stand_in, 0))


def _check_types(file: pq.ParquetFile, path: Path) -> None:
    """Raise SourceError unless the columns are of the types that the schema has."""
    for name in {*NEEDED, *FACTS, *BLOBS}:
        if name in file.schema_arrow.names and not _fits(file.schema_arrow.field(name).type, FACTS.get(name, "binary")):
            what = f"column {name} holds {quoted(str(file.schema_arrow.field(name).type))}"
            raise SourceError(str(path), what, "Check that this is a table of weights (docs/formats.md)")


def _fits(type: pa.DataType, kind: str) -> bool:
    """Whether values of a column can be what the schema wants; V1 and V2 have shapes as text, too."""
    if kind == "binary":
        return bool(pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_null(type))
    if pa.types.is_dictionary(type):
        type = type.value_type
    if kind == "int64[]":
        return bool(pa.types.is_string(type) or (pa.types.is_list(type) and pa.types.is_integer(type.value_type)))
    if kind == "string":
        return bool(pa.types.is_string(type) or pa.types.is_null(type))
    return bool(pa.types.is_integer(type) or pa.types.is_null(type))


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    check_table(path, frozenset(FACTS))
    try:
        metadata = pq.read_metadata(path)
        fields = [field for field in metadata.schema.to_arrow_schema() if field.name in FACTS]
        texts = [field.name for field in fields if pa.types.is_string(field.type)]
        with pq.ParquetFile(path, metadata=metadata, read_dictionary=texts) as file:
            missing = NEEDED - set(file.schema_arrow.names)
            if missing:
                what = f"the table has no column {', '.join(sorted(missing))}"
                raise SourceError(str(path), what, "Check that this is a table of weights (docs/formats.md)")
            _check_types(file, path)
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(str(path), f"the table cannot be read: {quoted(str(error))}", DAMAGED) from error


def _bytes(value: pa.Scalar) -> pa.Buffer | None:
    """The bytes of a binary value, uncopied; None for null."""
    return value.as_buffer() if value.is_valid else None
