"""What a run is doing or has done, as plain data, from its files alone: no driver is asked, and none need be there.

Imports nothing of the work itself, so that looking takes a moment. How long the rest will take is told from how long
tasks of the same kind took, in this run or in earlier ones of the same log, and from how many were done at once.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from converter.errors import SourceError
from jobs.events import PLAN, RUN, read
from jobs.lease import holder_of
from jobs.store import Store

Line = dict[str, Any]


@dataclass
class Pace:
    """How long tasks took, by kind: sums of seconds, and how many."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    tasks: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, seconds: float) -> None:
        self.seconds[kind] += seconds
        self.tasks[kind] += 1

    def mean(self, kind: str) -> float:
        """The seconds of one task of this kind; of any, when this kind was never seen."""
        if not self.tasks[kind]:
            return sum(self.seconds.values()) / max(1, self.tasks.total())
        return self.seconds[kind] / self.tasks[kind]


@dataclass
class Seen:
    """What the log says of one run, from its plan on."""

    began: float = 0.0
    planned: Counter[str] = field(default_factory=Counter)  # kind -> tasks
    settled: Counter[str] = field(default_factory=Counter)  # kind -> tasks that are done, failed or left out
    states: Counter[str] = field(default_factory=Counter)  # done, failed, skipped -> tasks
    pace: Pace = field(default_factory=Pace)
    running: dict[str, Line] = field(default_factory=dict)  # key -> its start
    last: dict[str, Line] = field(default_factory=dict)  # subject -> the last that happened to it
    peak_bytes: int = 0
    end: Line | None = None

    def take(self, event: Line) -> None:
        """Take in an event of a task."""
        state, key, subject, kind = event["state"], event["task"], event["subject"], kind_of(event["task"])
        if state == "note":
            return  # what a task waits for now, its progress says
        if subject not in self.last or self.last[subject]["state"] not in ("failed", "skipped"):
            self.last[subject] = event  # what failed stays, though other tasks of the job may still end well
        self.running.pop(key, None)
        if state == "start":
            self.running[key] = event
            return
        self.states[state] += 1
        self.settled[kind] += 1
        self.peak_bytes = max(self.peak_bytes, event.get("peak_bytes", 0))
        if state == "done":
            self.pace.add(kind, event.get("seconds", 0.0))


def kind_of(key: str) -> str:
    """The kind of a task, with which its key begins."""
    return key.partition("-")[0]


def status(store: Store) -> dict[str, Any]:
    """How far the last run is that had anything to do, and what became of every job.

    `state` is running, done, failed, or cut: the driver is gone and left no end; `convert` goes on from there. Times
    are seconds since 1970; `remaining_seconds` is None where nothing can be said. Raises SourceError when there is no
    log.
    """
    if not store.events.is_file():
        raise SourceError(str(store.run), "nothing has run here yet", "Start with hubmill convert")
    seen, ever, succeeded = _read(store)
    holder = holder_of(store.lease)
    progress = {key: store.progress(key) for key in seen.running}
    for key, (fraction, waits) in progress.items():
        said = f"{100 * fraction:.0f} %{', ' if waits else ''}{waits}"
        seen.running[key]["note"] = said if holder else "was cut; convert goes on from here"
    left = _seconds_left(seen, ever, {key: fraction for key, (fraction, _) in progress.items()})
    worked = sum(seen.pace.seconds.values())
    now = time.time()
    at_once = max(1.0, worked / max(1e-3, now - seen.began))
    return {
        "state": "running" if holder else seen.end["state"] if seen.end else "cut",
        "note": str(holder) if holder else seen.end.get("note", "") if seen.end else "",
        "started": seen.began,
        "ended": seen.end["time"] if seen.end and not holder else None,
        "last_success": succeeded or None,
        "fraction": round(worked / (worked + left), 4) if worked else float(not seen.planned),
        "remaining_seconds": round(left / at_once, 1) if holder and worked else None,
        "planned": seen.planned.total(),
        "running": len(seen.running) if holder else 0,
        "done": seen.states["done"],
        "failed": seen.states["failed"],
        "skipped": seen.states["skipped"],
        "kinds": {
            kind: {"planned": count, "done": seen.pace.tasks[kind], "seconds": round(seen.pace.seconds[kind], 3)}
            for kind, count in seen.planned.items()
        },
        "peak_bytes": seen.peak_bytes,
        "tasks": list(seen.last.values()),
    }


def _read(store: Store) -> tuple[Seen, Pace, float]:
    """The last run of the log that had anything to do, the pace of all, and when one ended well; 0.0 for never."""
    seen, ever, succeeded = Seen(), Pace(), 0.0
    for event in read(store):
        if event["task"] == PLAN:
            if event.get("counts") or not seen.planned:
                seen = Seen(began=event["time"], planned=Counter(event.get("counts", {})))
        elif event["task"] == RUN:
            seen.end = seen.end or event
            succeeded = event["time"] if event["state"] == "done" else succeeded
        else:
            seen.take(event)
            if event["state"] == "done":
                ever.add(kind_of(event["task"]), event.get("seconds", 0.0))
    return seen, ever, succeeded


def _seconds_left(seen: Seen, ever: Pace, fractions: dict[str, float]) -> float:
    """Seconds of work that are left, by tasks; what runs counts as far as it says it is."""
    left = 0.0
    for kind, count in seen.planned.items():
        pace = seen.pace if seen.pace.tasks[kind] else ever
        left += max(0, count - seen.settled[kind]) * pace.mean(kind)
    for key, fraction in fractions.items():
        pace = seen.pace if seen.pace.tasks[kind_of(key)] else ever
        left -= fraction * pace.mean(kind_of(key))
    return max(0.0, left)
