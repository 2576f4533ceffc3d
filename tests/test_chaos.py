"""Faults at random moments, by the harness of `make chaos`: a few here, each of them in the long suites."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from patience import PATIENCE_SECONDS
from small_run import ROOT

HERE = ("driver-killed", "two-at-once")


def chaos(*arguments: str, timeout: float) -> None:
    """The harness in a process of its own, since it forks, and a process with threads should not."""
    done = subprocess.run(
        [sys.executable, "-m", "chaos", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_faults_on_one_machine_change_no_byte_and_lose_nothing() -> None:
    chaos("--times", "1", "--only", *HERE, timeout=PATIENCE_SECONDS)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_no_fault_changes_a_byte_or_loses_anything() -> None:
    chaos("--times", "3", "--seconds", "1800", "--seed", "1", timeout=3600)
