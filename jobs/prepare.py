"""Open every model, plan every artifact, and find out now what would fail later.

Reads headers, small files and text only. A problem belongs to a job, not to the run: the caller decides whether to
refuse the run or to go on without those jobs. Nothing is written but what comes from hubs: the small files of models,
and those files of a data set that hold the rows. Data sets are pinned to a commit here: later tasks read them again.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converter import dataset, hub, signing
from converter.adapt import adapt, untied
from converter.architecture import COMPUTED, check_blocks, code_notes, find
from converter.containers import ArtifactPlan
from converter.containers.tables import CONTAINERS
from converter.errors import HubmillError, SourceError, UnsupportedError
from converter.expression import evaluate
from converter.hub_calls import Tell, hush
from converter.manifest import Calibration, Job, Manifest, Target
from converter.methods import Needs
from converter.methods.rotation import why_fixed
from converter.methods.tables import NEEDS, reorders, turns
from converter.packed import packed_notes
from converter.progress import bytes_text
from converter.provenance import portable_source
from converter.publish import Destination
from jobs.agreement import check_agreement
from jobs.keep import Shelf
from jobs.needs import disk_bytes, embedding_shape, streams
from jobs.planner import Plan, build
from jobs.store import Store
from jobs.task import Task
from jobs.texts import remember, text_rows
from jobs.work import Model, PlannedJob, Signed, Texts
from quantkernels import processor

CONNECT_SECONDS = 5.0
MEMORY_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What can be done, and by job what cannot and why; manifest: as it was, with its data sets at their commits."""

    manifest: Manifest
    plan: Plan
    problems: Mapping[str, str]
    commits: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Room:
    """What this machine has: cores, bytes of memory, bytes free on the disk of the output folder."""

    cpus: int
    memory_bytes: int
    disk_bytes: int

    @property
    def usable_memory_bytes(self) -> int:
        """What tasks may take together; the rest is the system's and the driver's."""
        return int(MEMORY_SHARE * self.memory_bytes)


def prepare(
    manifest: Manifest, jobs: Sequence[Job], store: Store, cpus: int, device: str, tell: Tell = hush
) -> Prepared:
    """Plan these jobs of the manifest. tell: hears of waits for hubs."""
    problems: dict[str, str] = {}
    models: dict[str, Model] = {}
    lost: dict[str, HubmillError] = {}  # by model
    planned: list[PlannedJob] = []
    texts: dict[str, Texts] = {}
    manifest, unread = _pinned(manifest, store)
    signed, unsigned = _signed(manifest)
    for job in jobs:
        name = job.model.name
        try:
            if name not in models and name not in lost:
                models[name] = _open(job, store, tell)
                texts[name] = _texts(manifest, unread, models[name], store, device)
        except HubmillError as error:
            lost[name] = error
        try:
            if name in lost:
                raise lost[name]
            if unsigned:
                raise unsigned
            planned.append(replace(_plan_job(manifest, job, models[name]), signed=signed))
        except HubmillError as error:
            own = name not in lost and job.target.where not in str(
                error
            )  # what a model lacks is told once for its jobs
            problems[job.key] = f"{job.target.where}: {job.key}: {error}" if own else str(error)
    plan = build(manifest, planned, texts, cpus, device)
    commits = {name: model.snapshot.commit for name, model in models.items()}
    return Prepared(manifest=manifest, plan=plan, problems=problems, commits=commits)


def _open(job: Job, store: Store, tell: Tell) -> Model:
    """The job's model, its config.json and its weights found to be of the same model."""
    where = f"model '{job.model.name}'"
    snapshot = replace(hub.resolve(job.model.source, store.downloads, where, tell=tell), name=job.model.name)
    try:
        architecture = find(snapshot.config, where)
    except UnsupportedError:  # its weights can still be rounded; what needs more says so in _plan_job
        return Model(name=job.model.name, snapshot=snapshot, architecture=None)
    snapshot, architecture = adapt(snapshot, architecture, where)
    computed = tuple(name for name in snapshot.tensors if COMPUTED.search(name))
    tensors = {name: header for name, header in snapshot.tensors.items() if name not in computed}
    check_blocks(architecture, snapshot.config, tensors, where)  # first: what comes next builds as many as it is told
    snapshot = replace(snapshot, tensors=tensors)
    check_agreement(snapshot, architecture, where)
    return Model(
        name=job.model.name,
        snapshot=snapshot,
        architecture=architecture,
        computed=computed,
    )


