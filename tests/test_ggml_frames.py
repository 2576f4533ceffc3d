"""Frames of ggml blocks: exact with ggml's decoder for every type, and written back as the blocks they came from."""

# O out, I in, G groups of a row.
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

import ggml_peer
from quantkernels import columns
from quantkernels.columns import PointFrame
from quantkernels.ggml import TYPES, frames
from quantkernels.ggml.frames.points import LATTICES

needs_peer = pytest.mark.skipif(ggml_peer.library() is None, reason="xllamacpp is not installed")
WITH_FRAME = [*frames.SCALARS, *LATTICES]
COLUMNS = 512


def weights(rows: int = 9) -> Tensor:
    """Heavy tails, a row of zeros, a constant one, one that is never negative, tiny ones and large ones."""
    drawn = np.random.default_rng(3).standard_t(4, (rows, COLUMNS)).astype(np.float32) * np.float32(0.1)
    drawn[0], drawn[1], drawn[2] = 0, 0.25, np.abs(drawn[2])
    drawn[3] *= np.float32(1e-6)
    drawn[4] *= np.float32(1e3)
    return torch.from_numpy(drawn)


def encoded(type: str, weight: Tensor) -> Tensor:
    importance = np.random.default_rng(4).random(COLUMNS).astype(np.float32) + np.float32(0.1)
    return torch.from_numpy(ggml_peer.quantize(weight.numpy(), type, importance))


def decoded(type: str, blocks: Tensor) -> Tensor:
    return torch.from_numpy(ggml_peer.dequantize(blocks.numpy(), type, COLUMNS))


def hessian() -> Tensor:
    random = torch.Generator().manual_seed(5)
    rows = torch.randn(700, COLUMNS, generator=random) @ (
        torch.eye(COLUMNS) + torch.randn(COLUMNS, COLUMNS, generator=random) * 0.1
    )
    return rows.T @ rows / 700 + 0.05 * torch.eye(COLUMNS)


def test_every_type_with_codes_has_a_frame() -> None:
    assert set(WITH_FRAME) == set(TYPES) - {"F32", "F16", "BF16"}
    for type in ("F32", "F16", "BF16"):
        assert frames.frame(torch.zeros(2, 64, dtype=torch.uint8), type) is None


@needs_peer
@pytest.mark.parametrize("type", WITH_FRAME)
def test_a_frame_decodes_to_the_bits_of_ggml(type: str) -> None:
    blocks = encoded(type, weights())
    frame = frames.frame(blocks, type)
    assert frame is not None
    codes = frames.codes(blocks, type)
    assert torch.equal(frame.decode(codes), decoded(type, blocks))
    assert torch.equal(frames.with_codes(blocks, type, codes), blocks)
    # any other codes: those of a row further down, and both ends of the range
    others = [codes.roll(1, 0), codes.roll(-1, 1)]
    if not isinstance(frame, PointFrame):
        others += [torch.full_like(codes, frame.low), torch.full_like(codes, frame.high)]
    for other in others:
        written = frames.with_codes(blocks, type, other)
        assert torch.equal(frames.codes(written, type), other)
        assert torch.equal(frame.decode(other), decoded(type, written))
        again = frames.frame(written, type)
        assert again is not None and torch.equal(again.scale_OG, frame.scale_OG)


@needs_peer
@pytest.mark.parametrize("type", WITH_FRAME)
def test_other_scales_cost_less_and_are_stored_exactly(type: str) -> None:
    weight = weights(400)
    blocks, given = encoded(type, weight), hessian()
    frame, codes = frames.frame(blocks, type), frames.codes(blocks, type)
    assert frame is not None
    before = blocks.clone()
    new, moved = columns.refine(weight, given, frame, codes, sweeps=2)
    written = frames.with_frame(blocks, type, new, moved)
    assert torch.equal(decoded(type, written), new.decode(moved)) and torch.equal(blocks, before)
    assert torch.equal(frames.codes(written, type), moved)

    def error(of: columns.AnyFrame, codes: Tensor) -> Tensor:
        off = (of.decode(codes) - weight).double()
        return ((off @ given.double()) * off).sum(1)

    held = dataclasses.replace(frame, scales=None)
    alone = columns.refine(weight, given, held, codes, sweeps=2)[1]
    assert bool((error(new, moved) <= error(frame, codes) * (1 + 1e-6)).all())
    if type in ("MXFP4", "TQ1_0", "TQ2_0"):
        assert torch.equal(new.scale_OG, frame.scale_OG)
    else:
        ratio = (error(new, moved) / error(held, alone))[1:]  # of each row, however large; the row of zeros has none
        assert float(ratio[ratio > 0].log().mean().exp()) < 0.999


@needs_peer
def test_without_anything_to_gain_nothing_moves() -> None:
    """The weight is what the blocks decode to: nothing is off."""
    for type in WITH_FRAME:
        blocks = encoded(type, weights())
        frame, codes = frames.frame(blocks, type), frames.codes(blocks, type)
        assert frame is not None
        new, moved = columns.refine(frame.decode(codes), hessian(), frame, codes, sweeps=1)
        assert torch.equal(new.scale_OG, frame.scale_OG) and torch.equal(moved, codes), type
        assert torch.equal(decoded(type, frames.with_frame(blocks, type, new, codes)), frame.decode(codes)), type


@needs_peer
def test_frames_of_a_kind_are_stacked_and_split_with_their_ladders() -> None:
    for type in ("Q2_K", "Q4_1", "IQ4_XS", "IQ2_XS", "IQ1_M"):
        first, second = encoded(type, weights(9)), encoded(type, weights(12)[5:])
        parts = [frame for blocks in (first, second) if (frame := frames.frame(blocks, type)) is not None]
        codes = torch.cat([frames.codes(first, type), frames.codes(second, type)])
        whole = columns.stack(parts)
        expected = torch.cat([decoded(type, first), decoded(type, second)])
        assert torch.equal(whole.decode(codes), expected)
        refined, moved = columns.refine(expected * 1.01, hessian(), whole, codes, sweeps=1)
        again = columns.split(refined, [9, 7])
        assert again[1].scales is not None and len(again[1].scales.unit_OG) == 7
        written = frames.with_frame(second, type, again[1], moved[9:])
        assert torch.equal(decoded(type, written), again[1].decode(moved[9:]))
