"""Parquet: a model as a table, one row for each tensor or part of one, for SQL, dataset viewers and per-layer fetches.

Not a load path (safetensors and GGUF are mapped, Parquet is copied), but the one format that a database reads: names,
shapes and sizes without touching weights, one layer without the others. Codes are packed low bits first, scales lie
beside them. Every 2-D tensor is quantized, the embedding too, and the rest keeps its type. Small tensors share a row
group, since each row group costs about 1 kB of footer.

Stored sizes are planned to the byte, so values stay uncompressed unless zstd pays, which the plan then calls an upper
bound. Scales are BF16 for BF16 and F32 weights, since it has their range and no scale can over- or underflow, and F16
for F16 weights. The alternative, F32 as in the older schema, costs 0.5 bits a weight more at groups of 32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, Parts, TensorPlan
from converter.containers.parquet_file import ParquetWriter
from converter.containers.parquet_open import OpenedParquet, open_parquet
from converter.containers.parquet_rows import Chunk, chunks, columns_for, encode_row, planned_row
from converter.containers.selection import choose, float_dtype
from converter.containers.small_files import copy_small_files, original_config
from converter.errors import UnsupportedError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.micro import MicroGrid
from converter.grids.plain import PlainGrid
from converter.manifest import Target
from converter.source import Snapshot

GROUP_BYTES = 8 << 20  # a row group is closed once it holds this much
FILE_BYTES = 4_900_000_000  # of values; hubs want files below 5 GB
ZSTD_LEVEL = 1  # higher levels took time and saved nothing on codes
ZSTD_FROM_BYTES = 1 << 20


class Parquet:
    """The container of `format: parquet`."""

    def plan(self, snapshot: Snapshot, architecture: Architecture | None, target: Target) -> ArtifactPlan:
        """What the artifact will hold; file sizes are exact, or upper bounds where zstd pays."""
        tensors: list[TensorPlan] = []
        dropped: dict[str, str] = {}
        for name, header in snapshot.tensors.items():
            dtype = float_dtype(header.dtype)
            if dtype is None:
                dropped[name] = f"a table of {header.dtype}, which is no weight"
                continue
            block = architecture.block_of(name) if architecture else None
            tensors.append(_plan_tensor(name, header.shape, dtype, block, target))
        if not tensors:
            what = f"{snapshot.repo} holds no floating-point tensor"
            raise UnsupportedError(f"target {target.name}", what, "Choose a model with weights")
        tensors.sort(key=lambda tensor: (-1 if tensor.block is None else tensor.block, tensor.name))
        files, grids = _layout(tensors), [tensor.grid for tensor in tensors]
        sizes = {}
        for file, groups in files.items():
            counter = ParquetWriter(None, columns_for(grids), _metadata(snapshot))
            for group in groups:
                counter.write_row_group([planned_row(chunk, _dtype(snapshot, chunk)) for chunk in group])
            sizes[file] = counter.close()
        exact = not any(_pays(group) for groups in files.values() for group in groups)
        return ArtifactPlan(tensors=tuple(tensors), files=sizes, exact=exact, dropped=dropped)

    def write(
        self,
        plan: ArtifactPlan,
        snapshot: Snapshot,
        architecture: Architecture | None,
        target: Target,
        parts: Parts,
        folder: Path,
    ) -> None:
        """Write the table and the model's small files into `folder`, one row group in memory at a time."""
        # What config.json says of the source's codes, which came multiplied out, or of a head that was no tensor.
        stale = "quantization_config" in snapshot.config or bool(snapshot.untied)
        copy_small_files(snapshot, folder, without=("config.json",) if stale else ())
        if stale:
            config = {key: value for key, value in original_config(snapshot).items() if key != "quantization_config"}
            (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        last: tuple[str, Mapping[str, Tensor]] = ("", {})
        columns = columns_for(tensor.grid for tensor in plan.tensors)
        for file, groups in _layout(plan.tensors).items():
            with (folder / file).open("wb") as out:
                writer = ParquetWriter(out, columns, _metadata(snapshot), _compress)
                for group in groups:
                    rows = []
                    for chunk in group:
                        if last[0] != chunk.tensor.name:
                            last = (chunk.tensor.name, parts(chunk.tensor.name))
                        rows.append(encode_row(chunk, _dtype(snapshot, chunk), last[1]))
                    writer.write_row_group(rows, compressed=_pays(group))
                writer.close()

    def open(self, folder: Path, architecture: Architecture | None) -> OpenedParquet:
        """The tables in `folder`, of Schema V3, V2 or V1; raises SourceError when one is damaged."""
        return open_parquet(folder)


def _plan_tensor(name: str, shape: tuple[int, ...], dtype: str, block: int | None, target: Target) -> TensorPlan:
    choice = choose(target, name)
    grid: Grid = PlainGrid(dtype=choice.keep or dtype)
    fallback = f"kept: {len(shape)} dimensions, only tables of 2 are rounded" if len(shape) > 2 else ""
    if len(shape) == 2 and not choice.keep:
        chosen = choice.grid(group_size=choice.target.group_size, scale_dtype="F16" if dtype == "F16" else "BF16")
        fallback = _unfit(chosen, shape)
        grid = grid if fallback else chosen
    tensor = TensorPlan(
        name=name,
        source=name,
        shape=shape,
        grid=grid,
        block=block,
        size_bytes=0,
        quantized=not isinstance(grid, PlainGrid),
        fallback=fallback,
    )
    return replace(tensor, size_bytes=sum(chunk.size_bytes for chunk in chunks(tensor, 0)))


def _unfit(grid: Grid, shape: tuple[int, ...]) -> str:
    """Why a table of this shape keeps its floating point; empty where it does not."""
    if isinstance(grid, MicroGrid) and shape[1] % grid.group_size:
        return f"kept: rows of {shape[1]} values do not fill groups of {grid.group_size}"
    return "kept: it is empty" if not isinstance(grid, AffineGrid) and 0 in shape else ""


def _layout(tensors: Sequence[TensorPlan]) -> dict[str, list[list[Chunk]]]:
    """Row groups by file: a group is closed once it is full, a file before it would be too large."""
    files: list[list[list[Chunk]]] = [[]]
    group: list[Chunk] = []
    group_bytes = file_bytes = 0
    for layer, tensor in enumerate(tensors):
        for chunk in chunks(tensor, layer):
            group.append(chunk)
            group_bytes += chunk.size_bytes
            if group_bytes >= GROUP_BYTES:
                if files[-1] and file_bytes + group_bytes > FILE_BYTES:
                    files.append([])
                    file_bytes = 0
                files[-1].append(group)
                file_bytes += group_bytes
                group, group_bytes = [], 0
    if group:
        files[-1].append(group)
    if len(files) == 1:
        return {"model.parquet": files[0]}
    return {f"model-{number:05}-of-{len(files):05}.parquet": groups for number, groups in enumerate(files, start=1)}


def _pays(group: Sequence[Chunk]) -> bool:
    """Whether zstd saves an eighth or more of a row group, going by most of its bytes.

    Measured at level 1 on a trained model: BF16 weights 1.28x, codes of up to 4 bits fitted by min/max 1.19 to 1.35x,
    codes that share one scale per tensor 1.23x; but codes fitted by least squares only 1.07 to 1.11x, which is not
    worth reading seven times as slowly and a size that is planned as an upper bound.
    """
    sizes = [(chunk.size_bytes, _compressible(chunk.tensor.grid)) for chunk in group]
    total = sum(size for size, _ in sizes)
    return total >= ZSTD_FROM_BYTES and 2 * sum(size for size, pays in sizes if pays) > total


def _compressible(grid: Grid) -> bool:
    if isinstance(grid, AffineGrid):
        return grid.granularity == "tensor" or (grid.observer == "minmax" and grid.bits <= 4)
    return grid.name == "BF16"


def _compress(data: bytes) -> bytes:
    frame: bytes = pa.Codec("zstd", ZSTD_LEVEL).compress(data, asbytes=True)
    return frame


def _metadata(snapshot: Snapshot) -> dict[str, str]:
    return {
        "schema_version": "3",
        "source": snapshot.repo,
        "commit": snapshot.commit,
        "byte_order": "little",
    }


def _dtype(snapshot: Snapshot, chunk: Chunk) -> str:
    dtype = float_dtype(snapshot.tensors[chunk.tensor.source].dtype)
    assert dtype is not None
    return dtype