def _plan_job(manifest: Manifest, job: Job, model: Model) -> PlannedJob:
    target = job.target.with_defaults()
    needs = [NEEDS[method](target.collects_imatrix) for method in target.methods] + [Needs(sums=target.fixes_ranges)]
    if model.snapshot.gguf and target.format != "gguf":
        what = f"the source is GGUF, which becomes GGUF of other types, and this target is {target.format}"
        remedy = "Convert the original model, or choose format: gguf"
        raise UnsupportedError(model.snapshot.repo, what, remedy)
    unknown = model.architecture is None and not model.snapshot.gguf
    turned = turns(target.methods)
    if unknown and (target.format == "gguf" or turned or any(need.sums or need.gram for need in needs)):
        find(model.snapshot.config, f"{target.where}: {job.key}")  # raises, naming what is known
    if model.architecture and not model.runs and any(need.sums or need.gram for need in needs):
        what = f"models of the family {model.architecture.name} are not run block by block, so nothing is calibrated"
        raise UnsupportedError(
            f"{target.where}: {job.key}", what, "Choose method rtn, and importance from a file or none"
        )
    if target.has_chain and not model.runs:
        what = "this model is not run block by block, so there is no chain of hidden states to propagate"
        raise UnsupportedError(f"{target.where}: {job.key}", what, "Remove propagate, or write propagate: original")
    if reorders(target.methods) and model.architecture and not model.architecture.middles:
        what = f"no columns of the family {model.architecture.name} can change places"
        raise UnsupportedError(f"{target.where}: {job.key}", what, "Leave reorder out")
    if turned:
        model = _turned(model, f"{target.where}: {job.key}")
    artifact = CONTAINERS[target.format].plan(model.snapshot, model.architecture, target)
    left_out = dict.fromkeys(model.computed, "whoever runs the model computes it")
    artifact = replace(artifact, dropped=left_out | dict(artifact.dropped))
    names = set(model.snapshot.tensors)
    if target.format == "gguf":  # rules may speak of the names in the file, too
        names |= {tensor.stack or tensor.name for tensor in artifact.tensors}
    unused = [rule.pattern for rule in target.rules if not any(re.search(rule.pattern, name) for name in names)]
    moving = artifact.tensors if streams(target) else ()
    moved = {tensor.source: tensor.grid.name for tensor in moving if not tensor.prepare}
    notes = code_notes(model.snapshot.config, model.architecture)
    notes += packed_notes(model.snapshot.config, model.snapshot.packed, moved)
    notes += tuple(f"the rule '{pattern}' fits no tensor" for pattern in unused)
    if model.snapshot.copies:
        notes += ("the head is stored by itself: once the stream is turned, it is no longer the embedding",)
    if target.format == "gguf":
        notes += tuple(_idle_rules(target, artifact, unused))
    artifact = replace(artifact, notes=artifact.notes + notes)
    if model.snapshot.untied and model.snapshot.untied not in {tensor.source for tensor in artifact.tensors}:
        what = "readers of this family take the embedding for the head, and in a turned model the two differ"
        raise UnsupportedError(f"{target.where}: {job.key}", what, "Leave rotation out, or choose another format")
    return PlannedJob(model=model, target=target, artifact=artifact, place=_place(manifest, job, model))


def _signed(manifest: Manifest) -> tuple[Signed | None, HubmillError | None]:
    """The key that artifacts are signed with, or why it cannot sign."""
    if manifest.publish is None or manifest.publish.sign is None:
        return None, None
    key = Path(manifest.publish.sign.key)
    try:
        return Signed(key=key, fingerprint=signing.fingerprint(key, "publish.sign")), None
    except HubmillError as error:
        return None, error


