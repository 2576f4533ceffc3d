"""The quantize step: the tensors of one block, or of what lies outside the blocks, onto their grids and into files.

Targets whose rows do not depend on each other go through stream.py a slab at a time; the others see a block as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from converter import tensor_file
from converter.architecture import Architecture
from converter.containers import TensorPlan
from converter.containers.gguf import coverage
from converter.containers.gguf.operations import apply_preparation
from converter.manifest import Target
from converter.methods import Block, Options
from converter.methods.ranges import fix_inputs, largest_kept, share_ranges
from converter.methods.tables import NEEDS, ROUNDERS, TRANSFORMS, turns
from converter.rare_experts import blended
from converter.residual import Residual
from converter.stats import TapStats, unpack
from converter.workers import row_threads
from jobs import stream
from jobs.attempt import PRODUCTS, Attempt, here, read
from jobs.needs import rounds_on_gpu, streams
from jobs.rows import rows_of_block
from jobs.stages import in_stages, round_in_stages
from jobs.work import Model

UNMATCHED = "routed otherwise in the chain than in the original: not corrected for earlier blocks"


def quantize(attempt: Attempt) -> None:
    """Round the tensors of one block, or, outside the blocks, one tensor after the other."""
    work, block = attempt.work, attempt.task.block
    assert work.target is not None
    model = here(attempt)
    inside = model.architecture if block is not None else None
    prefix = inside.prefix(block) if inside and block is not None else ""
    seen, attempt.record["skipped"] = _statistics(attempt)
    stats, rare = blended(seen, inside.taps if inside else ())
    attempt.record["rows"] = _rows(work.tensors, seen, inside)
    state = Block(
        where=attempt.task.subject + (f" block {block}" if block is not None else ""),
        tensors={},
        stats=stats,
        taps=inside.taps if inside else (),
        foldings=inside.foldings if inside else (),
        residual=_residual(model, block),
        middles=inside.middles if inside else {},
    )
    notes: dict[str, str] = {}
    for said in (rare, _dark(work.target, stats)):
        _add(notes, _of_taps(said, work.tensors, state, prefix))
    importance: Mapping[str, Tensor] = {}  # by name in the artifact, where it is not the statistics'
    if weighing := coverage.weighing_of(work.target):
        coverage.check_unchanged(weighing, work.imatrix_sha256)
        importance = coverage.importance_of(weighing, work.tensors, lambda name, what: _add(notes, {name: what}))
    elif work.target.collects_imatrix:
        importance = coverage.unreached(work.tensors, state, prefix, lambda name, what: _add(notes, {name: what}))
    if streams(work.target):
        _add(notes, _stream(attempt, model, state, prefix, importance))
    else:
        names = [tensor.name for tensor in work.tensors]
        outside = _groups(work.tensors, state.residual) if turns(work.target.methods) else [[name] for name in names]
        groups = [names] if block is not None else outside
        for done, group in enumerate(groups):
            _add(notes, _round_group(attempt, model, group, state, prefix, importance))
            attempt.report((done + 1) / len(groups))
    _add(notes, dict.fromkeys(_unmatched(attempt, state, prefix), UNMATCHED))
    attempt.record["notes"] = notes


def _add(notes: dict[str, str], more: Mapping[str, str]) -> None:
    """Add notes by name to those that are there, behind what they say already."""
    notes.update({name: f"{notes[name]}; {said}" if name in notes else said for name, said in more.items()})


def _of_taps(said: Mapping[str, str], tensors: Sequence[TensorPlan], state: Block, prefix: str) -> Mapping[str, str]:
    """What is said of taps, by the checkpoint names of those of `tensors` that are rounded with them."""
    of = {
        f"{prefix}{linear}.weight": said[tap.name] for tap in state.taps if tap.name in said for linear in tap.linears
    }
    return {tensor.source: of[tensor.source] for tensor in tensors if tensor.quantized and tensor.source in of}


def _residual(model: Model, block: int | None) -> Residual | None:
    if model.architecture is None:
        return None
    return model.architecture.outer_residual if block is None else model.architecture.inner_residual


def _groups(tensors: Sequence[TensorPlan], residual: Residual | None) -> list[list[str]]:
    """Names of tensors outside of the blocks, those together that transforms look at together: a norm and its head."""
    assert residual is not None  # or the plan would have refused it
    behind = {f"{linear}.weight": norm for norm, own in residual.reads.items() for linear in own}
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        norm = behind.get(tensor.source)
        groups.setdefault(f"{norm}.weight" if norm else tensor.source, []).append(tensor.name)
    return list(groups.values())


def _unmatched(attempt: Attempt, state: Block, prefix: str) -> Iterator[str]:
    """The linears, by checkpoint name, that a chain's correction was asked for and has no rows to be made from."""
    work = attempt.work
    assert work.target is not None
    if work.target.has_chain and any(
        NEEDS[method](work.target.collects_imatrix).drift for method in work.target.methods
    ):
        for tensor in work.tensors:
            stats = state.stats_of(tensor.source.removeprefix(prefix))
            if tensor.quantized and stats is not None and stats.drift is None:
                yield tensor.source


def _rows(
    tensors: Sequence[TensorPlan], seen: Mapping[str, TapStats], architecture: Architecture | None
) -> dict[str, int]:
    """How many calibration rows each linear read, by checkpoint name; nothing where no statistics were asked for."""
    taps = {tensor.source: architecture.tap_of(tensor.source) for tensor in tensors} if architecture and seen else {}
    return {name: seen[tap.name].rows if tap.name in seen else 0 for name, tap in taps.items() if tap}


