"""Rows that gave too little after rounding give as much again; what cannot be stretched stays as it is."""

# O out, I in, G groups of a row.
from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from quantkernels.columns import Frame, Ladder, restore_gain

ROWS, WIDTH, GROUP = 40, 96, 32


def hessian() -> Tensor:
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.3 + torch.eye(WIDTH)
    return mix @ mix.T


def weight() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))


def frame(dtype: torch.dtype = torch.float32, offset: float = 0.0, offsets: bool = False) -> Frame:
    """Two bits, with scales that are too small."""
    scale_OG = torch.full((ROWS, WIDTH // GROUP), 0.7)
    ladder = Ladder(unit_OG=scale_OG, group_size=GROUP, dtype=dtype)
    return Frame(
        scale_OG=scale_OG,
        zero_OG=torch.zeros_like(scale_OG),
        offset_OG=torch.full_like(scale_OG, offset),
        group_size=GROUP,
        low=-2,
        high=1,
        scales=ladder,
        offsets=ladder if offsets else None,
    )


def codes_of(given: Frame) -> Tensor:
    scale_OI, offset_OI = (each.repeat_interleave(GROUP, 1) for each in (given.scale_OG, given.offset_OG))
    return ((weight() - offset_OI) / scale_OI).round().clamp(given.low, given.high).to(torch.int8)


def gains(given: Frame, codes: Tensor) -> Tensor:
    """w H w'^T over w H w^T of each row."""
    seen = weight().double() @ hessian().double()
    return (seen * given.decode(codes).double()).sum(1) / (seen * weight().double()).sum(1)


@pytest.mark.parametrize("given", [frame(), frame(offset=0.05, offsets=True)])
def test_rows_give_what_the_weight_gives(given: Frame) -> None:
    codes = codes_of(given)
    before = gains(given, codes)
    assert bool((before < 0.97).all()), "nothing was lost, so nothing is shown"
    stretched = restore_gain(weight(), hessian(), given, codes)
    assert isinstance(stretched, Frame)
    torch.testing.assert_close(gains(stretched, codes), torch.ones(ROWS, dtype=torch.float64), rtol=1e-5, atol=0)
    share_OG = stretched.scale_OG / given.scale_OG
    torch.testing.assert_close(share_OG, share_OG[:, :1].expand_as(share_OG))
    torch.testing.assert_close(stretched.offset_OG, given.offset_OG * share_OG)


def test_scales_are_those_that_can_be_stored() -> None:
    given = frame(torch.bfloat16)
    stretched = restore_gain(weight(), hessian().bfloat16(), given, codes_of(given))
    assert torch.equal(stretched.scale_OG, stretched.scale_OG.bfloat16().float())
    assert bool(((gains(stretched, codes_of(given)) - 1).abs() < 2**-7).all())


def test_what_cannot_be_stretched_stays() -> None:
    rungs = Ladder(unit_OG=torch.full((ROWS, 3), 0.01), group_size=GROUP, rungs=(1.0, 2.0, 3.0))
    for given in (
        dataclasses.replace(frame(), scales=None),
        dataclasses.replace(frame(), scales=rungs),
        frame(offset=0.05),
        dataclasses.replace(frame(offset=0.05, offsets=True), offsets=rungs),
    ):
        assert restore_gain(weight(), hessian(), given, codes_of(given)) is given


def test_rows_that_are_lost_stay() -> None:
    """A row that became zeros, one of zeros, and one that is noise: no stretching helps."""
    given = frame()
    codes, wanted = codes_of(given), weight()
    codes[0], wanted[1], codes[1], codes[2] = 0, 0, 0, -codes[2]
    stretched = restore_gain(wanted, hessian(), given, codes)
    assert torch.equal(stretched.scale_OG[:3], given.scale_OG[:3])
    assert bool((stretched.scale_OG[3:] > given.scale_OG[3:]).all())
