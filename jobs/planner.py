"""From prepared jobs to the task graph, and to what it will take. Pure: no file, no clock, no network.

    fetch(model) -> calibrate(model, b) -> quantize(job, b) -> assemble(job) -> evaluate(job) -> finish(job)
                    calibrate(model, last) -> imatrix(model)
    fetch(model) -> reference(model) -----------------------------------------> evaluate(job)    finish -> publish

A job is one model in one target. Calibration runs once for a model with the union of the statistics that its targets
ask for; blocks are quantized as soon as their statistics exist, and at most two blocks of statistics lie on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from converter.architecture import Architecture, block_count
from converter.containers import ArtifactPlan, TensorPlan
from converter.manifest import Calibration, Evaluation, Manifest, Target
from converter.methods.tables import NEEDS
from converter.source import Snapshot
from jobs.task import Graph, Resources, Task

F32_BYTES = 4
# Importing torch and transformers and reading a tokenizer takes about this much in every worker process.
WORKER_BYTES = 700_000_000


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the manifest, opened: where its files are and what family it is (None: a plain state dict).

    computed: tensors of the checkpoint that the snapshot leaves out, because whoever runs the model computes them.
    """

    name: str
    snapshot: Snapshot
    architecture: Architecture | None
    computed: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        return block_count(self.snapshot.config) if self.architecture else 0


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """One model in one target, with everything its artifact will hold. repo: where it is published; None: nowhere."""

    model: Model
    target: Target
    artifact: ArtifactPlan
    repo: str | None

    @property
    def subject(self) -> str:
        return f"{self.model.name}/{self.target.name}"

    def blocks(self) -> list[int | None]:
        """The blocks that have tensors in the artifact, in order; None, for what lies outside of them, comes first."""
        found = {tensor.block for tensor in self.artifact.tensors}
        return sorted(found, key=lambda block: -1 if block is None else block)

    def tensors(self, block: int | None) -> tuple[TensorPlan, ...]:
        return tuple(tensor for tensor in self.artifact.tensors if tensor.block == block)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The token text of a run, by digest, so that a changed text changes the keys."""

    calibration: Calibration
    calibration_sha256: str
    evaluation: Evaluation
    evaluation_sha256: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step needs to find its way; see jobs/steps.py for which step reads which field."""

    model: Model
    texts: Texts
    target: Target | None = None
    artifact: ArtifactPlan | None = None
    tensors: tuple[TensorPlan, ...] = ()
    gram_taps: tuple[str, ...] = ()
    calibrated: str = ""  # the key of the calibrate task that this step reads
    parts: Mapping[str, tuple[str, ...]] | None = None  # quantize key -> names of the tensors it holds
    assembled: str = ""
    referenced: str = ""
    evaluated: str = ""
    finished: str = ""
    repo: str = ""
    hub: str = ""
    private: bool = True
    device: str = "cpu"
    fetched: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The graph of a run and what it will take: bytes on disk at the most, bytes of memory for its largest task."""

    jobs: tuple[PlannedJob, ...]
    graph: Graph
    disk_bytes: int
    memory_bytes: int


def build(manifest: Manifest, jobs: Sequence[PlannedJob], texts: Mapping[str, Texts], cpus: int, device: str) -> Plan:
    """The task graph of these jobs on machines with `cpus` cores each; texts go by the model's name."""
    tasks: list[Task] = []
    by_model: dict[str, list[PlannedJob]] = {}
    for job in jobs:
        by_model.setdefault(job.model.name, []).append(job)
    for name, group in by_model.items():
        tasks.extend(_model_tasks(manifest, group, texts[name], cpus, device))
    largest = max((task.resources.memory_bytes for task in tasks), default=0)
    return Plan(
        jobs=tuple(jobs), graph=Graph(tasks), disk_bytes=_disk_bytes(jobs, texts, manifest), memory_bytes=largest
    )


