"""The faults of one machine, one function each: a run that begins with nothing, is disturbed, and ends undisturbed."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

from chaos.nodes import Cluster
from chaos.runs import (
    Broken,
    Forked,
    Place,
    Process,
    check_end,
    check_finals,
    check_nobody,
    events,
    fork,
    kill,
    repeated,
    start,
    started,
)
from jobs import lease
from jobs.store import Store

Driver = TypeVar("Driver", bound=Process)
KILLS_A_RUN = 12
DAMAGES_A_RUN = 4
REFUSED = 3


@dataclass(kw_only=True)
class Trial:
    """One repetition of a fault. `injected` counts what went wrong on purpose, `cut` the tasks that were cut by it.

    hung: runs that had to be killed, since they did not end. drivers: all that were started.
    again: tasks that may be done twice, because what they had made was damaged.
    """

    place: Place
    name: str
    dice: Random
    cluster: Callable[[], Cluster]
    injected: int = 0
    cut: int = 0
    hung: int = 0
    again: set[str] = field(default_factory=set)
    drivers: list[Process] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.place.run(self.name)

    def start(self, address: str = "", before: Callable[[], object] | None = None) -> Forked:
        """Start the run, or go on with it."""
        command = self.place.command(self.name, address)
        return self._noted(fork(command, before or self.place.before, self.said))

    def start_second(self, before: Callable[[], object] | None = None) -> Forked:
        """Start the same command beside it."""
        return self._noted(fork(self.place.command(self.name), before, self.said_second))

    def start_afresh(self, mark: str) -> Process:
        """Start the run as people do, with an embedded cluster; what comes of it is marked."""
        return self._noted(start(self.place.command(self.name, "local"), mark, self.said))

    def _noted(self, driver: Driver) -> Driver:
        self.drivers.append(driver)
        return driver

    @property
    def said(self) -> Path:
        """What the run printed."""
        return self.place.folder / self.name / "said"

    @property
    def said_second(self) -> Path:
        """What another run of the same command printed."""
        return self.place.folder / self.name / "said-second"

    def broken(self, what: str) -> Broken:
        """What was not kept, with the last that the run said."""
        said = [path.read_text("utf-8", "replace")[-2000:] for path in (self.said, self.said_second) if path.is_file()]
        return Broken("\n".join([what, *said]))

    def moment(self, share: float = 0.5) -> float:
        """Seconds from the start of a run to some moment in it."""
        return self.dice.uniform(0.0, share) * self.place.seconds


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

    def check(self, trial: Trial) -> int:
        """Raise Broken when a task was done again that had been finished; returns how many were cut since."""
        since = started(trial.run)[self.starts :]
        if again := self.finished.intersection(since) - trial.again:
            raise Broken(f"finished, and done again: {sorted(again)}")
        return len(set(since) - Before.of(trial.run).finished)


def allow_statistics(trial: Trial) -> None:
    """Let statistics be made again: those that a failed job had left are removed, since they would fill the disk."""
    trial.again |= {key for key in trial.place.reads if key.startswith(("calibrate-", "propagate-"))}


def finish(trial: Trial) -> None:
    """The same command once more, undisturbed: it ends well, repeats nothing, and leaves what it should."""
    before = Before.of(trial.run)
    driver = trial.start()
    if status := driver.wait():
        raise trial.broken(f"the run after it ended with {status}") from None
    check_nobody(driver.pid)
    before.check(trial)
    if again := repeated(trial.run) - trial.again:
        raise Broken(f"finished, and done again: {sorted(again)}")
    check_end(trial.place, trial.name)


def settle(trial: Trial, driver: Process, before: Before) -> None:
    """The looks at what a run left that was cut."""
    check_nobody(driver.pid)
    check_finals(trial.run, trial.place.expected)
    trial.cut += before.check(trial)


def driver_killed(trial: Trial) -> None:
    """SIGKILL of the driver and its process group, again and again until the run comes to its end."""
    for _ in range(KILLS_A_RUN):
        before, driver = Before.of(trial.run), trial.start()
        try:
            driver.wait(trial.moment())
            break
        except subprocess.TimeoutExpired:
            kill(driver)
        trial.injected += 1
        settle(trial, driver, before)
    finish(trial)


def file_damaged(trial: Trial) -> None:
    """A bit is flipped in what a finished step left, or it is cut off, while later steps run; sometimes with a kill."""
    for _ in range(DAMAGES_A_RUN):
        before, driver = Before.of(trial.run), trial.start()
        try:
            driver.wait(trial.moment(0.8))
            break
        except subprocess.TimeoutExpired:
            damage(trial)
        if trial.dice.random() < 0.5:
            kill(driver)
            check_nobody(driver.pid)
            trial.cut += before.check(trial)
        elif driver.wait() not in (0, 1):
            raise trial.broken("damage ended the run") from None
    finish(trial)


def damage(trial: Trial) -> None:
    """Damage one file of a finished task, in place, as a disk does."""
    files = [path for path in (trial.run / ".work" / "tasks").glob("*/**/*") if path.is_file()]
    if not files:
        return
    path = trial.dice.choice(sorted(files))
    key = path.relative_to(trial.run / ".work" / "tasks").parts[0]
    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            if trial.dice.random() < 0.3:
                file.truncate(trial.dice.randrange(max(1, size)))
            else:
                place = trial.dice.randrange(max(1, size))
                file.seek(place)
                byte = file.read(1)
                file.seek(place)
                file.write(bytes([byte[0] ^ (1 << trial.dice.randrange(8))]))
    except (OSError, IndexError):  # it was forgotten meanwhile
        return
    trial.injected += 1
    # A finished artifact is the same file under two names: who put it under the second has to do that again.
    finishes = {one for one, reads in trial.place.reads.items() if key in reads and one.startswith("finish-")}
    for one in {key} | (finishes if key.startswith("assemble-") else set()):
        trial.again |= {one} | trial.place.ancestors(one)


def disk_full(trial: Trial) -> None:
    """The disk of the results, a small one in memory, is filled up at some moment, and emptied later."""
    out = trial.run.parent
    with small_disk(out):
        for _ in range(2):
            before, driver = Before.of(trial.run), trial.start()
            ballast = out / "ballast"
            try:
                driver.wait(trial.moment(0.8))
                break
            except subprocess.TimeoutExpired:
                fill(ballast, leave=trial.dice.choice((0, 4096, 65536, 300_000)))
            trial.injected += 1
            status = driver.wait()
            if status not in (0, 1):
                raise trial.broken(f"a full disk ended the run with {status}") from None
            if status and not any(word in trial.said.read_text() for word in ("No space left", "Make room")):
                raise trial.broken("a full disk was not named") from None
            ballast.unlink()
            allow_statistics(trial)
            settle(trial, driver, before)
        finish(trial)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs of 64 MB at `folder` while the body runs; the plan asks for a third of it."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "chaos", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(ballast: Path, leave: int) -> None:
    """Take what is free on a disk but for `leave` bytes."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave))


