"""A run of hubmill in a process of its own, that may be killed, and the looks that are taken at what it left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from converter import cli
from converter import manifest as manifests
from converter.compare.tables import read_table
from converter.folder import file_sha256
from converter.lock import read_lock
from jobs.convert import Run, plan
from jobs.store import Store
from patience import PATIENCE_SECONDS
from small_run import ROOT, write_manifest, write_model

TARGETS: Mapping[str, str] = {
    "q4-k-m": "{format: gguf, type: Q4_K_M, imatrix: true}",
    "w4a16": "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 32}",
    "chain": "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 32, propagate: quantized}",
    "int8": "{format: parquet, scheme: INT8}",
}
MARK = "HUBMILL_CHAOS"  # in the environment of a run that was started afresh, and of all that it starts
GONE_SECONDS = 30.0  # that what a killed run started may take to notice
# Ray's own agents, which do no work, first try for a minute to tell a dead cluster that it is dead (ray 2.60).
AGENTS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")
AGENTS_GONE_SECONDS = 120.0
POLL_SECONDS = 0.005


class Broken(AssertionError):  # noqa: N818 - a finding, not a mistake in the harness
    """A promise was not kept."""


class Process(Protocol):
    """A run that was started, in a session of its own."""

    pid: int
    returncode: int | None

    def wait(self, timeout: float | None = None) -> int: ...


@dataclass(kw_only=True)
class Forked:
    """A copy of this process, which has everything imported: a run starts in an instant, so kills meet work."""

    pid: int
    returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative after a signal, as that of subprocess.Popen."""
        deadline = time.monotonic() + (PATIENCE_SECONDS if timeout is None else timeout)
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
                return self.returncode
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked run", timeout or PATIENCE_SECONDS)
            time.sleep(POLL_SECONDS)


@dataclass(kw_only=True)
class Place:
    """A small model, a manifest for it, and the sha256 of every file that an undisturbed run makes of them.

    before: called in each process that runs it, before all else.
    """

    folder: Path
    targets: Mapping[str, str] = field(default_factory=lambda: TARGETS)
    expected: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    before: Callable[[], object] | None = None
    reads: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of each task but publish, by key

    def prepare(self) -> None:
        """Make the model, and run it undisturbed, twice: the first compiles kernels."""
        write_model(self.folder / "model")
        for name in ("first", "whole"):
            self.write(name)
            begin = time.monotonic()
            status = fork(self.command(name), self.before).wait()
            self.seconds = time.monotonic() - begin
            assert status == 0, f"an undisturbed run ended with {status}"
        self.expected = sums(self.run("whole"))
        status = apart(self._write_reads).wait()
        assert status == 0
        self.reads = json.loads((self.folder / "reads.json").read_text("utf-8"))
        assert self.expected and self.reads

    def _write_reads(self) -> None:
        if self.before:
            self.before()
        (self.folder / "reads.json").write_text(json.dumps(planned_reads(self.folder / "whole")), "utf-8")

    def write(self, name: str) -> None:
        """A manifest for a run that begins with nothing, and publishes to a folder of its own."""
        (self.folder / name).mkdir()
        sources = ("../model",)
        write_manifest(self.folder / name, self.targets, "publish: {hub: folder:hub}", sources)

    def command(self, name: str, address: str = "") -> list[str]:
        """The command line of a run: in its own process, on a cluster at an address, or on its own cluster, "local"."""
        manifest, out = self.folder / name / "small.yaml", self.folder / name / "out"
        where = ["--executor", "ray" if address else "inprocess"]
        where += ["--address", address] if address not in ("", "local") else []
        return ["convert", str(manifest), "--json", "--out", str(out), *where]

    def ancestors(self, key: str) -> set[str]:
        """Every task that a task's output was made from."""
        found: set[str] = set()
        for read in self.reads.get(key, ()):
            found |= {read} | self.ancestors(read)
        return found

    def run(self, name: str) -> Path:
        return self.folder / name / "out" / "small"


