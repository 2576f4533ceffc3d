"""The propagate step: a target's own chain, the hidden states that its own quantized blocks produce.

Statistics of such a target come from the chain, and beside it runs the original, so that the block's rounder can make
up for what earlier blocks did. Blocks of one target then wait for each other, where otherwise each is rounded as soon
as calibration has passed it; that, and three forwards for each block beside those in stages.py, is the price.
"""

# N sequences, T tokens of a sequence, D hidden width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from converter import tensor_file
from converter.blocks import Decoder
from converter.caches import KEYS, Cached, CacheRounding, rounding_of
from converter.calibrate import calibrate_chain
from converter.compare import evaluation
from converter.containers import TensorPlan
from converter.grids import Coded
from converter.schemes import Activations
from converter.stats import pack
from jobs.attempt import Attempt, calibrating, here, hidden_before, original_of, rows_of
from jobs.quantize import part_file
from jobs.stages import joined


def propagate(attempt: Attempt) -> None:
    """Bring the chain in front of a block, and gather the statistics of that block's taps there."""
    task, work = attempt.task, attempt.work
    model = here(attempt)
    assert task.block is not None and model.architecture is not None
    decoder, original = calibrating(attempt, model), original_of(attempt, model)
    skip = work.texts.calibration.skip_bad_rows
    if task.block == 0:
        rows = rows_of(attempt, model, work.texts.calibration)
        first, chain = _embedded(attempt, decoder, original, rows)
    else:
        first = hidden_before(attempt, model, decoder, original, task.block)
        chain = _run_quantized(attempt, decoder, original, task.block - 1)
        attempt.report(1 / 3)
        if not skip:
            remedy = "The original's is; store the largest weights of this block in a wider type with rules:"
            evaluation.check_hidden(chain, f"{task.subject} block {task.block - 1} as quantized", remedy)
    stats, skipped = calibrate_chain(
        decoder,
        task.block,
        evaluation.block_tensors(original, task.block),
        first,
        chain,
        gram_for=frozenset(work.gram_taps),
        drift_for=frozenset(work.drift_taps),
        skip_bad_rows=skip,
        counted_for=work.counted,
        watch_cache=work.watch_cache,
    )
    if skipped:
        attempt.record["note"] = f"{skipped} of {len(chain)} calibration rows overflowed and were left out"
    # Of the first block the original's is nowhere else, since calibration writes what is behind a block.
    saved = {"hidden": chain} | ({"original": first} if task.block == 0 else {})
    tensor_file.save(attempt.folder / "hidden.safetensors", saved)
    tensor_file.save(attempt.folder / "stats.safetensors", pack(stats), {"skipped": str(skipped)})


def _embedded(
    attempt: Attempt, decoder: Decoder, original: evaluation.Original, rows_NT: Tensor
) -> tuple[Tensor, Tensor]:
    """The hidden states [N, T, D] in front of block 0: the original's, and with the target's own embedding."""
    own, _, _ = _decoded(attempt, original, None)
    first = decoder.embed(rows_NT, {name: original.read(name) for name in decoder.input_names})
    chain = decoder.embed(
        rows_NT, {name: own[name] if name in own else original.read(name) for name in decoder.input_names}
    )
    return first, original.unturned(chain)


def _run_quantized(attempt: Attempt, decoder: Decoder, original: evaluation.Original, block: int) -> Tensor:
    """The chain [N, T, D] behind a block, as the target's files will have the block, in the original's basis."""
    chain = tensor_file.load(attempt.store.file(attempt.work.chained, "hidden.safetensors"))["hidden"]
    own, activations, rounding = _decoded(attempt, original, block)
    assert original.architecture is not None
    prefix = original.architecture.prefix(block)
    inside = {name.removeprefix(prefix): name for name in original.names if name.startswith(prefix)}
    rest = {local: original.read(name) for local, name in inside.items() if local not in own}  # GGUF's metadata
    behind = decoder.run_block(block, own | rest, original.turned(chain), activations=activations, rounding=rounding)
    return original.unturned(behind)


def _decoded(
    attempt: Attempt, original: evaluation.Original, block: int | None
) -> tuple[dict[str, Tensor], dict[str, Activations], CacheRounding | None]:
    """The tensors of a block, or those outside all, decoded from what the quantize task wrote, f32.

    By checkpoint names relative to the block; and by module how the linears' inputs are quantized, where they are; and
    how keys and values are.
    """
    work = attempt.work
    assert work.artifact is not None and work.parts is not None and original.architecture is not None
    prefix = original.architecture.prefix(block) if block is not None else ""
    pieces: dict[str, list[tuple[TensorPlan, Tensor]]] = {}
    activations: dict[str, Activations] = {}
    cached: dict[str, Cached] = {}
    largest: dict[str, Tensor] = {}
    for key, names in work.parts.items():
        for tensor in (tensor for tensor in work.artifact.tensors if tensor.block == block and tensor.name in names):
            parts = tensor_file.load(attempt.store.file(key, part_file(names, tensor.name)))
            weight = Coded(grid=tensor.grid, shape=tensor.shape, parts=dict(parts)).decode()
            local = tensor.source.removeprefix(prefix)
            pieces.setdefault(local, []).append((tensor, weight))
            if tensor.cached:
                cached |= dict.fromkeys(tensor.cached.of, tensor.cached)
                largest |= {tap: parts[tap] for tap in tensor.cached.of}
            if tensor.activations:
                activations[local.removesuffix(".weight")] = _fixed(tensor.activations, parts)
    whole = {name: joined(found[0][0].prepare, [weight for _, weight in found]) for name, found in pieces.items()}
    return whole, activations, rounding_of(cached[KEYS], largest) if cached else None


def _fixed(activations: Activations, parts: Mapping[str, Tensor]) -> Activations:
    """The activations with the range that the quantize task fixed, where it did."""
    if not activations.static:
        return activations
    lowest, largest = parts["input_range"].tolist()
    return replace(activations, lowest=lowest, largest=largest)
