"""What a step works with: its task, where its files go, and the model where its weights were fetched to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter import tensor_file
from converter.blocks import Decoder
from converter.compare import evaluation
from converter.compare.evaluation import hidden_file
from converter.hub_calls import Tell
from converter.manifest import Calibration, Evaluation
from converter.methods.tables import folds, reorders, turns
from converter.pooling import declared_pooling
from jobs.store import Report, Store
from jobs.task import Task
from jobs.texts import planned_rows, text_rows
from jobs.work import Model, Work

PRODUCTS = {"f32": torch.float32, "bf16": torch.bfloat16}

_calibrating: dict[tuple[object, ...], Decoder] = {}  # the last one


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What a step works with: its task, the run's store, a folder for its files, a record for what it found out."""

    task: Task
    work: Work
    store: Store
    folder: Path
    record: dict[str, Any]
    threads: int
    report: Report
    tell: Tell


def here(attempt: Attempt) -> Model:
    """The model with its weights where the fetch task put them."""
    model = attempt.work.model
    folder = Path(attempt.store.record(attempt.work.fetched)["folder"])
    return replace(model, snapshot=replace(model.snapshot, folder=folder))


def read(model: Model, name: str) -> Tensor:
    return model.snapshot.read(name).to(torch.float32)


def decoder_of(attempt: Attempt, model: Model, products: torch.dtype = torch.float32) -> Decoder:
    """The model's blocks, to be run on as many threads as the attempt has; their linears multiply in `products`."""
    assert model.architecture is not None
    return Decoder(
        model.snapshot.folder,
        model.architecture,
        model.name,
        device=attempt.work.device,
        workers=attempt.threads,
        stored=model.snapshot.tensors,
        products=products,
    )


def calibrating(attempt: Attempt, model: Model) -> Decoder:
    """The model's blocks as calibration runs them.

    Kept for the next task of this process that asks for the same: made anew they would take 20 ms and more each time.
    Where the head is stored apart, it is another model; and rotary positions may keep what the longest rows made them.
    """
    snapshot, text = model.snapshot, attempt.work.texts.calibration
    own = (model.name, snapshot.folder, snapshot.commit, snapshot.untied)
    key = (*own, text.length, text.precision, attempt.work.device, attempt.threads)
    if key not in _calibrating:
        _calibrating.clear()
        _calibrating[key] = decoder_of(attempt, model, PRODUCTS[text.precision])
    return _calibrating[key]


def rows_of(attempt: Attempt, model: Model, settings: Calibration | Evaluation) -> Tensor:
    """The token rows [N, T] of the text that the manifest names."""
    texts, folder, cache = attempt.work.texts, model.snapshot.folder, attempt.store.downloads
    is_calibration = isinstance(settings, Calibration)
    sha256 = texts.calibration_sha256 if is_calibration else texts.evaluation_sha256
    read = partial(text_rows, settings, folder, model.name, cache, closed=model.encodes)
    return planned_rows(sha256, read, f"{settings.text} for model '{model.name}'")


def hidden_before(
    attempt: Attempt, model: Model, decoder: Decoder, original: evaluation.Original, block: int
) -> Tensor:
    """The original's hidden state [N, T, D] of the calibration rows in front of a block.

    It lies behind the block before where that one was run. Where its statistics were kept from another run it was not:
    then the rows go through all blocks again.
    """
    before = attempt.work.beside or attempt.work.calibrated
    if block and (attempt.store.output(before) / "hidden.safetensors").is_file():
        return tensor_file.load(attempt.store.file(before, "hidden.safetensors"))["hidden"]
    rows = rows_of(attempt, model, attempt.work.texts.calibration)
    hidden = decoder.embed(rows, {name: original.read(name) for name in decoder.input_names})
    for earlier in range(block):
        hidden = decoder.run_block(earlier, evaluation.block_tensors(original, earlier), hidden)
    return hidden


def original_of(attempt: Attempt, model: Model) -> evaluation.Original:
    """The original's tensors and, where a reference was run, its hidden states."""
    key, target = attempt.work.referenced, attempt.work.target
    foldings = model.architecture.foldings if model.architecture and target else ()
    return evaluation.Original(
        architecture=model.architecture,
        foldings=tuple(folding for folding in foldings if target and folds(target.methods, folding)),
        seed=model.snapshot.commit if target and turns(target.methods) else "",
        reordered=bool(target and reorders(target.methods)),
        copies=model.snapshot.copies,
        names=tuple(model.snapshot.tensors),
        read=partial(read, model),
        hidden_at=cache(lambda block: attempt.store.file(key, hidden_file(Path(), block).name)) if key else None,
        pooling=declared_pooling(model.snapshot.folder, model.name) if model.encodes else (),
    )
