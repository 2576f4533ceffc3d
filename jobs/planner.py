"""From prepared jobs to the task graph, and to what it will take. Pure: no file, no clock, no network.

    fetch(model) -> calibrate(model, b) -> quantize(job, b) -> assemble(job) -> evaluate(job) -> finish(job)
                    calibrate(model, last) -> imatrix(model)
    fetch(model) -> reference(model) -----------------------------------------> evaluate(job)    finish -> publish
    calibrate(model, b - 1), propagate(job, b - 1), quantize(job, b - 1) -> propagate(job, b) -> quantize(job, b)

A job is one model in one target. Calibration runs once for a model with the union of the statistics that its targets
ask for; blocks are quantized as soon as their statistics exist, and at most two blocks of statistics lie on disk. Jobs
with `propagate: quantized` have statistics of their own, of a chain in which each block reads what the quantized block
before it gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from converter.architecture import Architecture
from converter.hub_calls import TOGETHER
from converter.manifest import Calibration, Evaluation, Manifest, Target
from converter.methods import Needs
from converter.methods.tables import NEEDS, folds, reorders, turns
from converter.stats import Counted
from jobs import needs
from jobs.task import RECIPES, Graph, Kind, Resources, Task
from jobs.work import PlannedJob, Texts, Work


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The jobs of a run and the graph of its tasks."""

    jobs: tuple[PlannedJob, ...]
    graph: Graph


def build(manifest: Manifest, jobs: Sequence[PlannedJob], texts: Mapping[str, Texts], cpus: int, device: str) -> Plan:
    """The task graph of these jobs on machines with `cpus` cores each; texts go by the model's name."""
    tasks: list[Task] = []
    by_model: dict[str, list[PlannedJob]] = {}
    for job in jobs:
        by_model.setdefault(job.model.name, []).append(job)
    for name, group in by_model.items():
        tasks.extend(_model_tasks(manifest, group, texts[name], cpus, device))
    return Plan(jobs=tuple(jobs), graph=Graph(tasks))


def _model_tasks(
    manifest: Manifest, jobs: Sequence[PlannedJob], texts: Texts, cpus: int, device: str
) -> Iterator[Task]:
    model = jobs[0].model
    identity = {"repo": model.snapshot.repo, "commit": model.snapshot.commit}
    far = model.snapshot.source.startswith("hub:")
    fetch = Task(
        kind="fetch",
        subject=model.name,
        spec=identity,
        work=Work(model=model, texts=texts),
        resources=Resources(
            disk_bytes=sum(model.snapshot.files.values()) if far else 0, connections=TOGETHER if far else 0
        ),
    )
    yield fetch
    work = Work(model=model, texts=texts, device=device, fetched=fetch.key)
    calibrations = list(_calibrate_tasks(jobs, work, fetch, cpus))
    quantize: dict[str, list[Task]] = {job.subject: [] for job in jobs}
    chains: dict[str, list[Task]] = {job.subject: [] for job in jobs if job.target.has_chain}
    # Those also read the original's hidden state in front of their block, which the calibration of the one before left.
    twice = {job.subject for job in jobs if job.target.has_chain or _learns(job.target)}
    # Outside of the blocks first, then block by block across targets: statistics are used while they are there.
    for block in [None, *range(model.blocks)]:
        if block is not None and calibrations:
            # Whoever reads what calibration left two blocks ago, also as what lies in front of the block after.
            waits = tuple(
                task.key
                for name, tasks in quantize.items()
                for task in tasks
                if task.block == (block - 1 if name in twice else block - 2)
            )
            calibrations[block] = replace(calibrations[block], waits=waits)
            yield calibrations[block]
        for job in jobs:
            if block in job.blocks():
                own = replace(work, model=job.model)
                statistics = calibrations[block] if block is not None and calibrations else None
                if block is not None and job.subject in chains:
                    before = [task for task in quantize[job.subject] if task.block == (block - 1 if block else None)]
                    statistics = _propagate_task(
                        job, block, own, fetch, calibrations, chains[job.subject], before, cpus
                    )
                    chains[job.subject].append(statistics)
                    yield statistics
                beside = calibrations[block - 1] if block and calibrations and job.subject in twice else None
                task = _quantize_task(job, block, own, fetch, statistics, beside)
                quantize[job.subject].append(task)
                yield task
    reference = _reference_task(work, fetch) if model.runs else None
    if reference:
        yield reference
    weighed = next((job for job in jobs if _weighs_for_readers(job.target)), None)
    if weighed and calibrations:
        last = calibrations[-1].key
        names = {tensor.name: tensor.source for tensor in weighed.artifact.tensors}
        yield Task(
            kind="imatrix",
            subject=model.name,
            spec={"model": model.name, "text": texts.calibration.text, "names": names},
            work=replace(work, artifact=weighed.artifact, calibrated=last),
            reads=(last,),
        )
    for job in jobs:
        own = replace(work, model=job.model)
        yield from _artifact_tasks(manifest, job, own, fetch, quantize[job.subject], reference)


