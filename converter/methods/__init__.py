"""Methods: who chooses the stored values. Transforms first, then exactly one rounder.

A transform changes a block's weights without changing what the model computes (SmoothQuant moves column scales from
activations into weights). One that concerns the whole model, such as a rotation of the residual stream, is carried out
block by block all the same, and on what lies outside of the blocks as if that were one. A rounder turns every linear of
a block into codes on its grid. Both see one block and the statistics of its taps, nothing else: that is what bounds
memory and what lets blocks go to different machines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from converter.architecture import Folding, Tap
from converter.grids import Coded, Grid
from converter.residual import Residual
from converter.stats import TapStats


class Rows(Protocol):
    """Sequences of calibration rows in front of a block, and what the original block makes of the original's own.

    tensors are all of Block.tensors, f32, as a reader of the artifact would have them.
    """

    @property
    def count(self) -> int:
        """How many sequences there are."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the block runs, and where gradients are."""
        ...

    def errors(self, tensors: Mapping[str, Tensor], sequences: Sequence[int]) -> Tensor:
        """The squared error f64 [N] of the block's output in each of the sequences."""
        ...

    def gradients(
        self, tensors: Mapping[str, Tensor], sequences: Sequence[int], of: Collection[str]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The errors, and the gradient f32 of their sum with respect to each of the tensors named in `of`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a method sees. Names are checkpoint names relative to the block ("mlp.up_proj.weight").

    tensors: every tensor of the block that the artifact stores, f32. stats: by tap name, empty for methods that need
    none and for models without a known architecture. where: the block in words, for errors. importance: of the columns
    [I] of the tensors that an imatrix file speaks of; it goes before what the statistics say. notes: by tensor, what a
    transform could not do as asked, for the comparison. residual: what of it touches the residual stream; None where no
    family is known. middles: by tap, the linears whose rows make its columns, see Architecture. rows: to run the block
    on, for methods that ask for them.
    """

    where: str
    tensors: Mapping[str, Tensor]
    stats: Mapping[str, TapStats]
    taps: tuple[Tap, ...] = ()
    foldings: tuple[Folding, ...] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    residual: Residual | None = None
    middles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: Rows | None = None
    start: Rounded | None = None

    def stats_of(self, tensor: str) -> TapStats | None:
        """The statistics of the tap that the linear with weight `tensor` reads; None when it has none."""
        module = tensor.removesuffix(".weight")
        return next(
            (self.stats[tap.name] for tap in self.taps if module in tap.linears and tap.name in self.stats), None
        )


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a target says about its methods; see docs/manifest.md for each.

    seed: what random choices follow from, the model's commit. sweeps is for measurements and has no word there: how
    often gptq goes over the codes again; None is its own choice. gain: whether gptq gives rows of few values back what
    rounding took off their output; what is learned from there on begins without. iterations, batch_size and
    learning_rate are autoround's; without a rate it is 1 / iterations. device: where gptq factorizes and solves.
    products: the type of its large products. threads: over which it spreads rows and blocks of columns; they change no
    bit.
    """

    importance: bool = False
    smoothing_strength: float = 0.8
    damping: float = 0.01
    sweeps: int | None = None
    gain: bool = True
    iterations: int = 200
    batch_size: int = 8
    learning_rate: float | None = None
    seed: str = ""
    device: str = "cpu"
    products: torch.dtype = torch.float32
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks the calibration pass for: statistics, and rows to run the block on.

    drift: of a target's own chain, where it has one.
    """

    sums: bool = False
    gram: bool = False
    drift: bool = False
    rows: bool = False


# The mapping gives the grid of each tensor in the block.
Transform = Callable[[Block, Mapping[str, Grid], Options], Block]
# The result has an entry for each tensor, and notes on what happened.
Rounder = Callable[[Block, Mapping[str, Grid], Options], "Rounded"]


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A block's coded tensors, and by tensor what was not as asked ("damping raised to 0.1"), for the comparison."""

    coded: Mapping[str, Coded]
    notes: Mapping[str, str]
