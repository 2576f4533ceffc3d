"""One tensor as rows of a table, and back: "Schema V3", and the older V2 and V1 for reading. Pure.

A row is a run of a tensor's first dimension that stands for itself: its codes are one stream of bits, and it carries
the scales it needs, so a reader of one row needs no other. Most tensors are one row; an embedding of gigabytes is many,
because Parquet readers hold a value in memory whole and stop at 2 GB. V2 has one row for each tensor and f32 scales.
docs/formats.md lists the columns.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from converter.containers import TensorPlan
from converter.containers.packing import pack_bytes, to_signed, to_unsigned, unpack_bytes
from converter.containers.parquet_file import Column, Planned, Value
from converter.containers.safetensors_file import tensor_bytes
from converter.errors import SourceError
from converter.grids.affine import AffineGrid
from converter.grids.plain import DTYPES, PlainGrid

# O out, I in (columns), G groups

CHUNK_BYTES = 64 << 20  # codes of one row of the table
BLOBS = ("data", "scales", "zero_points")
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
FLOAT_TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PACKED = "low_bits_first_offset"  # code + 2**(bits - 1), element i in bits [i * bits, i * bits + bits) of `data`
_BY_FLOAT_TYPE = {stored: dtype for dtype, stored in FLOAT_TYPES.items()}
_BY_DTYPE_NAME = {stored: dtype for dtype, stored in DTYPE_NAMES.items()}
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
    def scales(self) -> int:
        """How many scales go with these rows."""
        grid = self.tensor.grid
        if not isinstance(grid, AffineGrid):
            return 0
        if grid.granularity == "tensor":
            return 1
        columns = self.tensor.shape[1]
        return (self.stop - self.start) * -(-columns // max(1, grid.columns_per_scale(columns)))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of data, scales and zero points."""
        grid = self.tensor.grid
        if isinstance(grid, PlainGrid):
            return self.num_params * DTYPES[grid.dtype].itemsize, 0, 0
        assert isinstance(grid, AffineGrid)
        data = -(-self.num_params * grid.bits // 8)
        return data, self.scales * DTYPES[grid.scale_dtype].itemsize, 0 if grid.symmetric else self.scales


def chunks(tensor: TensorPlan, layer: int) -> tuple[Chunk, ...]:
    """The rows of the table that a tensor becomes, each at most CHUNK_BYTES of data."""
    rows = tensor.shape[0] if tensor.shape else 1
    bits = tensor.grid.bits if isinstance(tensor.grid, AffineGrid) else _item_bits(tensor)
    at_once = max(1, CHUNK_BYTES * 8 // max(1, bits * math.prod(tensor.shape[1:])))
    starts = range(0, max(1, rows), at_once)
    return tuple(
        Chunk(tensor=tensor, layer=layer, index=i, count=len(starts), start=start, stop=min(start + at_once, rows))
        for i, start in enumerate(starts)
    )


def _item_bits(tensor: TensorPlan) -> int:
    assert isinstance(tensor.grid, PlainGrid)
    return DTYPES[tensor.grid.dtype].itemsize * 8


def planned_row(chunk: Chunk, dtype: str) -> dict[str, Value]:
    """The row of a chunk with lengths in place of values, for a tensor that its checkpoint stores as `dtype`."""
    data, scales, zero_points = (Planned(size) for size in chunk.sizes)
    return _facts(chunk, dtype) | {
        "data_sha256": "0" * 64,
        "data": data,
        "scales": scales,
        "zero_points": zero_points,
    }


def encode_row(chunk: Chunk, dtype: str, parts: Mapping[str, Tensor]) -> dict[str, Value]:
    """The row of a chunk, from the parts of its whole tensor."""
    grid, rows = chunk.tensor.grid, slice(chunk.start, chunk.stop)
    scales = zero_points = memoryview(b"")
    if isinstance(grid, PlainGrid):
        values = parts["values"]
        data = tensor_bytes(values[rows] if values.ndim else values)
    else:
        assert isinstance(grid, AffineGrid)
        codes = parts["codes"][rows].reshape(1, -1)
        packed = codes if grid.bits == 8 else pack_bytes(to_unsigned(codes, grid.bits), grid.bits)
        data = tensor_bytes(packed)
        own = slice(0, 1) if grid.granularity == "tensor" else rows
        scales = tensor_bytes(parts["scale"][own])
        if not grid.symmetric:
            zero_points = tensor_bytes(parts["zero_point"][own])
    assert (len(data), len(scales), len(zero_points)) == chunk.sizes, f"{chunk.tensor.name}: not of its planned size"
    return _facts(chunk, dtype) | {
        "data_sha256": hashlib.sha256(data).hexdigest(),
        "data": data,
        "scales": scales,
        "zero_points": zero_points,
    }


def _facts(chunk: Chunk, dtype: str) -> dict[str, Value]:
    grid = chunk.tensor.grid
    affine = grid if isinstance(grid, AffineGrid) else None
    return {
        "layer_name": chunk.tensor.name,
        "layer_index": chunk.layer,
        "chunk_index": chunk.index,
        "num_chunks": chunk.count,
        "row_offset": chunk.start,
        "shape": chunk.tensor.shape,
        "dtype": DTYPE_NAMES[dtype],
        "quant_type": f"int{affine.bits}" if affine else FLOAT_TYPES[grid.name],
        "bits": affine.bits if affine else _item_bits(chunk.tensor),
        "packing": PACKED if affine and affine.bits < 8 else "none",
        "num_params": chunk.num_params,
        "quant_axis": 0 if affine and affine.granularity != "tensor" else -1,
        "group_size": (affine.group_size or 0) if affine else 0,
        "scales_dtype": DTYPE_NAMES[affine.scale_dtype] if affine else "",
        "zero_points_dtype": "int8" if affine and not affine.symmetric else "",
    }


def row_grid(row: Mapping[str, Any]) -> AffineGrid | PlainGrid:
    """The grid of a tensor, from the facts of one of its rows (V1, V2 or V3)."""
    kind = row.get("quant_type") or row["dtype"]
    if not kind.startswith("int"):
        return PlainGrid(dtype=_BY_FLOAT_TYPE.get(kind) or _BY_DTYPE_NAME[kind.removeprefix("torch.")])
    group_size, axis = row["group_size"] or 0, row["quant_axis"]
    channel = axis is not None and axis >= 0
    return AffineGrid(
        bits=int(kind.removeprefix("int")),
        symmetric=not row.get("zero_points_dtype"),
        granularity="group" if group_size > 0 else "channel" if channel else "tensor",
        group_size=group_size if group_size > 0 else None,
        scale_dtype=_BY_DTYPE_NAME[row.get("scales_dtype") or "float32"],
    )


def row_shape(row: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the row's tensor; V2 was written with lists and with their text alike."""
    shape = row["shape"]
    return tuple(int(size) for size in (re.findall(r"\d+", shape) if isinstance(shape, str) else shape))


def decode_rows(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The weight f32 of one tensor from all its rows, in the order of their chunks.

    Raises SourceError when a row's checksum, lengths or types do not fit.
    """
    first = rows[0]
    try:
        if "chunk_index" in first:
            grid, shape = row_grid(first), row_shape(first)
            return torch.cat([_decode_v3(row, grid, shape) for row in rows]).reshape(shape)
        return _decode_v2(first)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        what = f"its {first.get('quant_type') or first['dtype']} values do not fit shape {first['shape']}: {error}"
        raise SourceError(str(first["layer_name"]), what, _REMEDY) from error


def _decode_v3(row: Mapping[str, Any], grid: AffineGrid | PlainGrid, shape: tuple[int, ...]) -> Tensor:
    if hashlib.sha256(row["data"]).hexdigest() != row["data_sha256"]:
        raise SourceError(str(row["layer_name"]), "its bytes do not have the checksum they were written with", _REMEDY)
    if isinstance(grid, PlainGrid):
        return _tensor(row["data"], DTYPES[grid.dtype]).float()
    codes_OI = _codes(row["data"], grid.bits, row["num_params"]).reshape(-1, shape[1])
    groups = -(-shape[1] // max(1, grid.columns_per_scale(shape[1])))
    parts = {"codes": codes_OI, "scale": _tensor(row["scales"], DTYPES[grid.scale_dtype]).reshape(-1, groups)}
    if not grid.symmetric:
        parts["zero_point"] = _tensor(row["zero_points"], torch.int8).reshape(-1, groups)
    return grid.decode(parts).flatten()


def _decode_v2(row: Mapping[str, Any]) -> Tensor:
    """V2 (and V1): codes of the whole tensor, f32 scales and zero points along `quant_axis` or over groups of columns.

    INT2 codes lie four in a byte, low bits first, counted from -2.
    """
    grid, shape = row_grid(row), row_shape(row)
    if isinstance(grid, PlainGrid):
        return _tensor(row["data"], DTYPES[grid.dtype]).float().reshape(shape)
    codes = _codes(row["data"], grid.bits, math.prod(shape)).reshape(shape).float()
    scales = _tensor(row["scales"], torch.float32)
    zeros = _tensor(row["zero_points"], torch.float32) if row.get("zero_points") else torch.zeros_like(scales)
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
    stream = _tensor(data, torch.uint8)
    if len(stream) != -(-count * bits // 8):
        raise ValueError(f"{count} codes of {bits} bits do not take {len(stream)} bytes")
    if bits == 8:
        return stream.view(torch.int8)
    return to_signed(unpack_bytes(stream[None], bits, count)[0], bits)


def _tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(dtype)
