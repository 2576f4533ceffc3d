"""A Ray cluster that runs already, of two nodes on this machine: the same bytes, also when a node dies half-way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from converter import manifest as manifests
from converter.progress import Event
from jobs.convert import Run, convert
from jobs.store import file_sha256
from patience import PATIENCE_SECONDS
from small_run import ROOT, TARGETS, write_manifest, write_model

pytestmark = pytest.mark.ray
RAY = Path(sys.executable).parent / "ray"
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
NODE = [
    "--node-ip-address=127.0.0.1",
    "--num-cpus=1",
    "--memory=4000000000",
    "--object-store-memory=100000000",
    "--disable-usage-stats",
    "--block",
]


class Quiet:
    """A display that shows nothing."""

    def show(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


def start(*options: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A Ray node in a session of its own, with a folder of its own: two in one folder fight over a socket."""
    folder = Path(tempfile.mkdtemp(prefix="hm-", dir="/tmp"))  # the path of a socket must stay under 107 characters
    command = [str(RAY), "start", *options, *NODE]
    log = (folder / "log").open("wb")
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True), folder


def stop(node: subprocess.Popen[bytes], folder: Path) -> None:
    os.killpg(node.pid, signal.SIGKILL)
    node.wait()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a head without cores and the process of one of its two workers."""
    head, head_folder = start("--head", "--port=0", "--include-dashboard=false")
    nodes = [(head, head_folder)]
    try:
        deadline = time.monotonic() + 60
        found = None
        while not found and time.monotonic() < deadline:
            found = re.search(r"--address='([^']+)'", (head_folder / "log").read_text("utf-8", "replace"))
            time.sleep(0.2)
        assert found, (head_folder / "log").read_text("utf-8", "replace")
        workers = [start(f"--address={found[1]}") for _ in range(2)]
        nodes += workers
        yield found[1], workers[0][0]
    finally:
        for node, folder in reversed(nodes):
            stop(node, folder)


def sums(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file() and ".work" not in path.parts]
    return {path.name + path.parent.name: file_sha256(path) for path in paths if path.parent.parent.name == "model"}


def test_a_cluster_writes_the_same_bytes_also_when_a_node_dies(
    cluster: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    address, victim = cluster
    write_model(tmp_path / "model")
    chosen = {name: TARGETS[name] for name in ("q8-0", "w4a16", "int8")}
    manifest = write_manifest(tmp_path, chosen)
    expected = Run(manifest=manifests.load(manifest), out=tmp_path / "here", executor="inprocess")
    assert convert(expected, Quiet()).exit_code == 0

    command = [sys.executable, "-m", "converter.cli", "convert", str(manifest), "--out", str(tmp_path / "there")]
    process = subprocess.Popen(
        [*command, "--address", address, "--json"], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    events = tmp_path / "there" / "small" / ".work" / "events.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (events.is_file() and events.read_text().count('"done"') >= 2):
        time.sleep(0.1)
    os.killpg(victim.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert sums(tmp_path / "there") == sums(tmp_path / "here")
    attempts = tmp_path / "there" / "small" / ".work" / "attempts"
    assert not [path for path in attempts.iterdir() if "place" in path.name]
