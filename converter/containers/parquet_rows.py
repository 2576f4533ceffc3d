"""One tensor as rows of a table, and back: "Schema V3", and the older V2 and V1 for reading. Pure.

A row is a run of a tensor's first dimension that stands for itself: its codes are one stream of bits, and it carries
the scales it needs, so a reader of one row needs no other. Most tensors are one row; an embedding of gigabytes is many,
because Parquet readers hold a value in memory whole and stop at 2 GB. V2 has one row for each tensor and f32 scales.
docs/formats.md lists the columns, parquet_layout.py what is in them for each grid.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converter.containers import TensorPlan
from converter.containers.packing import to_signed, unpack_bytes
from converter.containers.parquet_file import Column, Planned, Value
from converter.containers.parquet_layout import (
    DTYPE_NAMES,
    Stored,
    bits_of,
    bytes_as,
    facts_of,
    grid_of,
    layout,
    table_of,
)
from converter.containers.safetensors_file import tensor_bytes
from converter.errors import SourceError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.plain import DTYPES, PlainGrid

# O out, I in (columns), G groups

CHUNK_BYTES = 64 << 20  # codes of one row of the table
MOST_DIMENSIONS = 16
MOST_WEIGHTS = 1 << 40  # of a tensor
BLOBS = ("data", "scales", "zero_points", "offsets", "units", "levels")
COLUMNS = (
    Column(name="layer_name", kind="string", bounds=True),
    Column(name="layer_index", kind="int32"),
    Column(name="chunk_index", kind="int32"),
    Column(name="num_chunks", kind="int32"),
    Column(name="row_offset", kind="int64"),
    Column(name="shape", kind="int64[]"),
    Column(name="dtype", kind="string"),
    Column(name="quant_type", kind="string"),
    Column(name="bits", kind="int32"),
    Column(name="packing", kind="string"),
    Column(name="num_params", kind="int64"),
    Column(name="quant_axis", kind="int32"),
    Column(name="group_size", kind="int32"),
    Column(name="scales_dtype", kind="string"),
    Column(name="zero_points_dtype", kind="string"),
    Column(name="data_sha256", kind="string"),
    Column(name="scales", kind="binary", compressed=True),
    Column(name="zero_points", kind="binary", compressed=True),
    Column(name="data", kind="binary", compressed=True),
)
# Behind them in tables that hold other grids than integers.
MORE_COLUMNS = (
    Column(name="offsets_dtype", kind="string"),
    Column(name="units_dtype", kind="string"),
    Column(name="levels_dtype", kind="string"),
    Column(name="offsets", kind="binary", compressed=True),
    Column(name="units", kind="binary", compressed=True),
    Column(name="levels", kind="binary", compressed=True),
)
_REMEDY = "Write the artifact again, or ask whoever wrote it"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows [start, stop) of a tensor's first dimension, the `index`th of `count` chunks of the `layer`th tensor."""

    tensor: TensorPlan
    layer: int
    index: int
    count: int
    start: int
    stop: int

    @property
    def num_params(self) -> int:
        return (self.stop - self.start) * math.prod(self.tensor.shape[1:])

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The parts of a quantized tensor."""
        grid = self.tensor.grid
        return () if isinstance(grid, PlainGrid) else layout(grid, self.tensor.shape[1])

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each column of values."""
        grid = self.tensor.grid
        if isinstance(grid, PlainGrid):
            return dict.fromkeys(BLOBS, 0) | {"data": self.num_params * DTYPES[grid.dtype].itemsize}
        own = {stored.column: stored.size_bytes(self.stop - self.start) for stored in self.stored}
        return dict.fromkeys(BLOBS, 0) | {"levels": 4 * len(table_of(grid))} | own

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())


def columns_for(grids: Iterable[Grid]) -> tuple[Column, ...]:
    """The columns of a table that holds these grids."""
    return COLUMNS + (() if all(isinstance(grid, PlainGrid | AffineGrid) for grid in grids) else MORE_COLUMNS)


