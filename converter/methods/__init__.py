"""Methods: who chooses the stored values. Transforms first, then exactly one rounder.

A transform changes a block's weights without changing what the model computes (SmoothQuant moves column scales from
activations into weights). One that concerns the whole model, such as a rotation of the residual stream, is carried out
block by block all the same, and on what lies outside of the blocks as if that were one. A rounder turns every linear of
a block into codes on its grid. Both see one block and the statistics of its taps, nothing else: that is what bounds
memory and what lets blocks go to different machines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from converter.architecture import Folding, Tap
from converter.grids import Coded, Grid
from converter.residual import Residual
from converter.stats import TapStats


@dataclass(frozen=True, kw_only=True)
class Block:
    """What a method sees. Names are checkpoint names relative to the block ("mlp.up_proj.weight").

    tensors: every tensor of the block that the artifact stores, f32. stats: by tap name, empty for methods that need
    none and for models without a known architecture. where: the block in words, for errors. importance: of the columns
    [I] of the tensors that an imatrix file speaks of; it goes before what the statistics say. notes: by tensor, what a
    transform could not do as asked, for the comparison. residual: what of it touches the residual stream; None where no
    family is known.
    """

    where: str
    tensors: Mapping[str, Tensor]
    stats: Mapping[str, TapStats]
    taps: tuple[Tap, ...] = ()
    foldings: tuple[Folding, ...] = ()
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    residual: Residual | None = None

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
    often gptq goes over the codes again. Two took 3 % (4 bits) to 12 % (2 bits) off the KL divergence and about as long
    as all before them; more than that changed next to nothing.
    """

    importance: bool = False
    smoothing_strength: float = 0.8
    damping: float = 0.01
    sweeps: int = 2
    seed: str = ""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The statistics that a method asks the calibration pass for; drift: of a target's own chain, where it has one."""

    sums: bool = False
    gram: bool = False
    drift: bool = False


# The mapping gives the grid of each tensor in the block.
Transform = Callable[[Block, Mapping[str, Grid], Options], Block]
# The result has an entry for each tensor, and notes on what happened.
Rounder = Callable[[Block, Mapping[str, Grid], Options], "Rounded"]


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A block's coded tensors, and by tensor what was not as asked ("damping raised to 0.1"), for the comparison."""

    coded: Mapping[str, Coded]
    notes: Mapping[str, str]
