"""MXFP4 and NVFP4: the largest magnitude of sixteen sub-blocks at a time, one per lane; then codes block by block.

The nearest of eight levels is found by comparing with the seven middles between them, which are exact numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.legacy import place
from quantkernels.ggml.cpu.search import ZERO, extreme_of, gather
from quantkernels.lanes import WIDTH, Lanes, buffer, load, magnitude, select, spread, store, store_bytes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

LOG_2 = 0.6931471805599453
NAN_UE4M3 = 127
LARGEST = np.float32(3.4028235e38)


@compiled
def nearest_code(value: Lanes, scale: np.float32) -> Lanes:
    """The code from 0 to 15 of the nearest level times `scale`; half-way the one nearer to 0, and never -0."""
    size = magnitude(value)
    code = select(size > scale * np.float32(0.5), np.float32(1), spread(ZERO))
    code = select(size > scale * np.float32(1.5), np.float32(2), code)
    code = select(size > scale * np.float32(2.5), np.float32(3), code)
    code = select(size > scale * np.float32(3.5), np.float32(4), code)
    code = select(size > scale * np.float32(5), np.float32(5), code)
    if scale * np.float32(8) <= LARGEST:  # a level that is infinite is never the nearest
        code = select(size > scale * np.float32(7), np.float32(6), code)
        code = select(size > scale * np.float32(10), np.float32(7), code)
    return select((value < ZERO) & (code > ZERO), code + np.float32(8), code)


@compiled
def exponent_of(bits: int) -> int:
    """floor(log2f(x)) + 125 for the bits of a positive float, as one byte.

    floor(log2f(x)) is the exponent of x, but one more where x lies so few steps below a power of two that log2f rounds
    up: n steps of 2**-24 change the logarithm by n * 2**-24 / log(2), and its own steps near 2**j are 2**(j - 23).
    """
    if bits < 0x00800000:  # denormal; 2**64 makes it normal and log2f gives the logarithm of the value itself
        power = -127
        while bits < 0x00800000:
            bits <<= 1
            power -= 1
        power += 1
    else:
        power = (bits >> 23) - 127
    above = power + 1
    steps = 0x00800000 - (bits & 0x007FFFFF)
    distance = above - 1 if above > 0 else -above  # log2f approaches a positive number from the binade below it
    reach = 0
    while distance > 1:
        distance >>= 1
        reach += 1
    if above not in (0, 1) and steps < LOG_2 * (1 << reach):
        power = above
    return (power + 125) & 255


@compiled
def half_e8m0(exponent: int) -> np.float32:
    """2 ** (exponent - 128)."""
    if exponent < 2:
        return np.float32(2.0**-128) * np.float32(1 + exponent)
    return np.float32(2.0 ** (exponent - 128))


@kernel
def quantize_mxfp4(rows: Floats, out: Bytes) -> None:
    """MXFP4 of flat `rows` into flat `out`."""
    x = buffer(32)
    found = buffer(1)
    found_bits = found.view(np.int32)
    offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // 32
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, offsets)
        gather(rows, offsets, 32, x)
        store(found, 0, magnitude(extreme_of(x, 0, 32)))
        for k in range(present):
            at = (group * WIDTH + k) * 17
            bits = int(found_bits[k])
            exponent = 0
            if bits > 0:
                exponent = exponent_of(bits)
            scale = half_e8m0(exponent)
            out[at] = exponent
            first = nearest_code(load(rows, offsets[k]), scale)
            second = nearest_code(load(rows, offsets[k] + WIDTH), scale)
            store_bytes(out, at + 1, first + second * np.float32(16))


@compiled
def ue4m3_of(value: np.float32, bits: int) -> int:
    """The byte for a value that is not negative, and its bits; the byte for NaN beyond 448."""
    if value > np.float32(448):
        return NAN_UE4M3
    if bits >> 23 <= 120:
        return min(int(value * np.float32(512) + np.float32(0.5)), 7)
    field = (((bits >> 19) + 1) >> 1) - (120 << 3)
    return field if field < 0x78 else 0x7E


@compiled
def half_ue4m3(field: int) -> np.float32:
    """Half of what the byte stands for; 0 for NaN."""
    if field == NAN_UE4M3:
        return ZERO
    if field < 8:
        return np.float32(field) * np.float32(2.0**-10)
    return np.float32(8 + (field & 7)) * np.float32(2.0 ** ((field >> 3) - 11))


@kernel
def quantize_nvfp4(rows: Floats, out: Bytes) -> None:
    """NVFP4 of flat `rows` into flat `out`: four blocks, which are sixteen sub-blocks, at a time."""
    x = buffer(WIDTH)
    found = buffer(1)
    found_bits = found.view(np.int32)
    codes = buffer(WIDTH + 1)
    pairs = np.empty(WIDTH * 8 + 8, np.uint8)  # each store of sixteen bytes has eight that count
    offsets = np.empty(WIDTH, np.int64)
    parts = len(rows) // WIDTH
    for first in range(0, parts, WIDTH):
        for k in range(WIDTH):
            offsets[k] = min(first + k, parts - 1) * WIDTH
        gather(rows, offsets, WIDTH, x)
        store(found, 0, magnitude(extreme_of(x, 0, WIDTH)) / np.float32(6))
        for k in range(min(WIDTH, parts - first)):
            field = ue4m3_of(found[k], int(found_bits[k]))
            at = (first + k) // 4 * 36
            out[at + k % 4] = field
            store(codes, 0, spread(ZERO))
            scale = half_ue4m3(field)
            if scale > ZERO:
                store(codes, 0, nearest_code(load(rows, offsets[k]), scale))
            store_bytes(pairs, k * 8, load(codes, 0) + load(codes, 8) * np.float32(16))
            for i in range(8):
                out[at + 4 + k % 4 * 8 + i] = pairs[k * 8 + i]
