"""The truth for TQ1_0 and TQ2_0: the largest magnitude of a block is its scale, and what reaches half of it counts.

That is exact for weights trained to be ternary and poor for others; `thorough/reference_ternary.py` fits the scale.
Shapes: R rows, C columns, S blocks of 256 weights. Source: quantize_row_tq1_0_ref and quantize_row_tq2_0_ref of ggml.
"""

from __future__ import annotations

import numpy as np

from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.packing.ternary import Bytes, Floats, pack_ternary


def quantize_ternary(rows: Floats, name: str) -> Bytes:
    """The ggml bytes of `rows` [R, C] f32, finite; gives [R, bytes] u8."""
    x_SN = rows.reshape(-1, SUPER_BLOCK)
    d_S = np.abs(x_SN).max(axis=1)
    with np.errstate(all="ignore"):
        inverse_S = np.where(d_S > 0, np.float32(1) / d_S, np.float32(0))
        scaled_SN = x_SN * inverse_S[:, None]
        reached_SN = np.isfinite(scaled_SN) & (np.abs(scaled_SN) >= np.float32(0.5))  # C turns infinity into code 0
        codes_SN = np.where(reached_SN, np.sign(scaled_SN), np.float32(0)) + np.float32(1)
        return pack_ternary(name, d_S, codes_SN).reshape(len(rows), -1)
