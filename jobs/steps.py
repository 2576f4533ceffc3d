"""What each kind of task does: reads files, calls `converter`, writes files. All side effects of a run are here.

A step sees one task and the run's store, and puts its files into the attempt folder it is given; the store makes them
the task's output. Steps know nothing of Ray: the same function runs in this process or on another machine.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from converter import calibration, dataset, hub, tensor_file
from converter.blocks import Decoder, tokenizer
from converter.calibrate import calibrate_block
from converter.compare import card, evaluation
from converter.containers.gguf.imatrix import Sums, write_imatrix
from converter.containers.tables import CONTAINERS
from converter.errors import HubmillError, SourceError
from converter.manifest import Calibration, Evaluation, Target
from converter.methods import Block, Options
from converter.methods.tables import NEEDS, ROUNDERS, TRANSFORMS
from converter.publish import FolderHub, Hub
from converter.stats import TapStats, pack, unpack
from jobs.store import Report, Store, file_sha256, place, place_file
from jobs.task import Kind, Task
from jobs.work import Model, Work


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended: error is empty when it is done."""

    key: str
    seconds: float
    peak_bytes: int
    error: str = ""
    note: str = ""


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


def run(task: Task, store: Store, threads: int) -> Outcome:
    """Run one task to its end with this many threads; an error becomes part of the outcome, an interrupt does not."""
    start = time.perf_counter()
    _reset_peak()
    error = note = ""
    torch.set_num_threads(1)  # BLAS promises the same bits only on the same number; `threads` are our own workers
    try:
        assert isinstance(task.work, Work)
        with store.attempt(task.key) as (folder, record), torch.no_grad():
            report = store.reporter(task.key)
            STEPS[task.kind](
                Attempt(
                    task=task, work=task.work, store=store, folder=folder, record=record, threads=threads, report=report
                )
            )
            record["seconds"] = time.perf_counter() - start
            record["peak_bytes"] = _peak_bytes()
            note = str(record.get("note", ""))
    except HubmillError as problem:
        error = str(problem)
    except Exception as problem:  # the task boundary: whatever went wrong belongs to this task and its dependents
        error = f"{task.title}: {type(problem).__name__}: {problem}"
    return Outcome(key=task.key, seconds=time.perf_counter() - start, peak_bytes=_peak_bytes(), error=error, note=note)


def fetch(attempt: Attempt) -> None:
    """Bring the model's weights here; a model in a folder is here already."""
    snapshot = attempt.work.model.snapshot
    total = max(1, sum(snapshot.files.values()))
    arrived, alone = 0, Lock()

    def count(size_bytes: int) -> None:  # called from every thread that downloads
        nonlocal arrived
        with alone:
            arrived += size_bytes
            attempt.report(min(1.0, arrived / total))

    fetched = hub.fetch(snapshot, attempt.store.downloads, f"model '{attempt.work.model.name}'", report=count)
    attempt.record["folder"] = str(fetched.folder)


def calibrate(attempt: Attempt) -> None:
    """Run one original block over the calibration rows: the rows for the next block, and the statistics of its taps."""
    task, work = attempt.task, attempt.work
    model = _here(attempt)
    assert task.block is not None and model.architecture is not None
    decoder = _decoder(attempt, model)
    if task.block == 0:
        rows = text_rows(work.texts.calibration, model.snapshot.folder, model.name, attempt.store.downloads)
        hidden = decoder.embed(rows, {name: model.snapshot.read(name) for name in decoder.input_names})
    else:
        hidden = tensor_file.load(attempt.store.output(work.calibrated) / "hidden.safetensors")["hidden"]
    result = calibrate_block(
        decoder,
        task.block,
        evaluation.block_tensors(_original(attempt, model), task.block),
        hidden,
        gram_for=frozenset(work.gram_taps),
        skip_bad_rows=work.texts.calibration.skip_bad_rows,
    )
    if result.skipped:
        attempt.record["note"] = f"{result.skipped} of {len(hidden)} calibration rows overflowed and were left out"
    if task.block + 1 < model.blocks:
        tensor_file.save(attempt.folder / "hidden.safetensors", {"hidden": result.hidden})
    tensor_file.save(attempt.folder / "stats.safetensors", pack(result.stats))
    sums: dict[
        str, Tensor
    ] = {}  # of this block and every one before it: what an imatrix holds, a few kilobytes a block
    if task.block > 0:
        sums |= tensor_file.load(attempt.store.output(work.calibrated) / "sums.safetensors")
    for tap, stats in result.stats.items():
        name = model.architecture.prefix(task.block) + tap
        sums |= {name: stats.sum_squares, f"{name}/rows": torch.tensor([stats.rows])}
    tensor_file.save(attempt.folder / "sums.safetensors", sums)


