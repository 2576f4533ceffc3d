"""A tensor as a part of a stored one: every other row, or the whole turned over.

Some checkpoints keep a linear's weight as [I, O], or the rows of two linears in turn. Everything here wants a linear as
[O, I], so the header of such a tensor says how to get from the bytes that were read to it. What is a plain range of
rows needs no view: its header spans just those bytes.
"""

# R, C rows and columns as stored; O, I as a linear has them

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class View:
    """How the bytes of a header become its tensor: `shape` [R, C] as stored, turned over, then rows start:stop:step."""

    shape: tuple[int, int]
    transposed: bool = False
    start: int = 0
    stop: int | None = None
    step: int = 1

    def apply(self, stored: Tensor) -> Tensor:
        """The tensor [O, I] from `stored` [R, C], in memory of its own."""
        turned = stored.T if self.transposed else stored
        return turned[self.start : self.stop : self.step].contiguous()
