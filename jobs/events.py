"""The log of a run: everything that happened, a line of JSON each, so that whoever looks needs no driver.

A run begins with the event of its plan, which says how many tasks of each kind it asks for, and ends with one of its
own; a driver that was killed leaves no such end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from converter.progress import Event
from jobs.store import Store

PLAN, RUN = "plan", "run"  # the tasks of the first and the last event of a run
LONGEST_BYTES = 16 << 20  # then a log is put aside, in place of the one that was put aside before
Show = Callable[[Event], None]


def say(store: Store, show: Show, event: Event) -> None:
    """Show an event and add it to the run's log; not when `show` raises because the folder is another run's by now."""
    show(event)
    store.events.parent.mkdir(parents=True, exist_ok=True)
    said = {"time": round(time.time(), 3)} | asdict(event)
    if not event.counts:
        del said["counts"]  # only a plan has them
    with store.events.open("a", encoding="utf-8") as file:
        file.write(json.dumps(said, ensure_ascii=False) + "\n")


def put_aside(store: Store) -> None:
    """Begin a new log when this one is long; only when no other run is working here."""
    if store.events.is_file() and store.events.stat().st_size > LONGEST_BYTES:
        store.events.replace(store.events.with_suffix(".old.jsonl"))


def read(store: Store) -> Iterator[dict[str, Any]]:
    """The events of the log from its beginning, as they were written, each with its `time`."""
    with store.events.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:  # the end of a run that was killed while it wrote, or is writing now
                continue
            if isinstance(event, dict):
                yield event
