"""The truth for the thorough TQ1_0 and TQ2_0: every cut of the sorted magnitudes, in numpy.

Shapes: R rows, C columns, S blocks of 256 weights.
"""

from __future__ import annotations

import numpy as np

from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.fields import Bytes, Floats, as_half
from quantkernels.ggml.packing.ternary import pack_ternary

LEAST_WEIGHT = np.float32(2.0**-30)  # of the block's largest


def quantize_thorough(rows: Floats, importance: Floats | None, name: str) -> Bytes:
    """Blocks [R, bytes] of least weighted square error; rows [R, C] f32, importance [C] f32 or None for ones."""
    x_SN = rows.reshape(-1, SUPER_BLOCK)
    weight_SN: Floats = np.ones_like(x_SN)
    with np.errstate(all="ignore"):
        if importance is not None:
            given_SN = np.broadcast_to(importance, rows.shape).reshape(-1, SUPER_BLOCK)
            high_S1 = given_SN.max(axis=1, keepdims=True)
            weight_SN = np.where(high_S1 > 0, np.maximum(given_SN / high_S1, LEAST_WEIGHT), np.float32(1))
        size_SN = np.abs(x_SN)
        order_SN = np.lexsort((weight_SN, size_SN), axis=1)[:, ::-1]  # of equal magnitudes the weightier comes first
        size_SN, weight_SN = (np.take_along_axis(values, order_SN, axis=1) for values in (size_SN, weight_SN))
        sum_wx_SN = np.add.accumulate(weight_SN * size_SN, axis=1, dtype=np.float32)
        sum_w_SN = np.add.accumulate(weight_SN, axis=1, dtype=np.float32)
        fitted_SN: Floats = np.divide(sum_wx_SN, sum_w_SN)
        d_SN = as_half(fitted_SN)
        error_SN = d_SN * (d_SN * sum_w_SN - np.float32(2) * sum_wx_SN)
        error_SN = np.where((d_SN <= np.float32(65504)) & (error_SN < 0), error_SN, np.float32(0))
        chosen_S1 = np.argmin(error_SN, axis=1)[:, None]
        lowest_S1 = np.take_along_axis(error_SN, chosen_S1, axis=1)
        d_S1 = np.where(lowest_S1 < 0, np.take_along_axis(d_SN, chosen_S1, axis=1), np.float32(0))
        border_S1 = d_S1 * np.float32(0.5)
        codes_SN = (x_SN > border_S1).astype(np.float32) - (-x_SN > border_S1) + np.float32(1)
        return pack_ternary(name, d_S1[:, 0], codes_SN).reshape(len(rows), -1)
