"""Kill runs at random moments, again and again: the end is the same bytes, and nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from patience import PATIENCE_SECONDS
from small_run import ROOT, TARGETS, write_manifest, write_model

pytestmark = [pytest.mark.slow, pytest.mark.ray]
KILLS = 15
GONE = 30.0  # seconds that the workers of a killed driver may take to notice
# Ray's own agents, which do no work, first try for a minute to tell a dead cluster that it is dead (ray 2.60).
AGENTS, AGENTS_GONE = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent"), 120.0
EXECUTORS = ("inprocess", "ray")


def start(place: Path, executor: str) -> subprocess.Popen[bytes]:
    """`hubmill convert` in a session of its own; PLACE in its environment tells its workers from anybody else's."""
    command = [sys.executable, "-m", "converter.cli", "convert", str(place / "small.yaml"), "--json"]
    command += ["--out", str(place / executor), "--executor", executor]
    environment = os.environ | {"HUBMILL_KILLED_RUN": str(place / executor)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)


def family(place: Path, executor: str, *, agents: bool) -> list[int]:
    """The processes that came of a run, whoever their parent is by now; with Ray's agents or without."""
    mark, found = f"HUBMILL_KILLED_RUN={place / executor}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = mark in (folder / "environ").read_bytes().split(b"\0")
            if ours and (agents or not (folder / "cmdline").read_bytes().startswith(AGENTS)):
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def wait_for_nobody(place: Path, executor: str, *, agents: bool = False) -> list[int]:
    """The processes of a run that are still there after GONE seconds, or with Ray's agents after AGENTS_GONE."""
    deadline = time.monotonic() + (AGENTS_GONE if agents else GONE)
    while (left := family(place, executor, agents=agents)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def sums(run: Path) -> dict[str, str]:
    """The sha256 of every file of the artifacts."""
    paths = [path for path in run.rglob("*") if path.is_file() and ".work" not in path.parts]
    ours = [path for path in paths if len(path.relative_to(run).parts) > 1]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in ours}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    write_model(folder / "model")
    write_manifest(folder, TARGETS, extra="publish: {hub: folder:hub}")
    return folder


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, str]:
    """What a run that nobody disturbs gives, and in `whole` beside it the seconds it takes."""
    whole = place / "whole"
    begin = time.monotonic()
    command = [sys.executable, "-m", "converter.cli", "convert", str(place / "small.yaml"), "--out", str(whole)]
    subprocess.run(
        [*command, "--executor", "inprocess", "--json"],
        cwd=ROOT,
        timeout=PATIENCE_SECONDS,
        check=True,
        capture_output=True,
    )
    (whole / "seconds").write_text(str(time.monotonic() - begin))
    return sums(whole / "small")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    executor: str, place: Path, expected: dict[str, str]
) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are found by /proc")
    moments = random.Random(f"kill {executor}")
    seconds = float((place / "whole" / "seconds").read_text())
    run = place / executor / "small"
    for _ in range(KILLS):
        process = start(place, executor)
        try:
            process.wait(timeout=moments.uniform(0.2, 1.0) * seconds * (1.0 if executor == "inprocess" else 1.5))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not wait_for_nobody(place, executor)
        there = sums(run)  # what stands under its final name is whole, whenever one looks
        for artifact in {Path(name).parts[:2] for name in there}:
            assert {name: sha256 for name, sha256 in expected.items() if Path(name).parts[:2] == artifact} == {
                name: sha256 for name, sha256 in there.items() if Path(name).parts[:2] == artifact
            }
    process = start(place, executor)
    assert process.wait(timeout=PATIENCE_SECONDS) == 0
    assert not wait_for_nobody(place, executor, agents=True)
    assert sums(run) == expected
    check_leftovers(run)
    for target in TARGETS:
        published, ours = place / "hub" / f"model-{target}", run / "model" / target
        assert {path.name for path in published.iterdir()} == {path.name for path in ours.iterdir()}


def check_leftovers(run: Path) -> None:
    """No attempt, no progress, no temporary result that nobody will read, no file under a temporary name."""
    for folder in ("attempts", "progress"):
        assert not list((run / ".work" / folder).glob("*"))
    kinds = {path.name.partition("-")[0] for path in (run / ".work" / "tasks").iterdir()}
    assert not kinds & {"calibrate", "quantize", "reference"}
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".work"]