def chunks(tensor: TensorPlan, layer: int) -> tuple[Chunk, ...]:
    """The rows of the table that a tensor becomes, each at most CHUNK_BYTES of data."""
    rows = tensor.shape[0] if tensor.shape else 1
    at_once = max(1, CHUNK_BYTES * 8 // max(1, bits_of(tensor.grid) * math.prod(tensor.shape[1:])))
    starts = range(0, max(1, rows), at_once)
    return tuple(
        Chunk(tensor=tensor, layer=layer, index=i, count=len(starts), start=start, stop=min(start + at_once, rows))
        for i, start in enumerate(starts)
    )


def planned_row(chunk: Chunk, dtype: str) -> dict[str, Value]:
    """The row of a chunk with lengths in place of values, for a tensor that its checkpoint stores as `dtype`."""
    sizes: dict[str, Value] = {column: Planned(size) for column, size in chunk.sizes.items()}
    return _facts(chunk, dtype) | {"data_sha256": "0" * 64} | sizes


def encode_row(chunk: Chunk, dtype: str, parts: Mapping[str, Tensor]) -> dict[str, Value]:
    """The row of a chunk, from the parts of its whole tensor."""
    rows, blobs = slice(chunk.start, chunk.stop), dict.fromkeys(BLOBS, memoryview(b""))
    if isinstance(chunk.tensor.grid, PlainGrid):
        values = parts["values"]
        blobs["data"] = tensor_bytes(values[rows] if values.ndim else values)
    elif table := table_of(chunk.tensor.grid):
        blobs["levels"] = tensor_bytes(torch.tensor(table))
    blobs |= {stored.column: stored.encode(parts[stored.part], rows) for stored in chunk.stored}
    assert {column: len(blob) for column, blob in blobs.items()} == chunk.sizes, f"{chunk.tensor.name}: not as planned"
    return _facts(chunk, dtype) | {"data_sha256": hashlib.sha256(blobs["data"]).hexdigest()} | blobs


def _facts(chunk: Chunk, dtype: str) -> dict[str, Value]:
    tensor = chunk.tensor
    return {
        "layer_name": tensor.name,
        "layer_index": chunk.layer,
        "chunk_index": chunk.index,
        "num_chunks": chunk.count,
        "row_offset": chunk.start,
        "shape": tensor.shape,
        "dtype": DTYPE_NAMES[dtype],
        "num_params": chunk.num_params,
        **facts_of(tensor.grid, tensor.shape[-1] if tensor.shape else 1),
    }


def row_shape(row: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the row's tensor; V2 was written with lists and with their text alike.

    Raises ValueError when no tensor has such a shape.
    """
    written = row["shape"]
    shape = tuple(int(size) for size in (re.findall(r"\d+", written) if isinstance(written, str) else written))
    if len(shape) > MOST_DIMENSIONS or not all(0 <= size < MOST_WEIGHTS for size in shape):
        raise ValueError(f"a tensor of {len(shape)} dimensions")
    if math.prod(shape) >= MOST_WEIGHTS:
        raise ValueError(f"a tensor of {math.prod(shape):,} weights")
    return shape


def decode_rows(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The weight f32 of one tensor from all its rows, in the order of their chunks.

    Raises SourceError when a row's checksum, lengths or types do not fit.
    """
    first = rows[0]
    try:
        if "chunk_index" in first:
            grid, shape = grid_of(first), row_shape(first)
            return torch.cat([_decode_v3(row, grid, shape) for row in rows]).reshape(shape)
        return _decode_v2(first)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        what = f"its {first.get('quant_type') or first['dtype']} values do not fit shape {first['shape']}: {error}"
        raise SourceError(str(first["layer_name"]), what, _REMEDY) from error


def _decode_v3(row: Mapping[str, Any], grid: Grid, shape: tuple[int, ...]) -> Tensor:
    if hashlib.sha256(row["data"]).hexdigest() != row["data_sha256"]:
        raise SourceError(str(row["layer_name"]), "its bytes do not have the checksum they were written with", _REMEDY)
    if isinstance(grid, PlainGrid):
        return bytes_as(row["data"], DTYPES[grid.dtype]).float()
    rows = row["num_params"] // max(1, shape[1])
    parts = {stored.part: stored.decode(row[stored.column], rows) for stored in layout(grid, shape[1])}
    if "levels" in parts:
        parts["levels"] = parts["levels"].view(rows, -1, 1 << bits_of(grid))
    return grid.decode(parts).flatten()


def _decode_v2(row: Mapping[str, Any]) -> Tensor:
    """V2 (and V1): codes of the whole tensor, f32 scales and zero points along `quant_axis` or over groups of columns.

    INT2 codes lie four in a byte, low bits first, counted from -2.
    """
    grid, shape = grid_of(row), row_shape(row)
    if isinstance(grid, PlainGrid):
        return bytes_as(row["data"], DTYPES[grid.dtype]).float().reshape(shape)
    assert isinstance(grid, AffineGrid)
    codes = _codes(row["data"], grid.bits, math.prod(shape)).reshape(shape).float()
    scales = bytes_as(row["scales"], torch.float32)
    zeros = bytes_as(row["zero_points"], torch.float32) if row.get("zero_points") else torch.zeros_like(scales)
    if grid.group_size:
        per_row = -(-shape[-1] // grid.group_size)
        scales, zeros = (
            values.reshape(-1, per_row).repeat_interleave(grid.group_size, 1)[:, : shape[-1]].reshape(shape)
            for values in (scales, zeros)
        )
    elif len(scales) > 1:
        along = [1] * len(shape)
        along[row["quant_axis"]] = -1
        scales, zeros = scales.reshape(along), zeros.reshape(along)
    return (codes - zeros) * scales


def _codes(data: bytes, bits: int, count: int) -> Tensor:
    stream = bytes_as(data, torch.uint8)
    if len(stream) != -(-count * bits // 8):
        raise ValueError(f"{count} codes of {bits} bits do not take {len(stream)} bytes")
    if bits == 8:
        return stream.view(torch.int8)
    return to_signed(unpack_bytes(stream[None], bits, count)[0], bits)