def imatrix(attempt: Attempt) -> None:
    """Write what calibration found important as a file that llama.cpp's tools read, beside the model's artifacts."""
    work, store, architecture = attempt.work, attempt.store, attempt.work.model.architecture
    assert work.artifact is not None and architecture is not None
    sums = tensor_file.load(store.output(work.calibrated) / "sums.safetensors")
    entries: dict[str, Sums] = {}
    for tensor in work.artifact.tensors:
        tap = architecture.tap_of(tensor.source)
        if tap and tensor.block is not None:
            name = architecture.prefix(tensor.block) + tap.name
            entries[tensor.name] = Sums(sum_squares=sums[name], count=int(sums[f"{name}/rows"]))
    text = work.texts.calibration
    path = attempt.folder / "imatrix.gguf"
    write_imatrix(path, entries, [text.text.rpartition("/")[2]], text.sequences, text.length)
    attempt.record["files"] = list_files(attempt.folder)
    place_file(path, store.run / work.model.name / "imatrix.gguf")


def quantize(attempt: Attempt) -> None:
    """Round the tensors of one block, or, outside the blocks, one tensor after the other."""
    work = attempt.work
    assert work.target is not None
    model = _here(attempt)
    names = [tensor.name for tensor in work.tensors]
    groups = [names] if attempt.task.block is not None else [[name] for name in names]
    stats: dict[str, TapStats] = {}
    if work.calibrated:
        gram = any(NEEDS[method](work.target.imatrix).gram for method in work.target.methods)
        stats = unpack(tensor_file.load(attempt.store.output(work.calibrated) / "stats.safetensors"), gram)
    notes: dict[str, str] = {}
    for done, group in enumerate(groups):
        notes.update(_quantize_group(attempt, model, group, stats))
        attempt.report((done + 1) / len(groups))
    attempt.record["notes"] = notes


def _quantize_group(
    attempt: Attempt, model: Model, names: list[str], stats: Mapping[str, TapStats]
) -> Mapping[str, str]:
    """Round these tensors together and write the parts of each to a file of its own."""
    work, target = attempt.work, attempt.work.target
    assert target is not None
    planned = {tensor.name: tensor for tensor in work.tensors}
    block, architecture = attempt.task.block, model.architecture
    prefix = architecture.prefix(block) if architecture and block is not None else ""
    local = {planned[name].source.removeprefix(prefix): planned[name] for name in names}
    state = Block(
        where=f"{attempt.task.subject} block {block}" if block is not None else f"{attempt.task.subject} {names[0]}",
        tensors={name: _read(model, tensor.source) for name, tensor in local.items()},
        stats=stats,
        taps=architecture.taps if architecture and block is not None else (),
        foldings=architecture.foldings if architecture and block is not None else (),
    )
    options = Options(importance=target.imatrix, smoothing_strength=target.smoothing_strength, damping=target.damping)
    for method in target.methods[:-1]:
        state = TRANSFORMS[method](state, options)
    rounded = ROUNDERS[target.methods[-1]](state, {name: tensor.grid for name, tensor in local.items()}, options)
    for name, tensor in local.items():
        path = attempt.folder / part_file(tuple(planned), tensor.name)
        tensor_file.save(path, {key: value.contiguous() for key, value in rounded.coded[name].parts.items()})
    return {local[name].source: note for name, note in rounded.notes.items() if name in local}


def part_file(names: tuple[str, ...], name: str) -> str:
    """The file of a tensor's parts inside a quantize task's output: by number, since names may be long or odd."""
    return f"{names.index(name):05d}.safetensors"


