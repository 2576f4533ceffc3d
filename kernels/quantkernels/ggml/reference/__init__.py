"""The truth for quantizing: what each ggml type does with the searches of `reference/search.py`, in numpy.

Two rules of ggml shape every type: what is stored is what is used (scales go through float16 and their packed fields
before weights are rounded to them), and where a stored scale is 0 the codes of the search stay. The price of a truth in
numpy is time: `cpu.py` gives the same bytes 15 to 140 times faster.

Shapes: R rows, B blocks or sub-blocks, N weights in each, S super-blocks, J sub-blocks in a super-block.
Source: quantize_row_*_ref and quantize_row_*_impl of ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml import packing
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.fields import as_half
from quantkernels.ggml.reference.fp4 import quantize_fp4
from quantkernels.ggml.reference.iq1 import quantize_iq1
from quantkernels.ggml.reference.iq2 import quantize_iq2
from quantkernels.ggml.reference.iq3 import quantize_iq3
from quantkernels.ggml.reference.iq4 import quantize_iq4
from quantkernels.ggml.reference.search import (
    TINY,
    Floats,
    Steps,
    as_byte,
    first_extreme,
    first_lowest,
    nearest,
    round_half_away,
    running_sum,
    search_descent,
    search_nonnegative,
    search_scale_min,
    search_symmetric,
)
from quantkernels.ggml.reference.ternary import quantize_ternary

Bytes = NDArray[np.uint8]

WITH_IMPORTANCE = Steps(first=-0.9, width=0.05, count=36, bounded=True)
ALONE = {
    "Q2_K": Steps(first=-0.5, width=0.1, count=15, absolute=True),
    "Q4_K": Steps(first=-1.0, width=0.1, count=20),
    "Q5_K": Steps(first=-0.5, width=0.1, count=15),
}


def quantize_blocks(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """The ggml bytes of `rows`.

    rows [R, C] f32, finite, C a multiple of the type's block; importance [C] f32 or None; gives [R, bytes] u8.
    """
    with np.errstate(all="ignore"):
        if name in ("Q4_K", "Q5_K", "Q2_K"):
            blocks = _quantize_scale_min_k(rows, name, importance)
        elif name == "Q6_K":
            blocks = _quantize_q6_k(rows, importance)
        elif name == "Q3_K":
            blocks = _quantize_q3_k(rows, importance)
        elif name.startswith("IQ4"):
            blocks = quantize_iq4(rows, name, importance)
        elif name.startswith("IQ2"):
            blocks = quantize_iq2(rows, name, importance)
        elif name.startswith("IQ3"):
            blocks = quantize_iq3(rows, name, importance)
        elif name.startswith("IQ1"):
            blocks = quantize_iq1(rows, name, importance)
        elif name.startswith("TQ"):
            blocks = quantize_ternary(rows, name)
        elif name.endswith("FP4"):
            blocks = quantize_fp4(rows, name)
        else:
            blocks = _quantize_legacy(rows, name, importance)
    return blocks.reshape(rows.shape[0], -1)


def _quantize_legacy(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of 32 with one scale, and one minimum in the _1 types."""
    x_BN = rows.reshape(-1, 32)
    bits = int(name[1])
    minimum_B = None
    if name == "Q8_0":
        scale_B = np.abs(x_BN).max(axis=1) / np.float32(127)
        scaled_BN = round_half_away(x_BN * _inverse(scale_B)[:, None])
        codes_BN = np.where(np.isfinite(scaled_BN), scaled_BN, np.float32(0))  # C turns what is not finite into byte 0
        return packing.pack_legacy(name, scale_B, None, codes_BN)
    if importance is not None:
        weight_BN = _row_weights(rows, importance).reshape(-1, 32)
        if name.endswith("_0"):
            found = search_symmetric(x_BN, weight_BN, 1 << (bits - 1))
            return packing.pack_legacy(name, found.scale_B, None, found.codes_BN)
        fitted = search_scale_min(x_BN, weight_BN, (1 << bits) - 1, WITH_IMPORTANCE)
        return packing.pack_legacy(name, fitted.scale_B, -fitted.depth_B, fitted.codes_BN)
    if name.endswith("_0"):
        scale_B = first_extreme(x_BN) / np.float32(-(1 << (bits - 1)))
        shifted_BN = x_BN * _inverse(scale_B)[:, None] + np.float32((1 << (bits - 1)) + 0.5)
    else:
        minimum_B = first_lowest(x_BN)
        scale_B = (x_BN.max(axis=1) - minimum_B) / np.float32((1 << bits) - 1)
        shifted_BN = (x_BN - minimum_B[:, None]) * _inverse(scale_B)[:, None] + np.float32(0.5)
    shifted_BN = np.where(np.isfinite(shifted_BN), shifted_BN, np.float32(0))
    codes_BN = np.minimum(np.trunc(shifted_BN), np.float32((1 << bits) - 1))
    return packing.pack_legacy(name, scale_B, minimum_B, codes_BN)


