"""One run from beginning to end: plan, refuse or go on, drive, compare, and say what came of it.

The order is the promise: everything that can fail early fails in `prepare`, before the output folder is touched; the
lock is written before work starts; and the comparison is written from what finished tasks recorded, also when others
failed, so a night that half worked is half done and says which half.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, Literal

import torch

from converter.errors import HubmillError, ManifestError, UnsupportedError
from converter.folder import file_sha256
from converter.hub_calls import Tell, hush
from converter.lock import lock_text, portable, read_lock
from converter.manifest import Job, Manifest
from converter.progress import Display, Event
from converter.source import Snapshot
from jobs import events, keep, settled
from jobs.drive import Executor, InProcess, Progress, drive
from jobs.events import Show
from jobs.lease import held
from jobs.prepare import Prepared, Room, keep_problems, prepare, room, shortages, unreachable, unwritable
from jobs.results import write_results
from jobs.steps import open_hub
from jobs.store import DamagedError, Store, write_text
from jobs.task import Graph, Task
from jobs.work import Work

Place = Literal["ray", "inprocess"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """How to run a manifest. only: jobs to do, as model/target or model or target names; empty: all.

    skip_unsupported: leave out jobs that cannot be done in place of refusing the run.
    """

    manifest: Manifest
    out: Path
    executor: Place = "ray"
    address: str | None = None
    only: tuple[str, ...] = ()
    device: str = "cpu"
    skip_unsupported: bool = False

    @property
    def store(self) -> Store:
        return Store(run=(self.out / self.manifest.name).absolute())

    def chosen(self) -> frozenset[str]:
        """The jobs that --only leaves, as model/target.

        Raises ManifestError when it names one that the manifest does not have.
        """
        jobs = self.manifest.jobs()
        for name in self.only:
            if not any(name in _names(job) for job in jobs):
                known = ", ".join(job.key for job in jobs)
                raise ManifestError((f"--only {name}: the manifest has no such job. It has {known}.",))
        return frozenset(job.key for job in jobs if not self.only or _names(job).intersection(self.only))


def _names(job: Job) -> set[str]:
    return {job.key, job.model.name, job.target.name}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a run: rows of the comparison, and failures as (task, error)."""

    rows: tuple[dict[str, Any], ...]
    failures: tuple[tuple[str, str], ...]
    tasks_run: int

    @property
    def exit_code(self) -> int:
        return int(bool(self.failures) or any(row["status"] == "failed" for row in self.rows))