def memory_short(trial: Trial) -> None:
    """From some moment the process gets hardly any more memory: an error of a task with a reason, or a crash."""
    before, driver = Before.of(trial.run), trial.start()
    try:
        driver.wait(trial.moment(0.8))
    except subprocess.TimeoutExpired:
        size = 1024 * int(Path(f"/proc/{driver.pid}/status").read_text().split("VmSize:")[1].split()[0])
        size += trial.dice.choice((0, 1, 4, 16)) << 20
        resource.prlimit(driver.pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
        trial.injected += 1
        allow_statistics(trial)
        try:
            driver.wait(5 * trial.place.seconds)
        except subprocess.TimeoutExpired:  # Python's Thread.start waits for ever for a thread that died as it began
            kill(driver)
            trial.hung += 1
        settle(trial, driver, before)
    finish(trial)


def two_at_once(trial: Trial) -> None:
    """The same command twice at once: one does the work, the other one is refused and told who does."""
    first = trial.start()
    time.sleep(trial.moment(1.0))
    second = trial.start_second()
    killed = trial.dice.random() < 0.5
    if killed:
        time.sleep(trial.moment(0.3))
        kill(first)
    trial.injected += 1
    statuses = {0 if killed else first.wait(), second.wait()}
    said = trial.said.read_text() + trial.said_second.read_text()
    told = "another run is working in this folder: process" in said
    if not statuses <= {0, REFUSED} or (REFUSED in statuses) > told:
        raise trial.broken(f"two at once ended with {statuses}")
    check_finals(trial.run, trial.place.expected)
    finish(trial)


def host_stalled(trial: Trial) -> None:
    """The holder's host stands still for longer than a heartbeat may; another takes over; the first wakes up."""
    first = trial.start(before=lambda: on_host("one"))
    try:
        first.wait(trial.moment(0.8))
    except subprocess.TimeoutExpired:
        os.killpg(first.pid, signal.SIGSTOP)
        held = (trial.run / ".work" / "lease").exists()
        second = trial.start_second(before=lambda: on_host("two"))
        time.sleep(2.0 * STALLED_SECONDS + trial.moment(0.5))
        os.killpg(first.pid, signal.SIGCONT)
        trial.injected += 1
        statuses = (first.wait(), second.wait())
        if statuses[1] or (held and statuses[0] not in (0, REFUSED)):
            raise trial.broken(f"the two hosts ended with {statuses}") from None
        trial.again |= set(started(trial.run))  # the log is of both hosts
        check_finals(trial.run, trial.place.expected)
    finish(trial)


STALLED_SECONDS = 1.0


def on_host(name: str) -> None:
    """Let this process be of a host of its own, and hearts beat faster."""
    lease._machine = lambda: name
    lease.BEAT_SECONDS, lease.GONE_SECONDS, lease.GLANCE_SECONDS = 0.1, STALLED_SECONDS, 0.05
