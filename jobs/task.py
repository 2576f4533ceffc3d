"""A task: one step of the work as a frozen value, from files to files.

Its key says what its output is: the kind, what it does, the keys of what it reads and the version of the recipe. A task
whose output lies under the right key is done, as in make, with contents in place of clocks. So a run that was killed
resumes where it was, a second run does nothing, and a new target reruns only what is new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

Kind = Literal[
    "fetch",
    "calibrate",
    "imatrix",
    "propagate",
    "quantize",
    "assemble",
    "reference",
    "evaluate",
    "finish",
    "publish",
]
# Raise a number when a step writes other bytes for the same spec: everything that depends on it is then done again.
RECIPES: dict[Kind, int] = {
    "fetch": 2,
    "calibrate": 2,
    "imatrix": 1,
    "propagate": 2,
    "quantize": 6,
    "assemble": 2,
    "reference": 1,
    "evaluate": 2,
    "finish": 3,
    "publish": 1,
}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a task takes while it runs, and the disk that its output takes; planned from shapes, not measured.

    connections: to a hub on the network, whose limits count for a run as a whole.
    """

    cpus: int = 1
    gpus: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    connections: int = 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One step. reads: keys whose output it uses, part of its own key. waits: keys that only hold it back.

    subject: the model, or model/target, that it belongs to. spec: what decides its output, JSON values only. work: what
    the step needs to find its way (a frozen value from jobs/steps.py), nothing that would change the output.
    temporary: its output may go as soon as every task that reads it is done. here: it runs with the driver, because it
    needs what no other machine shall have.
    """

    kind: Kind
    subject: str
    spec: Mapping[str, object]
    work: object = field(repr=False)
    reads: tuple[str, ...] = ()
    waits: tuple[str, ...] = ()
    resources: Resources = Resources()
    temporary: bool = False
    here: bool = False
    block: int | None = None

    @cached_property
    def key(self) -> str:
        """The kind, a dash, and 16 hexadecimal digits of the sha256 over everything that decides the output."""
        text = json.dumps([self.kind, RECIPES[self.kind], self.spec, list(self.reads)], sort_keys=True, allow_nan=False)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def title(self) -> str:
        """The task in words, for a person."""
        part = "" if self.block is None else f" block {self.block}"
        return f"{self.kind} {self.subject}{part}"


class Graph:
    """Tasks by key, in an order in which each comes after everything it reads."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.tasks: dict[str, Task] = {}
        for task in tasks:
            missing = [key for key in task.reads if key not in self.tasks]
            assert not missing, f"{task.title} comes before what it reads: {missing}"
            self.tasks.setdefault(task.key, task)
        self.readers: dict[str, list[str]] = {key: [] for key in self.tasks}
        for key, task in self.tasks.items():
            for read in task.reads:
                self.readers[read].append(key)

    def needed(self, done: Iterable[str], ends: Iterable[str] | None = None) -> list[str]:
        """The tasks that still have to run, in order: the ends that are not done, and what they read, recursively.

        ends: keys to arrive at, also on the way to others; None takes every task that nothing reads. An intermediate
        result that is gone is made again only when something that is not done reads it.
        """
        finished = set(done)
        goals = {key for key in self.tasks if not self.readers[key]} if ends is None else set(ends)
        wanted: set[str] = set()
        for key in reversed(self.tasks):
            if key not in finished and (key in goals or any(reader in wanted for reader in self.readers[key])):
                wanted.add(key)
        return [key for key in self.tasks if key in wanted]

    def leftover(self, done: Iterable[str]) -> list[str]:
        """Of the finished tasks, those whose output is temporary and that nothing will read any more."""
        finished = set(done)
        return [key for key in finished if self.tasks[key].temporary and finished.issuperset(self.readers[key])]

    def dependents(self, key: str) -> set[str]:
        """Every task that reads `key`, directly or through others."""
        found: set[str] = set()
        open_keys = [key]
        while open_keys:
            for reader in self.readers[open_keys.pop()]:
                if reader not in found:
                    found.add(reader)
                    open_keys.append(reader)
        return found
