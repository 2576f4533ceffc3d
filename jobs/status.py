"""What a run is doing or has done, as plain data, from its files alone: no driver is asked, and none need be there.

Imports nothing of the work itself, so that looking takes a moment.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from converter.errors import SourceError
from jobs.lease import holder_of
from jobs.store import Store


def status(store: Store) -> dict[str, Any]:
    """The last thing that happened to every job, from the run's log; needs no driver."""
    if not store.events.is_file():
        raise SourceError(str(store.run), "nothing has run here yet", "Start with hubmill convert")
    last: dict[str, dict[str, Any]] = {}
    counts: Counter[str] = Counter()
    running: dict[str, dict[str, Any]] = {}
    for line in store.events.read_text("utf-8").split("\n"):
        try:
            event = json.loads(line)
        except ValueError:  # the end of a run that was killed while it wrote, or is writing now
            continue
        if event["task"] == "plan":  # each run begins with it
            counts.clear()
            running.clear()
            last.clear()
            continue
        if event["state"] == "note":
            continue  # what a task waits for now, its progress says
        counts[event["state"]] += 1
        if event["task"] != "plan" and last.get(event["subject"], event)["state"] not in ("failed", "skipped"):
            last[event["subject"]] = event  # what failed stays, though other tasks of the job may still end well
        running.pop(event["task"], None)
        if event["state"] == "start":
            running[event["task"]] = event
    alive = holder_of(store.lease) is not None
    for key, event in running.items():
        fraction, waits = store.progress(key)
        said = f"{100 * fraction:.0f} %{', ' if waits else ''}{waits}"
        event["note"] = said if alive else "was cut; convert goes on from here"
    return {
        "running": len(running) if alive else 0,
        "done": counts["done"],
        "failed": counts["failed"],
        "skipped": counts["skipped"],
        "tasks": list(last.values()),
    }