def _place(manifest: Manifest, job: Job, model: Model) -> Destination | None:
    """Where the job's artifact is published; None: nowhere. The hub wants Parquet in a data set."""
    publish = manifest.publish
    if publish is None:
        return None
    return Destination(
        hub=publish.hub,
        repo=publish.repo_of(manifest.name, job),
        kind="dataset" if job.target.format == "parquet" else "model",
        private=publish.private,
        branch=publish.branch_of(manifest.name, job),
        pull_request=publish.pull_request,
        collection=publish.collection,
        replace=publish.replace,
        origin=portable_source(model.snapshot.source),
    )


def _turned(model: Model, where: str) -> Model:
    """The model as a target sees it that turns its residual stream; raises UnsupportedError where that cannot be."""
    assert model.architecture is not None  # refused before
    if why := why_fixed(model.architecture, {one.name: one.shape for one in model.snapshot.tensors.values()}):
        raise UnsupportedError(where, f"the residual stream cannot be turned: {why}", "Leave rotation out")
    return replace(model, snapshot=untied(model.snapshot, model.architecture))


def _idle_rules(target: Target, artifact: ArtifactPlan, unused: Sequence[str]) -> Iterator[str]:
    """What rules fit tensors without giving any of them their type, a sentence each: norms, say, are always F32."""
    for rule in target.rules:
        fits = [
            tensor for tensor in artifact.tensors if target.rule_for(tensor.source, tensor.stack or tensor.name) == rule
        ]
        if rule.pattern not in unused and not any(t.grid.name == rule.type or t.fallback for t in fits):
            why = f"what it fits is never {rule.type}, or an earlier rule fits"
            yield f"the rule '{rule.pattern}' changes nothing: {why}"


def _pinned(manifest: Manifest, store: Store) -> tuple[Manifest, HubmillError | None]:
    """The manifest with its data sets on hubs at the commits they have now, or as it is and why that failed."""
    calibration, evaluation = manifest.calibration, manifest.evaluation
    try:
        texts = [
            dataset.pin(calibration.text, store.downloads, "calibration text"),
            dataset.pin(evaluation.text, store.downloads, "evaluation text"),
        ]
        if texts[0] == texts[1] != "builtin":
            what = f"{evaluation.text} and {calibration.text} are one commit, so nothing would be held out"
            raise UnsupportedError("evaluation text", what, "Name another text or column")
    except HubmillError as error:
        return manifest, error
    sections = {
        "calibration": calibration.model_copy(update={"text": texts[0]}),
        "evaluation": evaluation.model_copy(update={"text": texts[1]}),
    }
    return manifest.model_copy(update=sections), None


def _texts(manifest: Manifest, unread: HubmillError | None, model: Model, store: Store, device: str) -> Texts:
    """The token rows that this model will be calibrated and measured on, by digest; finds a text that is too short."""
    digests = ["", ""]
    if model.architecture and model.runs:
        if unread:
            raise unread
        folder = model.snapshot.folder
        most = evaluate(model.architecture.longest, model.snapshot.config) if model.architecture.longest else None
        longest = max(manifest.calibration.length, manifest.evaluation.length)
        if most is not None and longest > most:
            what = f"rows of {longest} tokens are asked for, and the model takes {most} at most"
            raise UnsupportedError(f"model '{model.name}'", what, "Mend `length` of calibration and evaluation")
        rows = [
            text_rows(settings, folder, model.name, store.downloads, model.encodes, manifest.places.get(section, ""))
            for section, settings in (("calibration", manifest.calibration), ("evaluation", manifest.evaluation))
        ]
        largest, table = max(int(tokens.max()) for tokens in rows), embedding_shape(model)[0]
        if largest >= table:
            what = f"the tokenizer gives token {largest}, and the embedding has {table} rows"
            remedy = "Tokenizer and weights are of different models: fetch both again"
            raise SourceError(f"model '{model.name}'", what, remedy)
        digests = [remember(tokens) for tokens in rows]
    return Texts(
        calibration=_with_precision(manifest.calibration, model, device),
        calibration_sha256=digests[0],
        evaluation=manifest.evaluation,
        evaluation_sha256=digests[1],
    )


