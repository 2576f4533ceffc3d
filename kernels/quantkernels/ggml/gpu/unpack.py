"""Blocks to weights in Triton, with the operations of ggml's to_float in their order; a lane is a weight."""

from __future__ import annotations

import triton.language as tl

from quantkernels.ggml.gpu.numbers import jitted, lane_of, load_byte, load_half


@jitted
def field_of(
    blocks: tl.tensor,
    at: tl.tensor,
    n: tl.tensor,
    present: tl.tensor,
    RUN: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """The bits of the n-th code in the field that starts at byte `at`; see `gpu_round.pack_kernel`."""
    byte = load_byte(blocks, at + n // (RUN * PARTS) * RUN + n % RUN, present)
    return (byte >> (n % (RUN * PARTS) // RUN * WIDTH)) & ((1 << WIDTH) - 1)


@jitted
def code_of(
    blocks: tl.tensor,
    lane: tl.tensor,
    present: tl.tensor,
    WEIGHTS: tl.constexpr,
    BYTES: tl.constexpr,
    FIELDS: tl.constexpr,
) -> tl.tensor:
    """A weight's code out of the fields (at, run, parts, width, shift) of its block."""
    n = (lane % WEIGHTS).to(tl.int32)
    code = tl.zeros_like(n)
    for f in tl.static_range(len(FIELDS)):
        at = lane // WEIGHTS * BYTES + FIELDS[f][0]
        part = field_of(blocks, at, n, present, FIELDS[f][1], FIELDS[f][2], FIELDS[f][3])
        code = code | (part << FIELDS[f][4])
    return code


@jitted
def sub_scale_min(
    blocks: tl.tensor, lane: tl.tensor, present: tl.tensor, BITS: tl.constexpr, N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The (scale, depth) of a weight's sub-block in Q2_K, Q4_K or Q5_K."""
    at = lane // 256 * (84 if BITS == 2 else (144 if BITS == 4 else 176))
    j = (lane % 256 // N).to(tl.int32)
    if BITS == 2:
        pair = load_byte(blocks, at + j, present)
        scale = pair & 15
        depth = pair >> 4
    else:
        first = load_byte(blocks, at + 4 + j % 4, present)
        second = load_byte(blocks, at + 8 + j % 4, present)
        third = load_byte(blocks, at + 12 + j % 4, present)
        scale = tl.where(j < 4, first & 63, (third & 15) | ((first >> 6) << 4))
        depth = tl.where(j < 4, second & 63, (third >> 4) | ((second >> 6) << 4))
    field = at + (80 if BITS == 2 else 0)
    d = load_half(blocks, field, present)
    dmin = load_half(blocks, field + 2, present)
    return d * scale.to(tl.float32), dmin * depth.to(tl.float32)


@jitted
def symmetric_scale(blocks: tl.tensor, lane: tl.tensor, present: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """The scale of a weight's sub-block in Q3_K, Q6_K or IQ4_XS."""
    block = lane // 256
    if NAME == "Q6_K":
        d = load_half(blocks, block * 210 + 208, present)
        code = load_byte(blocks, block * 210 + 192 + lane % 256 // 16, present)
        code = tl.where(code < 128, code, code - 256)
    elif NAME == "Q3_K":
        d = load_half(blocks, block * 110 + 108, present)
        j = (lane % 256 // 16).to(tl.int32)
        low = load_byte(blocks, block * 110 + 96 + j % 8, present) >> (4 * (j // 8))
        high = load_byte(blocks, block * 110 + 104 + j % 4, present) >> (2 * (j // 4))
        code = ((low & 15) | ((high & 3) << 4)) - 32
    else:
        d = load_half(blocks, block * 136, present)
        j = (lane % 256 // 32).to(tl.int32)
        low = load_byte(blocks, block * 136 + 4 + j // 2, present) >> (4 * (j % 2))
        high = load_byte(blocks, block * 136 + 2 + j // 4, present) >> (2 * (j % 4))
        code = ((low & 15) | ((high & 3) << 4)) - 32
    return d * code.to(tl.float32)


@jitted
def byte_scale(blocks: tl.tensor, lane: tl.tensor, present: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """Half the scale of a weight's sub-block in MXFP4 or NVFP4."""
    if NAME == "MXFP4":
        exponent = load_byte(blocks, lane // 32 * 17, present)
        bits = tl.where(exponent < 2, 0x00200000 << tl.where(exponent < 2, exponent, 0), (exponent - 1) << 23)
        scale = bits.to(tl.float32, bitcast=True)
    else:
        field = load_byte(blocks, lane // 64 * 36 + lane % 64 // 16, present)
        exponent = (field >> 3) & 15
        mantissa = (field & 7).to(tl.float32)
        power = ((exponent - 11 + 127) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(exponent == 0, mantissa * 0.0009765625, (mantissa + 8.0) * power)
        scale = tl.where(field == 127, 0.0, scale)
    return scale


@jitted
def trit_of(blocks: tl.tensor, lane: tl.tensor, present: tl.tensor) -> tl.tensor:
    """The code of a weight of TQ1_0: a digit is what multiplying the fraction by three carries out of the byte."""
    n = (lane % 256).to(tl.int32)
    run = tl.where(n < 160, 32, tl.where(n < 240, 16, 4))
    first = tl.where(n < 160, 0, tl.where(n < 240, 160, 240))
    at = tl.where(n < 160, 0, tl.where(n < 240, 32, 48))
    digit = (n - first) // run
    power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
    byte = load_byte(blocks, lane // 256 * 54 + at + (n - first) % run, present)
    return (((byte * power) & 255) * 3) >> 8


@jitted
def unpack_kernel(
    blocks: tl.tensor,
    levels: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    NAME: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BYTES: tl.constexpr,
    FIELDS: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """out [count] f32: the weights of `blocks`. levels holds the values of codes for types that have a table."""
    lane = lane_of(T)
    present = lane < count
    at = lane // WEIGHTS * BYTES
    code = trit_of(blocks, lane, present) if NAME == "TQ1_0" else code_of(blocks, lane, present, WEIGHTS, BYTES, FIELDS)
    if NAME == "Q8_0":
        weight = tl.where(code < 128, code, code - 256).to(tl.float32) * load_half(blocks, at, present)
    elif NAME == "Q4_0" or NAME == "Q5_0":
        weight = (code - (8 if NAME == "Q4_0" else 16)).to(tl.float32) * load_half(blocks, at, present)
    elif NAME == "Q4_1" or NAME == "Q5_1":
        weight = code.to(tl.float32) * load_half(blocks, at, present) + load_half(blocks, at + 2, present)
    elif NAME == "Q2_K":
        scale, depth = sub_scale_min(blocks, lane, present, 2, 16)
        weight = scale * code.to(tl.float32) - depth
    elif NAME == "Q4_K":
        scale, depth = sub_scale_min(blocks, lane, present, 4, 32)
        weight = scale * code.to(tl.float32) - depth
    elif NAME == "Q5_K":
        scale, depth = sub_scale_min(blocks, lane, present, 5, 32)
        weight = scale * code.to(tl.float32) - depth
    elif NAME == "Q3_K" or NAME == "Q6_K":
        shifted = (code - (4 if NAME == "Q3_K" else 32)).to(tl.float32)
        weight = symmetric_scale(blocks, lane, present, NAME) * shifted
    elif NAME == "IQ4_NL":
        weight = load_half(blocks, at, present) * tl.load(levels + code)
    elif NAME == "IQ4_XS":
        weight = symmetric_scale(blocks, lane, present, NAME) * tl.load(levels + code)
    elif NAME == "MXFP4" or NAME == "NVFP4":
        weight = tl.load(levels + code) * byte_scale(blocks, lane, present, NAME)
    else:
        tl.static_assert(NAME == "TQ1_0" or NAME == "TQ2_0")
        weight = (code - 1).to(tl.float32) * load_half(blocks, at + BYTES - 2, present)
    tl.store(out + lane, weight, mask=present)
