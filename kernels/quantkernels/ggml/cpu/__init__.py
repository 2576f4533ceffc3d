"""The numba backend: which kernel makes which type.

Kernels take flat arrays and write flat bytes; they hold no GIL, so threads may share the rows of a tensor.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import kernel
from quantkernels.ggml.cpu.fp4 import quantize_mxfp4, quantize_nvfp4
from quantkernels.ggml.cpu.iq1 import quantize_iq1_m, quantize_iq1_s
from quantkernels.ggml.cpu.iq1_lattice import tables as iq1_tables
from quantkernels.ggml.cpu.iq2 import quantize_rows as quantize_iq2
from quantkernels.ggml.cpu.iq3 import quantize_iq3
from quantkernels.ggml.cpu.iq4 import quantize_iq4_nl, quantize_iq4_xs
from quantkernels.ggml.cpu.k_scale_min import quantize_scale_min
from quantkernels.ggml.cpu.k_symmetric import quantize_q3_k, quantize_q6_k
from quantkernels.ggml.cpu.legacy import quantize_by_range, quantize_by_search, quantize_q8_0
from quantkernels.ggml.cpu.search import ZERO
from quantkernels.ggml.cpu.ternary import quantize_ternary
from quantkernels.ggml.layout import BlockType
from quantkernels.lanes import WIDTH, bits_of, load, magnitude, spread


def quantize_blocks(
    rows: NDArray[np.float32], known: BlockType, importance: NDArray[np.float32] | None, out: NDArray[np.uint8]
) -> None:
    """Write the ggml bytes of `rows` to `out`.

    rows [R, C] f32, finite, contiguous; importance [C] f32 or None; out [R, bytes] u8, contiguous.
    """
    columns = rows.shape[1]
    flat, target = rows.reshape(-1), out.reshape(-1)
    weights = np.empty(0, np.float32) if importance is None else importance
    bits = int(known.name[1]) if known.name[0] == "Q" else 0
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
        case "IQ4_NL":
            quantize_iq4_nl(flat, weights, columns, target)
        case "IQ4_XS":
            quantize_iq4_xs(flat, weights, columns, target)
        case "IQ2_XXS" | "IQ2_XS" | "IQ2_S":
            quantize_iq2(flat, weights, columns, known.name, target)
        case "IQ3_XXS" | "IQ3_S":
            quantize_iq3(flat, weights, columns, known.name, target)
        case "IQ1_S":
            quantize_iq1_s(flat, weights, columns, iq1_tables(), target)
        case "IQ1_M":
            quantize_iq1_m(flat, weights, columns, iq1_tables(), target)
        case "TQ1_0" | "TQ2_0":
            quantize_ternary(flat, known.name == "TQ1_0", target)
        case "MXFP4":
            quantize_mxfp4(flat, target)
        case "NVFP4":
            quantize_nvfp4(flat, target)
        case _:
            raise ValueError(f"no kernel makes {known.name}")


@kernel
def all_below(values: NDArray[np.float32], limit: np.float32) -> bool:
    """Whether the magnitude of every value is below `limit`; with an infinite limit, whether all are finite."""
    wrong = spread(ZERO) > ZERO
    full = len(values) // WIDTH * WIDTH
    for at in range(0, full, WIDTH):
        wrong = wrong | ~(magnitude(load(values, at)) < limit)
    for at in range(full, len(values)):
        if not abs(values[at]) < limit:
            return False
    return bool(bits_of(wrong) == 0)
