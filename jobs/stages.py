"""Round a block of a chain in stages: what a linear reads depends on the linears in front of it, so those come first.

The block runs with what is rounded so far, and beside it runs the original; each tap's statistics then know the errors
inside the block as well as those of earlier blocks. The alternative, one set of statistics for the whole block, costs
two forwards less for every tap but the first, and leaves most of what can be made up for: a block's own errors are as
large as those that reach it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from converter import tensor_file
from converter.architecture import Tap
from converter.blocks import Decoder
from converter.caches import CacheRounding, rounding_of
from converter.calibrate import Stage, calibrate_chain
from converter.compare import evaluation
from converter.containers import TensorPlan
from converter.containers.gguf.operations import undo_preparation
from converter.grids import Coded, Grid
from converter.methods import Block, Options, Rounded
from converter.methods.ranges import fix_inputs, largest_kept
from converter.methods.tables import NEEDS, ROUNDERS
from converter.rare_experts import blended
from converter.schemes import Activations, Observer
from converter.stats import pack, unpack
from jobs.attempt import Attempt, calibrating, hidden_before, original_of
from jobs.work import Model


def in_stages(attempt: Attempt) -> bool:
    """Whether the task's block is rounded so: where the target has a chain, and a rounder that corrects for it."""
    target = attempt.work.target
    return bool(
        target
        and target.has_chain
        and attempt.work.chained
        and NEEDS[target.methods[-1]](target.collects_imatrix).drift
    )


def round_in_stages(
    attempt: Attempt,
    model: Model,
    state: Block,
    moved: Mapping[str, Tensor],
    grids: Mapping[str, Grid],
    options: Options,
    planned: Mapping[str, TensorPlan],
) -> Rounded:
    """The block's tensors, which transforms have been through, rounded tap by tap in the order that they are read.

    moved: they as the checkpoint names them, not yet divided into those of the artifact; planned: the latter, by name
    relative to the block. The first taps have their statistics in `state`.
    """
    work, b = attempt.work, attempt.task.block
    assert work.target is not None and b is not None and model.architecture is not None
    rounder = ROUNDERS[work.target.methods[-1]]
    decoder, original = calibrating(attempt, model), original_of(attempt, model)
    hidden = hidden_of_chain(attempt, model, decoder, original, b)
    first, chain = (original.turned(one) for one in hidden)  # as the block is by now
    whole = evaluation.block_tensors(original, b) | dict(moved)
    coded: dict[str, Coded] = {}
    notes: dict[str, str] = {}
    stages = stages_of(state)
    for number, (taps, names) in enumerate(stages):
        stats = {name: state.stats[name] for name in taps if name in state.stats}
        if number:
            stage = Stage(
                tensors=whole | _decoded(coded, planned, model, b),
                activations=activations_of(coded, planned, state, work.target.input_observer),
                taps=frozenset(taps),
                rounding=rounding_of_cache(coded, planned, state),
            )
            found, _ = calibrate_chain(
                decoder,
                b,
                whole,
                first,
                chain,
                gram_for=frozenset(work.gram_taps),
                drift_for=frozenset(work.drift_taps),
                skip_bad_rows=work.texts.calibration.skip_bad_rows,
                stage=stage,
            )
            stats |= unpack({name: tensor.cpu() for name, tensor in pack(found).items()})  # where the weights are
            stats, _ = blended(stats, [tap for tap in state.taps if tap.name in taps])
        own = replace(state, stats=stats, tensors={name: state.tensors[name] for name in names})
        rounded = rounder(own, {name: grids[name] for name in names}, options)
        coded.update(rounded.coded)
        notes.update(rounded.notes)
        attempt.report((number + 1) / len(stages))
    return Rounded(coded={name: coded[name] for name in state.tensors}, notes=notes)


def stages_of(state: Block) -> list[tuple[list[str], list[str]]]:
    """Taps and tensors by stage. Experts go side by side; what reads no tap, such as a norm, comes first."""
    order: dict[str, list[Tap]] = {}
    for tap in state.taps:
        order.setdefault(tap.name.partition(".")[0], []).append(tap)
    stages = []
    left = dict.fromkeys(state.tensors)
    for taps in order.values():
        names = [name for tap in taps for linear in tap.linears if (name := f"{linear}.weight") in left]
        for name in names:
            del left[name]
        if names:
            stages.append(([tap.name for tap in taps], names))
    if not stages:
        return [([], list(left))]
    taps_of_first, names = stages[0]
    return [(taps_of_first, [*left, *names]), *stages[1:]]


def hidden_of_chain(
    attempt: Attempt, model: Model, decoder: Decoder, original: evaluation.Original, block: int
) -> tuple[Tensor, Tensor]:
    """The hidden states [N, T, D] in front of the block: the original's and the chain's."""
    work = attempt.work
    chained = tensor_file.load(attempt.store.file(work.chained, "hidden.safetensors"))
    if "original" in chained:
        return chained["original"], chained["hidden"]
    return hidden_before(attempt, model, decoder, original, block), chained["hidden"]


def _decoded(
    coded: Mapping[str, Coded], planned: Mapping[str, TensorPlan], model: Model, block: int
) -> dict[str, Tensor]:
    """The checkpoint's tensors, by name relative to the block, that are rounded as a whole by now, as decoded."""
    assert model.architecture is not None
    prefix = model.architecture.prefix(block)
    pieces: dict[str, list[str]] = {}
    for name, tensor in planned.items():
        pieces.setdefault(tensor.source.removeprefix(prefix), []).append(name)
    return {
        local: joined(planned[names[0]].prepare, [coded[name].decode() for name in names])
        for local, names in pieces.items()
        if all(name in coded for name in names)
    }


def activations_of(
    rounded: Collection[str], planned: Mapping[str, TensorPlan], state: Block, observer: Observer
) -> dict[str, Activations]:
    """How the inputs of linears that are `rounded` are quantized, by module; a fixed range is that of state."""
    given = {name: how for name in rounded if (how := planned[name].activations) is not None}
    return {name.removesuffix(".weight"): how for name, how in (given | fix_inputs(state, given, observer)).items()}


def rounding_of_cache(
    rounded: Collection[str], planned: Mapping[str, TensorPlan], state: Block
) -> CacheRounding | None:
    """How keys and values are kept, once the linears that make them are rounded; None before that."""
    cached = {name: tensor.cached for name, tensor in planned.items() if tensor.cached}
    if not cached or not cached.keys() <= {*rounded}:
        return None
    largest = {tap: one for found in largest_kept(state, cached).values() for tap, one in found.items()}
    return rounding_of(next(iter(cached.values())), largest)


def joined(prepare: str, pieces: list[Tensor]) -> Tensor:
    """A tensor of the checkpoint, f32, from what the artifact has in its place; prepare is that of any of them."""
    pieces = [piece.float() for piece in pieces]
    return undo_preparation(prepare, pieces) if prepare else pieces[0]
