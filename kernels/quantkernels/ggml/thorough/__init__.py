"""Lower error than ggml in the same file format: a joint search of scales and codes for what a decoder will read.

ggml fits each sub-block's scale first, rounds the scales to the integers that the format stores, and weighs errors by
the weights' own size; here the stored values themselves are searched, for the plain importance-weighted square error.
Each block is compared with ggml's own bytes and the better one stays, so no block is ever worse. The price: five to
eleven times the time of the kernels that equal ggml (which is about stock ggml's own), more where ggml only rounds, and
bytes that equal nobody else's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import kernel
from quantkernels.ggml import cpu, packing
from quantkernels.ggml.layout import SUPER_BLOCK, BlockType
from quantkernels.ggml.reference import quantize_blocks as by_ggml_truth
from quantkernels.ggml.thorough import (
    cpu_iq1,
    cpu_iq2,
    cpu_iq3,
    cpu_ternary,
    reference,
    reference_iq1,
    reference_iq2,
    reference_iq3,
    reference_ternary,
)
from quantkernels.ggml.thorough.cpu_blocks import quantize_scale, quantize_scale_minimum
from quantkernels.ggml.thorough.cpu_fp4 import quantize_mxfp4_thoroughly, quantize_nvfp4_thoroughly
from quantkernels.ggml.thorough.cpu_pairs import quantize_pairs
from quantkernels.ggml.thorough.cpu_scales import quantize_scales
from quantkernels.ggml.thorough.effort import Effort, effort_of

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SURELY = 1 - 1e-12  # beyond what another order of these sums could change
THOROUGH_TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)


def quantize_blocks(
    rows: Floats, known: BlockType, importance: Floats | None, out: Bytes, *, truth: bool = False
) -> None:
    """Write the bytes of least error for `rows` to `out`; truth: by the numpy reference.

    The truth gives the same bytes, but for IQ1: that reference sums in float64, so near ties may fall otherwise.

    rows [R, C] f32, finite, contiguous; importance [C] f32 or None, heeded for every type; out [R, bytes] u8,
    contiguous. A block that ggml's bytes serve as well or better, or whose scale ggml cannot hold, gets ggml's.
    Raises ValueError for a type that has no thorough search.
    """
    if known.name not in THOROUGH_TYPES:
        raise ValueError(f"no thorough search makes {known.name}; it makes {', '.join(THOROUGH_TYPES)}")
    if known.name.startswith(("IQ2", "IQ3")) and not truth:  # these begin with ggml's bytes and compare by themselves
        quantize_lattice(rows, known.name, importance, out)
        return
    stock = np.empty_like(out)
    stock_importance = importance if known.uses_importance else None
    if truth:
        stock[:] = by_ggml_truth(rows, known.name, stock_importance)
        out[:] = _searched_by_truth(rows, known.name, importance, stock).reshape(out.shape)
    else:
        cpu.quantize_blocks(rows, known, stock_importance, stock)
        if known.name.startswith(("IQ1", "TQ")):
            quantize_lattice(rows, known.name, importance, out)
        else:
            search(rows, known.name, importance, effort_of(known.name), out)
    weights = np.ones(rows.shape[1], np.float32) if importance is None else importance
    stock_blocks, blocks = stock.reshape(-1, known.size_bytes), out.reshape(-1, known.size_bytes)
    with np.errstate(all="ignore"):  # a scale that ggml cannot hold is infinite
        stored_stock = packing.unpack_blocks(stock_blocks, known.name).reshape(-1)
        stored = packing.unpack_blocks(blocks, known.name).reshape(-1)
    keep_better(rows.reshape(-1), weights, known.weights, stored_stock, stored, stock_blocks, blocks)
    for offset in known.byte_fields:  # NaN in a scale of one byte: ggml cannot hold the block
        refused = stock_blocks[:, offset] == known.byte_nan
        blocks[refused] = stock_blocks[refused]


def _searched_by_truth(rows: Floats, name: str, importance: Floats | None, stock: Bytes) -> Bytes:
    match name:
        case "IQ1_S" | "IQ1_M":
            return reference_iq1.quantize_thorough(rows, importance, name)
        case "IQ2_XXS" | "IQ2_XS" | "IQ2_S":
            return reference_iq2.quantize_iq2_thorough(rows, importance, name)
        case "IQ3_XXS" | "IQ3_S":
            blocks = stock.reshape(rows.size // SUPER_BLOCK, -1)
            return reference_iq3.improve_blocks(rows, name, importance, blocks)
        case "TQ1_0" | "TQ2_0":
            return reference_ternary.quantize_thorough(rows, importance, name)
    return reference.quantize_blocks(rows, name, importance)


def quantize_lattice(rows: Floats, name: str, importance: Floats | None, out: Bytes) -> None:
    """Write the bytes that the search for a type whose codes name points of a lattice finds to `out`."""
    match name:
        case "IQ1_S" | "IQ1_M":
            cpu_iq1.quantize_thorough(rows, importance, name, out)
        case "IQ2_XXS" | "IQ2_XS" | "IQ2_S":
            cpu_iq2.quantize_thorough(rows, importance, name, out)
        case "IQ3_XXS" | "IQ3_S":
            cpu_iq3.quantize_thorough(rows, importance, name, out)
        case "TQ1_0" | "TQ2_0":
            cpu_ternary.quantize_thorough(rows, importance, name, out)


def search(rows: Floats, name: str, importance: Floats | None, effort: Effort, out: Bytes) -> None:
    """Write the bytes that the numba search finds with `effort` for a type of scales and levels to `out`."""
    flat, target, columns = rows.reshape(-1), out.reshape(-1), rows.shape[1]
    weights = np.empty(0, np.float32) if importance is None else importance
    bits = int(name[-1]) if name.endswith("FP4") else int(name[name.index("Q") + 1])
    match name:
        case "Q4_0" | "Q5_0" | "Q8_0" | "IQ4_NL":
            quantize_scale(flat, weights, columns, bits, name == "IQ4_NL", effort.beyond, effort.sweeps, target)
        case "Q4_1" | "Q5_1":
            quantize_scale_minimum(flat, weights, columns, bits, effort.cuts, effort.sweeps, target)
        case "Q2_K" | "Q4_K" | "Q5_K":
            tops = (effort.d_tops, effort.dmin_tops)
            late = (effort.late, effort.sweeps)
            quantize_pairs(flat, weights, columns, bits, effort.cuts, *tops, effort.first, *late, target)
        case "Q3_K" | "Q6_K" | "IQ4_XS":
            tries = (effort.beyond, effort.d_tops, effort.first, effort.late, effort.sweeps)
            quantize_scales(flat, weights, columns, bits, *tries, target)
        case "MXFP4":
            quantize_mxfp4_thoroughly(flat, weights, columns, target)
        case "NVFP4":
            quantize_nvfp4_thoroughly(flat, weights, columns, target)


@kernel
def keep_better(
    rows: Floats,
    importance: Floats,
    size: int,
    stored_stock: Floats,
    stored: Floats,
    stock_blocks: Bytes,
    blocks: Bytes,
) -> None:
    """Put ggml's bytes back where their error, in float64, is not higher, or not a number at all.

    rows, stored_stock, stored: flat, what was asked for and what the bytes stand for; importance [C].
    """
    columns = len(importance)
    for block in range(len(blocks)):
        start = block * size
        offset = start % columns
        stock_error = 0.0
        error = 0.0
        for i in range(size):
            weight = np.float64(importance[offset + i])
            wanted = np.float64(rows[start + i])
            stock_difference = np.float64(stored_stock[start + i]) - wanted
            difference = np.float64(stored[start + i]) - wanted
            stock_error += weight * (stock_difference * stock_difference)
            error += weight * (difference * difference)
        if not error < stock_error * SURELY or stock_error > 1e308:
            blocks[block] = stock_blocks[block]