def fork(command: Sequence[str], before: Callable[[], object] | None = None, said: Path | None = None) -> Forked:
    """Run the command line in a copy of this process. before: called there first; said: takes what it prints."""

    def run() -> None:
        for descriptor in (1, 2):
            os.dup2(os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        if before:
            before()
        sys.argv = ["hubmill", *command]
        cli.main()

    return apart(run)


def apart(work: Callable[[], object]) -> Forked:
    """Call something in a copy of this process, in a session of its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return Forked(pid=pid)
    try:
        os.setsid()
        work()
    except SystemExit as ended:
        os._exit(int(ended.code or 0))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)
    os._exit(0)


def planned_reads(folder: Path) -> dict[str, tuple[str, ...]]:
    """The tasks of a run and what each of them reads; without publish, whose key names its place."""
    run = Run(manifest=manifests.load(folder / "small.yaml"), out=folder / "out", executor="inprocess")
    return {key: task.reads for key, task in plan(run).prepared.plan.graph.tasks.items() if task.kind != "publish"}


def start(command: Sequence[str], mark: str, said: Path) -> subprocess.Popen[bytes]:
    """Run the command line as people do, in a session of its own; `mark` tells what it starts from all else."""
    arguments = [sys.executable, "-m", "converter.cli", *command]
    with said.open("ab") as file:
        return subprocess.Popen(
            arguments, cwd=ROOT, env=os.environ | {MARK: mark}, stdout=file, stderr=file, start_new_session=True
        )


def kill(process: Process) -> None:
    """SIGKILL a run, which has not been waited for yet, and its process group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # a copy that has no group of its own yet
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


def in_session(session: int) -> set[int]:
    """The processes of a session that this process made. Those of session 0 are the system's: never asked for."""
    assert session > 1
    return {pid for pid, fields, _ in _processes() if int(fields[3]) == session}


def marked(mark: str, *, agents: bool = False) -> set[int]:
    """The processes with this mark in their environment, whoever their parent is by now; Ray's agents only if asked."""
    assert len(mark) > 8, "a mark is one that nobody else has"
    sought, found = f"{MARK}={mark}".encode(), set()
    for pid, _, folder in _processes():
        try:
            ours = sought in (folder / "environ").read_bytes().split(b"\0")
            if ours and (agents or not (folder / "cmdline").read_bytes().startswith(AGENTS)):
                found.add(pid)
        except OSError:  # it ended meanwhile
            continue
    return found


def _processes() -> Iterator[tuple[int, list[str], Path]]:
    """Every process that has not ended: number, the fields of its stat behind the name, its folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            yield int(folder.name), fields, folder


def check_nobody(session: int, mark: str = "", *, agents: bool = False) -> None:
    """Raise Broken when a process of an ended run is still there after a while; Ray's agents only if asked."""
    deadline = time.monotonic() + (AGENTS_GONE_SECONDS if agents else GONE_SECONDS)
    while left := in_session(session) | (marked(mark, agents=agents) if mark else set()):
        if time.monotonic() > deadline:
            raise Broken(f"processes {left} were left behind")
        time.sleep(0.05)


def sums(run: Path) -> dict[str, str]:
    """The sha256 of every file of the artifacts, of the imatrix, and of what is published."""
    published = run.parent.parent / "hub"
    paths = [path for path in run.rglob("*") if ".work" not in path.relative_to(run).parts]
    ours = {str(p.relative_to(run)): p for p in paths if p.is_file() and len(p.relative_to(run).parts) > 1}
    theirs = {f"hub/{p.relative_to(published)}": p for p in published.glob("[!.]*/**/*") if p.is_file()}
    return {name: file_sha256(path) for name, path in {**ours, **theirs}.items()}


def started(run: Path) -> list[str]:
    """The keys of the tasks that runs of this folder have started so far, in order."""
    return [event["task"] for event in events(run) if event["state"] == "start" and event["task"] != "plan"]


def repeated(run: Path) -> set[str]:
    """The keys of the tasks that were started again after they had ended well."""
    done: set[str] = set()
    again: set[str] = set()
    for event in events(run):
        if event["state"] == "start" and event["task"] in done:
            again.add(str(event["task"]))
        if event["state"] == "done" and event["task"] != "plan":
            done.add(str(event["task"]))
    return again


def events(run: Path) -> list[dict[str, object]]:
    """Every whole line of the run's log."""
    found = []
    path = run / ".work" / "events.jsonl"
    for line in path.read_text("utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut by a kill
            continue
    return found


def check_finals(run: Path, expected: Mapping[str, str]) -> None:
    """Raise Broken unless everything under a final name is whole: artifacts that are there, tables, the lock."""
    there = sums(run)
    for artifact in {name.rpartition("/")[0] for name in there}:
        if artifact.count("/") == 0 and not artifact.startswith("hub/"):
            continue  # the imatrix, which lies beside the artifacts
        ours = {name: sha256 for name, sha256 in there.items() if name.startswith(f"{artifact}/")}
        if ours != {name: sha256 for name, sha256 in expected.items() if name.startswith(f"{artifact}/")}:
            raise Broken(f"{artifact} is under its final name, and is not whole")
    if strange := [name for name, sha256 in there.items() if expected.get(name) != sha256]:
        raise Broken(f"{strange} have other bytes, or no business there")
    try:
        for name in ("comparison.parquet", "tensors.parquet"):
            if (run / name).exists():
                read_table(run / name)
        if (run / "comparison.json").exists():
            json.loads((run / "comparison.json").read_text("utf-8"))
        read_lock(run / "manifest.lock.yaml")
    except Exception as error:
        raise Broken(f"a table or the lock is half written: {error}") from error


def check_end(place: Place, name: str) -> None:
    """Raise Broken unless a run ended with the bytes of an undisturbed one, and left nothing else."""
    run = place.run(name)
    found = sums(run)
    if found != place.expected:
        other = sorted(set(found.items()) ^ set(place.expected.items()))
        raise Broken(f"other bytes than undisturbed: {other[:4]}")
    check_finals(run, place.expected)
    for folder in ("attempts", "progress"):
        if left := list((run / ".work" / folder).glob("*")):
            raise Broken(f"left behind: {left}")
    kinds = {key.partition("-")[0] for key in Store(run=run).done()}
    if kinds & {"calibrate", "propagate", "quantize", "reference"}:
        raise Broken(f"temporary results were left behind: {sorted(kinds)}")
    if hidden := [path for path in run.rglob(".*") if path.name != ".work" and ".work" not in path.parts]:
        raise Broken(f"files under temporary names were left behind: {hidden}")
