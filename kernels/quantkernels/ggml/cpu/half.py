"""float16 fields inside numba kernels: float32 to the two bytes and back, in integer arithmetic.

LLVM's own conversion needs a run-time library on processors without F16C, and numba ships none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numpy.typing import NDArray

from quantkernels.compiling import compiled, instruction


@instruction
def _bits_of(typing_context: Any, value: Any) -> Any:
    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.IntType(32))

    return types.uint32(types.float32), emit


@instruction
def _float_of(typing_context: Any, bits: Any) -> Any:
    def emit(context: Any, builder: Any, typed: Any, values: Any) -> Any:
        return builder.bitcast(values[0], ir.FloatType())

    return types.float32(types.uint32), emit


@compiled
def store_half(target: NDArray[np.uint8], at: int, value: np.float32) -> np.float32:
    """Write `value` as little-endian float16 at `at`, rounded to nearest even; gives the value that a reader gets."""
    bits = int(_bits_of(value))
    sign = (bits >> 16) & 0x8000
    size = bits & 0x7FFFFFFF
    if size > 0x7F800000:
        half = 0x7E00
    elif size >= 0x47800000:
        half = 0x7C00
    elif size < 0x38800000:  # below the normal range: adding 0.5 leaves multiples of 2**-24 in the mantissa
        half = int(_bits_of(_float_of(np.uint32(size)) + np.float32(0.5))) - 0x3F000000
    else:
        half = (size + 0xFFF + ((size >> 13) & 1) - 0x38000000) >> 13
    target[at] = half & 255
    target[at + 1] = (sign | half) >> 8
    if half >= 0x7C00:
        wide = 0x7F800000 | ((half & 0x3FF) << 13)
    elif half >= 0x400:
        wide = (half << 13) + 0x38000000
    else:
        wide = int(_bits_of(np.float32(half) * np.float32(2.0**-24)))
    value = _float_of(np.uint32(wide | (sign << 16)))
    return value
