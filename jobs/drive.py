"""Drive a graph to its end: what is needed, what is ready, what failed and what that takes with it.

An executor says where a task runs; this loop says which and when, the same for all of them. Submission is bounded by
the executor's slots, so a thousand planned tasks do not pin a thousand arguments, and what is submitted is taken in
the graph's order, so statistics are used while they are there.

A step that finds what it reads damaged is no failure: what was damaged is made again, with whatever that needs, and
then the step. A disk that damages the same result again and again is one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from converter.hub_calls import Tell
from converter.progress import Event
from jobs.events import Show, say
from jobs.outcome import Outcome
from jobs.steps import run
from jobs.store import Store
from jobs.task import Graph, Task

POLL_SECONDS = 0.5
STATISTICS = ("calibrate", "propagate")
REPAIRS = 2  # of one task's output in a run
CONNECTIONS = 16  # to hubs, of all tasks together


class Executor(Protocol):
    """A place where tasks run. `slots` tasks are submitted at once, and no more."""

    @property
    def slots(self) -> int: ...

    def check(self, tasks: Sequence[Task], store: Store) -> None:
        """Raise UnsupportedError when one of these tasks can never run here, or the store is not there."""
        ...

    def submit(self, task: Task, store: Store, tell: Tell) -> None:
        """Start a task. tell: hears what it waits for, where that is not to be read from the store."""
        ...

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """The outcomes of tasks that ended, after at most this many seconds; none when nothing did."""
        ...

    def close(self) -> None:
        """Stop whatever still runs and let go of the place."""
        ...


class InProcess:
    """Plain calls in this process, one after the other: `pdb` works, and so does a profiler."""

    slots = 1

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._ended: list[Outcome] = []

    def check(self, tasks: Sequence[Task], store: Store) -> None:
        """Whatever the plan allows on this machine can run in this process."""

    def submit(self, task: Task, store: Store, tell: Tell) -> None:
        self._ended.append(run(task, store, self._threads, tell))

    def wait(self, seconds: float) -> Sequence[Outcome]:
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        self._ended = []


@dataclass
class Progress:
    """The state of a run while it is driven: keys by what became of them."""

    done: set[str]
    needed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)  # key -> error
    skipped: dict[str, str] = field(default_factory=dict)  # key -> title of the task that failed before it
    running: dict[str, float] = field(default_factory=dict)  # key -> when it was submitted
    noted: dict[str, str] = field(default_factory=dict)  # key -> the last that it waited for
    repaired: dict[str, int] = field(default_factory=dict)  # key -> how often its output was found damaged

    def settled(self, key: str) -> bool:
        return key in self.done or key in self.failed or key in self.skipped

    def will_read(self, key: str) -> bool:
        """Whether this task, as far as this run goes, has yet to read what it reads; a failed one is tried again."""
        return key in self.failed or (key in self.needed and not self.settled(key))


def drive(
    graph: Graph, needed: Sequence[str], done: Iterable[str], executor: Executor, store: Store, show: Show
) -> Progress:
    """Run the tasks that are needed; returns what became of each. An interrupt leaves the state resumable."""
    state = Progress(done=set(done), needed=set(needed))
    todo = list(needed)
    share = _shares(graph, todo)
    while todo or state.running:
        ended: list[Outcome] = []
        for key in _startable(graph, todo, state, executor.slots):
            todo.remove(key)
            state.running[key] = time.monotonic()
            say(store, show, _event(graph, state, share, key, "start"))
            tell = partial(_note, graph, state, share, store, show, key)
            if graph.tasks[key].here:
                ended.append(run(graph.tasks[key], store, 1, tell))
            else:
                executor.submit(graph.tasks[key], store, tell)
        for outcome in [*ended, *executor.wait(0.0 if ended else POLL_SECONDS)]:
            state.running.pop(outcome.key, None)
            if outcome.damaged and _repair(graph, todo, state, store, outcome):
                _note(graph, state, share, store, show, outcome.key, f"{outcome.error} It is made anew.")
                continue
            lost = _settle(graph, todo, state, outcome)
            say(store, show, _event(graph, state, share, outcome.key, "failed" if outcome.error else "done", outcome))
            for key in lost:
                say(store, show, _event(graph, state, share, key, "skipped"))
            for key in (outcome.key, *lost):
                _forget_temporaries(graph, state, store, key)
        for key in state.running:
            fraction, waits = store.progress(key)
            show(_event(graph, state, share, key, "running", fraction=fraction))
            if waits:
                _note(graph, state, share, store, show, key, waits)
    return state


def _note(
    graph: Graph, state: Progress, share: dict[str, list[str]], store: Store, show: Show, key: str, waits: str
) -> None:
    """Say what a task waits for, unless that was the last that was said of it."""
    if state.noted.get(key) != waits:
        state.noted[key] = waits
        say(store, show, replace(_event(graph, state, share, key, "note"), note=waits))


def _ready(graph: Graph, todo: Sequence[str], state: Progress) -> list[str]:
    """What may start: everything it reads is done, everything it waits for is settled or not needed at all."""
    pending = set(todo) | set(state.running)
    return [
        key
        for key in todo
        if all(read in state.done for read in graph.tasks[key].reads)
        and not any(wait in pending for wait in graph.tasks[key].waits)
    ]


def _startable(graph: Graph, todo: Sequence[str], state: Progress, slots: int) -> list[str]:
    """What is to start now: as much of what is ready as there are slots, and connections to hubs.

    Ray's own resources would need every node of a cluster to be started with them, and its hub is one for all nodes.
    """
    used = sum(graph.tasks[key].resources.connections for key in state.running)
    chosen: list[str] = []
    for key in _ready(graph, todo, state):
        wanted = graph.tasks[key].resources.connections
        if len(state.running) + len(chosen) < slots and (not wanted or used + wanted <= CONNECTIONS):
            chosen.append(key)
            used += wanted
    return chosen


def _repair(graph: Graph, todo: list[str], state: Progress, store: Store, outcome: Outcome) -> bool:
    """Put a task back that found damage, and what has to be made again for it; False when that was tried enough.

    Several tasks may find the same damage, the last of them when it is mended already: so it is looked at again here.
    """
    damaged = outcome.damaged
    if not store.is_whole(damaged):
        state.repaired[damaged] = state.repaired.get(damaged, 0) + 1
        if state.repaired[damaged] > REPAIRS:
            return False
        store.forget(damaged)
    there = state.done & store.done()
    again = {key for key in graph.needed(there, [outcome.key]) if key not in state.running}
    state.done -= again
    state.needed |= again
    todo[:] = [key for key in graph.tasks if key in again or key in todo]
    return True


def _settle(graph: Graph, todo: list[str], state: Progress, outcome: Outcome) -> list[str]:
    """Record an outcome; a failure takes its dependents off the list, and what only they would have read.

    Returns what was taken off.
    """
    if not outcome.error:
        state.done.add(outcome.key)
        return []
    state.failed[outcome.key] = outcome.error
    dependents = graph.dependents(outcome.key)
    useless = [key for key in todo if key in dependents]
    lost = {*state.failed, *state.skipped, *useless}
    pending = (set(todo) | set(state.running)) - lost
    for key in reversed(todo):  # readers come after what they read, so one pass from the end finds every orphan
        readers = graph.readers[key]
        if key in pending and lost.intersection(readers) and not pending.intersection(readers):
            useless.append(key)
            lost.add(key)
            pending.remove(key)
    for key in useless:
        todo.remove(key)
        state.skipped[key] = graph.tasks[outcome.key].title
    return useless


def _forget_temporaries(graph: Graph, state: Progress, store: Store, key: str) -> None:
    """Remove outputs that nothing in this run reads any more. What a failed task reads stays: its next attempt will.

    So does what a task would have read that was left out, but for statistics: the disk has room for two blocks.
    """
    for read in graph.tasks[key].reads:
        stays = graph.tasks[read].kind not in STATISTICS
        readers = graph.readers[read]
        if graph.tasks[read].temporary and not any(
            state.will_read(reader) or (stays and reader in state.skipped) for reader in readers
        ):
            store.forget(read)


def _shares(graph: Graph, todo: Sequence[str]) -> dict[str, list[str]]:
    """By subject, the tasks that its bar is made of."""
    shares: dict[str, list[str]] = {}
    for key in todo:
        shares.setdefault(graph.tasks[key].subject, []).append(key)
    return shares


def _event(
    graph: Graph,
    state: Progress,
    shares: dict[str, list[str]],
    key: str,
    what: str,
    outcome: Outcome | None = None,
    fraction: float = 0.0,
) -> Event:
    task = graph.tasks[key]
    keys = shares.get(task.subject, [key])
    finished = sum(1 for other in keys if state.settled(other))
    return Event(
        task=key,
        subject=task.subject,
        state=what,  # type: ignore[arg-type]
        title=task.title,
        seconds=round(outcome.seconds, 3) if outcome else 0.0,
        peak_bytes=outcome.peak_bytes if outcome else 0,
        fraction=min(1.0, (finished + fraction) / len(keys)),
        note=(outcome.error or outcome.note) if outcome else _why(state, key),
    )


def _why(state: Progress, key: str) -> str:
    return f"left out, because {state.skipped[key]} failed" if key in state.skipped else ""
