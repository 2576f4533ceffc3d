"""The numba backend: which kernel makes which type.

Kernels take flat arrays and write flat bytes; they hold no GIL, so threads may share the rows of a tensor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import kernel
from quantkernels.ggml.cpu_k_scale_min import quantize_scale_min
from quantkernels.ggml.cpu_k_symmetric import quantize_q3_k, quantize_q6_k
from quantkernels.ggml.cpu_legacy import quantize_by_range, quantize_by_search, quantize_q8_0
from quantkernels.ggml.cpu_search import ZERO
from quantkernels.ggml.lanes import WIDTH, bits_of, load, spread
from quantkernels.ggml.layout import BlockType


def quantize_blocks(
    rows: NDArray[np.float32], known: BlockType, importance: NDArray[np.float32] | None, out: NDArray[np.uint8]
) -> None:
    """Write the ggml bytes of `rows` to `out`.

    rows [R, C] f32, finite, contiguous; importance [C] f32 or None; out [R, bytes] u8, contiguous.
    """
    columns = rows.shape[1]
    flat, target = rows.reshape(-1), out.reshape(-1)
    weights = np.empty(0, np.float32) if importance is None else importance
    bits = int(known.name[1])
    match known.name:
        case "Q2_K" | "Q4_K" | "Q5_K":
            quantize_scale_min(flat, weights, columns, bits, target)
        case "Q6_K":
            quantize_q6_k(flat, weights, columns, target)
        case "Q3_K":
            quantize_q3_k(flat, weights, columns, target)
        case "Q8_0":
            quantize_q8_0(flat, target)
        case "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1":
            with_minimum = known.name.endswith("_1")
            if importance is None:
                quantize_by_range(flat, bits, with_minimum, target)
            else:
                quantize_by_search(flat, weights, columns, bits, with_minimum, target)
        case _:
            raise ValueError(f"no kernel makes {known.name}")


@kernel
def all_finite(values: NDArray[np.float32]) -> bool:
    """Whether no value is infinite or NaN: such a value less itself is not 0."""
    wrong = spread(ZERO) > ZERO
    full = len(values) // WIDTH * WIDTH
    for at in range(0, full, WIDTH):
        value = load(values, at)
        wrong = wrong | ~(value - value == ZERO)
    for at in range(full, len(values)):
        if values[at] - values[at] != ZERO:
            return False
    return bool(bits_of(wrong) == 0)
