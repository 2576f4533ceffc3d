"""From encoded blocks to a frame, and back to the same blocks with other codes and scales.

Only where the codes lie is written down here. What scales and offsets are is asked of the decoder: blocks whose codes
all stand for 1, with the field of the minimum cleared, decode to the scale, and blocks whose codes all stand for 0 to
the offset. So a frame's values are the decoder's, bit for bit, for every type and without a word about its sub-scales.
The alternative, reading the fields again, is shorter by two decodings of the matrix and can be wrong.

# O out, I in, G groups of a row, B blocks, N weights in a block, P parts of a byte.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkernels.columns.frame import AnyFrame, Frame, PointFrame
from quantkernels.ggml import packing
from quantkernels.ggml.frames import ladders as ladders
from quantkernels.ggml.frames import points as frames_points
from quantkernels.ggml.layout import TYPES
from quantkernels.ggml.packing.fields import join, split
from quantkernels.ggml.packing.iq4 import LEVELS
from quantkernels.ggml.packing.ternary import pack_ternary

Bytes = NDArray[np.uint8]
ONE = np.frombuffer(np.array([1], "<f2").tobytes(), np.uint8)
SLAB_WEIGHTS = 1 << 22  # rows are decoded this many weights at a time: 16 MB


@dataclass(frozen=True, kw_only=True)
class Plane:
    """`width` bits of each code, from bit `shift` up: 8 / width runs of `run` codes share `run` bytes, from `at` on."""

    at: int
    width: int
    run: int
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class Scalar:
    """A type with a code for each weight: where the codes lie, and what they mean (see Frame).

    stored gives, for each position in the table, the code in the file; empty where they are the same.
    """

    planes: tuple[Plane, ...]
    group_size: int
    high: int
    low: int = 0
    zero: int = 0
    table: tuple[float, ...] = ()
    stored: tuple[int, ...] = ()


def _even(group_size: int, bits: int, zero: int, *planes: Plane) -> Scalar:
    return Scalar(planes=planes, group_size=group_size, high=(1 << bits) - 1, zero=zero)


def _table(group_size: int, values: tuple[int, ...], plane: Plane, stored: tuple[int, ...] = ()) -> Scalar:
    table = tuple(float(value) for value in values)
    return Scalar(planes=(plane,), group_size=group_size, high=len(table) - 1, table=table, stored=stored)


NIBBLES = Plane(at=16, width=4, run=32)
FP4 = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
FP4_STORED = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)  # the file has a minus zero too, code 8
SCALARS = MappingProxyType(
    {
        "Q4_0": _even(32, 4, 8, Plane(at=2, width=4, run=16)),
        "Q4_1": _even(32, 4, 0, Plane(at=4, width=4, run=16)),
        "Q5_0": _even(32, 5, 16, Plane(at=6, width=4, run=16), Plane(at=2, width=1, run=1, shift=4)),
        "Q5_1": _even(32, 5, 0, Plane(at=8, width=4, run=16), Plane(at=4, width=1, run=1, shift=4)),
        # -128 would be read rightly by definition; ggml never writes it, and some fast readers negate codes
        "Q8_0": Scalar(planes=(Plane(at=2, width=8, run=32),), group_size=32, low=-127, high=127),
        "Q2_K": _even(16, 2, 0, Plane(at=16, width=2, run=32)),
        "Q3_K": _even(16, 3, 4, Plane(at=32, width=2, run=32), Plane(at=0, width=1, run=32, shift=2)),
        "Q4_K": _even(32, 4, 0, NIBBLES),
        "Q5_K": _even(32, 5, 0, Plane(at=48, width=4, run=32), Plane(at=16, width=1, run=32, shift=4)),
        "Q6_K": _even(16, 6, 32, Plane(at=0, width=4, run=64), Plane(at=128, width=2, run=32, shift=4)),
        "IQ4_NL": _table(32, LEVELS, Plane(at=2, width=4, run=16)),
        "IQ4_XS": _table(32, LEVELS, Plane(at=8, width=4, run=16)),
        "MXFP4": _table(32, FP4, Plane(at=1, width=4, run=16), FP4_STORED),
        "NVFP4": _table(16, FP4, Plane(at=4, width=4, run=8), FP4_STORED),
        "TQ1_0": Scalar(planes=(), group_size=256, high=2, zero=1),  # base 3: see packing_ternary
        "TQ2_0": Scalar(planes=(Plane(at=0, width=2, run=32),), group_size=256, high=2, zero=1),
    }
)


def frame(blocks: Tensor, type: str) -> AnyFrame | None:
    """The frame of `blocks` [O, bytes a row] u8; None for floating point."""
    scales, offsets = ladders.ladders(blocks, type)
    if type in frames_points.LATTICES:
        return replace(frames_points.frame(blocks, type), scales=scales)
    return replace(_scalar_frame(blocks, type), scales=scales, offsets=offsets) if type in SCALARS else None


def with_frame(blocks: Tensor, type: str, new: AnyFrame, codes: Tensor) -> Tensor:
    """`blocks` [O, bytes a row] u8 with the codes, and with the scales and offsets of a frame that `rescale` gave."""
    written = with_codes(blocks, type, codes)
    if new.scales is None:
        return written
    every = new.scales.group_size // new.group_size
    scale_OG = new.scale_OG[:, ::every]
    if isinstance(new, PointFrame) or new.offsets is None:
        return ladders.with_scales(written, type, scale_OG, new.scales, None, None)
    return ladders.with_scales(written, type, scale_OG, new.scales, new.offset_OG[:, ::every], new.offsets)


def _scalar_frame(blocks: Tensor, type: str) -> Frame:
    scalar, known = SCALARS[type], TYPES[type]
    rows = max(1, SLAB_WEIGHTS * known.size_bytes // known.weights // max(1, blocks.shape[1]))
    unit = scalar.table.index(1.0) if scalar.table else scalar.zero + 1
    nothing = scalar.table.index(0.0) if 0.0 in scalar.table else scalar.zero
    scales, offsets = [], []
    for slab in torch.split(blocks, rows):
        raw = slab.contiguous().numpy().reshape(-1, known.size_bytes).copy()
        minimum = known.half_fields[1:]
        if minimum:
            offsets.append(_firsts(_filled(raw, type, nothing), type, len(slab)))
            raw[:, minimum[0] : minimum[0] + 2] = 0
        scales.append(_firsts(_filled(raw, type, unit), type, len(slab)))
    scale_OG = torch.cat(scales)
    return Frame(
        scale_OG=scale_OG,
        zero_OG=torch.full_like(scale_OG, scalar.zero),
        offset_OG=torch.cat(offsets) if offsets else torch.zeros_like(scale_OG),
        group_size=scalar.group_size,
        low=scalar.low,
        high=scalar.high,
        table=scalar.table,
    )


def codes(blocks: Tensor, type: str) -> Tensor:
    """The codes in `blocks` [O, bytes a row] u8 of a type that has a frame: i8 [O, I], or i32 [O, I / 8] of points."""
    if type in frames_points.LATTICES:
        return frames_points.codes(blocks, type)
    scalar, known = SCALARS[type], TYPES[type]
    raw = blocks.contiguous().numpy().reshape(-1, known.size_bytes)
    if not scalar.planes:
        plain = raw.copy()
        plain[:, known.half_fields[0] : known.half_fields[0] + 2] = ONE
        found = packing.unpack_blocks(plain, type).astype(np.int8) + np.int8(scalar.zero)
    else:
        bits = np.zeros((len(raw), known.weights), np.uint8)
        for plane in scalar.planes:
            share = known.weights * plane.width // 8
            parts = split(raw[:, plane.at : plane.at + share].reshape(-1, plane.run), plane.width, 8 // plane.width)
            bits |= parts.reshape(bits.shape) << np.uint8(plane.shift)
        found = _positions(scalar)[bits] if scalar.stored else bits.view(np.int8)
    return torch.from_numpy(found.reshape(len(blocks), -1))


def with_codes(blocks: Tensor, type: str, codes_OI: Tensor) -> Tensor:
    """`blocks` [O, bytes a row] u8 with the codes of its frame in place of their own."""
    if type in frames_points.LATTICES:
        return frames_points.with_codes(blocks, type, codes_OI)
    known = TYPES[type]
    raw = blocks.contiguous().numpy().reshape(-1, known.size_bytes)
    written = _coded(raw, type, codes_OI.contiguous().numpy().reshape(-1, known.weights))
    return torch.from_numpy(written.reshape(len(blocks), -1))


def _coded(raw: Bytes, type: str, codes_BN: NDArray[np.int8]) -> Bytes:
    scalar = SCALARS[type]
    if not scalar.planes:
        d_B = raw[:, TYPES[type].half_fields[0] :].copy().view("<f2")[:, 0]
        return pack_ternary(type, d_B.astype(np.float32), codes_BN.astype(np.float32))
    bits = np.array(scalar.stored, np.uint8)[codes_BN] if scalar.stored else codes_BN.view(np.uint8)
    written = raw.copy()
    for plane in scalar.planes:
        share = codes_BN.shape[1] * plane.width // 8
        some = (bits >> np.uint8(plane.shift)) & np.uint8((1 << plane.width) - 1)
        parts = some.reshape(-1, 8 // plane.width, plane.run)
        written[:, plane.at : plane.at + share] = join(parts, plane.width).reshape(len(raw), -1)
    return written


def _filled(raw: Bytes, type: str, code: int) -> Bytes:
    """The blocks with every code the same."""
    return _coded(raw, type, np.full((len(raw), TYPES[type].weights), code, np.int8))


def _firsts(raw: Bytes, type: str, rows: int) -> Tensor:
    """What the first weight of each group decodes to, [rows, G] f32."""
    decoded = packing.unpack_blocks(raw, type)[:, :: SCALARS[type].group_size]
    return torch.from_numpy(np.ascontiguousarray(decoded).reshape(rows, -1))


def _positions(scalar: Scalar) -> NDArray[np.int8]:
    """The position in the table for each code of the file; a minus zero is zero."""
    found = np.full(1 << scalar.planes[0].width, scalar.table.index(0.0), np.int8)
    found[list(scalar.stored)] = np.arange(len(scalar.stored), dtype=np.int8)
    return found
