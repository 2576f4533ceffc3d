"""The faults, one function each: a repetition that begins with nothing, is disturbed, and ends undisturbed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

from chaos.runs import Broken, Place, check_end, check_finals, check_nobody, events, fork, kill, started
from jobs.store import Store

KILLS_A_RUN = 12


@dataclass(kw_only=True)
class Trial:
    """One repetition of a fault. `injected` counts what went wrong on purpose, `cut` the tasks that were cut by it."""

    place: Place
    name: str
    dice: Random
    injected: int = 0
    cut: int = 0

    @property
    def run(self) -> Path:
        return self.place.run(self.name)


@dataclass(frozen=True, kw_only=True)
class Before:
    """What was finished before a run, and how many tasks had been started."""

    finished: frozenset[str]
    starts: int

    @classmethod
    def of(cls, run: Path) -> Before:
        """What the files say and what the log says: a result that either names must not be made again."""
        logged = {str(event["task"]) for event in events(run) if event["state"] == "done"}
        return cls(finished=frozenset(Store(run=run).done() | logged), starts=len(started(run)))

    def check(self, run: Path) -> int:
        """Raise Broken when a task was done again that had been finished; returns how many were started since."""
        since = started(run)[self.starts :]
        if again := self.finished.intersection(since):
            raise Broken(f"finished, and done again: {sorted(again)}")
        return len(since)


def driver_killed(trial: Trial) -> None:
    """SIGKILL of the driver and its process group, again and again until the run comes to its end."""
    place, command = trial.place, trial.place.command(trial.name)
    for _ in range(KILLS_A_RUN):
        before = Before.of(trial.run)
        driver = fork(command)
        try:
            driver.wait(trial.dice.uniform(0.0, 0.5) * place.seconds)
            break
        except subprocess.TimeoutExpired:
            kill(driver)
        trial.injected += 1
        trial.cut += before.check(trial.run) - len(Before.of(trial.run).finished - before.finished)
        check_nobody(driver.pid)
        check_finals(trial.run, place.expected)
    finish(trial)


def finish(trial: Trial) -> None:
    """The same command once more, undisturbed: it ends well, repeats nothing, and leaves what it should."""
    before = Before.of(trial.run)
    driver = fork(trial.place.command(trial.name))
    if status := driver.wait():
        raise Broken(f"the run after it ended with {status}")
    check_nobody(driver.pid)
    before.check(trial.run)
    check_end(trial.place, trial.name)


FAULTS: Mapping[str, Callable[[Trial], None]] = {
    "driver-killed": driver_killed,
}
