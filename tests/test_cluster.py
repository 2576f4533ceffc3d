"""A Ray cluster that runs already, of three nodes on this machine: the same bytes, whatever dies meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from chaos.nodes import SETTINGS, Cluster, cluster
from converter import manifest as manifests
from converter.folder import file_sha256
from converter.progress import Event
from jobs.cluster import RayExecutor
from jobs.convert import Run, convert
from jobs.outcome import Outcome
from jobs.store import Store
from jobs.task import Task
from patience import PATIENCE_SECONDS
from small_run import ROOT, TARGETS, write_manifest, write_model

pytestmark = pytest.mark.ray


class Quiet:
    """A display that shows nothing."""

    def show(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster() as one:
        yield one


def sums(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {path.name + path.parent.name: file_sha256(path) for path in paths if path.parent.parent.name == "model"}


def hubmill(nodes: Cluster, manifest: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "converter.cli", "convert", str(manifest), "--out", str(out), "--json"]
    return subprocess.Popen(
        [*command, "--address", nodes.address],
        cwd=ROOT,
        env=os.environ | SETTINGS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(events: Path, text: str, times: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (events.is_file() and events.read_text().count(text) >= times):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def test_a_node_that_does_not_see_the_output_folder_is_named_before_any_work(nodes: Cluster, tmp_path: Path) -> None:
    """The node has another folder mounted there, as a machine has that lacks the shared one."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("mounting needs root")
    write_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    apart = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path / "out")]
    node = nodes.join(apart)
    try:
        nodes.wait_for_workers()
        process = hubmill(nodes, write_manifest(tmp_path, {"int8": TARGETS["int8"]}), tmp_path / "out")
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        node.kill()
        nodes.workers.remove(node)
    assert process.returncode == 3, output
    assert "at the same place on every" in output
    assert re.search(r": node \S+: \S+: No such file or directory\. Mount", output), output
    assert '"task": "quantize' not in output


def test_a_cluster_writes_the_same_bytes_also_when_a_worker_and_a_node_die(nodes: Cluster, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    chosen = {name: TARGETS[name] for name in ("q8-0", "w4a16", "int8")}
    manifest = write_manifest(tmp_path, chosen)
    expected = Run(manifest=manifests.load(manifest), out=tmp_path / "here", executor="inprocess")
    assert convert(expected, Quiet()).exit_code == 0

    process = hubmill(nodes, manifest, tmp_path / "there")
    events = tmp_path / "there" / "small" / ".work" / "events.jsonl"
    wait_for(events, '"state": "done"', 2, process)
    while not (busy := nodes.busy()):
        assert process.poll() is None
    os.kill(busy[0], signal.SIGKILL)
    wait_for(events, "its worker was lost", 1, process)
    nodes.workers.pop(0).kill()
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert sums(tmp_path / "there") == sums(tmp_path / "here")
    attempts = tmp_path / "there" / "small" / ".work" / "attempts"
    assert not list(attempts.iterdir()), "what the killed had begun is gone"


def test_a_node_that_loses_files_of_ray_costs_another_try_and_another_program_fails(
    nodes: Cluster, tmp_path: Path
) -> None:
    task = Task(kind="fetch", subject="model", spec={}, work=None)
    for error, ends_well in ((FileNotFoundError(2, "gone", "worker.out"), True), (ModuleNotFoundError("jobs"), False)):
        marker = tmp_path / type(error).__name__

        def once(task: Task, *_: object, marker: Path = marker, error: Exception = error) -> Outcome:
            if marker.exists():
                return Outcome(key=task.key, seconds=0.0, peak_bytes=0)
            marker.touch()
            raise error

        told: list[str] = []
        executor = RayExecutor(nodes.address, 1, 1 << 30)
        executor._remote = ray.remote(once)
        try:
            executor.submit(task, Store(run=tmp_path / "out"), told.append)
            outcomes: list[Outcome] = []
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not outcomes and time.monotonic() < deadline:
                outcomes = [*executor.wait(1.0)]
        finally:
            executor.close()
        [outcome] = outcomes
        if ends_well:
            assert not outcome.error
            assert len(told) == 1 and "its worker was lost" in told[0] and "started again" in told[0]
        else:
            assert "Install the same hubmill on every machine" in outcome.error and not told
