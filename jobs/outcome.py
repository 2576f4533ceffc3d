"""How a task ended: what executors hand back, what it took, and a stranger's error told as one of ours."""

from __future__ import annotations

import contextlib
import errno
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from converter.progress import bytes_text
from jobs.task import Task


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended: error is empty when it is done."""

    key: str
    seconds: float
    peak_bytes: int
    error: str = ""
    note: str = ""
    out_of_memory: bool = False  # so that it may end well with more
    damaged: str = ""  # the key of a finished task whose output turned out not to be what it wrote


def lacks_memory(problem: Exception) -> bool:
    """Whether there was not enough memory; torch has no type of its own for that of a CPU."""
    return isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(problem)


def told(task: Task, problem: Exception) -> str:
    """A stranger's error as one of ours: where, what, and where it is known what to do."""
    said = f"{task.title}: {type(problem).__name__}: {problem}"
    if lacks_memory(problem):
        planned, peak = bytes_text(task.resources.memory_bytes), bytes_text(peak_bytes())
        return (
            f"{said}. It was planned with {planned} and came to {peak}. "
            "Use a machine with more memory, or fewer or shorter rows."
        )
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{said}. Make room, and run the same command again: what is finished is kept."
    return said


def reset_peak() -> None:
    """Start a new measurement of this process's peak memory, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak resident memory of this process since the last reset, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
