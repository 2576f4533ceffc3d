"""The lease of a run's folder: one holder, named to all others, and taken over only from the dead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from converter.errors import UnsupportedError
from jobs import lease
from jobs.lease import Holder, held, holder_of
from jobs.store import Store

ELSEWHERE = replace(Holder.here(), machine="another boot", host="far", user="ann", pid=7)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds become tenths."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "GONE_SECONDS", 0.6)
    monkeypatch.setattr(lease, "GLANCE_SECONDS", 0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "small" / ".work").mkdir(parents=True)
    return tmp_path / "small" / ".work" / "lease"


@pytest.fixture
def beating(path: Path) -> Iterator[Path]:
    """A lease of a host that cannot be asked, with a heartbeat."""
    path.write_text(json.dumps(asdict(ELSEWHERE)))
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    yield path
    stop.set()
    thread.join()


def test_a_second_run_is_refused_and_told_who_holds_the_folder(path: Path) -> None:
    with (
        held(path),
        pytest.raises(UnsupportedError, match=rf"small: another run .* process {os.getpid()} of .*, since 20"),
        held(path),
    ):
        pass
    assert not path.exists()


def test_a_holder_elsewhere_is_known_by_its_heartbeat(beating: Path) -> None:
    assert holder_of(beating) == ELSEWHERE
    with pytest.raises(UnsupportedError, match="process 7 of ann on far"), held(beating):
        pass
    assert json.loads(beating.read_text())["host"] == "far"


@pytest.mark.parametrize("content", ["", "{}", json.dumps(asdict(ELSEWHERE))])
def test_a_lease_without_a_heartbeat_is_taken_over_after_a_while(path: Path, content: str) -> None:
    path.write_text(content)
    begin = time.monotonic()
    with held(path):
        assert time.monotonic() - begin > 0.5
        found = holder_of(path)
        assert found and found.pid == os.getpid()
    assert not list(path.parent.iterdir())


def test_a_lease_of_a_process_that_was_killed_here_is_taken_over_at_once(path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from jobs.lease import held
with held(Path({str(path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    dead = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    while dead.returncode is None and not os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        time.sleep(0.01)
    assert path.exists() and holder_of(path) is None, "also while nobody has asked how it ended"
    begin = time.monotonic()
    with held(path):
        assert time.monotonic() - begin < 0.5
    dead.wait()


def test_another_process_under_the_number_of_a_dead_one_is_not_its_holder(path: Path) -> None:
    path.write_text(json.dumps(asdict(replace(Holder.here(), begun="1"))))
    with held(path):
        pass


def test_who_lost_the_lease_is_told_and_leaves_it_alone(path: Path) -> None:
    with held(path) as mine:
        mine.check()
        path.write_text(json.dumps(asdict(ELSEWHERE)))
        with pytest.raises(UnsupportedError, match="another took over: process 7 of ann on far"):
            mine.check()
    assert json.loads(path.read_text())["host"] == "far"


def test_a_holder_that_stood_still_removes_nothing_of_who_took_over(path: Path) -> None:
    """It stands still between looking for leftovers and removing them: the worst moment."""
    store = Store(run=path.parent.parent)
    (path.parent / "attempts" / "left").mkdir(parents=True)
    with held(path) as mine:

        def stand_still() -> None:
            path.write_text(json.dumps(asdict(ELSEWHERE)))
            (path.parent / "attempts" / "theirs").mkdir()
            mine.check()

        with pytest.raises(UnsupportedError, match="ann on far"):
            store.sweep(stand_still)
    assert (path.parent / "attempts" / "theirs").is_dir()
    store.sweep(lambda: None)
    assert not list((path.parent / "attempts").iterdir())


@pytest.mark.parametrize("dead", [ELSEWHERE, replace(Holder.here(), begun="1")], ids=["elsewhere", "here"])
def test_of_many_that_find_a_dead_lease_one_gets_it_at_a_time(path: Path, dead: Holder) -> None:
    path.write_text(json.dumps(asdict(dead)))
    inside, most, got = 0, 0, 0
    alone = threading.Lock()

    def try_it() -> None:
        nonlocal inside, most, got
        try:
            with held(path):
                with alone:
                    inside, got = inside + 1, got + 1
                    most = max(most, inside)
                time.sleep(0.2)
                with alone:
                    inside -= 1
        except UnsupportedError:
            pass

    threads = [threading.Thread(target=try_it) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and got >= 1
    assert not list(path.parent.iterdir())


def test_a_claim_that_its_maker_left_holds_nobody_back_for_ever(path: Path) -> None:
    path.write_text(json.dumps(asdict(ELSEWHERE)))
    path.with_name(f"lease.{ELSEWHERE.number}").touch()
    with held(path):
        assert holder_of(path)
    assert not list(path.parent.iterdir())


def test_the_heartbeat_needs_no_room_on_the_disk(path: Path) -> None:
    with held(path):
        size, first = path.stat().st_size, path.stat().st_mtime_ns
        time.sleep(0.3)
        assert path.stat().st_size == size and path.stat().st_mtime_ns > first
