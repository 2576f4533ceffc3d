"""Readers on hostile files, each time in a process of its own, with a bound on memory and time.

The worker imports once and forks for every question, so that one costs milliseconds and its peak is its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from converter.containers.gguf.imatrix import open_imatrix
from converter.containers.gguf.open import open_file
from converter.containers.parquet_open import open_parquet
from converter.errors import HubmillError, SourceError
from converter.manifest import load
from converter.source import open_folder
from jobs.survey import survey
from jobs.verify import verify

LIMIT_BYTES = 1 << 30  # of memory that is touched, beyond what the process takes when it starts
HARD_LIMIT_BYTES = 4 << 30  # of memory that is reserved: Arrow's allocator begins with one GiB
LIMIT_SECONDS = 20  # of processor time: machines are shared


@dataclass(frozen=True, kw_only=True)
class End:
    """How a reader ended: "read", "refused" (an error of ours), or the name of what else came out of it."""

    how: str
    said: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0


def read_all(place: Path) -> None:
    opened = open_parquet(place)
    for name in opened.names:
        opened.stored(name)
        opened.read(name)


def plan(place: Path) -> None:
    if problems := survey(f"folder:{place}", place / "cache")["problems"]:
        raise SourceError("plan", problems[0], "")


READERS: Mapping[str, Callable[[Path], object]] = {
    "model": lambda place: open_folder(place, "test"),
    "plan": plan,
    "gguf": lambda place: open_file(place, None),
    "imatrix": open_imatrix,
    "parquet": read_all,
    "manifest": load,
    "verify": lambda place: verify(str(place), place / "out"),
}


def memory_bytes(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10


def ask(reader: str, place: Path) -> End:
    """The end of one reader in this process, which it may take with it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = memory_bytes("VmRSS"), time.process_time()
    limit = memory_bytes("VmData") + HARD_LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # which mapped files are no part of
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS))
    how, said = "read", ""
    try:
        READERS[reader](place)
    except HubmillError as error:
        how, said = "refused", str(error)
    except BaseException as error:
        how, said = type(error).__name__, str(error)[:300]
    peak = memory_bytes("VmHWM") - before
    return End(how=how, said=said, seconds=time.process_time() - started, peak_bytes=peak)


def serve() -> None:
    """Answer questions on standard input, a JSON list each, one line for one."""
    for line in sys.stdin:
        reader, place = json.loads(line)
        there, here = os.pipe()
        child = os.fork()
        if not child:
            with os.fdopen(here, "w") as answer:
                answer.write(json.dumps(asdict(ask(reader, Path(place)))))
            os._exit(0)
        os.close(here)
        with os.fdopen(there) as answer:
            text = answer.read()
        _, status = os.waitpid(child, 0)
        print(text or json.dumps(asdict(End(how=f"killed by signal {os.WTERMSIG(status)}"))), flush=True)


Bounded = Callable[[str, Path], End]


@pytest.fixture(scope="session")
def bounded() -> Iterator[Bounded]:
    """Ask a reader of READERS about a place; fails when it takes more than the limits or ends in a stranger's error."""
    command = [sys.executable, __file__]
    paths = os.pathsep.join(path for path in sys.path if path)
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert worker.stdin and worker.stdout

    def question(reader: str, place: Path) -> End:
        assert worker.stdin and worker.stdout
        worker.stdin.write(json.dumps([reader, str(place)]) + "\n")
        worker.stdin.flush()
        end = End(**json.loads(worker.stdout.readline()))
        assert end.how in ("read", "refused") and end.peak_bytes < LIMIT_BYTES, end
        return end

    yield question
    worker.stdin.close()
    worker.wait()


if __name__ == "__main__":
    serve()
