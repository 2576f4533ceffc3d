"""A run's status as a file that Prometheus reads by way of node_exporter's textfile collector.

A port to scrape would end with the driver, which is when somebody wants to know; a file stays, and says when it was
written. The price is that it is as old as that: whoever alerts on it looks at hubmill_updated_timestamp_seconds, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from converter.errors import SourceError, UnsupportedError
from converter.progress import Display, Event
from jobs.status import status
from jobs.store import Store, write_text

EVERY_SECONDS = 15.0
STATES = ("running", "done", "failed", "cut")
# Name -> type, help. Every sample has the label run, the manifest's name.
METRICS: Mapping[str, tuple[str, str]] = {
    "hubmill_run_state": ("gauge", "1 for what the last run is: running, done, failed or cut (its driver is gone)."),
    "hubmill_run_tasks": ("gauge", "Tasks of the last run by state."),
    "hubmill_run_progress_ratio": ("gauge", "How much of the last run's work is done, 0 to 1, by estimated seconds."),
    "hubmill_run_remaining_seconds": ("gauge", "Estimated seconds until a running run ends."),
    "hubmill_run_start_timestamp_seconds": ("gauge", "When the last run began."),
    "hubmill_run_end_timestamp_seconds": ("gauge", "When the last run ended; absent while it runs or when it was cut."),
    "hubmill_run_last_success_timestamp_seconds": ("gauge", "When a run last ended with everything done."),
    "hubmill_run_peak_memory_bytes": ("gauge", "Highest resident memory of a task's process in the last run."),
    "hubmill_tasks_done_total": ("counter", "Finished tasks of the last run by kind."),
    "hubmill_task_seconds_total": ("counter", "Seconds of the last run's finished tasks by kind."),
    "hubmill_job_failed": ("gauge", "1 for each job of the last run that failed or was left out after a failure."),
    "hubmill_updated_timestamp_seconds": ("gauge", "When this file was written."),
}
Sample = tuple[str, Mapping[str, str], float]


class Metered:
    """A display that also keeps a file of metrics, every EVERY_SECONDS and at the end."""

    def __init__(self, display: Display, store: Store, path: Path) -> None:
        self._display = display
        self._store = store
        self._path = path
        self._next = time.monotonic() + EVERY_SECONDS
        check_place(path)

    def show(self, event: Event) -> None:
        self._display.show(event)
        if time.monotonic() > self._next:
            self._next = time.monotonic() + EVERY_SECONDS
            self._write()

    def close(self) -> None:
        self._display.close()
        self._write()

    def _write(self) -> None:
        with suppress(OSError, SourceError):  # nothing has run yet; or no room, and then the file's own time tells
            write(self._store, self._path)


def check_place(path: Path) -> None:
    """Raise UnsupportedError when no file of metrics can be written there."""
    if path.suffix != ".prom":
        what, remedy = "node_exporter reads files that end in .prom", "Name it so"
    elif not path.parent.is_dir():
        what, remedy = f"there is no folder {path.parent}", "Name one that node_exporter's textfile collector reads"
    else:
        return
    raise UnsupportedError(f"--metrics {path}", what, remedy)


def write(store: Store, path: Path) -> None:
    """Write the file anew, whole or not at all. Raises SourceError when nothing has run in the store, and OSError."""
    write_text(path, exposition(store.run.name, status(store), time.time()))


def exposition(run: str, found: Mapping[str, Any], now: float) -> str:
    """A status in Prometheus's text format."""
    lines: list[str] = []
    told = ""
    for name, labels, value in _samples(found, now):
        if name != told:
            kind, text = METRICS[name]
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            told = name
        inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in {"run": run, **labels}.items())
        lines.append(f"{name}{{{inner}}} {value!r}")
    return "\n".join(lines) + "\n"


def _samples(found: Mapping[str, Any], now: float) -> Iterator[Sample]:
    """The samples of a status, those of one metric together; what is not known is left out."""
    for state in STATES:
        yield "hubmill_run_state", {"state": state}, int(found["state"] == state)
    for state in ("planned", "running", "done", "failed", "skipped"):
        yield "hubmill_run_tasks", {"state": state}, found[state]
    single = {
        "hubmill_run_progress_ratio": found["fraction"],
        "hubmill_run_remaining_seconds": found["remaining_seconds"],
        "hubmill_run_start_timestamp_seconds": found["started"],
        "hubmill_run_end_timestamp_seconds": found["ended"],
        "hubmill_run_last_success_timestamp_seconds": found["last_success"],
        "hubmill_run_peak_memory_bytes": found["peak_bytes"],
    }
    for name, value in single.items():
        if value is not None:
            yield name, {}, value
    for kind, figures in found["kinds"].items():
        yield "hubmill_tasks_done_total", {"kind": kind}, figures["done"]
    for kind, figures in found["kinds"].items():
        yield "hubmill_task_seconds_total", {"kind": kind}, figures["seconds"]
    for event in found["tasks"]:
        if event["state"] in ("failed", "skipped"):
            yield "hubmill_job_failed", {"job": event["subject"]}, 1
    yield "hubmill_updated_timestamp_seconds", {}, round(now, 3)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