def _model_tasks(
    manifest: Manifest, jobs: Sequence[PlannedJob], texts: Texts, cpus: int, device: str
) -> Iterator[Task]:
    model = jobs[0].model
    identity = {"repo": model.snapshot.repo, "commit": model.snapshot.commit}
    fetch = Task(kind="fetch", subject=model.name, spec=identity, work=Work(model=model, texts=texts))
    yield fetch
    work = Work(model=model, texts=texts, device=device, fetched=fetch.key)
    calibrations = list(_calibrate_tasks(jobs, work, fetch, cpus))
    quantize: dict[str, list[Task]] = {job.subject: [] for job in jobs}
    # Outside of the blocks first, then block by block across targets: statistics are used while they are there.
    for block in [None, *range(model.blocks)]:
        if block is not None and calibrations:
            waits = tuple(task.key for tasks in quantize.values() for task in tasks if task.block == block - 2)
            calibrations[block] = replace(calibrations[block], waits=waits)
            yield calibrations[block]
        for job in jobs:
            if block in job.blocks():
                task = _quantize_task(job, block, work, fetch, calibrations)
                quantize[job.subject].append(task)
                yield task
    reference = _reference_task(work, fetch) if model.architecture else None
    if reference:
        yield reference
    weighed = next((job for job in jobs if job.target.imatrix and job.target.format == "gguf"), None)
    if weighed and calibrations:
        last = calibrations[-1].key
        work_of_imatrix = replace(work, artifact=weighed.artifact, calibrated=last)
        yield Task(kind="imatrix", subject=model.name, spec={}, work=work_of_imatrix, reads=(last,))
    for job in jobs:
        yield from _artifact_tasks(manifest, job, work, fetch, quantize[job.subject], reference)


