"""What each kind of task does: reads files, calls `converter`, writes files. All side effects of a run are here.

A step sees one task and the run's store, and puts its files into the attempt folder it is given; the store makes them
the task's output. Steps know nothing of Ray: the same function runs in this process or on another machine.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from converter import hub, provenance, signing, tensor_file
from converter.calibrate import calibrate_block
from converter.compare import card, evaluation
from converter.containers.gguf.imatrix import Sums, open_imatrix, write_imatrix
from converter.containers.tables import CONTAINERS
from converter.errors import HubmillError, SourceError
from converter.hub_calls import Tell, hush
from converter.hub_publish import HuggingFaceHub
from converter.publish import Destination, FolderHub, Hub
from converter.stats import pack, unpack
from jobs import keep
from jobs.attempt import Attempt, calibrating, decoder_of, here, hidden_before, original_of, rows_of
from jobs.origin import conversion, file_digests, versions_of
from jobs.outcome import Outcome, lacks_memory, peak_bytes, reset_peak, told
from jobs.propagate import propagate
from jobs.quantize import part_file, quantize
from jobs.store import DamagedError, Store, list_files, place, place_file
from jobs.task import Kind, Task
from jobs.work import Model, Work


def run(task: Task, store: Store, threads: int, tell: Tell | None = None) -> Outcome:
    """Run one task to its end with this many threads; an error becomes part of the outcome, an interrupt does not.

    tell: hears of waits, which are written beside the progress in any case.
    """
    start = time.perf_counter()
    reset_peak()
    error = note = damaged = ""
    out_of_memory = False
    torch.set_num_threads(1)  # BLAS promises the same bits only on the same number; `threads` are our own workers
    try:
        assert isinstance(task.work, Work)
        with store.attempt(task.key, durable=not task.temporary) as (folder, record), torch.no_grad():
            reporter = store.reporter(task.key)
            attempt = Attempt(
                task=task,
                work=task.work,
                store=store,
                folder=folder,
                record=record,
                threads=threads,
                report=reporter.report,
                tell=both(reporter.tell, tell) if tell else reporter.tell,
            )
            STEPS[task.kind](attempt)
            record["versions"] = versions_of(task, store)
            record["seconds"] = time.perf_counter() - start
            record["peak_bytes"] = peak_bytes()
            note = str(record.get("note", ""))
    except DamagedError as problem:
        error, damaged = str(problem), problem.key
    except HubmillError as problem:
        error = str(problem)
    except Exception as problem:  # the task boundary: whatever went wrong belongs to this task and its dependents
        error, out_of_memory = told(task, problem), lacks_memory(problem)
    return Outcome(
        key=task.key,
        seconds=time.perf_counter() - start,
        peak_bytes=peak_bytes(),
        error=error,
        note=note,
        out_of_memory=out_of_memory,
        damaged=damaged,
    )


def both(first: Tell, second: Tell) -> Tell:
    """Tell two."""

    def tell(note: str) -> None:
        first(note)
        second(note)

    return tell


def fetch(attempt: Attempt) -> None:
    """Bring the model's weights here; a model in a folder is here already, and its files are only hashed."""
    snapshot = attempt.work.model.snapshot
    total = max(1, sum(snapshot.files.values()))
    arrived, alone = 0, Lock()

    def count(size_bytes: int) -> None:  # called from every thread that downloads
        nonlocal arrived
        with alone:
            arrived += size_bytes
            attempt.report(min(1.0, arrived / total))

    fetched = hub.fetch(
        snapshot, attempt.store.downloads, f"model '{attempt.work.model.name}'", report=count, tell=attempt.tell
    )
    attempt.record["folder"] = str(fetched.folder)
    attempt.record["sources"] = file_digests(fetched, attempt.threads, attempt.report)


def calibrate(attempt: Attempt) -> None:
    """Run one original block over the calibration rows: the rows for the next block, and the statistics of its taps."""
    task, work = attempt.task, attempt.work
    model = here(attempt)
    assert task.block is not None and model.architecture is not None
    kept = _kept(attempt, task.block) if work.takes else None
    if kept is None:
        kept = _calibrate_block(attempt, model, task.block)
        if work.keep:
            keep.put(work, task.block, kept, keep.asked_of(work))
    for what in left_out(kept.skipped, work.texts.calibration.sequences):
        _note(attempt, what)
    tensor_file.save(attempt.folder / "stats.safetensors", kept.tensors, {"skipped": str(kept.skipped)})
    sums: dict[str, Tensor] = {}  # of this block and every one before it: what an imatrix holds, 8 bytes a column
    if task.block > 0:
        sums |= tensor_file.load(attempt.store.file(work.calibrated, "sums.safetensors"))
    for tap, stats in unpack(kept.tensors, large=()).items():
        name = model.architecture.prefix(task.block) + tap
        sums |= {name: stats.sum_squares, f"{name}/rows": torch.tensor([stats.rows])}
    tensor_file.save(attempt.folder / "sums.safetensors", sums)