def assemble(attempt: Attempt) -> None:
    """Stream the parts of every block into the container's files, then open what was written."""
    work = attempt.work
    assert work.target is not None and work.artifact is not None and work.parts is not None
    model = _here(attempt)
    homes = {name: (key, names) for key, names in work.parts.items() for name in names}
    total = len(work.artifact.tensors)
    asked = 0

    def parts(name: str) -> Mapping[str, Tensor]:
        nonlocal asked
        asked += 1
        attempt.report(min(1.0, asked / total))
        key, names = homes[name]
        return tensor_file.load(attempt.store.output(key) / part_file(names, name))

    container = CONTAINERS[work.target.format]
    container.write(work.artifact, model.snapshot, model.architecture, work.target, parts, attempt.folder)
    container.open(attempt.folder, model.architecture)
    records = [attempt.store.record(key) for key in work.parts]
    notes = {tensor.source: tensor.fallback for tensor in work.artifact.tensors if tensor.fallback}
    attempt.record["notes"] = notes | {name: note for record in records for name, note in record["notes"].items()}
    if work.artifact.notes:
        attempt.record["note"] = "; ".join(work.artifact.notes)
    attempt.record["quantize_seconds"] = sum(record["seconds"] for record in records)
    attempt.record["quantize_peak_bytes"] = max(record["peak_bytes"] for record in records)
    attempt.record["files"] = list_files(attempt.folder)
    attempt.record["changed_ns"] = changed_ns(attempt.folder)


def list_files(folder: Path) -> list[dict[str, Any]]:
    """Every file below `folder` with its size and sha256, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    ]


def changed_ns(folder: Path) -> dict[str, int]:
    """When each file below `folder` was last written, by relative path: a later time asks for a look at its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def reference(attempt: Attempt) -> None:
    """Run the original over the held-out rows and keep its hidden states, block by block."""
    model = _here(attempt)
    attempt.record["source"] = evaluation.reference(
        _decoder(attempt, model),
        text_rows(attempt.work.texts.evaluation, model.snapshot.folder, model.name, attempt.store.downloads),
        _original(attempt, model),
        attempt.folder,
        attempt.report,
    )


def evaluate(attempt: Attempt) -> None:
    """Read the written artifact back and measure it beside the original."""
    model, work = _here(attempt), attempt.work
    assert work.target is not None and work.artifact is not None
    opened = CONTAINERS[work.target.format].open(attempt.store.output(work.assembled), model.architecture)
    known = model.architecture is not None
    measured = evaluation.measure(
        _original(attempt, model),
        opened,
        _decoder(attempt, model) if known else None,
        text_rows(work.texts.evaluation, model.snapshot.folder, model.name, attempt.store.downloads) if known else None,
        attempt.report,
    )
    notes: dict[str, str] = attempt.store.record(work.assembled)["notes"]
    for tensor in measured["tensors"]:
        tensor["note"] = notes.get(tensor["name"], "")
    attempt.record.update(measured)
    if work.referenced:
        attempt.record["source"] = attempt.store.record(work.referenced)["source"]


def finish(attempt: Attempt) -> None:
    """Put the artifact under its final name, with its model card."""
    work, store = attempt.work, attempt.store
    assert work.target is not None and work.artifact is not None
    model = work.model
    assembled = store.output(work.assembled)
    files = {item["path"]: assembled / item["path"] for item in store.record(work.assembled)["files"]}
    row = row_of(store, work)
    row["files"] = store.record(work.assembled)["files"]
    text = card.card_text(row, model.snapshot, work.target, work.repo, work.texts.calibration, work.texts.evaluation)
    final = store.run / model.name / work.target.name
    place(files, {"README.md": text}, final, attempt.store.work / "attempts")
    placed = list_files(final)
    expected = {item["path"]: item["sha256"] for item in row["files"]}
    damaged = [item["path"] for item in placed if expected.get(item["path"], item["sha256"]) != item["sha256"]]
    if damaged:  # the bytes on the disk are no longer those that were written and measured
        store.forget(work.assembled)
        what = f"{', '.join(damaged)} changed on the disk since it was written"
        raise SourceError(str(final), what, "Check the disk and run the same command again: it is made anew")
    attempt.record["row"] = row | {"files": placed}
    attempt.record["changed_ns"] = changed_ns(final)


def publish(attempt: Attempt) -> None:
    """Publish the artifact in one atomic step."""
    work, store = attempt.work, attempt.store
    assert work.target is not None
    row = store.record(work.finished)["row"]
    published = open_hub(work.hub, work.private).publish(
        work.repo,
        store.run / work.model.name / work.target.name,
        {item["path"]: item["sha256"] for item in row["files"]},
        f"{work.model.name} as {work.target.name}, by hubmill",
        repo_kind(work.target),
    )
    attempt.record["commit"] = published.commit
    attempt.record["note"] = f"published {published.repo}" if published.changed else f"{published.repo} is up to date"


