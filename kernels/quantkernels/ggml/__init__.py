"""Weights to ggml blocks and back, byte-equal to stock ggml, with and without importance.

Kernels named after a ggml type give exactly the bytes of `ggml_quantize_chunk`, so a converted file can be compared
with anyone's. The alternative, a better search, gives a lower error and other bytes; it would carry another name.

`reference.py` is the readable truth; `cpu_*.py` run the same steps for 16 blocks at a time.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from quantkernels.ggml import cpu, packing, reference
from quantkernels.ggml.layout import TYPES, BlockType
from quantkernels.rows import over_rows

__all__ = ["TYPES", "BlockType", "block_size", "dequantize", "quantize", "row_bytes"]

Array = TypeVar("Array", NDArray[Any], torch.Tensor)
Backend = Literal["cpu", "reference"]

_SLAB_WEIGHTS = 1 << 18  # rows are cast, checked and quantized this many weights at a time: 1 MiB, which stays in cache


def block_size(type: str) -> int:
    """How many weights of a row share one block; a row's length must be a multiple of it."""
    return _known(type).weights


def row_bytes(type: str, columns: int) -> int:
    """The bytes that a row of `columns` weights takes. Raises ValueError when the row does not fit the block."""
    known = _known(type)
    if columns <= 0 or columns % known.weights:
        raise ValueError(f"{known.name} stores blocks of {known.weights} weights; a row of {columns} does not fit")
    return columns // known.weights * known.size_bytes


def quantize(
    rows: Array,
    type: str,
    importance: Array | None = None,
    *,
    threads: int = 1,
    backend: Backend = "cpu",
) -> Array:
    """The ggml bytes of `rows`, the same as `ggml_quantize_chunk` gives.

    rows [R, C] f32, f16 or bf16 on the CPU; importance [C], the mean square of each input column, or None; types that
    have no use for importance ignore it. Gives [R, row_bytes(type, C)] u8, numpy for numpy and torch for torch. Threads
    share the rows and never change a byte.
    Raises ValueError for an unknown type, a shape that does not fit, a value that is not finite (naming row and
    column), an importance that is negative or not finite, and a block whose scale is beyond float16.
    """
    known = _known(type)
    if rows.ndim != 2:
        raise ValueError(f"rows must be [R, C]; got shape {tuple(rows.shape)}")
    count, columns = rows.shape
    out = np.empty((count, row_bytes(type, columns)), np.uint8)
    weights = _checked_importance(importance, columns)
    height = max(1, _SLAB_WEIGHTS // columns)

    def fill(first: int, last: int) -> None:
        for start in range(first, last, height):
            slab = _as_float32(rows[start : min(start + height, last)])
            blocks = out[start : start + len(slab)]
            _check_finite(slab, start)
            _quantize_slab(slab, known, weights if known.uses_importance else None, backend, blocks)
            _check_scales(blocks, known, start)

    over_rows(count, threads, fill)
    return _like(out, rows)


def dequantize(blocks: Array, type: str, columns: int | None = None) -> Array:
    """The weights that `blocks` [R, bytes] u8 stand for, [R, C] f32, equal bit for bit to ggml's own.

    columns is checked against the bytes when given. Raises ValueError for an unknown type or bytes that do not fit.
    """
    known = _known(type)
    raw: NDArray[np.uint8] = np.ascontiguousarray(blocks.numpy() if isinstance(blocks, torch.Tensor) else blocks)
    if raw.ndim != 2 or raw.dtype != np.uint8 or raw.shape[1] % known.size_bytes:
        raise ValueError(
            f"blocks of {type} must be u8 [R, multiple of {known.size_bytes}]; got {raw.dtype} {raw.shape}"
        )
    width = raw.shape[1] // known.size_bytes * known.weights
    if columns is not None and columns != width:
        raise ValueError(f"rows of {raw.shape[1]} bytes hold {width} weights of {type}, not {columns}")
    if type == "F32":
        weights = raw.view("<f4")
    elif type == "F16":
        weights = raw.view("<f2").astype(np.float32)
    elif type == "BF16":
        weights = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        weights = packing.unpack_blocks(raw.reshape(-1, known.size_bytes), type).reshape(len(raw), width)
    return _like(np.array(weights, np.float32), blocks)


def _known(type: str) -> BlockType:
    known = TYPES.get(type)
    if known is None:
        raise ValueError(f"unknown ggml type {type!r}; known are {', '.join(TYPES)}")
    return known


def _like(result: NDArray[Any], example: Array) -> Array:
    return torch.from_numpy(result) if isinstance(example, torch.Tensor) else result


def _as_float32(rows: Array) -> NDArray[np.float32]:
    if isinstance(rows, torch.Tensor):
        if rows.device.type != "cpu" or rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"rows must be f32, f16 or bf16 on the CPU; got {rows.dtype} on {rows.device}")
        plain: NDArray[np.float32] = rows.detach().float().contiguous().numpy()
        return plain
    if rows.dtype not in (np.float32, np.float16):
        raise ValueError(f"rows must be f32 or f16; got {rows.dtype}")
    return np.ascontiguousarray(rows, np.float32)


def _checked_importance(importance: Array | None, columns: int) -> NDArray[np.float32] | None:
    if importance is None:
        return None
    plain = importance.detach().float().numpy() if isinstance(importance, torch.Tensor) else importance
    weights = np.ascontiguousarray(plain, np.float32)
    if weights.shape != (columns,):
        raise ValueError(f"importance must have one value per column: [{columns}]; got {weights.shape}")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        column = int(wrong[0])
        raise ValueError(f"importance must be finite and not negative; column {column} holds {weights[column]}")
    return weights


def _check_finite(rows: NDArray[np.float32], first_row: int) -> None:
    if not cpu.all_finite(rows.reshape(-1)):
        row, column = divmod(int(np.argmin(np.isfinite(rows))), rows.shape[1])
        raise ValueError(f"rows must be finite; row {first_row + row} column {column} holds {rows[row, column]}")


def _check_scales(blocks: NDArray[np.uint8], known: BlockType, first_row: int) -> None:
    """Raise ValueError where a float16 field is infinite or NaN: the file would hold weights that are not finite."""
    for offset in known.half_fields:
        high = blocks[:, offset + 1 :: known.size_bytes]
        wrong = (high & 0x7C) == 0x7C
        if wrong.any():
            row, block = divmod(int(np.argmax(wrong)), wrong.shape[1])
            start = block * known.weights
            raise ValueError(
                f"the scale of row {first_row + row} columns {start} to {start + known.weights - 1} "
                f"is beyond float16, so {known.name} cannot hold it"
            )


def _quantize_slab(
    rows: NDArray[np.float32],
    known: BlockType,
    importance: NDArray[np.float32] | None,
    backend: Backend,
    out: NDArray[np.uint8],
) -> None:
    if known.name == "F32":
        out[:] = rows.view(np.uint8)
    elif known.name == "F16":
        out[:] = torch.from_numpy(rows).half().numpy().view(np.uint8)
    elif known.name == "BF16":
        out[:] = torch.from_numpy(rows).bfloat16().view(torch.uint8).numpy()
    elif backend == "reference":
        out[:] = reference.quantize_blocks(rows, known.name, importance)
    else:
        cpu.quantize_blocks(rows, known, importance, out)