def _dark(target: Target, stats: Mapping[str, TapStats]) -> dict[str, str]:
    """By tap, how many of its columns no calibration row lit, where rounding would have made use of it."""
    needs = [NEEDS[method](target.collects_imatrix) for method in target.methods]
    if not any(need.sums or need.gram for need in needs):
        return {}
    counts = {tap: int((one.sum_squares == 0).sum()) for tap, one in stats.items()}
    return {
        tap: f"{count} of {len(stats[tap].sum_squares)} input columns stayed dark in calibration: rounded to nearest"
        for tap, count in counts.items()
        if 0 < count < len(stats[tap].sum_squares)  # of one that is dark as a whole, the rounder says so
    }


def _statistics(attempt: Attempt) -> tuple[Mapping[str, TapStats], int]:
    """What calibration saw in this block, by tap; nothing when the target asks for nothing. And rows it left out."""
    work = attempt.work
    if not work.calibrated:
        return {}, 0
    assert work.target is not None
    gram = any(NEEDS[method](work.target.collects_imatrix).gram for method in work.target.methods)
    large = [*(["gram", "drift"] if gram else []), *(["histogram"] if work.target.counts_inputs else [])]
    file = tensor_file.load(attempt.store.file(work.calibrated, "stats.safetensors"))
    return unpack(file, large), int(file.metadata.get("skipped", 0))


def _stream(
    attempt: Attempt, model: Model, state: Block, prefix: str, importance: Mapping[str, Tensor]
) -> Mapping[str, str]:
    """Round the task's tensors a slab of rows at a time and write the blocks of each to a file of its own."""
    work = attempt.work
    assert work.target is not None
    importance, notes = stream.weigh(work.target, model.snapshot, work.tensors, state, prefix, importance)
    names = tuple(tensor.name for tensor in work.tensors)
    files = {name: attempt.folder / part_file(names, name) for name in names}
    device = work.device if rounds_on_gpu(work.target) else "cpu"
    with row_threads(attempt.threads):
        stream.round_tensors(model.snapshot, work.tensors, importance, files, state.where, attempt.report, device)
    return notes


def _round_group(
    attempt: Attempt,
    model: Model,
    names: list[str],
    state: Block,
    prefix: str,
    importance: Mapping[str, Tensor],
) -> Mapping[str, str]:
    """Round these tensors together and write the parts of each to a file of its own."""
    work, target = attempt.work, attempt.work.target
    assert target is not None
    planned = {tensor.name: tensor for tensor in work.tensors}
    local = {planned[name].source.removeprefix(prefix) + planned[name].prepare: planned[name] for name in names}
    grids = {name: tensor.grid for name, tensor in local.items()}
    options = Options(
        importance=target.weighs_columns,
        smoothing_strength=target.smoothing_strength,
        damping=target.damping,
        iterations=target.iterations,
        batch_size=target.batch_size,
        learning_rate=target.learning_rate,
        seed=model.snapshot.commit,
        device=work.device,
        products=PRODUCTS[work.texts.calibration.precision],
        threads=attempt.threads,
    )
    state = replace(
        state,
        where=state.where if attempt.task.block is not None else f"{state.where} {names[0]}",
        tensors={
            source.removeprefix(prefix): read(model, source)
            for source in dict.fromkeys(tensor.source for tensor in local.values())
        },
        importance={name: importance[tensor.name] for name, tensor in local.items() if tensor.name in importance},
    )
    for method in target.methods[:-1]:
        state = TRANSFORMS[method](state, grids, options)
    moved = state.tensors
    state = replace(
        state,
        tensors={
            name: apply_preparation(tensor.prepare, values) if tensor.prepare else values
            for name, tensor in local.items()
            for values in (moved[tensor.source.removeprefix(prefix)],)
        },
    )
    shared = share_ranges(state, grids)
    rounder = target.methods[-1]
    learns = attempt.task.block is not None and NEEDS[rounder](target.collects_imatrix).rows
    rounded = round_in_stages(attempt, model, state, moved, shared, options, local) if in_stages(attempt) else None
    if learns:
        state = replace(state, start=rounded, rows=rows_of_block(attempt, model, state, moved, local))
    if learns or rounded is None:
        rounded = ROUNDERS[rounder](state, shared, options)
    given = {name: tensor.activations for name, tensor in local.items() if tensor.activations}
    fixed = fix_inputs(state, given, target.input_observer)
    kept = largest_kept(state, {name: tensor.cached for name, tensor in local.items() if tensor.cached})
    for name, tensor in local.items():
        parts = {**rounded.coded[name].parts, **kept.get(name, {})}
        if name in fixed:
            parts["input_range"] = torch.tensor([fixed[name].lowest, fixed[name].largest])
        path = attempt.folder / part_file(tuple(planned), tensor.name)
        tensor_file.save(path, {key: value.contiguous() for key, value in parts.items()})
    notes = {name: "; ".join(said) for name in local if (said := _said(name, state.notes, rounded.notes))}
    return {local[name].source: note for name, note in notes.items()}


def _said(name: str, *notes: Mapping[str, str]) -> list[str]:
    return [some[name] for some in notes if name in some]


def part_file(names: tuple[str, ...], name: str) -> str:
    """The file of a tensor's parts inside a quantize task's output: by number, since names may be long or odd."""
    return f"{names.index(name):05d}.safetensors"
