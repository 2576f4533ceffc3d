"""TQ1_0 and TQ2_0: codes 0, 1, 2 for -d, 0, +d to the bytes of a block, and back, in numpy.

TQ1_0 reads five codes as one number in base 3 and stores it as a fraction of 256, so that a reader finds each digit by
multiplying and keeping the carry. Shapes: S blocks of 256 weights.
Source: block_tq1_0, block_tq2_0 and their dequantize functions of ggml.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Integers = NDArray[np.integer[Any]]

RUNS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))  # first weight, bytes, weights in a byte; these lie `bytes` apart
POWERS = np.array([81, 27, 9, 3, 1], np.uint16)


def pack_ternary(name: str, d_S: Floats, codes_SN: Floats) -> Bytes:
    """Blocks of TQ1_0 [S, 54] or TQ2_0 [S, 66]; codes [S, 256] are 0, 1 or 2."""
    codes = codes_SN.astype(np.uint16)
    if name == "TQ2_0":
        shifts = np.arange(0, 8, 2, dtype=np.uint16)[:, None]
        fields = [np.bitwise_or.reduce(codes.reshape(-1, 2, 4, 32) << shifts, axis=2).reshape(-1, 64)]
    else:
        fields = [_as_fraction(codes[:, first : first + n * each].reshape(-1, each, n)) for first, n, each in RUNS]
    packed = np.concatenate(fields, axis=1).astype(np.uint8)
    return np.concatenate([packed, d_S.astype("<f2")[:, None].view(np.uint8)], axis=1)


def _as_fraction(digits: NDArray[np.uint16]) -> Integers:
    """Digits [S, up to 5, N] in base 3 as the smallest bytes that are at least number / 243 of 256."""
    number = (digits * POWERS[: digits.shape[1], None]).sum(axis=1, dtype=np.uint16)
    fraction: Integers = (number * np.uint16(256) + np.uint16(242)) // np.uint16(243)
    return fraction


def unpack_ternary(blocks: Bytes, name: str) -> Floats:
    """The weights that `blocks` [S, bytes] stand for, [S, 256] f32, as ggml's to_float computes them."""
    d_S1 = np.ascontiguousarray(blocks[:, -2:]).view("<f2").astype(np.float32)
    if name == "TQ2_0":
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        codes: Integers = (blocks[:, :64].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    else:
        codes = _digits_of(blocks[:, :52])
    return (codes.reshape(len(blocks), -1).astype(np.float32) - np.float32(1)) * d_S1


def _digits_of(fractions: Bytes) -> Integers:
    """Codes [S, 256] of the 52 bytes of a TQ1_0 block."""
    found = []
    at = 0
    for _, count, each in RUNS:
        scaled = fractions[:, None, at : at + count] * np.array([1, 3, 9, 27, 81], np.uint8)[:each, None]
        found.append(((scaled.astype(np.uint16) * np.uint16(3)) >> 8).reshape(len(fractions), -1))
        at += count
    return np.concatenate(found, axis=1)
