"""Weights to ggml blocks and back, byte-equal to stock ggml, with and without importance.

Kernels named after a ggml type give exactly the bytes of `ggml_quantize_chunk`, so a converted file can be compared
with anyone's. `search="thorough"` is the alternative: a lower error in the same format, and bytes of its own.

`reference/` is the readable truth; `cpu/` runs the same steps for 16 blocks at a time, `gpu/` for a GPU's thousands.
`thorough/` holds the other search. Tensors on a GPU take its kernels by themselves; `backend` asks for one by name.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from quantkernels.ggml import packing, reference
from quantkernels.ggml.checks import check_scales, check_values, magnitude_limit
from quantkernels.ggml.layout import TYPES, BlockType
from quantkernels.rows import over_rows

__all__ = ["TYPES", "BlockType", "Search", "block_size", "dequantize", "quantize", "row_bytes"]

Array = TypeVar("Array", NDArray[Any], torch.Tensor)
Backend = Literal["cpu", "reference", "triton"]
Search = Literal["ggml", "thorough"]

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
    backend: Backend | None = None,
    search: Search = "ggml",
) -> Array:
    """The ggml bytes of `rows`, the same as `ggml_quantize_chunk` gives.

    With search "thorough" every type heeds importance and no block has a higher weighted square error than ggml's; the
    floating-point types, where there is nothing to search, stay as they are.

    rows [R, C] f32, f16 or bf16 on the CPU or a GPU; importance [C], the mean square of each input column, or None;
    types that have no use for importance ignore it. Gives [R, row_bytes(type, C)] u8 on the device of the rows, numpy
    for numpy and torch for torch. Threads share the rows of the CPU and never change a byte.
    Raises ValueError for an unknown type or search, a search that the type or the device does not have, a shape that
    does not fit, a value that is not finite (naming row and column), an importance that is negative or not finite, and
    a block whose scale is beyond float16.
    """
    known = _known(type)
    if search not in ("ggml", "thorough"):
        raise ValueError(f"unknown search {search!r}; known are ggml, thorough")
    if rows.ndim != 2:
        raise ValueError(f"rows must be [R, C]; got shape {tuple(rows.shape)}")
    count, columns = rows.shape
    if not count:
        raise ValueError(f"there are no rows to quantize; got shape {tuple(rows.shape)}")
    width = row_bytes(type, columns)
    weights = _checked_importance(importance, columns)
    if known.needs_importance and weights is None:
        raise ValueError(f"{known.name} cannot be made without importance; give one value per column: [{columns}]")
    if isinstance(rows, torch.Tensor) and (rows.is_cuda if backend is None else backend == "triton"):
        if search != "ggml":
            raise ValueError(f"no GPU kernel makes {known.name} with the search {search!r}; move the rows to the CPU")
        made: torch.Tensor = _gpu().quantize(rows, known, None if weights is None else torch.from_numpy(weights))
        return made
    from quantkernels.ggml import cpu, thorough  # here: numba is half a second and 110 MB, and plans do without

    out = np.empty((count, width), np.uint8)
    height = max(1, _SLAB_WEIGHTS // columns)

    def fill(first: int, last: int) -> None:
        for start in range(first, last, height):
            slab = _as_float32(rows[start : min(start + height, last)])
            blocks = out[start : start + len(slab)]
            if not cpu.all_below(slab.reshape(-1), np.float32(magnitude_limit(known))):
                check_values(slab, known, start)
            if search == "thorough" and known.weights > 1:
                thorough.quantize_blocks(slab, known, weights, blocks, truth=backend == "reference")
            else:
                _quantize_slab(slab, known, weights if known.uses_importance else None, backend, blocks)
            check_scales(blocks, known, start)

    over_rows(count, threads, fill)
    return _like(out, rows)


def dequantize(blocks: Array, type: str, columns: int | None = None, *, backend: Backend | None = None) -> Array:
    """The weights that `blocks` [R, bytes] u8 stand for, [R, C] f32, equal bit for bit to ggml's own.

    Those of blocks on a GPU stay there.

    columns is checked against the bytes when given. Raises ValueError for an unknown type or bytes that do not fit.
    """
    known = _known(type)
    if blocks.ndim != 2 or blocks.dtype not in (np.uint8, torch.uint8) or blocks.shape[1] % known.size_bytes:
        raise ValueError(
            f"blocks of {type} must be u8 [R, multiple of {known.size_bytes}]; got {blocks.dtype} {tuple(blocks.shape)}"
        )
    width = blocks.shape[1] // known.size_bytes * known.weights
    if columns is not None and columns != width:
        raise ValueError(f"rows of {blocks.shape[1]} bytes hold {width} weights of {type}, not {columns}")
    if isinstance(blocks, torch.Tensor) and (blocks.is_cuda if backend is None else backend == "triton"):
        read: torch.Tensor = _gpu().dequantize(blocks, known)
        return read
    raw: NDArray[np.uint8] = np.ascontiguousarray(blocks.numpy() if isinstance(blocks, torch.Tensor) else blocks)
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


def _gpu() -> ModuleType:
    """The Triton backend, which needs a package that machines without a GPU can do without."""
    try:
        from quantkernels.ggml import gpu
    except ModuleNotFoundError as error:
        raise ValueError("tensors on a GPU need the package triton: install hubmill[gpu]") from error
    return gpu


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
    plain = importance.detach().float().cpu().numpy() if isinstance(importance, torch.Tensor) else importance
    weights = np.ascontiguousarray(plain, np.float32)
    if weights.shape != (columns,):
        raise ValueError(f"importance must have one value per column: [{columns}]; got {weights.shape}")
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        column = int(wrong[0])
        raise ValueError(f"importance must be finite and not negative; column {column} holds {weights[column]}")
    return weights


def _quantize_slab(
    rows: NDArray[np.float32],
    known: BlockType,
    importance: NDArray[np.float32] | None,
    backend: Backend | None,
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
        from quantkernels.ggml import cpu

        cpu.quantize_blocks(rows, known, importance, out)
