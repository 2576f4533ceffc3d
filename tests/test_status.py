"""A run is told from its files alone, at once, and as it is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from command import Command, hubmill
from converter.errors import UnsupportedError
from converter.progress import Event
from jobs import events, metrics
from jobs.status import status
from jobs.store import Store
from patience import PATIENCE_SECONDS
from small_run import ROOT, TARGETS, write_manifest, write_model

__all__ = ["hubmill"]  # a fixture

# Runs the command line, then writes which of the slow packages it has brought in.
LOOK = """
import sys
from converter import cli
try:
    cli.main()
except SystemExit:
    sys.stderr.write("slow:" + " ".join({"torch", "transformers", "ray", "numba"} & set(sys.modules)))
"""


@pytest.mark.parametrize("command", ["--help", "--version", "status", "compare"])
def test_what_only_looks_imports_nothing_that_computes(command: str, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    more = () if command.startswith("-") else (str(manifest), "--out", str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-c", LOOK, command, *more],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert done.stderr.partition("slow:")[2] == ""


def log(store: Store, *lines: tuple[float, str, str, Mapping[str, Any]]) -> None:
    """Write a run's log: time, key, state, and what else the event says."""
    store.events.parent.mkdir(parents=True, exist_ok=True)
    with store.events.open("a") as file:
        for when, key, state, more in lines:
            event = {"time": when, "task": key, "subject": "model/x", "state": state, "title": key, "fraction": 0.5}
            file.write(json.dumps(event | {"seconds": 0.0, "peak_bytes": 0, "note": ""} | more) + "\n")


def began(when: float, **counts: int) -> tuple[float, str, str, Mapping[str, Any]]:
    return when, "plan", "done", {"subject": "small", "counts": counts}


def ended(when: float, state: str = "done", note: str = "") -> tuple[float, str, str, Mapping[str, Any]]:
    return when, "run", state, {"subject": "small", "note": note}


def test_what_is_left_is_told_from_tasks_of_the_same_kind(tmp_path: Path) -> None:
    store = Store(run=tmp_path / "small")
    log(store, began(0.0, assemble=1), (5.0, "assemble-a", "done", {"seconds": 40.0}), ended(50.0))  # an earlier run
    log(store, began(100.0, quantize=4, assemble=1))
    log(store, (101.0, "quantize-a", "done", {"seconds": 10.0}), (102.0, "quantize-b", "done", {"seconds": 20.0}))
    log(store, (102.0, "quantize-c", "start", {}))
    store.reporter("quantize-c").tell("")
    (store.work / "progress" / "quantize-c").write_text("0.4000")
    found = status(store)
    assert found["state"] == "cut" and found["started"] == 100.0 and found["ended"] is None
    assert (found["planned"], found["done"]) == (5, 2)
    # 30 s are done; two of four quantize are left at 15 s each, less 0.4 of one; assemble took 40 s the last time
    assert found["fraction"] == pytest.approx(30 / (30 + 2 * 15 - 0.4 * 15 + 40), abs=1e-4)
    assert found["remaining_seconds"] is None, "nobody works on it"
    assert found["last_success"] == 50.0
    assert found["tasks"][0]["note"] == "was cut; convert goes on from here"


def test_a_run_that_has_done_nothing_yet_is_at_its_beginning(tmp_path: Path) -> None:
    store = Store(run=tmp_path / "small")
    log(store, began(1.0, quantize=4), (2.0, "quantize-a", "start", {}))
    assert status(store)["fraction"] == 0.0


def test_a_run_that_finds_nothing_to_do_leaves_the_one_before_in_sight(tmp_path: Path) -> None:
    store = Store(run=tmp_path / "small")
    log(store, began(0.0, quantize=1), (9.0, "quantize-a", "done", {"seconds": 9.0}), ended(10.0))
    log(store, ended(20.0, note="nothing to do"), began(30.0), ended(31.0))
    found = status(store)
    assert (found["state"], found["started"], found["ended"]) == ("done", 0.0, 10.0)
    assert found["last_success"] == 31.0 and len(found["tasks"]) == 1 and found["fraction"] == 1.0