def _kept(attempt: Attempt, block: int) -> keep.Kept | None:
    """What an earlier run kept of the block's statistics; None, and a note where it is damaged, when it has to run."""
    path = keep.block_file(keep.folder_of(attempt.work), block)
    try:
        found = keep.take(path, keep.asked_of(attempt.work))
    except SourceError as error:
        _note(attempt, f"{path}: {error.what}: made anew")
        return None
    if found:
        _note(attempt, f"taken from {path}")
    return found


def _calibrate_block(attempt: Attempt, model: Model, block: int) -> keep.Kept:
    """Run the block over the rows in front of it, and leave those behind it for the next."""
    work, decoder, original = attempt.work, calibrating(attempt, model), original_of(attempt, model)
    result = calibrate_block(
        decoder,
        block,
        evaluation.block_tensors(original, block),
        hidden_before(attempt, model, decoder, original, block),
        gram_for=frozenset(work.gram_taps),
        skip_bad_rows=work.texts.calibration.skip_bad_rows,
        counted_for=work.counted,
        watch_cache=work.watch_cache,
    )
    if block + 1 < model.blocks:
        tensor_file.save(attempt.folder / "hidden.safetensors", {"hidden": result.hidden})
    return keep.Kept(tensors={name: one.cpu() for name, one in pack(result.stats).items()}, skipped=result.skipped)


def left_out(skipped: int, rows: int) -> list[str]:
    """What is said of calibration rows that overflowed, in a list that is empty where none did."""
    return [f"{skipped} of {rows} calibration rows overflowed and were left out"] if skipped else []


def _note(attempt: Attempt, what: str) -> None:
    """Add a sentence to what the run says of this task."""
    attempt.record["note"] = "; ".join(filter(None, [attempt.record.get("note", ""), what]))


def imatrix(attempt: Attempt) -> None:
    """Write what calibration found important as a file that llama.cpp's tools read, beside the model's artifacts."""
    work, store, architecture = attempt.work, attempt.store, attempt.work.model.architecture
    assert work.artifact is not None and architecture is not None
    sums = tensor_file.load(store.file(work.calibrated, "sums.safetensors"))
    seen: dict[str, list[str]] = {}  # what the matrices of each tensor of the file read, in their order
    for tensor in work.artifact.tensors:
        tap = architecture.tap_of(tensor.source)
        if tap and tensor.block is not None:
            seen.setdefault(tensor.stack or tensor.name, []).append(architecture.prefix(tensor.block) + tap.name)
    nothing = torch.zeros(1, dtype=torch.int64)  # an expert that no row reached: a count of 0 is neutral to readers
    entries = {
        name: Sums(
            sum_squares=torch.stack([sums.get(tap, torch.zeros_like(sums[lit[0]])) for tap in taps]),
            counts=torch.cat([sums.get(f"{tap}/rows", nothing) for tap in taps]),
        )
        for name, taps in seen.items()
        if (lit := [tap for tap in taps if tap in sums])
    }
    text = work.texts.calibration
    path = attempt.folder / "imatrix.gguf"
    write_imatrix(path, entries, [text.text.rpartition("/")[2]], text.sequences, text.length)
    open_imatrix(path)
    place_file(path, store.run / work.model.name / "imatrix.gguf")


def assemble(attempt: Attempt) -> None:
    """Stream the parts of every block into the container's files, then open what was written."""
    work = attempt.work
    assert work.target is not None and work.artifact is not None and work.parts is not None
    model = here(attempt)
    homes = {name: (key, names) for key, names in work.parts.items() for name in names}
    total = len(work.artifact.tensors)
    asked = 0

    def parts(name: str) -> Mapping[str, Tensor]:
        nonlocal asked
        asked += 1
        attempt.report(min(1.0, asked / total))
        key, names = homes[name]
        return tensor_file.load(attempt.store.file(key, part_file(names, name)))

    container = CONTAINERS[work.target.format]
    container.write(work.artifact, model.snapshot, model.architecture, work.target, parts, attempt.folder)
    container.open(attempt.folder, model.architecture)
    records = [attempt.store.record(key) for key in work.parts]
    notes = {tensor.source: tensor.fallback for tensor in work.artifact.tensors if tensor.fallback}
    attempt.record["notes"] = notes | {name: note for record in records for name, note in record["notes"].items()}
    if work.artifact.notes:
        attempt.record["note"] = "; ".join(work.artifact.notes)
    attempt.record["rows"] = {name: rows for record in records for name, rows in record.get("rows", {}).items()}
    attempt.record["skipped"] = max((record.get("skipped", 0) for record in records), default=0)
    attempt.record["quantize_seconds"] = sum(record["seconds"] for record in records)
    attempt.record["quantize_peak_bytes"] = max(record["peak_bytes"] for record in records)
    attempt.record["changed_ns"] = changed_ns(attempt.folder)


