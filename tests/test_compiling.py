"""Compiled kernels: their cache never gives old code, one kernel is one signature, and no cache is no obstacle."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numba.core.dispatcher import Dispatcher

from patience import PATIENCE_SECONDS
from quantkernels import columns, ggml, gram, hadamard, scales, sums, symmetric
from quantkernels.compiling import compiled, digest
from quantkernels.compiling import kernel as made_kernel
from quantkernels.ggml import TYPES
from quantkernels.ggml.cpu import k_symmetric as cpu_k_symmetric
from quantkernels.ggml.cpu import search as cpu_search
from test_columns_kernel import all_frames

ROOT = Path(__file__).parent.parent
# A package of two files: a kernel and what it calls; `run` prints the kernel's answer and whether it was compiled.
OUTER = """
from quantkernels.compiling import kernel
from trial.inner import add

@kernel
def answer(x):
    return add(x)
"""
INNER = """
from quantkernels.compiling import compiled

@compiled
def add(x):
    return x + 1
"""
RUN = "from trial.outer import answer; print(answer(1), sum(answer.stats.cache_hits.values()))"


def write_package(folder: Path) -> Path:
    """The package `trial` in `folder`; returns its own folder."""
    package = folder / "trial"
    package.mkdir()
    for name, text in (("__init__", ""), ("outer", OUTER), ("inner", INNER)):
        (package / f"{name}.py").write_text(text)
    return package


def start(folder: Path, code: str = RUN, **environment: str) -> subprocess.Popen[str]:
    path = os.pathsep.join((str(folder), str(ROOT / "kernels")))
    whole = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def answer(running: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process printed, and what it said beside; it must have ended well."""
    out, beside = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 0, beside
    return out.strip(), beside


def test_an_edit_in_a_called_file_reaches_the_cached_kernel(tmp_path: Path) -> None:
    package = write_package(tmp_path)
    cache = str(tmp_path / "cache")
    assert answer(start(tmp_path, NUMBA_CACHE_DIR=cache))[0] == "2 0"
    assert answer(start(tmp_path, NUMBA_CACHE_DIR=cache))[0] == "2 1"
    (package / "inner.py").write_text(INNER.replace("x + 1", "x + 5"))
    assert answer(start(tmp_path, NUMBA_CACHE_DIR=cache))[0] == "6 0"


def test_where_no_cache_can_be_written_kernels_are_compiled_with_a_warning(tmp_path: Path) -> None:
    (write_package(tmp_path) / "__pycache__").write_text("a file where the folder would be")
    said, beside = answer(start(tmp_path, XDG_CACHE_HOME="/dev/null", NUMBA_CACHE_DIR="", PYTHONDONTWRITEBYTECODE="1"))
    assert said.split()[0] == "2"
    assert "set NUMBA_CACHE_DIR" in beside


@pytest.mark.slow
def test_processes_that_start_together_on_an_empty_cache_all_get_the_same(tmp_path: Path) -> None:
    code = (
        "import hashlib, numpy as np; from quantkernels.ggml import quantize; "
        "rows = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32); "
        "print(*(hashlib.sha256(quantize(rows, name).tobytes()).hexdigest() for name in ('Q8_0', 'Q4_0')))"
    )
    running = [start(tmp_path, code, NUMBA_CACHE_DIR=str(tmp_path / "cache")) for _ in range(3)]
    said = {answer(one)[0] for one in running}
    assert len(said) == 1
    assert answer(start(tmp_path, code, NUMBA_CACHE_DIR=str(tmp_path / "cache")))[0] in said
    assert not list(tmp_path.rglob("*.tmp.*"))


def test_the_cached_name_of_a_kernel_changes_with_the_constants_of_what_it_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = inspect.unwrap(cpu_k_symmetric.quantize_q6_k)
    before = digest(function)
    assert digest(function) == before
    monkeypatch.setattr(cpu_search, "TENTH", np.float32(0.2))
    assert digest(function) != before


def test_a_kernel_above_what_it_calls_is_refused() -> None:
    with pytest.raises(NameError, match="uses later, which must be defined above the kernel"):
        made_kernel(too_early)


def too_early(x: int) -> int:
    return later(x)  # type: ignore[name-defined, no-any-return]  # noqa: F821 - that is what is tested


@compiled
def twice(x: int) -> int:
    return 2 * x


def kernels() -> dict[str, Any]:
    """Every entry point there is, known by the digest at the end of its name."""
    return {
        function.py_func.__qualname__: function
        for module in list(sys.modules.values())
        if module.__name__.startswith("quantkernels.")
        for function in vars(module).values()
        if isinstance(function, Dispatcher) and re.search("_[0-9a-f]{16}$", function.py_func.__qualname__)
    }


@pytest.mark.slow
def test_every_kernel_is_called_with_one_signature() -> None:
    """What would let two processes mix up their machine code: see the note in quantkernels/compiling.py."""
    random = torch.Generator().manual_seed(0)
    for rows, width in ((1, 256), (3, 512), (40, 256)):
        weight, importance = torch.randn(rows, width, generator=random), torch.rand(width, generator=random)
        for name in TYPES:
            for weights in (importance,) if TYPES[name].needs_importance else (None, importance):
                for search in get_args(ggml.Search):
                    ggml.quantize(weight.bfloat16(), name, weights, threads=2, search=search)
                    ggml.quantize(weight.numpy(), name, None if weights is None else weights.numpy(), search=search)
    for rows, width, group_size in ((1, 1, 1), (3, 100, 100), (40, 304, 32), (2, 129, 129), (1, 8, 8)):
        weight, importance = torch.randn(rows, width, generator=random), torch.rand(width, generator=random)
        for centred in (True, False):
            for weights in (None, importance):
                scale_OG, zero_OG = scales.search(
                    weight, weights, group_size=group_size, low=-8, high=7, symmetric=centred, threads=2
                )
                scales.errors(weight, weights, scale_OG, zero_OG, group_size=group_size, low=-8, high=7, threads=2)
        for weights in (None, importance):
            scales.search_floats(weight, weights, scales.E4M3, height=2, width=group_size, threads=2)
            scales.choose_float(weight, weights, torch.ones(rows, 1, 3), scales.E2M1, threads=2)
        for given in (weight, weight.T.contiguous().T):  # the same values, row after row or column after column
            for frame in all_frames(rows, width):
                order = torch.arange(width).flip(0) if frame.together == 1 else torch.arange(width)
                codes = columns.solve(given, columns.root_of(torch.eye(width)), frame, order, threads=2)
                columns.refine(given, torch.eye(width).T, frame, codes, sweeps=2, threads=2)
    for rows, width in ((1, 1), (40, 304), (3, 96)):
        for given in (torch.randn(rows, width), torch.randn(width, rows).T):
            hadamard.spread(given, threads=2)
            hadamard.spread(given, inverse=True)
            sums.of_columns(given)
            square = torch.randn(given.shape[1], given.shape[1]).T
            symmetric.mirror(symmetric.unpack(symmetric.pack(square), len(square)))
            if gram.available():
                gram.add(torch.zeros(given.shape[1], given.shape[1]), given)
    found = kernels()
    assert found
    assert {name: len(function.signatures) for name, function in found.items()} == dict.fromkeys(found, 1)
