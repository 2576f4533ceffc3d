"""Which values of a row of the table are which parts of a grid: their columns, types, counts and packing. Pure.

Each grid has one layout, and sizes, bytes and their way back all follow from it. What a code means stands in the table,
too (`levels`), so that a reader needs no list of ours: a weight is its level, or code less zero point, times a scale,
plus an offset where there is one. docs/formats.md says this column by column.
"""

# O out, I in (columns), G groups of a row, L levels

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from converter.containers.packing import pack_bytes, pack_trits, to_signed, to_unsigned, unpack_bytes, unpack_trits
from converter.containers.safetensors_file import tensor_bytes
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.floats import TYPES, Fp8Grid
from converter.grids.kmeans import KMeansGrid
from converter.grids.levels import LEVELS, LevelGrid
from converter.grids.micro import LEVELS as FP4_LEVELS
from converter.grids.micro import MicroGrid
from converter.grids.plain import DTYPES, PlainGrid

FLOAT_TYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PACKED = "low_bits_first_offset"  # code + 2**(bits - 1), element i in bits [i * bits, i * bits + bits) of `data`
UNSIGNED = "low_bits_first"  # the same, of codes that count from 0
TRITS = "five_trits"  # byte k is the sum of the codes of elements 5 k + n, times 3**n
_BY_FLOAT_TYPE = {stored: dtype for dtype, stored in FLOAT_TYPES.items()}
_BY_DTYPE_NAME = {stored: dtype for dtype, stored in DTYPE_NAMES.items()}
_FP8_NAMES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One part in one column: `count` values for each row of the tensor, or, where shared, for all of them.

    bits of a value; packing "none" keeps values as dtype has them, the others are for codes i8 (with an offset) and u8.
    """

    part: str
    column: str
    count: int
    dtype: torch.dtype
    bits: int
    packing: str = "none"
    shared: bool = False

    def size_bytes(self, rows: int) -> int:
        """Bytes for so many rows of the tensor."""
        values = self.count * (1 if self.shared else rows)
        return -(-values // 5) if self.packing == TRITS else -(-values * self.bits // 8)

    def encode(self, values: Tensor, rows: slice) -> memoryview:
        """The bytes of these rows of a part of the whole tensor."""
        own = (values if self.shared else values[rows]).reshape(1, -1)
        if self.packing == PACKED:
            own = pack_bytes(to_unsigned(own, self.bits), self.bits)
        elif self.packing == UNSIGNED:
            own = pack_bytes(own.view(torch.uint8), self.bits)
        elif self.packing == TRITS:
            own = pack_trits(own.view(torch.uint8))
        return tensor_bytes(own)

    def decode(self, data: bytes, rows: int) -> Tensor:
        """The values [rows, count], or [1, count] where shared. Raises ValueError for more or fewer bytes."""
        if len(data) != self.size_bytes(rows):
            total = self.count * (1 if self.shared else rows)
            raise ValueError(f"{total} {self.part} of {self.bits} bits do not take {len(data)} bytes")
        stream, shape = bytes_as(data, torch.uint8), (1 if self.shared else rows, self.count)
        total = shape[0] * self.count
        if self.packing == PACKED:
            return to_signed(unpack_bytes(stream[None], self.bits, total)[0], self.bits).view(shape)
        if self.packing == UNSIGNED:
            return unpack_bytes(stream[None], self.bits, total)[0].view(self.dtype).view(shape)
        if self.packing == TRITS:
            return unpack_trits(stream[None], total)[0].view(self.dtype).view(shape)
        return stream.view(self.dtype).view(shape)


def bytes_as(data: bytes, dtype: torch.dtype) -> Tensor:
    """The values that these bytes are, copied."""
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(dtype)


def bits_of(grid: Grid) -> int:
    """Bits of a value in `data`, rounded up to whole ones."""
    match grid:
        case PlainGrid():
            return DTYPES[grid.dtype].itemsize * 8
        case AffineGrid() | KMeansGrid():
            return grid.bits
        case LevelGrid():
            return (len(grid.levels) - 1).bit_length()
        case MicroGrid():
            return 8 if grid.values == "mxfp8" else 4
    assert isinstance(grid, Fp8Grid)
    return 8


def layout(grid: Grid, columns: int) -> tuple[Stored, ...]:
    """The parts of a quantized tensor [O, columns] as they are stored, codes first."""
    match grid:
        case AffineGrid():
            return _affine(grid, columns)
        case LevelGrid():
            return _levels(grid, columns)
        case KMeansGrid():
            sets, dtype = -(-columns // grid.columns_per_codebook(columns)), DTYPES[grid.levels_dtype]
            count = sets << grid.bits
            levels = Stored(part="levels", column="levels", count=count, dtype=dtype, bits=8 * dtype.itemsize)
            return _codes(columns, grid.bits, UNSIGNED), levels
        case MicroGrid():
            return _micro(grid, columns)
    assert isinstance(grid, Fp8Grid)
    dtype = DTYPES[grid.scale_dtype]
    codes = Stored(part="codes", column="data", count=columns, dtype=TYPES[grid.values], bits=8)
    shared = grid.granularity == "tensor"
    return codes, Stored(part="scale", column="scales", count=1, dtype=dtype, bits=8 * dtype.itemsize, shared=shared)


def _codes(columns: int, bits: int, packing: str) -> Stored:
    return Stored(part="codes", column="data", count=columns, dtype=torch.int8, bits=bits, packing=packing)


def _affine(grid: AffineGrid, columns: int) -> tuple[Stored, ...]:
    shared, dtype = grid.granularity == "tensor", DTYPES[grid.scale_dtype]
    groups = -(-columns // max(1, grid.columns_per_scale(columns)))
    stored = [
        _codes(columns, grid.bits, PACKED if grid.bits < 8 else "none"),
        Stored(part="scale", column="scales", count=groups, dtype=dtype, bits=8 * dtype.itemsize, shared=shared),
    ]
    if not grid.symmetric:
        zero_point = Stored(
            part="zero_point", column="zero_points", count=groups, dtype=torch.int8, bits=8, shared=shared
        )
        stored.append(zero_point)
    return tuple(stored)


def _levels(grid: LevelGrid, columns: int) -> tuple[Stored, ...]:
    groups, dtype = -(-columns // grid.columns_per_scale(columns)), DTYPES[grid.scale_dtype]
    wide, bits = 8 * dtype.itemsize, grid.scale_bits
    stored = [_codes(columns, bits_of(grid), TRITS if len(grid.levels) == 3 else UNSIGNED)]
    parts = [("scale", "scales", torch.uint8, UNSIGNED)]
    if grid.offset:
        parts.append(("offset", "offsets", torch.int8, PACKED if bits < 8 else "none"))
    for part, column, coded, packing in parts:
        if bits:
            stored.append(Stored(part=part, column=column, count=groups, dtype=coded, bits=bits, packing=packing))
        else:
            stored.append(Stored(part=part, column=column, count=groups, dtype=dtype, bits=wide))
    if bits:
        stored.append(Stored(part="units", column="units", count=len(parts), dtype=dtype, bits=wide))
    return tuple(stored)


def _micro(grid: MicroGrid, columns: int) -> tuple[Stored, ...]:
    codes = _codes(columns, 4, UNSIGNED)
    if grid.values == "mxfp8":
        codes = Stored(part="codes", column="data", count=columns, dtype=torch.float8_e4m3fn, bits=8)
    dtype = torch.float8_e4m3fn if grid.values == "nvfp4" else torch.uint8
    scale = Stored(part="scale", column="scales", count=columns // grid.group_size, dtype=dtype, bits=8)
    if grid.values != "nvfp4":
        return codes, scale
    divisor = Stored(part="divisor", column="units", count=1, dtype=torch.float32, bits=32, shared=True)
    return codes, scale, divisor


def table_of(grid: Grid) -> tuple[float, ...]:
    """What the codes mean where that is the same for all of the tensor and no arithmetic: the column `levels`."""
    if isinstance(grid, LevelGrid):
        return grid.levels
    return FP4_LEVELS if isinstance(grid, MicroGrid) and grid.values != "mxfp8" else ()


def facts_of(grid: Grid, columns: int) -> dict[str, Any]:
    """What a row says of its grid; `grid_of` is the inverse."""
    stored = {} if isinstance(grid, PlainGrid) else {one.column: one for one in layout(grid, columns)}
    by_row = bool(stored) and not all(one.shared for one in stored.values() if one.column in ("scales", "levels"))
    grouped = grid.group_size if isinstance(grid, AffineGrid | LevelGrid | KMeansGrid | MicroGrid) else None
    return {
        "quant_type": _kind(grid),
        "bits": bits_of(grid),
        "packing": stored["data"].packing if stored else "none",
        "quant_axis": 0 if by_row else -1,
        "group_size": grouped or 0,
        **{
            f"{column}_dtype": _dtype_name(stored.get(column))
            for column in ("scales", "zero_points", "offsets", "units")
        },
        "levels_dtype": "float32" if table_of(grid) else _dtype_name(stored.get("levels")),
    }


def _kind(grid: Grid) -> str:
    match grid:
        case PlainGrid():
            return FLOAT_TYPES[grid.dtype]
        case AffineGrid():
            return f"int{grid.bits}"
        case KMeansGrid():
            return f"kmeans{grid.bits}"
        case LevelGrid() | MicroGrid():
            return grid.values
    assert isinstance(grid, Fp8Grid)
    return f"fp8_{grid.values}"


def _dtype_name(stored: Stored | None) -> str:
    if stored is None:
        return ""
    if stored.packing != "none":
        return f"{'uint' if stored.dtype == torch.uint8 else 'int'}{stored.bits}"
    return str(stored.dtype).removeprefix("torch.")


def grid_of(row: Mapping[str, Any]) -> Grid:
    """The grid of a tensor, from the facts of one of its rows (V1, V2 or V3)."""
    kind = row.get("quant_type") or row["dtype"]
    group_size, axis = max(0, row.get("group_size") or 0) or None, row.get("quant_axis")
    scales = row.get("scales_dtype") or "float32"
    channel: Any = "channel" if axis is not None and axis >= 0 else "tensor"
    if kind.startswith("int"):
        return AffineGrid(
            bits=int(kind.removeprefix("int")),
            symmetric=not row.get("zero_points_dtype"),
            granularity="group" if group_size else channel,
            group_size=group_size,
            scale_dtype=_BY_DTYPE_NAME[scales],
        )
    if kind in LEVELS:
        bits = int(scales.removeprefix("uint")) if scales.startswith("uint") else 0
        return LevelGrid(
            values=kind,
            group_size=group_size,
            offset=bool(row["offsets_dtype"]),
            scale_bits=bits,
            scale_dtype=_BY_DTYPE_NAME[row["units_dtype"] if bits else scales],
        )
    if kind.startswith("kmeans"):
        bits, dtype = int(kind.removeprefix("kmeans")), _BY_DTYPE_NAME[row["levels_dtype"]]
        return KMeansGrid(bits=bits, group_size=group_size, levels_dtype=dtype)
    if kind in ("mxfp4", "mxfp8", "nvfp4"):
        return MicroGrid(values=kind)
    if kind in ("fp8_e4m3", "fp8_e5m2"):
        values: Any = kind.removeprefix("fp8_")
        return Fp8Grid(values=values, granularity=channel, scale_dtype=_BY_DTYPE_NAME[scales])
    return PlainGrid(dtype=_BY_FLOAT_TYPE.get(kind) or _BY_DTYPE_NAME[kind.removeprefix("torch.")])
