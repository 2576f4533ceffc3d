"""Tasks on Ray: an embedded cluster of this machine's cores, or one that runs already.

Ray moves names, never tensors: a task and the store's path go out, an outcome comes back, files stay where they are. On
a cluster of several machines the output folder must be one that all of them share, which is tried before any work. An
error of the step is part of the outcome. Retries are counted here and not by Ray, which would try a task again for ever
that its memory monitor ended, and with the same memory: here a lost worker's task is started again, and one that ran
out of memory with twice as much, until no node has more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from converter.errors import UnsupportedError
from converter.hub_calls import Tell, without_credentials
from converter.progress import bytes_text
from jobs.head import Head
from jobs.outcome import Outcome
from jobs.steps import run
from jobs.store import Store, try_folder
from jobs.task import Task

OBJECT_STORE_BYTES = 100_000_000  # outcomes are a few hundred bytes
PAUSES = (0.0, 5.0, 25.0)  # seconds before each further start of a task whose worker was lost
GROWTH = 2  # how much more memory a task gets that ran out of it
STARTS = 3
PROBE_SECONDS = 60.0  # for every node to look into the output folder: it may have to start a worker first
PREFIX = "hubmill-ray-"
LOST = "its processes are lost as soon as they start"


@dataclass(frozen=True, kw_only=True)
class Running:
    """A task that was submitted: with how much memory, and how often it was before."""

    task: Task
    store: Store
    tell: Tell
    memory_bytes: int
    losses: int = 0
    growths: int = 0


class RayExecutor:
    """Runs tasks in Ray workers. address None: a cluster inside this process, gone when it is closed."""

    def __init__(self, address: str | None, cpus: int, memory_bytes: int, gpus: int = 0) -> None:
        # Usage statistics would be a call to the outside, and an unset auth mode writes a token file into the home
        # directory that later changes how other clusters start; both are read from the environment alone.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        self._folder = ""
        self._head: Head | None = None
        if address is None:
            self._folder = _own_folder()
            with _ends_in_order():
                _start_here(self._folder, cpus, memory_bytes, gpus)
        else:
            self._head = Head(address)
            with _ends_in_order():
                _connect(address)
        self._remote = ray.remote(run)
        self._running: dict[Any, Running] = {}
        self._paused: list[tuple[float, Running]] = []  # until when, by the monotonic clock
        self._address = address or ""
        self._nodes = [node for node in ray.nodes() if node["Alive"]]
        working = [node for node in self._nodes if node["Resources"].get("CPU", 0) >= 1]  # a head may have none
        self._has: list[Mapping[str, float]] = [node["Resources"] for node in working]
        self._cpus = sum(int(has["CPU"]) for has in self._has)

    @property
    def slots(self) -> int:
        """As many tasks as there are cores, and one more that is ready when a core comes free."""
        return self._cpus + 1

    @property
    def _most_bytes(self) -> int:
        """The memory of the largest node."""
        return int(max((has.get("memory", 0) for has in self._has), default=0))

    def check(self, tasks: Sequence[Task], store: Store) -> None:
        """Refuse what no node can hold: Ray would wait for such a node for ever, and in silence.

        Refuse nodes, too, that do not see the output folder.
        """
        check_nodes(tasks, self._has)
        if self._head:
            self._check_shared(store)

    def _check_shared(self, store: Store) -> None:
        """The driver writes a file, and every node that tasks run on reads it, and writes beside it."""
        probe = store.work / f"shared.{uuid.uuid4().hex}"
        probe.write_text(probe.name, "utf-8")
        lacks = {node["NodeID"]: LOST for node in self._nodes if node["Resources"].get("CPU", 0)}
        try:
            for _ in range(STARTS):
                lacks |= _look(probe, [node for node, why in lacks.items() if why == LOST])
        finally:
            probe.unlink()
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        # One that died just now hinders nobody.
        problems = [f"node {hosts[node]}: {why}" for node, why in lacks.items() if why and node in hosts]
        if problems:
            remedy = f"Mount {store.run} at the same place on every machine of the cluster, or take those out"
            raise UnsupportedError(f"Ray at {self._address}", "; ".join(problems), remedy)

    def submit(self, task: Task, store: Store, tell: Tell) -> None:
        self._start(Running(task=task, store=store, tell=tell, memory_bytes=task.resources.memory_bytes))

    def _start(self, one: Running) -> None:
        widest = max((int(has.get("CPU", 0)) for has in self._has), default=1)
        cpus = max(1, min(one.task.resources.cpus, widest))
        options: dict[str, Any] = {}
        if one.growths:  # a process of its own: one that ran out of memory may hold on to what it has
            options["runtime_env"] = {"env_vars": _worker_environment() | {"HUBMILL_ATTEMPT": str(one.growths)}}
        call = self._remote.options(
            num_cpus=cpus,
            num_gpus=one.task.resources.gpus,
            memory=one.memory_bytes,
            max_retries=0,
            name=one.task.title,
            **options,
        )
        self._running[call.remote(one.task, one.store, cpus)] = one

    def wait(self, seconds: float) -> Sequence[Outcome]:
        if self._head:
            self._head.check()
        due = [one for until, one in self._paused if until <= time.monotonic()]
        self._paused = [(until, one) for until, one in self._paused if one not in due]
        for one in due:
            self._start(one)
        if not self._running:
            time.sleep(seconds if self._paused else 0.0)
            return []
        ended, _ = ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [outcome for reference in ended if (outcome := self._outcome(reference))]

    def _outcome(self, reference: Any) -> Outcome | None:
        """How a task ended; None when it was started again."""
        one = self._running.pop(reference)
        task = one.task
        try:
            outcome: Outcome = ray.get(reference)
            if outcome.out_of_memory and self._grow(one, "it"):
                return None
        except ray.exceptions.RayTaskError as error:  # not from the step, whose errors are outcomes: it did not start
            reason = str(error).strip().splitlines()[-1]
            # An OSError is of files of Ray itself, as on a node that goes; another hubmill raises otherwise.
            if isinstance(error.cause, OSError) and self._again(one, reason):
                return None
            what = f"{task.title}: the worker could not run it: {reason}. Install the same hubmill on every machine."
            return Outcome(key=task.key, seconds=0.0, peak_bytes=0, error=what)
        except ray.exceptions.OutOfMemoryError:
            if self._grow(one, "its node"):
                return None
            what = (
                f"{task.title}: its node ran out of memory, also with {bytes_text(one.memory_bytes)} kept for it, and "
                "no node has more. Add a larger one, see what else takes memory there, or take fewer or shorter rows."
            )
            return Outcome(key=task.key, seconds=0.0, peak_bytes=0, error=what)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            if self._again(one, reason):
                return None
            what = f"{task.title}: its worker was lost {one.losses + 1} times: {reason}"
            return Outcome(
                key=task.key, seconds=0.0, peak_bytes=0, error=f"{what}. Look at memory and disk, then run again."
            )
        return outcome

    def _again(self, one: Running, reason: str) -> bool:
        """Start a task again after a pause; False when it was lost too often."""
        if one.losses >= len(PAUSES):
            return False
        one.tell(f"its worker was lost ({reason}): started again")
        self._paused.append((time.monotonic() + PAUSES[one.losses], replace(one, losses=one.losses + 1)))
        return True

    def _grow(self, one: Running, who: str) -> bool:
        """Start a task again with more memory; False when no node has more."""
        if one.memory_bytes >= self._most_bytes:
            return False
        more = min(GROWTH * max(1, one.memory_bytes), self._most_bytes)
        one.tell(f"{who} ran out of memory: started again with {bytes_text(more)} kept for it")
        self._start(replace(one, memory_bytes=more, growths=one.growths + 1))
        return True

    def close(self) -> None:
        # Ray ends the tasks of a driver that leaves. Cancelling them by force first made its task manager abort the
        # whole process when one of them ended at that moment (ray 2.60).
        self._running, self._paused = {}, []
        if self._head:
            self._head.close()
            if self._head.lost:
                return  # there is nobody to say goodbye to, and Ray would wait for him
        ray.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


def check_nodes(tasks: Sequence[Task], nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise UnsupportedError for the first task that no node can hold; nodes: what each has, by Ray's names."""
    if not nodes:
        what, remedy = (
            "no node has cores for tasks",
            "Start the workers first: a run is planned with those that are there",
        )
        raise UnsupportedError("Ray", what, remedy)
    for task in tasks:
        memory, gpus = task.resources.memory_bytes, task.resources.gpus
        if not any(has.get("memory", 0) >= memory and has.get("GPU", 0) >= gpus for has in nodes):
            most = bytes_text(max(has.get("memory", 0) for has in nodes))
            wanted = f"{bytes_text(memory)} of memory" + (f" and {gpus} GPU" if gpus else "")
            what = f"{task.title} needs {wanted}, and no node has that (the most memory is {most})"
            remedy = "Add a larger node, or take fewer or shorter calibration and evaluation rows"
            raise UnsupportedError("Ray", what, remedy)


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """Keep what this process does at SIGTERM: Ray would end it where it stands, as if it had failed."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _look(probe: Path, nodes: Sequence[str]) -> dict[str, str]:
    """Why tasks could not work in the folder of a probe, by node; empty when they could, LOST when a process was."""
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    look = ray.remote(num_cpus=0, max_retries=0)(try_folder)
    asked = {look.options(scheduling_strategy=near(node, soft=False)).remote(probe): node for node in nodes}
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS) if asked else ([], [])
    found = {asked[one]: f"it did not look within {PROBE_SECONDS:.0f} s" for one in silent}
    for one in answered:
        try:
            found[asked[one]] = ray.get(one)
        except ray.exceptions.OutOfMemoryError:
            found[asked[one]] = ""  # for now: that says nothing of its folders
        except ray.exceptions.WorkerCrashedError:
            found[asked[one]] = LOST
        except ray.exceptions.RayError as error:
            found[asked[one]] = str(error).strip().splitlines()[-1]
    return found


def _start_here(folder: str, cpus: int, memory_bytes: int, gpus: int) -> None:
    """Start Ray on this machine. It gives a node 30 seconds, which a busy one may miss, so it gets three of them."""
    for left in reversed(range(STARTS)):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                num_gpus=gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder,
                _memory=memory_bytes,
                **_settings(),
            )
            return
        except Exception as error:  # Ray raises a plain Exception for a node that was too slow
            ray.shutdown()
            if not left or "timed out" not in str(error):
                what = f"it did not start: {error}"
                remedy = "Free processor time and memory, or use --executor inprocess, which needs no Ray"
                raise UnsupportedError("Ray on this machine", what, remedy) from error


def _connect(address: str) -> None:
    try:
        ray.init(address=address, **_settings())
    except (ConnectionError, RuntimeError) as error:
        what, remedy = f"no cluster answers: {error}", "Start one with `ray start --head`, or leave out --address"
        raise UnsupportedError(f"Ray at {address}", what, remedy) from error


def _settings() -> dict[str, Any]:
    return {
        "runtime_env": {"env_vars": _worker_environment()},
        "logging_level": "ERROR",
        "log_to_driver": False,
    }


def _own_folder() -> str:
    """A fresh folder for Ray's session, locked until this process ends; those of processes that ended are removed.

    In /tmp whatever TMPDIR says, because the paths of sockets must stay under 107 characters.
    """
    for old in Path("/tmp").glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (old / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=PREFIX, dir="/tmp")
    descriptor = os.open(Path(folder) / "lock", os.O_CREAT | os.O_RDWR)  # stays open, and so locked, to the end
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return folder


def _worker_environment() -> dict[str, str]:
    """What workers need to find this code when it runs from a checkout, and the hub that the plan was made with."""
    found = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    endpoint = os.environ.get("HF_ENDPOINT")
    if endpoint and endpoint == without_credentials(endpoint):  # Ray keeps what is sent in its state and its logs
        found["HF_ENDPOINT"] = endpoint  # fetch and publish ask the same hub as the plan; tokens are each node's own
    return found