def _inverse(scale_B: Floats) -> Floats:
    return np.where(scale_B != 0, np.float32(1) / scale_B, np.float32(0))


def _row_weights(rows: Floats, importance: Floats) -> Floats:
    mean_square_R = running_sum(rows * rows) / np.float32(rows.shape[1])
    return importance * np.sqrt(mean_square_R[:, None] + rows * rows)


def _super_block_importance(rows: Floats, importance: Floats) -> Floats:
    return np.broadcast_to(importance, rows.shape).reshape(-1, SUPER_BLOCK)


def _super_block_weights(rows: Floats, importance: Floats, factor: float) -> Floats:
    """Importance times sqrt(factor * mean square + x^2), [S, 256], the mean over the super-block."""
    x_SN = rows.reshape(-1, SUPER_BLOCK)
    mean_square_S = np.float32(factor) * running_sum(x_SN * x_SN) / np.float32(SUPER_BLOCK)
    root_SN = np.sqrt(mean_square_S[:, None] + x_SN * x_SN)
    return _super_block_importance(rows, importance) * root_SN


def _quantize_scale_min_k(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """Q2_K, Q4_K, Q5_K: super-blocks of 256 whose sub-blocks have a small scale and a small minimum each."""
    size, limit, scale_limit = (16, 3, 15) if name == "Q2_K" else (32, 15 if name == "Q4_K" else 31, 63)
    x_BN = rows.reshape(-1, size)
    if importance is None:
        magnitude_BN = np.abs(x_BN)
        weight_BN = magnitude_BN
        if name != "Q2_K":
            weight_BN = np.sqrt(running_sum(x_BN * x_BN) / np.float32(size))[:, None] + magnitude_BN
        found = search_scale_min(x_BN, weight_BN, limit, ALONE[name])
    else:
        weight_BN = _super_block_weights(rows, importance, 1 if name == "Q2_K" else 2).reshape(-1, size)
        found = search_scale_min(x_BN, weight_BN, limit, WITH_IMPORTANCE)
    scale_SJ = found.scale_B.reshape(-1, SUPER_BLOCK // size)
    depth_SJ = found.depth_B.reshape(-1, SUPER_BLOCK // size)
    if importance is None:
        d_S, scales_SJ = _scales_by_maximum(scale_SJ, scale_limit)
        dmin_S, depths_SJ = _scales_by_maximum(depth_SJ, scale_limit)
    else:
        sum_w_SJ = running_sum(weight_BN).reshape(scale_SJ.shape)
        d_S, scales_SJ = search_nonnegative(scale_SJ, sum_w_SJ, scale_limit)
        dmin_S, depths_SJ = search_nonnegative(depth_SJ, sum_w_SJ, scale_limit)
        if name == "Q5_K":
            scales_SJ, depths_SJ = (np.minimum(codes, np.float32(63)) for codes in (scales_SJ, depths_SJ))
    fields = packing.pack_sub_scales(name, scales_SJ, depths_SJ)
    scales_SJ, depths_SJ = packing.unpack_sub_scales(name, fields)
    scale_B = (as_half(d_S)[:, None] * scales_SJ).reshape(-1, 1)
    depth_B = (as_half(dmin_S)[:, None] * depths_SJ).reshape(-1, 1)
    rounded_BN = np.clip(nearest((x_BN + depth_B) / scale_B), np.float32(0), np.float32(limit))
    codes_BN = np.where(scale_B != 0, rounded_BN, found.codes_BN)  # ggml keeps the search's codes where the scale is 0
    return packing.pack_scale_min_k(name, d_S, dmin_S, fields, codes_BN.reshape(-1, SUPER_BLOCK))


def _scales_by_maximum(value_SJ: Floats, limit: int) -> tuple[Floats, Floats]:
    high_S = np.maximum(value_SJ.max(axis=1), np.float32(0))
    inverse_S = np.where(high_S > 0, np.float32(limit) / high_S, np.float32(0))
    codes_SJ = as_byte(nearest(inverse_S[:, None] * value_SJ))
    if limit == 63:  # ggml clamps these, and lets those of Q2_K wrap
        codes_SJ = np.minimum(codes_SJ, np.float32(limit))
    return high_S / np.float32(limit), codes_SJ


def _quantize_q6_k(rows: Floats, importance: Floats | None) -> Bytes:
    """Q6_K: 16 sub-blocks of 16 with a signed 8-bit scale each."""
    x_BN = rows.reshape(-1, 16)
    weight_BN = x_BN * x_BN if importance is None else _super_block_importance(rows, importance).reshape(-1, 16)
    found = search_symmetric(x_BN, weight_BN, 32)
    scale_SJ = found.scale_B.reshape(-1, 16)
    extreme_S = first_extreme(scale_SJ)
    inverse_S = np.float32(-128) / extreme_S
    d_S = np.float32(1) / inverse_S
    scales_SJ = np.minimum(nearest(inverse_S[:, None] * scale_SJ), np.float32(127))
    codes_SN = _round_to_scales(x_BN, as_half(d_S)[:, None] * scales_SJ, 32, found.codes_BN)
    blocks = packing.pack_q6_k(d_S, scales_SJ, codes_SN)
    blocks[np.abs(extreme_S) < TINY] = 0
    return blocks


def _quantize_q3_k(rows: Floats, importance: Floats | None) -> Bytes:
    """Q3_K: 16 sub-blocks of 16 with a signed 6-bit scale each."""
    x_BN = rows.reshape(-1, 16)
    if importance is None:
        found = search_descent(x_BN, 4)
        scale_SJ = found.scale_B.reshape(-1, 16)
        extreme_S = first_extreme(scale_SJ)
        inverse_S = np.float32(-32) / extreme_S
        scales_SJ = np.clip(nearest(inverse_S[:, None] * scale_SJ), np.float32(-32), np.float32(31))
        d_S = np.where(extreme_S != 0, np.float32(1) / inverse_S, np.float32(0))
        scales_SJ = np.where(extreme_S[:, None] != 0, scales_SJ, np.float32(-32))
    else:
        weight_SN = _super_block_weights(rows, importance, 2)
        found = search_symmetric(x_BN, weight_SN.reshape(-1, 16), 4)
        scale_SJ = found.scale_B.reshape(-1, 16)
        outer = search_symmetric(scale_SJ, running_sum(weight_SN.reshape(-1, 16)).reshape(-1, 16), 32)
        d_S = outer.scale_B
        scales_SJ = outer.codes_BN - np.float32(32)
    codes_SN = _round_to_scales(x_BN, as_half(d_S)[:, None] * scales_SJ, 4, found.codes_BN)
    return packing.pack_q3_k(d_S, scales_SJ, codes_SN)


def _round_to_scales(x_BN: Floats, scale_SJ: Floats, limit: int, searched_BN: Floats) -> Floats:
    """Codes [S, 256] for stored scales; a sub-block whose stored scale is 0 keeps the codes of the search."""
    scale_B1 = scale_SJ.reshape(-1, 1)
    rounded_BN = np.clip(nearest(x_BN / scale_B1), np.float32(-limit), np.float32(limit - 1)) + np.float32(limit)
    return np.where(scale_B1 != 0, rounded_BN, searched_BN).reshape(-1, SUPER_BLOCK)
