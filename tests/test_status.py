"""A run is told from its files alone, at once, and as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE_SECONDS
from small_run import ROOT, write_manifest

# Runs the command line, then writes which of the slow packages it has brought in.
LOOK = """
import sys
from converter import cli
try:
    cli.main()
except SystemExit:
    sys.stderr.write("slow:" + " ".join({"torch", "transformers", "ray", "numba"} & set(sys.modules)))
"""


@pytest.mark.parametrize("command", ["--help", "--version", "status", "compare"])
def test_what_only_looks_imports_nothing_that_computes(command: str, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path)
    more = () if command.startswith("-") else (str(manifest), "--out", str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-c", LOOK, command, *more],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_SECONDS,
        check=True,
    )
    assert done.stderr.partition("slow:")[2] == ""
