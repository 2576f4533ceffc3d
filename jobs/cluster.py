"""Tasks on Ray: an embedded cluster of this machine's cores, or one that runs already.

Ray moves names, never tensors: a task and the store's path go out, an outcome comes back, files stay where they are. On
a cluster of several machines the output folder must be one that all of them share. An application error is part of the
outcome, so Ray's own retries are left for what they are good at: a worker or a node that died.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from converter.errors import UnsupportedError
from converter.hub_calls import Tell
from converter.progress import bytes_text
from jobs.steps import Outcome, run
from jobs.store import Store
from jobs.task import Task

OBJECT_STORE_BYTES = 100_000_000  # outcomes are a few hundred bytes
RETRIES = 3
STARTS = 3
PREFIX = "hubmill-ray-"


class RayExecutor:
    """Runs tasks in Ray workers. address None: a cluster inside this process, gone when it is closed."""

    def __init__(self, address: str | None, cpus: int, memory_bytes: int, gpus: int = 0) -> None:
        # Usage statistics would be a call to the outside, and an unset auth mode writes a token file into the home
        # directory that later changes how other clusters start; both are read from the environment alone.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        self._folder = ""
        if address is None:
            self._folder = _own_folder()
            _start_here(self._folder, cpus, memory_bytes, gpus)
        else:
            _connect(address)
        self._remote = ray.remote(run)
        self._running: dict[Any, Task] = {}
        self._nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._cpus = int(ray.cluster_resources().get("CPU", 1))

    @property
    def slots(self) -> int:
        """As many tasks as there are cores, and one more that is ready when a core comes free."""
        return self._cpus + 1

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse what no node can hold: Ray would wait for such a node for ever, and in silence."""
        for task in tasks:
            memory, gpus = task.resources.memory_bytes, task.resources.gpus
            if not any(node.get("memory", 0) >= memory and node.get("GPU", 0) >= gpus for node in self._nodes):
                most = bytes_text(max((node.get("memory", 0) for node in self._nodes), default=0))
                wanted = f"{bytes_text(memory)} of memory" + (f" and {gpus} GPU" if gpus else "")
                what = f"{task.title} needs {wanted}, and no node has that (the most memory is {most})"
                remedy = "Add a larger node, or take fewer or shorter calibration and evaluation rows"
                raise UnsupportedError("Ray", what, remedy)

    def submit(self, task: Task, store: Store, tell: Tell) -> None:
        needs = task.resources
        widest = max((int(node.get("CPU", 0)) for node in self._nodes), default=1)
        cpus = max(1, min(needs.cpus, widest))
        call = self._remote.options(
            num_cpus=cpus,
            num_gpus=needs.gpus,
            memory=needs.memory_bytes,
            max_retries=RETRIES,
            name=task.title,
        )
        self._running[call.remote(task, store, cpus)] = task

    def wait(self, seconds: float) -> Sequence[Outcome]:
        if not self._running:
            return []
        ended, _ = ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [self._outcome(reference) for reference in ended]

    def _outcome(self, reference: Any) -> Outcome:
        task = self._running.pop(reference)
        try:
            outcome: Outcome = ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # not from the step, whose errors are outcomes: it did not start
            reason = str(error).strip().splitlines()[-1]
            what = f"{task.title}: the worker could not run it: {reason}. Install the same hubmill on every machine."
            return Outcome(key=task.key, seconds=0.0, peak_bytes=0, error=what)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            what = f"{task.title}: its worker was lost {RETRIES + 1} times: {reason}"
            return Outcome(
                key=task.key, seconds=0.0, peak_bytes=0, error=f"{what}. Look at memory and disk, then run again."
            )
        return outcome

    def close(self) -> None:
        # Ray ends the tasks of a driver that leaves. Cancelling them by force first made its task manager abort the
        # whole process when one of them ended at that moment (ray 2.60).
        self._running = {}
        ray.shutdown()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)


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
    if endpoint := os.environ.get("HF_ENDPOINT"):
        found["HF_ENDPOINT"] = endpoint  # fetch and publish ask the same hub as the plan; tokens are each node's own
    return found
