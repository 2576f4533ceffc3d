"""The calibration rows in front of a block and the block itself, for rounders that learn from what comes out of it.

What is wanted behind the block is what the original block gives for the original's rows, also where it gets the rows of
a target's own chain: then it makes up for the blocks before it. Rows come from where calibration, or the chain, left
them, so that a task that was killed begins its own block again and nothing else.
"""

# N sequences, T tokens of a sequence, D hidden width

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from converter.blocks import Decoder
from converter.caches import CacheRounding
from converter.compare import evaluation
from converter.containers import TensorPlan
from converter.containers.gguf.operations import apply_preparation
from converter.methods import Block
from converter.schemes import Activations
from jobs.attempt import Attempt, calibrating, hidden_before, original_of
from jobs.stages import activations_of, hidden_of_chain, joined, rounding_of_cache
from jobs.store import Report
from jobs.work import Model


class BlockRows:
    """Rows of a block, as methods.Rows has them: `hidden` [N, T, D] in front of it, `wanted` behind it.

    whole: the block's tensors, by checkpoint name relative to it, those that are given standing in for theirs. planned:
    the latter's, by the names that methods know. steps: how many gradients there will be, for `report`.
    """

    def __init__(
        self,
        decoder: Decoder,
        block: int,
        whole: Mapping[str, Tensor],
        planned: Mapping[str, TensorPlan],
        hidden: Tensor,
        wanted: Tensor,
        activations: Mapping[str, Activations],
        rounding: CacheRounding | None,
        steps: int,
        report: Report,
    ) -> None:
        self._decoder, self._block, self._whole = decoder, block, whole
        self._hidden, self._wanted = hidden, wanted
        self._activations, self._rounding = activations, rounding
        self._steps, self._taken, self._report = steps, 0, report
        self._prepare = {name: tensor.prepare for name, tensor in planned.items()}
        self._pieces: dict[str, list[str]] = {}
        for name, tensor in planned.items():
            self._pieces.setdefault(_local(name, tensor), []).append(name)

    @property
    def count(self) -> int:
        return len(self._hidden)

    @property
    def device(self) -> torch.device:
        return self._decoder.device

    def errors(self, tensors: Mapping[str, Tensor], sequences: Sequence[int]) -> Tensor:
        errors_N, _ = self._run(tensors, sequences, ())
        return errors_N

    def gradients(
        self, tensors: Mapping[str, Tensor], sequences: Sequence[int], of: Collection[str]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        wholes = [local for local, names in self._pieces.items() if not {*names}.isdisjoint(of)]
        errors_N, found = self._run(tensors, sequences, wholes)
        self._taken += 1
        self._report(self._taken / self._steps)
        parts = {name: (local, self._prepare[name]) for local in wholes for name in self._pieces[local] if name in of}
        # A preparation moves values about, and their gradients with them
        return errors_N, {
            name: apply_preparation(prepare, found[local]) if prepare else found[local]
            for name, (local, prepare) in parts.items()
        }

    def _run(
        self, tensors: Mapping[str, Tensor], sequences: Sequence[int], of: Collection[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        given = {
            local: joined(self._prepare[names[0]], [tensors[name] for name in names])
            for local, names in self._pieces.items()
        }
        chosen = list(sequences)
        return self._decoder.errors(
            self._block,
            {**self._whole, **given},
            self._hidden[chosen],
            self._wanted[chosen],
            of,
            self._activations,
            self._rounding,
        )


def rows_of_block(
    attempt: Attempt, model: Model, state: Block, moved: Mapping[str, Tensor], planned: Mapping[str, TensorPlan]
) -> BlockRows:
    """The rows of the task's block; state, moved and planned as for stages.round_in_stages.

    Sequences that overflowed are left out where the manifest says that they may; otherwise calibration refused them.
    """
    work, b = attempt.work, attempt.task.block
    assert work.target is not None and b is not None
    decoder, original = calibrating(attempt, model), original_of(attempt, model)
    if work.chained:
        first, hidden = hidden_of_chain(attempt, model, decoder, original, b)
    else:
        first = hidden = hidden_before(attempt, model, decoder, original, b)
    tensors = evaluation.block_tensors(original, b)
    wanted = decoder.run_block(b, tensors, first)
    good = (hidden.isfinite() & wanted.isfinite()).flatten(1).all(1)
    return BlockRows(
        decoder,
        b,
        tensors | dict(moved),
        planned,
        original.turned(hidden[good]),
        original.turned(wanted[good]),
        activations_of(planned, planned, state, work.target.input_observer),
        rounding_of_cache(planned, planned, state),
        work.target.iterations,
        attempt.report,
    )


def _local(name: str, tensor: TensorPlan) -> str:
    """The checkpoint's name relative to the block, of what methods know as `name`."""
    return name.removesuffix(tensor.prepare)
