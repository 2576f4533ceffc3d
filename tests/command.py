"""The command line as a fixture: run in this process, with its exit code and what it wrote."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from converter import cli


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How the command line ended."""

    code: int
    output: str
    errors: str


Command = Callable[..., Answer]


@pytest.fixture
def hubmill(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The command line, run in this process; an error that it does not expect fails the test with its traceback."""
    before = signal.getsignal(signal.SIGINT)

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["hubmill", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        return Answer(code=int(ended.value.code or 0), output=written.out, errors=written.err)

    yield run
    signal.signal(signal.SIGINT, before)
