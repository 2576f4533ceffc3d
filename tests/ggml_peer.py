"""Stock ggml, called through the shared library inside the `xllamacpp` wheel: the peer that bytes are compared with."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml import TYPES, row_bytes


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None where the wheel is not installed."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    for path in sorted(Path(spec.origin).parent.glob("*.so")):
        loaded = ctypes.CDLL(str(path))
        loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
        loaded.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        return loaded
    return None


def quantize(
    rows: NDArray[np.float32],
    name: str,
    importance: NDArray[np.float32] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """What `ggml_quantize_chunk` makes of `rows` [R, C] f32: [R, bytes] u8."""
    loaded = library()
    assert loaded is not None
    assert rows.flags.c_contiguous and rows.dtype == np.float32
    count, columns = rows.shape
    if out is None:
        out = np.zeros((count, row_bytes(name, columns)), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = loaded.ggml_quantize_chunk(
        TYPES[name].number,
        rows.ctypes.data,
        out.ctypes.data,
        0,
        count,
        columns,
        None if weights is None else weights.ctypes.data,
    )
    assert written == out.nbytes
    return out


def dequantize(blocks: NDArray[np.uint8], name: str, columns: int) -> NDArray[np.float32]:
    """What ggml's own `dequantize_row_*` makes of `blocks` [R, bytes] u8: [R, columns] f32."""
    loaded = library()
    assert loaded is not None
    function = loaded[f"dequantize_row_{name.lower().replace('_k', '_K')}"]
    function.restype = None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    source = np.ascontiguousarray(blocks)
    out = np.full((len(blocks), columns), np.nan, np.float32)
    function(source.ctypes.data, out.ctypes.data, out.size)
    return out