def _calibrate_tasks(jobs: Sequence[PlannedJob], work: Work, fetch: Task, cpus: int) -> Iterator[Task]:
    model, architecture = work.model, work.model.architecture
    needs = [need for job in jobs for need in _needs(job.target)]
    if architecture is None or not any(need.sums or need.gram for need in needs):
        return
    grams = tuple(tap.name for tap in architecture.taps) if any(need.gram for need in needs) else ()
    before = fetch
    for block in range(model.blocks):
        spec = {
            "text": _settings(work.texts.calibration),
            "sha256": work.texts.calibration_sha256,
            "taps": {tap.name: list(tap.linears) for tap in architecture.taps},
            "gram": list(grams),
            "block": block,
            "device": work.device,
        }
        before = Task(
            kind="calibrate",
            subject=model.name,
            block=block,
            spec=spec,
            work=replace(work, gram_taps=grams, calibrated=before.key if block else ""),
            reads=(before.key,),
            resources=Resources(
                cpus=max(1, cpus // 2),
                gpus=_gpus(work),
                memory_bytes=_calibrate_bytes(model, work.texts, block, bool(grams)),
            ),
            temporary=True,
        )
        yield before


def _quantize_task(job: PlannedJob, block: int | None, work: Work, fetch: Task, calibrations: Sequence[Task]) -> Task:
    tensors = job.tensors(block)
    calibrated = ""
    if block is not None and calibrations and any(need.sums or need.gram for need in _needs(job.target)):
        calibrated = calibrations[block].key
    spec = {
        "tensors": [repr(tensor) for tensor in tensors],
        "methods": list(job.target.methods),
        "options": [job.target.imatrix, job.target.smoothing_strength, job.target.damping],
    }
    weights = sum(_elements(tensor.shape) for tensor in tensors) if block is not None else 0
    widest = max((_elements(tensor.shape) for tensor in tensors), default=0)
    grams = calibrated and any(need.gram for need in _needs(job.target))
    gram = max((tensor.shape[-1] for tensor in tensors), default=0) ** 2 if grams else 0
    return Task(
        kind="quantize",
        subject=job.subject,
        block=block,
        spec=spec,
        work=replace(work, target=job.target, tensors=tensors, calibrated=calibrated),
        reads=tuple(key for key in (fetch.key, calibrated) if key),
        resources=Resources(memory_bytes=WORKER_BYTES + F32_BYTES * (weights + 3 * widest + 4 * gram)),
        temporary=True,
    )


def _reference_task(work: Work, fetch: Task) -> Task:
    spec = {
        "text": _settings(work.texts.evaluation),
        "sha256": work.texts.evaluation_sha256,
        "device": work.device,
    }
    resources = Resources(gpus=_gpus(work), memory_bytes=_evaluate_bytes(work.model, work.texts))
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
    files = {"files": dict(job.artifact.files), "target": job.target.name, "model": job.model.name}
    assemble = Task(
        kind="assemble",
        subject=job.subject,
        spec=files,
        work=replace(work, parts=parts),
        reads=(fetch.key, *parts),
        resources=Resources(memory_bytes=WORKER_BYTES),
    )
    yield assemble
    evaluate = Task(
        kind="evaluate",
        subject=job.subject,
        spec={"device": work.device},
        work=replace(work, assembled=assemble.key, parts=parts, referenced=reference.key if reference else ""),
        reads=(assemble.key, *((reference.key,) if reference else ())),
        resources=Resources(gpus=_gpus(work), memory_bytes=_evaluate_bytes(job.model, work.texts)),
    )
    yield evaluate
    finish = Task(
        kind="finish",
        subject=job.subject,
        spec={
            "target": job.target.model_dump(mode="json", exclude={"where"}),
            "repo": job.repo,
            "notes": list(job.artifact.notes),
        },
        work=replace(work, assembled=assemble.key, evaluated=evaluate.key, repo=job.repo or ""),
        reads=(assemble.key, evaluate.key),
    )
    yield finish
    if manifest.publish and job.repo:
        hub, private = manifest.publish.hub, manifest.publish.private
        yield Task(
            kind="publish",
            subject=job.subject,
            spec={"hub": hub, "private": private, "repo": job.repo},
            work=replace(work, finished=finish.key, repo=job.repo, hub=hub, private=private),
            reads=(finish.key,),
        )


def _needs(target: Target) -> Iterator[Any]:
    for method in target.methods:
        yield NEEDS[method](target.imatrix)


def _settings(text: Calibration | Evaluation) -> dict[str, Any]:
    """What decides the token rows, but not where the text lies: its content has a digest of its own."""
    return text.model_dump(mode="json", exclude={"text"})


def _gpus(work: Work) -> int:
    return int(work.device == "cuda")


def _elements(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def block_bytes(model: Model, block: int | None) -> int:
    """Bytes in f32 of the checkpoint's tensors in a block, or of those outside every block."""
    if model.architecture is None:
        return 0
    headers = model.snapshot.tensors.values()
    return F32_BYTES * sum(_elements(h.shape) for h in headers if model.architecture.block_of(h.name) == block)


def _hidden_bytes(model: Model, rows: int) -> int:
    return F32_BYTES * rows * embedding_shape(model)[-1]


def embedding_shape(model: Model) -> tuple[int, ...]:
    """The shape [V, D] of the embedding; the weights are there to ask, and config.json may leave out what is usual."""
    assert model.architecture is not None
    return model.snapshot.tensors[f"{model.architecture.embedding}.weight"].shape


def _calibrate_bytes(model: Model, texts: Texts, block: int, grams: bool) -> int:
    assert model.architecture is not None
    hidden = _hidden_bytes(model, texts.calibration.sequences * texts.calibration.length)
    total = WORKER_BYTES + block_bytes(model, block) + 2 * hidden + (block_bytes(model, None) if block == 0 else 0)
    if grams:
        shapes = {tap.name: 0 for tap in model.architecture.taps}
        for name, header in model.snapshot.tensors.items():
            tap = model.architecture.tap_of(name)
            if tap and model.architecture.block_of(name) == block:
                shapes[tap.name] = header.shape[-1]
        total += 2 * F32_BYTES * sum(width * width for width in shapes.values())
    return total


def _evaluate_bytes(model: Model, texts: Texts) -> int:
    if model.architecture is None:
        return WORKER_BYTES
    hidden = _hidden_bytes(model, texts.evaluation.sequences * texts.evaluation.length)
    largest = max((block_bytes(model, block) for block in range(model.blocks)), default=0)
    logits = 4 * F32_BYTES * texts.evaluation.length * embedding_shape(model)[0]
    return WORKER_BYTES + 2 * largest + 2 * block_bytes(model, None) + 3 * hidden + logits


def _disk_bytes(jobs: Sequence[PlannedJob], texts: Mapping[str, Texts], manifest: Manifest) -> int:
    """An upper bound: downloads, hidden states, every job's parts and files at once, and a copy for a folder hub."""
    models = {job.model.name: job.model for job in jobs}
    total = 0
    for model in models.values():
        if model.snapshot.source.startswith("hub:"):
            total += sum(model.snapshot.files.values())
        if model.architecture:
            evaluation, calibration = texts[model.name].evaluation, texts[model.name].calibration
            total += _hidden_bytes(model, evaluation.sequences * evaluation.length) * (model.blocks + 1)
            total += 2 * _hidden_bytes(model, calibration.sequences * calibration.length)
    copies = 2 if manifest.publish and manifest.publish.hub.startswith("folder:") else 1
    for job in jobs:
        parts = sum(_elements(t.shape) if t.quantized else t.size_bytes for t in job.artifact.tensors)
        total += parts + copies * sum(job.artifact.files.values())
    return total