def _with_precision(calibration: Calibration, model: Model, device: str) -> Calibration:
    """The same with `auto` decided here, for all nodes: bf16 for weights in bf16, where that is what is fast."""
    if calibration.precision != "auto":
        return calibration
    fast = device == "cuda" or processor.is_fast_in_bf16()
    stored = {one.dtype for one in model.snapshot.tensors.values()}
    return calibration.model_copy(update={"precision": "bf16" if fast and "BF16" in stored else "f32"})


def room(folder: Path) -> Room:
    """What this machine has for a run whose output goes to `folder`, which may not exist yet."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return Room(
        cpus=_cores(Path("/sys/fs/cgroup/cpu.max")),
        memory_bytes=memory,
        disk_bytes=shutil.disk_usage(_existing(folder)).free,
    )


def _cores(limit: Path) -> int:
    """The cores that this process may use: those it is bound to, or fewer where a container has a share in time only.

    limit: the control group's "quota period" in microseconds, or "max period".
    """
    bound = len(os.sched_getaffinity(0))
    quota, _, period = limit.read_text().partition(" ") if limit.is_file() else ("max", "", "")
    return max(1, min(bound, int(quota) // int(period))) if quota.isdigit() else bound


def unwritable(folder: Path) -> list[UnsupportedError]:
    """Why nothing can be written into `folder`, which may not exist yet; empty when something can."""
    existing = _existing(folder)
    if not existing.is_dir():
        what = f"{existing} is a file, and results go to a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        what = f"{existing} cannot be written to"
    else:
        return []
    return [UnsupportedError(str(folder), what, "Choose another --out")]


def unreachable(address: str) -> list[UnsupportedError]:
    """Why no Ray cluster answers at "host:port"; Ray itself would go on trying without an end."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return []  # such as "auto": Ray finds it, or says at once that there is none
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        remedy = "Start a cluster with `ray start --head`, mend --address, or leave it out"
        return [UnsupportedError(f"--address {address}", f"nothing answers there: {error}", remedy)]
    return []


def _existing(folder: Path) -> Path:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def keep_problems(shelves: Sequence[Shelf], out: Path) -> tuple[list[UnsupportedError], int]:
    """Why statistics cannot be kept, and how many bytes of them will lie on the disk of `out`, where results go."""
    problems: dict[str, UnsupportedError] = {}
    beside = 0
    for shelf in shelves:
        keep, where = shelf.folder.parent, f"model '{shelf.model}': calibration.keep"
        for problem in unwritable(keep):
            problems[where] = UnsupportedError(where, problem.what, "Name another folder, or remove keep")
        if where not in problems and os.stat(_existing(keep)).st_dev == os.stat(_existing(out)).st_dev:
            beside += shelf.size_bytes
        elif where not in problems:
            free = shutil.disk_usage(_existing(keep)).free
            if shelf.size_bytes > free:
                what = (
                    f"statistics of {shelf.model} take {bytes_text(shelf.size_bytes)}, and {bytes_text(free)} are free"
                )
                problems[where] = UnsupportedError(where, what, "Free some, name another folder, or remove keep")
    return list(problems.values()), beside


def shortages(tasks: Sequence[Task], has: Room, here: bool, where: str, kept_bytes: int = 0) -> list[UnsupportedError]:
    """What is lacking for these tasks; empty when there is enough. here: whether they run on this machine.

    kept_bytes: of statistics that stay on the same disk for later manifests.
    """
    found = []
    need = disk_bytes(tasks) + kept_bytes
    if need > has.disk_bytes:
        what = f"the run needs up to {bytes_text(need)} of disk, and {bytes_text(has.disk_bytes)} are free"
        remedy = "Free some, choose another --out, or take fewer targets with --only"
        found.append(UnsupportedError(where, what, remedy))
    largest = max(tasks, key=lambda task: task.resources.memory_bytes, default=None)
    if here and largest and largest.resources.memory_bytes > has.usable_memory_bytes:
        need, have = largest.resources.memory_bytes, has.memory_bytes
        what = f"{largest.title} needs {bytes_text(need)} of memory, and this machine has {bytes_text(have)}"
        remedy = "Use a machine with more, or fewer or shorter calibration and evaluation rows"
        found.append(UnsupportedError(where, what, remedy))
    return found