def test_what_failed_stays_in_sight_and_in_the_metrics(tmp_path: Path) -> None:
    store = Store(run=tmp_path / 'sm"all')
    log(store, began(0.0, quantize=2, assemble=1), (1.0, "quantize-a", "failed", {"note": "why", "peak_bytes": 7}))
    log(store, (1.0, "assemble-a", "skipped", {}), (2.0, "quantize-b", "done", {"seconds": 1.0}))
    log(store, ended(3.0, "failed", "1 tasks failed"))
    found = status(store)
    assert (found["state"], found["note"], found["failed"], found["skipped"]) == ("failed", "1 tasks failed", 1, 1)
    assert found["tasks"][0]["note"] == "why" and found["last_success"] is None and found["fraction"] == 1.0
    samples = parsed(metrics.exposition(store.run.name, found, 5.0))
    assert samples["hubmill_job_failed", "model/x"] == 1
    assert samples["hubmill_run_state", "failed"] == 1 and samples["hubmill_run_state", "done"] == 0
    assert samples["hubmill_run_peak_memory_bytes", ""] == 7
    assert samples["hubmill_updated_timestamp_seconds", ""] == 5.0


def parsed(text: str) -> dict[tuple[str, str], float]:
    """The samples as Prometheus reads them, by name and by the label beside `run`."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("gauge", "counter")
        for sample in family.samples:
            assert sample.labels["run"].startswith("sm")
            more = [value for label, value in sample.labels.items() if label != "run"]
            found[sample.name, more[0] if more else ""] = sample.value
    return found


def test_every_metric_is_explained_where_operators_look() -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert not [name for name in metrics.METRICS if f"`{name}`" not in page]


def test_a_place_for_metrics_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "hubmill.txt", tmp_path / "no" / "hubmill.prom"):
        with pytest.raises(UnsupportedError):
            metrics.check_place(path)


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(run=tmp_path / "small")
    log(store, began(0.0, quantize=1))
    events.put_aside(store)
    assert store.events.is_file()
    monkeypatch.setattr(events, "LONGEST_BYTES", 10)
    events.put_aside(store)
    assert not store.events.is_file() and (store.work / "events.old.jsonl").is_file()


def test_nothing_is_written_into_a_folder_that_was_lost(tmp_path: Path) -> None:
    def lost(event: Event) -> None:
        raise UnsupportedError("small", "another took over", "Leave it")

    store = Store(run=tmp_path / "small")
    with pytest.raises(UnsupportedError):
        events.say(store, lost, Event(task="run", subject="small", state="failed"))
    assert not store.events.exists()


@pytest.mark.slow
def test_a_run_is_told_while_it_works_when_its_driver_is_killed_and_when_it_is_done(
    tmp_path: Path, hubmill: Command
) -> None:
    write_model(tmp_path / "model")
    manifest = write_manifest(tmp_path, {name: TARGETS[name] for name in ("q8-0", "int8")})
    options = (str(manifest), "--out", str(tmp_path / "out"))
    command = [sys.executable, "-m", "converter.cli", "convert", *options, "--executor", "inprocess", "--json"]
    command += ["--metrics", str(tmp_path / "run.prom")]
    events_file = tmp_path / "out" / "small" / ".work" / "events.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (events_file.is_file() and events_file.read_text().count('"state": "done"') >= 4):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)  # so that it works on while it is looked at
        running = json.loads(hubmill("status", *options, "--json").output)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert running["state"] == "running" and f"process {process.pid}" in running["note"]
    assert 0 < running["fraction"] < 1 and running["remaining_seconds"] > 0
    assert 3 <= running["done"] < running["planned"]
    cut = json.loads(hubmill("status", *options, "--metrics", tmp_path / "run.prom", "--json").output)
    assert cut["state"] == "cut" and cut["remaining_seconds"] is None and cut["ended"] is None
    assert parsed((tmp_path / "run.prom").read_text())["hubmill_run_state", "cut"] == 1

    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=PATIENCE_SECONDS).returncode == 0
    done = json.loads(hubmill("status", *options, "--json").output)
    assert done["state"] == "done" and done["fraction"] == 1.0 and done["planned"] == done["done"] > 0
    assert done["planned"] < running["planned"], "what the killed one had finished is not planned again"
    samples = parsed((tmp_path / "run.prom").read_text())
    assert samples["hubmill_run_state", "done"] == 1
    assert samples["hubmill_run_last_success_timestamp_seconds", ""] == pytest.approx(done["last_success"])
    assert "100 %" in hubmill("status", *options).output
