"""Grids: which values a stored weight can take.

A grid is one axis of three: grid (which values exist) x method (who chooses among them) x container (how they are
stored). Every grid turns a weight into parts, named tensors that a container writes as they are, and parts back into a
weight; the same `decode` measures an artifact, so what is reported is what a reader computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quantkernels.columns import AnyFrame


@dataclass(frozen=True, kw_only=True)
class Framed:
    """Parts as a method sees them that chooses codes: their frame, and how codes become parts again.

    with_frame takes this frame, or it with other scales that its ladders allow, and codes.
    """

    frame: AnyFrame
    with_frame: Callable[[AnyFrame, Tensor], Mapping[str, Tensor]]


class Grid(Protocol):
    """The values a stored weight can take. Implementations are frozen dataclasses: equal grids store equal parts."""

    @property
    def name(self) -> str:
        """The grid in words that a plan or a report can show, such as "int4 g128" or "Q4_K"."""
        ...

    def encode(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The parts for `weight` [O, I] f32, each value rounded to nearest; importance [I] f32 weighs columns."""
        ...

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight [O, I] f32 that a reader of these parts computes with."""
        ...

    def framed(self, parts: Mapping[str, Tensor]) -> Framed | None:
        """`parts` with its codes set apart from all else; None when there are no codes, such as in floating point."""
        ...


@dataclass(frozen=True, kw_only=True)
class Coded:
    """One rounded tensor: what a rounder yields and a container takes."""

    grid: Grid
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]

    def decode(self) -> Tensor:
        """The weight that a reader computes with, f32, in `shape`."""
        return self.grid.decode(self.parts).reshape(self.shape)
