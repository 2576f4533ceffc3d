"""A Ray cluster of three nodes on this machine, each of which may be killed and started again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from chaos.runs import AGENTS, MARK, marked

RAY = Path(sys.executable).parent / "ray"
SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
START_SECONDS = 60.0
NODE = [
    "--node-ip-address=127.0.0.1",
    "--num-cpus=1",
    "--memory=4000000000",
    "--object-store-memory=100000000",
    "--disable-usage-stats",
    "--block",
]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A Ray node in a session of its own, with a folder of its own: two in one folder fight over a socket."""

    process: subprocess.Popen[bytes]
    folder: Path

    def kill(self) -> None:
        """SIGKILL everything of the node at once, as a machine dies."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(kw_only=True)
class Cluster:
    """A head and two workers of one core each; `before` goes in front of the command that starts a node."""

    mark: str = field(default_factory=lambda: f"cluster-{uuid.uuid4().hex}")
    address: str = ""
    head: Node | None = None
    workers: list[Node] = field(default_factory=list)

    def start(self) -> None:
        """Start all three and wait until the head's address is known."""
        self.head = self._node("--head", "--port=0", "--include-dashboard=false")
        self.address = ""
        log = self.head.folder / "log"
        deadline = time.monotonic() + START_SECONDS
        while not self.address:
            assert time.monotonic() < deadline, log.read_text("utf-8", "replace")
            found = re.search(r"--address='([^']+)'", log.read_text("utf-8", "replace"))
            self.address = found[1] if found else ""
            time.sleep(0.1)
        for _ in range(2):
            self.join()
        self.wait_for_workers()

    def join(self, before: Sequence[str] = (), settings: Mapping[str, str] | None = None) -> Node:
        """Start one more node. before: put in front of the command; settings: more of its environment."""
        node = self._node(f"--address={self.address}", before=before, settings=settings)
        self.workers.append(node)
        return node

    def wait_for_workers(self) -> None:
        """Until every node that was started says so."""
        deadline = time.monotonic() + START_SECONDS
        for node in self.workers:
            log = node.folder / "log"
            while "Ray runtime started" not in log.read_text("utf-8", "replace"):
                assert time.monotonic() < deadline, log.read_text("utf-8", "replace")
                time.sleep(0.1)

    def _node(self, *options: str, before: Sequence[str] = (), settings: Mapping[str, str] | None = None) -> Node:
        folder = Path(tempfile.mkdtemp(prefix="hm-", dir="/tmp"))  # the path of a socket must stay under 107 characters
        command = [*before, str(RAY), "start", *options, f"--temp-dir={folder}", *NODE]
        environment = {**os.environ, **SETTINGS, **(settings or {}), MARK: self.mark}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        return Node(process=process, folder=folder)

    def busy(self) -> list[int]:
        """The workers that run a task right now, by process."""
        found = []
        for pid in marked(self.mark):
            try:
                said = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if said.startswith(b"ray::") and not said.startswith((b"ray::IDLE", *AGENTS)):
                found.append(pid)
        return found

    def stop(self) -> None:
        """Kill every node, and whatever of them outlived it."""
        for node in [*self.workers, *([self.head] if self.head else [])]:
            if node.process.poll() is None:
                node.kill()
            shutil.rmtree(node.folder, ignore_errors=True)
        for pid in marked(self.mark, agents=True):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.head, self.workers = None, []


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster while the body runs."""
    one = Cluster()
    try:
        one.start()
        yield one
    finally:
        one.stop()
