"""The truth for IQ4_NL and IQ4_XS: sixteen uneven levels, sixteen trial scales a block of 32, in numpy.

Both round with inverse scales near -127 / extreme and take the least-squares scale of the codes found; IQ4_XS then
rounds the eight scales of a super-block to six bits. Unlike the k-quants, the codes are rounded with the scale before
it goes through float16. The legend of shapes is that of `reference.py`.

Source: quantize_row_iq4_nl_impl of ggml-quants.c.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.iq4 import LEVELS, MIDDLES, pack_iq4_nl, pack_iq4_xs
from quantkernels.ggml.reference.search import TINY, Floats, first_extreme, nearest, running_sum

Bytes = NDArray[np.uint8]
Codes = NDArray[np.intp]


def quantize_iq4(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    """Blocks of IQ4_NL or IQ4_XS, [B, bytes]; rows [R, C] f32, importance [C] f32 or None.

    Where a sum of the search overflows, d becomes infinite or NaN, which the caller refuses. In IQ4_XS ggml instead
    drops such a sub-block and stores zeros for it.
    """
    size = 32 if name == "IQ4_NL" else SUPER_BLOCK
    x_SN = rows.reshape(-1, size)
    if importance is None:
        weight_SN = x_SN * x_SN
    else:
        mean_square_S = running_sum(x_SN * x_SN) * np.float32(2 / size)
        weight_SN = np.broadcast_to(importance, rows.shape).reshape(-1, size)
        weight_SN = weight_SN * np.sqrt(mean_square_S[:, None] + x_SN * x_SN)
    x_BN = rows.reshape(-1, 32)
    scale_B = search_levels(x_BN, weight_SN.reshape(-1, 32))
    if name == "IQ4_NL":
        return pack_iq4_nl(scale_B, nearest_level(_inverse(scale_B)[:, None] * x_BN).astype(np.uint8))
    scale_SJ = scale_B.reshape(-1, 8)
    d_S = first_extreme(scale_SJ) / np.float32(-32)
    scales_SJ = np.clip(nearest(_inverse(d_S)[:, None] * scale_SJ), np.float32(-32), np.float32(31))
    inverse_B = _inverse((d_S[:, None] * scales_SJ).reshape(-1))
    codes = nearest_level(inverse_B[:, None] * x_BN).astype(np.uint8).reshape(-1, SUPER_BLOCK)
    return pack_iq4_xs(d_S, scales_SJ, codes)


def nearest_level(values: Floats) -> Codes:
    """The index of the nearest level, the upper one half-way between two and the last one for NaN.

    ggml compares the two distances; both are exact wherever they are close, so comparing with the middle is the same.
    """
    return np.searchsorted(np.array(MIDDLES, np.float32), values, side="right")


def search_levels(x_BN: Floats, weight_BN: Floats) -> Floats:
    """The scale among 16 candidates that leaves the least weighted square error, [B]; 0 for a block below TINY."""
    levels = np.array(LEVELS, np.float32)
    extreme_B = first_extreme(x_BN)
    scale_B = best_B = np.zeros(0, np.float32)
    for step in (None, *range(-7, 8)):
        if step is None:
            inverse_B: Floats = np.float32(1) / (extreme_B / np.float32(127))
        else:
            inverse_B = np.float32(step - 127) / extreme_B
        level_BN = levels[nearest_level(inverse_B[:, None] * x_BN)]
        sum_xl_B = running_sum(weight_BN * level_BN * x_BN)
        sum_l2_B = running_sum(weight_BN * level_BN * level_BN)
        if step is None:
            scale_B = np.where(sum_l2_B > 0, sum_xl_B / sum_l2_B, np.float32(0))
            best_B = scale_B * sum_xl_B
            continue
        better_B = (sum_l2_B > 0) & (sum_xl_B * sum_xl_B > best_B * sum_l2_B)
        scale_B = np.where(better_B, sum_xl_B / sum_l2_B, scale_B)
        best_B = np.where(better_B, scale_B * sum_xl_B, best_B)
    return np.where(np.abs(extreme_B) >= TINY, scale_B, np.float32(0))


def _inverse(scale_B: Floats) -> Floats:
    return np.where(scale_B != 0, np.float32(1) / scale_B, np.float32(0))