class Refused(HubmillError):  # noqa: N818 - it is a decision, not a mistake in the program
    """The run was not started; `problems` are full sentences, each saying what to do."""

    def __init__(self, problems: Sequence[str]) -> None:
        Exception.__init__(self, tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A planned run: what the machine has, which tasks are done and needed, and every reason not to start."""

    prepared: Prepared
    room: Room
    done: frozenset[str]
    needed: tuple[str, ...]
    reasons: tuple[str, ...]
    shelves: tuple[keep.Shelf, ...] = ()


def plan(run: Run, tell: Tell = hush) -> Ready:
    """Everything `convert` would do. tell: hears of waits for hubs."""
    chosen = run.chosen()
    here = room(run.store.run)
    prepared = prepare(run.manifest, run.manifest.jobs(), run.store, here.cpus, run.device, tell)
    graph = prepared.plan.graph
    done = finished(graph, run.store)
    models = {name.rpartition("/")[0] for name in chosen}
    ends = [
        key
        for key, task in graph.tasks.items()
        if (task.kind in ("finish", "publish") and task.subject in chosen)
        or (task.kind == "imatrix" and task.subject in models)
    ]
    needed = graph.needed(done, ends)
    problems = [error for key, error in prepared.problems.items() if key in chosen]
    reasons = [] if run.skip_unsupported and len(problems) < len(chosen) else problems
    reasons += [str(lack) for lack in unwritable(run.store.run)]
    if run.address is not None:
        reasons += [str(lack) for lack in unreachable(run.address)]
    tasks = [graph.tasks[key] for key in needed]
    shelves = keep.shelves(tasks)
    lacks, kept_bytes = keep_problems(shelves, run.store.run)
    lacks += shortages(tasks, here, run.address is None, str(run.store.run), kept_bytes)
    reasons += [str(lack) for lack in lacks]
    if needed:
        places = [job.place for job in prepared.plan.jobs if job.place and job.subject in chosen]
        reasons += [str(problem) for problem in open_hub(places[0], tell).problems(places)] if places else []
    return Ready(
        prepared=prepared,
        room=here,
        done=frozenset(done),
        needed=tuple(needed),
        shelves=tuple(shelves),
        reasons=tuple(dict.fromkeys(reasons)),
    )


def convert(run: Run, display: Display) -> Result:
    """Do what the manifest says. Raises Refused before anything is written when it cannot be done."""
    check_owner(run)
    began = time.monotonic()
    planning = Event(task=events.PLAN, subject=run.manifest.name, state="start", title="plan")
    display.show(planning)
    ready = plan(run, lambda note: display.show(replace(planning, state="note", note=note)))
    if ready.reasons:
        others = bool(ready.prepared.plan.jobs) and bool(ready.prepared.problems) and not run.skip_unsupported
        hint = ("Nothing was started. --skip-unsupported leaves out what cannot be done and does the rest.",)
        raise Refused((*ready.reasons, *(hint if others else ())))
    store, graph = run.store, ready.prepared.plan.graph
    with only_run(store, display.show) as (show, check):
        events.put_aside(store)
        counts = dict(Counter(str(graph.tasks[key].kind) for key in ready.needed))
        events.say(store, show, replace(planning, state="done", fraction=1.0, counts=counts))
        ending = Event(task=events.RUN, subject=run.manifest.name, state="failed", title="run", fraction=1.0)
        try:
            result = _work(run, ready, show, check)
        except BaseException as error:
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            with suppress(UnsupportedError):  # of a folder that was lost, whose log is another run's
                events.say(store, show, replace(ending, seconds=round(time.monotonic() - began, 3), note=why))
            raise
        ending = replace(ending, seconds=round(time.monotonic() - began, 3))
        if result.exit_code:
            events.say(store, show, replace(ending, note=f"{len(result.failures)} tasks failed"))
        else:
            events.say(store, show, replace(ending, state="done"))
    return result


def _work(run: Run, ready: Ready, show: Show, check: Callable[[], None]) -> Result:
    """Run the tasks that a plan found needed, and write what came of them; the run's folder is held meanwhile."""
    store, prepared, graph = run.store, ready.prepared, ready.prepared.plan.graph
    depends = _depends(run, prepared)
    store.settled.unlink(missing_ok=True)
    facts = {job.subject: {"files": dict(job.artifact.files)} for job in prepared.plan.jobs}
    write_text(store.run / "manifest.lock.yaml", lock_text(prepared.manifest, prepared.commits, facts))
    write_text(store.owner, str(run.manifest.path.absolute()))
    state = Progress(done=set(ready.done))
    store.sweep(check)
    for key in graph.leftover(ready.done):
        store.forget(key)
    if ready.needed:
        for key in ready.needed:
            store.forget(key)  # what is there under this key is damaged: a finished, whole one is not needed
        executor = _executor(run, ready.room)
        try:
            executor.check([graph.tasks[key] for key in ready.needed], store)
            state = drive(graph, ready.needed, ready.done, executor, store, show)
        finally:
            executor.close()
        store.sweep(check)  # what killed workers left: the next run may find nothing to do, and look no further
    if not run.only and not prepared.problems and not state.failed:
        for key in store.done() - set(graph.tasks):
            store.forget(key)  # of earlier settings, commits or versions: nothing will ask for it again
        store.forget_downloads({*prepared.commits.values(), *_commits_of_texts(prepared.manifest)})
    rows = write_results(prepared, state, store)
    failures = tuple((graph.tasks[key].title, error) for key, error in state.failed.items())
    result = Result(rows=tuple(rows), failures=failures, tasks_run=len(ready.needed))
    if depends and not run.only and not prepared.problems and not result.exit_code and _stands(prepared, store):
        settled.note(store, depends)
    return result


def _stands(prepared: Prepared, store: Store) -> bool:
    """Whether every artifact is what was put there: what was damaged since is not noted as it is now."""
    return all(_whole(task, store) for task in prepared.plan.graph.tasks.values() if task.kind == "finish")


def _depends(run: Run, prepared: Prepared) -> dict[str, Any]:
    """What this run depends on, at the commits it was planned with; empty when that cannot be told."""
    commits = {model.source: prepared.commits.get(model.name, "") for model in run.manifest.models}
    texts = run.manifest.calibration.text, run.manifest.evaluation.text
    commits |= dict(zip(texts, _commits_of_texts(prepared.manifest), strict=True))
    try:
        return settled.depends(run.manifest, run.device, commits.__getitem__)
    except (OSError, PackageNotFoundError):  # a checkout that was never installed, for one
        return {}


def _commits_of_texts(pinned: Manifest) -> list[str]:
    """The commits of the data sets that calibration and evaluation read, as hub:owner/name@commit#column names them."""
    texts = pinned.calibration.text, pinned.evaluation.text
    return [text.partition("#")[0].rpartition("@")[2] for text in texts]


def publish(run: Run, display: Display) -> Result:
    """Publish the artifacts that are finished, in this process; converts nothing."""
    ready = plan(run)
    store, graph = run.store, ready.prepared.plan.graph
    chosen = run.chosen()
    todo = [
        key
        for key, task in graph.tasks.items()
        if task.kind == "publish" and task.subject in chosen and ready.done.issuperset(task.reads)
    ]
    if not todo:
        raise UnsupportedError(str(store.run), "nothing is finished yet", "Run hubmill convert first")
    works = [graph.tasks[key].work for key in todo]
    places = [work.place for work in works if isinstance(work, Work) and work.place]
    if problems := open_hub(places[0]).problems(places):
        raise Refused([str(problem) for problem in problems])
    with only_run(store, display.show) as (show, _):
        state = drive(graph, todo, ready.done - set(todo), InProcess(ready.room.cpus), store, show)
    failures = tuple((graph.tasks[key].title, error) for key, error in state.failed.items())
    return Result(rows=(), failures=failures, tasks_run=len(todo))


def pick_device(name: str, address: str | None = None) -> str:
    """The device that cpu, cuda or auto means; auto takes a GPU when torch sees one here.

    Raises UnsupportedError when cuda is asked for and there is none. A cluster at `address` is asked later.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there and address is None:
        raise UnsupportedError("--device cuda", "torch sees no GPU here", "Use --device cpu, or install torch for CUDA")
    return "cuda" if name == "cuda" or (there and name == "auto") else "cpu"


def _executor(run: Run, here: Room) -> Executor:
    if run.executor == "inprocess":
        return InProcess(here.cpus)
    from jobs.cluster import RayExecutor  # ray takes seconds to import and is not needed in-process

    return RayExecutor(run.address, here.cpus, here.usable_memory_bytes, gpus=int(run.device == "cuda"))


def check_owner(run: Run) -> None:
    """Refuse a folder that another manifest of the same name filled.

    Another one it is when it has no source in common, or lies elsewhere while the first is still there: a checkout that
    was moved takes its results along.
    """
    lock = read_lock(run.store.run / "manifest.lock.yaml")
    if lock is None:
        return
    ours = {portable(model.source, run.manifest).partition("@")[0] for model in run.manifest.models}
    theirs = {source.partition("@")[0] for source in lock.sources.values()}
    owner = Path(run.store.owner.read_text("utf-8")) if run.store.owner.is_file() else run.manifest.path.absolute()
    if not ours & theirs or (owner != run.manifest.path.absolute() and owner.is_file()):
        raise UnsupportedError(
            str(run.store.run),
            f"these are the results of another manifest named '{run.manifest.name}', of {', '.join(sorted(theirs))}",
            f"Choose another --out or another name:, or remove {run.store.run / 'manifest.lock.yaml'} to take it over",
        )


@contextmanager
def only_run(store: Store, show: Show) -> Iterator[tuple[Show, Callable[[], None]]]:
    """Hold the run's folder, which is let go of when this process ends, however it ends.

    Gives what shows events, and what looks whether the folder is still ours; both raise UnsupportedError if it is not.
    Raises UnsupportedError when it is another run's already.
    """
    with ExitStack() as stack:
        try:
            store.work.mkdir(parents=True, exist_ok=True)
            lease = stack.enter_context(held(store.lease))
        except OSError as error:
            what = f"no results can be written at {error.filename}: {error.strerror}"
            remedy = "Choose another --out, or make room and rights there"
            raise UnsupportedError(str(store.run), what, remedy) from error

        def shown(event: Event) -> None:
            lease.check()  # so that nothing more is begun in a folder that was lost
            show(event)

        yield shown, lease.check


def finished(graph: Graph, store: Store) -> set[str]:
    """The tasks whose results are there, in full size, under their final names.

    Of what other tasks will read only the size of artifacts is looked at: who reads it hashes it, see `Store.file`.
    """
    return {key for key in store.done() if key in graph.tasks and _whole(graph.tasks[key], store)}


def _whole(task: Task, store: Store) -> bool:
    try:
        record = store.record(task.key)
    except DamagedError:
        return False
    if task.kind == "imatrix":
        return (store.run / task.subject / "imatrix.gguf").is_file()
    if not isinstance(task.work, Work):
        return True
    if task.kind == "fetch":
        return _fetched(task.work.model.snapshot, Path(record["folder"]))
    if task.work.target is None:
        return True
    if task.kind == "assemble":
        return _has(store.output(task.key), record["files"], record["changed_ns"])
    if task.kind == "finish":
        folder = store.run / task.work.model.name / task.work.target.name
        return _has(folder, record["row"]["files"], record["changed_ns"])
    if task.kind == "publish" and task.work.place and task.work.place.folder:
        return (task.work.place.folder / task.work.place.repo).exists()
    return True


def _fetched(snapshot: Snapshot, folder: Path) -> bool:
    """Whether the weights are still where they were fetched to; a model's folder may have been moved since."""
    same = snapshot.source.startswith("hub:") or folder == snapshot.folder
    return same and _has(folder, [{"path": name, "bytes": snapshot.files[name]} for name in snapshot.weight_files])


def _has(folder: Path, files: Sequence[Mapping[str, Any]], changed_ns: Mapping[str, int] | None = None) -> bool:
    """Whether the files are there in full size; those written to since `changed_ns` must still have their sha256."""
    for item in files:
        path = folder / item["path"]
        if not path.is_file() or path.stat().st_size != item["bytes"]:
            return False
        touched = changed_ns is not None and path.stat().st_mtime_ns != changed_ns.get(item["path"])
        if touched and file_sha256(path) != item["sha256"]:
            return False
    return True