def changed_ns(folder: Path) -> dict[str, int]:
    """When each file below `folder` was last written, by relative path: a later time asks for a look at its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def reference(attempt: Attempt) -> None:
    """Run the original over the held-out rows and keep its hidden states, block by block."""
    model = here(attempt)
    attempt.record["source"] = evaluation.reference(
        decoder_of(attempt, model),
        rows_of(attempt, model, attempt.work.texts.evaluation),
        original_of(attempt, model),
        attempt.folder,
        attempt.report,
    )


def evaluate(attempt: Attempt) -> None:
    """Read the written artifact back and measure it beside the original."""
    model, work = here(attempt), attempt.work
    assert work.target is not None and work.artifact is not None
    opened = CONTAINERS[work.target.format].open(attempt.store.whole(work.assembled), model.architecture)
    measured = evaluation.measure(
        original_of(attempt, model),
        opened,
        decoder_of(attempt, model) if model.runs else None,
        rows_of(attempt, model, work.texts.evaluation) if model.runs else None,
        attempt.report,
    )
    assembled = attempt.store.record(work.assembled)
    for tensor in measured["tensors"]:
        tensor["note"] = assembled["notes"].get(tensor["name"], "")
        tensor["calibration_rows"] = assembled.get("rows", {}).get(tensor["name"])
    attempt.record.update(measured)
    if work.referenced:
        attempt.record["source"] = attempt.store.record(work.referenced)["source"]


def finish(attempt: Attempt) -> None:
    """Put the artifact under its final name, with its model card and what it was made of."""
    work, store = attempt.work, attempt.store
    assert work.target is not None and work.artifact is not None
    model = work.model
    assembled = store.output(work.assembled)
    files = {item["path"]: assembled / item["path"] for item in store.record(work.assembled)["files"]}
    row = row_of(store, work)
    written = {item["path"]: item["sha256"] for item in store.record(work.assembled)["files"]}
    row["files"] = store.record(work.assembled)["files"]
    text = card.card_text(row, model.snapshot, work.target, work.repo, work.texts.calibration, work.texts.evaluation)
    sums = written.copy()
    sums["README.md"] = hashlib.sha256(text.encode()).hexdigest()
    made = provenance.statement(sums, conversion(attempt.task, store))
    final = store.run / model.name / work.target.name
    placed: list[dict[str, Any]] = []

    def complete(fresh: Path) -> None:
        if work.sign_key:
            signing.sign(fresh, key=work.sign_key, where=f"sign {attempt.task.subject}")
        placed.extend(list_files(fresh))
        for item in placed:  # what was measured is what gets the name
            if written.get(item["path"], item["sha256"]) != item["sha256"]:
                raise DamagedError(work.assembled, assembled / item["path"])

    place(files, {"README.md": text, provenance.FILE: made}, final, attempt.store.work / "attempts", complete)
    attempt.record["row"] = row | {"files": placed}
    attempt.record["changed_ns"] = changed_ns(final)


def publish(attempt: Attempt) -> None:
    """Publish the artifact in one atomic step."""
    work, store = attempt.work, attempt.store
    assert work.target is not None and work.place is not None
    row = store.record(work.finished)["row"]
    published = open_hub(work.place, attempt.tell).publish(
        work.place,
        store.run / work.model.name / work.target.name,
        {item["path"]: item["sha256"] for item in row["files"]},
        f"{work.model.name} as {work.target.name}, by hubmill",
    )
    attempt.record["commit"], attempt.record["url"] = published.commit, published.url
    done = "published as" if published.changed else "up to date:"
    attempt.record["note"] = published.note or f"{done} {published.url}"


def open_hub(place: Destination, tell: Tell = hush) -> Hub:
    """The hub of a place; one on the network takes endpoint and token from the environment."""
    return HuggingFaceHub(tell=tell) if place.folder is None else FolderHub(root=place.folder)


STEPS: dict[Kind, Callable[[Attempt], None]] = {
    "fetch": fetch,
    "calibrate": calibrate,
    "imatrix": imatrix,
    "propagate": propagate,
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
    source_bytes = snapshot.size_bytes
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
        "warnings": [*work.artifact.notes, *left_out(assembled.get("skipped", 0), work.texts.calibration.sequences)],
    }