def open_hub(name: str, private: bool) -> Hub:
    """The hub that a manifest calls folder:/path or hf; the latter takes endpoint and token from the environment."""
    if name.startswith("folder:"):
        return FolderHub(root=Path(name.removeprefix("folder:")))
    return hub.HuggingFaceHub(private=private)


def repo_kind(target: Target) -> Literal["model", "dataset"]:
    """What kind of repository a target goes to: the hub wants Parquet in a dataset."""
    return "dataset" if target.format == "parquet" else "model"


STEPS: dict[Kind, Callable[[Attempt], None]] = {
    "fetch": fetch,
    "calibrate": calibrate,
    "imatrix": imatrix,
    "quantize": quantize,
    "assemble": assemble,
    "reference": reference,
    "evaluate": evaluate,
    "finish": finish,
    "publish": publish,
}


def row_of(store: Store, work: Work) -> dict[str, Any]:
    """The job's row of comparison.json, without the list of files, from what its tasks recorded."""
    assert work.target is not None and work.artifact is not None
    measured = store.record(work.evaluated)
    assembled = store.record(work.assembled)
    snapshot = work.model.snapshot
    weights = sum(item["bytes"] for item in assembled["files"] if item["path"] in work.artifact.files)
    source_bytes = sum(header.end - header.start for header in (*snapshot.tensors.values(), *snapshot.scales.values()))
    source = {"repo": snapshot.repo, "commit": snapshot.commit, "size_bytes": source_bytes}
    return {
        "model": work.model.name,
        "target": work.target.name,
        "format": work.target.format,
        "scheme": work.target.type or work.target.scheme,
        "method": list(work.target.methods),
        "status": "done",
        "bits_per_weight": 8 * weights / measured["parameters"],
        "size_bytes": weights,
        "compression_ratio": source_bytes / weights,
        "weight": measured["weight"],
        "output": measured["output"],
        "seconds": assembled["quantize_seconds"] + assembled["seconds"],
        "peak_rss_bytes": max(assembled["quantize_peak_bytes"], assembled["peak_bytes"], measured["peak_bytes"]),
        "source": source | {"parameters": measured["parameters"]} | measured.get("source", {}),
        "notes": assembled["notes"],
        "warnings": list(work.artifact.notes),
    }


def _read(model: Model, name: str) -> Tensor:
    return model.snapshot.read(name).to(torch.float32)


def _here(attempt: Attempt) -> Model:
    """The model with its weights where the fetch task put them."""
    model = attempt.work.model
    folder = Path(attempt.store.record(attempt.work.fetched)["folder"])
    return replace(model, snapshot=replace(model.snapshot, folder=folder))


def _decoder(attempt: Attempt, model: Model) -> Decoder:
    assert model.architecture is not None
    return Decoder(
        model.snapshot.folder,
        model.architecture,
        model.name,
        device=attempt.work.device,
        workers=attempt.threads,
        stored=model.snapshot.tensors,
    )


def text_rows(settings: Calibration | Evaluation, folder: Path, name: str, cache: Path) -> Tensor:
    """The token rows [N, T] i64 of a manifest's text for the model in `folder`.

    cache receives the files of a data set on a hub. Raises SourceError when the text cannot be read or is too short.
    """
    split: Literal["calibration", "evaluation"] = "calibration" if isinstance(settings, Calibration) else "evaluation"
    loaded = tokenizer(folder, f"model '{name}'")
    if settings.text.startswith("hub:"):
        wanted = settings.sequences * (settings.length - len(loaded.prefix))
        documents = dataset.documents(
            settings.text, split, cache, loaded.chat, lambda text: len(loaded.encode(f"{text}\n\n")), wanted
        )
    else:
        documents = calibration.documents(settings.text, Path(), split, loaded.chat)
    return calibration.token_rows(
        documents,
        loaded.encode,
        settings.sequences,
        settings.length,
        settings.seed if isinstance(settings, Calibration) else 0,
        f"{split} text of model '{name}'",
        loaded.prefix,
    )


def _original(attempt: Attempt, model: Model) -> evaluation.Original:
    key = attempt.work.referenced
    return evaluation.Original(
        architecture=model.architecture,
        names=tuple(model.snapshot.tensors),
        read=partial(_read, model),
        hidden_folder=attempt.store.output(key) if key else None,
    )


def _reset_peak() -> None:
    """Start a new measurement of this process's peak memory, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """The peak resident memory of this process since the last reset, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
