"""What a task's end says when the machine gave out: memory, disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from jobs.outcome import Outcome, lacks_memory, told
from jobs.steps import run
from jobs.store import Store
from jobs.task import Resources, Task
from jobs.work import Work

TASK = Task(kind="fetch", subject="a model", spec={}, work=None, resources=Resources(memory_bytes=2_000_000_000))


def too_much_of_torch() -> None:
    torch.empty(1 << 58, dtype=torch.uint8)


def too_much_of_python() -> None:
    bytearray(1 << 62)


@pytest.mark.parametrize("take", [too_much_of_torch, too_much_of_python])
def test_want_of_memory_is_known_and_told_beside_what_was_planned(take: object) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        take()  # type: ignore[operator]
    assert lacks_memory(caught.value)
    assert "fetch a model: " in told(TASK, caught.value)
    assert "planned with 2.0 GB and came to" in told(TASK, caught.value)


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    assert not lacks_memory(RuntimeError("shapes do not match"))
    assert told(TASK, RuntimeError("no")) == "fetch a model: RuntimeError: no"


def test_a_full_disk_says_what_to_do_and_leaves_no_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr("jobs.steps.STEPS", {"fetch": full})
    store = Store(run=tmp_path)
    task = Task(kind="fetch", subject="a model", spec={}, work=Work.__new__(Work))
    outcome = run(task, store, 1)
    assert isinstance(outcome, Outcome)
    assert outcome.error.endswith("Make room, and run the same command again: what is finished is kept.")
    assert not list((tmp_path / ".work" / "attempts").iterdir()) and not store.done()