def _calibrate_tasks(jobs: Sequence[PlannedJob], work: Work, fetch: Task, cpus: int) -> Iterator[Task]:
    model, architecture = work.model, work.model.architecture
    asked = [need for job in jobs if not job.target.has_chain for need in _needs(job.target)]
    chained = any(job.target.has_chain for job in jobs)  # it runs beside the original
    hidden = chained or any(_learns(job.target) for job in jobs)  # whether tasks read the original's hidden states
    if architecture is None or not model.runs or not (chained or any(need.sums or need.gram for need in asked)):
        return
    grams = tuple(tap.name for tap in architecture.taps) if any(need.gram for need in asked) else ()
    own = [job for job in jobs if not job.target.has_chain]
    counted, watch_cache = _counted(own, architecture), any(job.target.kv_cache for job in own)
    keep = work.texts.calibration.keep.removeprefix("folder:")
    before = fetch
    for block in range(model.blocks):
        spec = {
            "text": _settings(work.texts.calibration),
            "sha256": work.texts.calibration_sha256,
            "taps": {tap.name: list(tap.linears) for tap in architecture.taps},
            "gram": list(grams),
            "counted": counted,
            "cache": watch_cache,
            "block": block,
            "device": work.device,
        }
        before = Task(
            kind="calibrate",
            subject=model.name,
            block=block,
            spec=spec,
            work=replace(
                work,
                gram_taps=grams,
                counted=counted,
                watch_cache=watch_cache,
                keep=keep,
                takes=bool(keep) and not hidden,
                calibrated=before.key if block else "",
            ),
            reads=tuple(dict.fromkeys((fetch.key, before.key))),
            resources=Resources(
                cpus=max(1, cpus // 2),
                gpus=_gpus(work),
                memory_bytes=needs.calibrate_bytes(model, work.texts, block, bool(grams), counted),
                disk_bytes=needs.calibrate_disk(model, work.texts, block, bool(grams), counted),
            ),
            temporary=True,
        )
        yield before


def _propagate_task(
    job: PlannedJob,
    block: int,
    work: Work,
    fetch: Task,
    calibrations: Sequence[Task],
    chain: Sequence[Task],
    quantized: Sequence[Task],
    cpus: int,
) -> Task:
    """The chain's step in front of a block. quantized: the task, if any, that rounded what comes before it."""
    model, architecture = work.model, work.model.architecture
    assert architecture is not None
    needs_of = list(_needs(job.target))
    grams = tuple(tap.name for tap in architecture.taps) if any(need.gram for need in needs_of) else ()
    # What routing decides on sees other tokens in the chain than in the original: no row has its like.
    matched = [tap.name for tap in architecture.taps if not architecture.is_routed(tap)]
    drifts = tuple(matched) if any(need.drift for need in needs_of) else ()
    counted = _counted([job], architecture)
    calibrated, chained = (calibrations[block - 1].key, chain[-1].key) if block else ("", "")
    parts = {task.key: tuple(t.name for t in task.work.tensors) for task in quantized if isinstance(task.work, Work)}
    spec = {
        "text": _settings(work.texts.calibration),
        "sha256": work.texts.calibration_sha256,
        "taps": {tap.name: list(tap.linears) for tap in architecture.taps},
        "gram": list(grams),
        "drift": list(drifts),
        "counted": counted,
        "cache": job.target.kv_cache is not None,
        "block": block,
        "device": work.device,
    }
    return Task(
        kind="propagate",
        subject=job.subject,
        block=block,
        spec=spec,
        work=replace(
            work,
            target=job.target,
            artifact=job.artifact,
            gram_taps=grams,
            drift_taps=drifts,
            counted=counted,
            watch_cache=job.target.kv_cache is not None,
            calibrated=calibrated,
            chained=chained,
            parts=parts,
        ),
        reads=tuple(key for key in (fetch.key, calibrated, chained, *parts) if key),
        resources=Resources(
            cpus=max(1, cpus // 2),
            gpus=_gpus(work),
            memory_bytes=needs.propagate_bytes(model, work.texts, block, bool(grams), counted),
            disk_bytes=needs.propagate_disk(model, work.texts, block, bool(grams), counted),
        ),
        temporary=True,
    )


def _quantize_task(
    job: PlannedJob, block: int | None, work: Work, fetch: Task, statistics: Task | None, beside: Task | None = None
) -> Task:
    """Round a block with these statistics. beside: what left the original's hidden state in front of a chain's."""
    tensors = job.tensors(block)
    calibrated = ""
    if statistics is not None and any(need.sums or need.gram for need in _needs(job.target)):
        calibrated = statistics.key
    spec = {
        "tensors": [repr(tensor) for tensor in tensors],
        "methods": list(job.target.methods),
        "options": [
            job.target.weighs_columns,
            job.target.smoothing_strength,
            job.target.damping,
            job.target.input_observer if job.target.fixes_inputs else "",
        ],
        "imatrix": job.artifact.imatrix_sha256,
        "foldings": repr(job.model.architecture.foldings) if job.model.architecture else "",
    }
    if job.model.architecture and turns(job.target.methods):
        spec["residual"] = repr(job.model.architecture.residual)
    if job.model.architecture and reorders(job.target.methods):
        spec["middles"] = repr(job.model.architecture.middles)
    gram = bool(calibrated) and any(need.gram for need in _needs(job.target))
    drift = gram and job.target.has_chain and any(need.drift for need in _needs(job.target))
    rows = bool(calibrated) and _learns(job.target)
    own = replace(
        work, target=job.target, tensors=tensors, calibrated=calibrated, imatrix_sha256=job.artifact.imatrix_sha256
    )
    memory_bytes, staged = needs.quantize_bytes(job, block, gram), 0
    if drift and statistics is not None and isinstance(statistics.work, Work):  # then it runs the block, too
        grams, drifts = statistics.work.gram_taps, statistics.work.drift_taps
        key = beside.key if beside else ""
        own = replace(own, gram_taps=grams, drift_taps=drifts, chained=calibrated, beside=key)
        memory_bytes, staged = needs.stages_bytes(job, work.texts, block or 0), statistics.resources.cpus
    if rows and statistics is not None:
        own = replace(own, chained=calibrated if job.target.has_chain else "", beside=beside.key if beside else "")
        staged = statistics.resources.cpus
        memory_bytes = max(memory_bytes, needs.learning_bytes(job, work.texts, block or 0, staged))
        spec["steps"] = [job.target.iterations, job.target.batch_size, job.target.learning_rate]
    return Task(
        kind="quantize",
        subject=job.subject,
        block=block,
        spec=spec,
        work=own,
        reads=tuple(key for key in (fetch.key, calibrated, own.beside) if key),
        resources=Resources(
            cpus=staged or 1,
            gpus=_gpus(work) if staged or needs.rounds_on_gpu(job.target) else 0,
            memory_bytes=memory_bytes,
            disk_bytes=needs.quantize_disk(job, block),
        ),
        temporary=True,
    )


def _reference_task(work: Work, fetch: Task) -> Task:
    spec = {
        "text": _settings(work.texts.evaluation),
        "sha256": work.texts.evaluation_sha256,
        "device": work.device,
    }
    resources = Resources(
        gpus=_gpus(work),
        memory_bytes=needs.evaluate_bytes(work.model, work.texts),
        disk_bytes=needs.reference_disk(work.model, work.texts),
    )
    return Task(
        kind="reference",
        subject=work.model.name,
        spec=spec,
        work=work,
        reads=(fetch.key,),
        resources=resources,
        temporary=True,
    )


def _artifact_tasks(
    manifest: Manifest, job: PlannedJob, work: Work, fetch: Task, quantize: Sequence[Task], reference: Task | None
) -> Iterator[Task]:
    work = replace(work, target=job.target, artifact=job.artifact)
    parts = {
        task.key: tuple(tensor.name for tensor in task.work.tensors) for task in quantize if isinstance(task.work, Work)
    }
    target = job.target.model_dump(mode="json", exclude={"where"})
    if job.target.imatrix_file:
        target["imatrix"] = job.target.imatrix_file.name  # what is in it is in the keys of the quantized blocks
    size_bytes = sum(job.artifact.files.values())
    assemble = Task(
        kind="assemble",
        subject=job.subject,
        spec={"files": dict(job.artifact.files), "target": target, "model": job.model.name},
        work=replace(work, parts=parts),
        reads=(fetch.key, *parts),
        resources=Resources(memory_bytes=needs.WORKER_BYTES, disk_bytes=size_bytes),
    )
    yield assemble
    evaluate = Task(
        kind="evaluate",
        subject=job.subject,
        spec={"device": work.device},
        work=replace(work, assembled=assemble.key, parts=parts, referenced=reference.key if reference else ""),
        reads=(fetch.key, assemble.key, *((reference.key,) if reference else ())),
        resources=Resources(gpus=_gpus(work), memory_bytes=needs.evaluate_bytes(work.model, work.texts)),
    )
    yield evaluate
    # Only on a hub that people can reach by its name does the card tell them to load the artifact from there.
    place = job.place.address if job.place and job.place.folder is None else ""
    finish = Task(
        kind="finish",
        subject=job.subject,
        spec={
            "target": target,
            "repo": place,
            "notes": list(job.artifact.notes),
            "texts": [work.texts.calibration.text, work.texts.evaluation.text],
            "recipes": _recipes(job, quantize),
            "signed_by": job.signed.fingerprint if job.signed else "",
        },
        work=replace(
            work,
            assembled=assemble.key,
            evaluated=evaluate.key,
            repo=place,
            sign_key=job.signed.key if job.signed else None,
        ),
        reads=(fetch.key, assemble.key, evaluate.key),
        here=job.signed is not None,
    )
    yield finish
    if job.place:
        yield Task(
            kind="publish",
            subject=job.subject,
            spec=asdict(job.place),
            work=replace(work, finished=finish.key, place=job.place),
            reads=(finish.key,),
            resources=Resources(
                disk_bytes=size_bytes if job.place.folder else 0, connections=0 if job.place.folder else TOGETHER
            ),
        )


def _recipes(job: PlannedJob, quantize: Sequence[Task]) -> dict[str, int]:
    """The versions of the steps that led to an artifact; calibrate is among them when it was calibrated."""
    kinds: list[Kind] = ["fetch", "quantize", "assemble", "evaluate", "finish"]
    if any(task.work.calibrated for task in quantize if isinstance(task.work, Work)):
        kinds += ["calibrate", "propagate"] if job.target.has_chain else ["calibrate"]
    return {kind: RECIPES[kind] for kind in sorted(kinds)}


def _weighs_for_readers(target: Target) -> bool:
    """Whether the importance of columns that the target is weighed by is that of the model as its readers have it."""
    own_columns = not turns(target.methods) and not reorders(target.methods)
    return target.collects_imatrix and target.format == "gguf" and own_columns


def _needs(target: Target) -> Iterator[Needs]:
    for method in target.methods:
        yield NEEDS[method](target.collects_imatrix)
    yield Needs(sums=target.fixes_ranges)


def _learns(target: Target) -> bool:
    """Whether its rounder runs the block on the rows in front of it."""
    return any(need.rows for need in _needs(target))


def _counted(jobs: Sequence[PlannedJob], architecture: Architecture) -> dict[str, Counted]:
    """The taps that these jobs want a histogram of: of each column where one of them moves column scales there."""
    found: dict[str, Counted] = {}
    for job in jobs:
        if not job.target.counts_inputs:
            continue
        scaled = {folding.tap for folding in architecture.foldings if folds(job.target.methods, folding)}
        for tensor in job.artifact.tensors:
            tap = architecture.tap_of(tensor.source)
            if tap and tensor.activations and tensor.activations.static and found.get(tap.name) != "column":
                found[tap.name] = "column" if tap.name in scaled else "tap"
    return found


def _settings(text: Calibration | Evaluation) -> dict[str, Any]:
    """What decides the token rows, but not where the text lies: its content has a digest of its own."""
    return text.model_dump(mode="json", exclude={"text", "keep"})


def _gpus(work: Work) -> int:
    return int(work.device == "cuda")
