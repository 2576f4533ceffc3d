"""IQ2_XXS, IQ2_XS and IQ2_S: what is theirs alone; `test_ggml_kernels.py` compares all types with stock ggml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ggml_peer import library as peer_library
from ggml_peer import quantize as peer_quantize
from patience import PATIENCE_SECONDS
from quantkernels.ggml import TYPES, quantize
from quantkernels.ggml.cpu.iq2 import search_tables
from quantkernels.ggml.lattice import UNREACHABLE, lattice
from quantkernels.ggml.packing.iq2 import pack_iq2, unpack_iq2_fields
from test_ggml_kernels import assert_same_blocks, heavy_tailed

pytestmark = pytest.mark.slow

NAMES = ["IQ2_XXS", "IQ2_XS", "IQ2_S"]
needs_peer = pytest.mark.skipif(peer_library() is None, reason="xllamacpp is not installed")


@needs_peer
@pytest.mark.parametrize("name", NAMES)
def test_a_heavy_weight_on_small_values_wraps_around_as_in_ggml(name: str) -> None:
    """Where only tiny values count, the others are millions of scales away: past 2**22 ggml's rounding wraps around."""
    random = np.random.default_rng(2)
    rows = heavy_tailed(random, 40, 512)
    importance = np.zeros(512, np.float32)
    importance[::3] = 1
    rows[:, ::3] *= np.exp(-30 * random.random((40, 1))).astype(np.float32)
    rows[:, 1::3] *= np.where(random.random(rows[:, 1::3].shape) < 0.9, np.float32(1e-20), np.float32(-1e3))
    assert_same_blocks(quantize(rows, name, importance), peer_quantize(rows, name, importance), name)


@pytest.mark.parametrize("name", NAMES)
def test_fields_survive_packing(name: str) -> None:
    random = np.random.default_rng(4)
    blocks = random.integers(0, 256, (64, TYPES[name].size_bytes), np.uint8)
    blocks[:, 1] &= 0x7B
    assert np.array_equal(pack_iq2(name, *unpack_iq2_fields(blocks, name)), blocks)


@pytest.mark.parametrize("name", NAMES)
def test_search_tables_hold_every_neighbour_once_in_order(name: str) -> None:
    known = lattice(name)
    rows, codes, _ = search_tables(name)
    reachable = np.flatnonzero(known.index_of != UNREACHABLE)
    assert len(reachable) == len(rows) == 3**8
    points = ((known.points.astype(np.int64) - 1) // 2 << 2 * np.arange(8)).sum(axis=1)
    for code in np.random.default_rng(5).choice(reachable, 300, replace=False).tolist():
        row = int(rows[sum((code >> 2 * i & 3) * 3**i for i in range(8))])
        chunks = row >> 1 & 31
        got = codes[(row >> 6) * 16 :][: chunks * 16].reshape(chunks, 16).T.reshape(-1)  # by lane, then by chunk
        index = known.index_of[code]
        assert bool(row & 1) == (index < 0)
        wanted = [index]
        if index < 0:
            wanted = known.neighbours[known.neighbour_start[-1 - index] : known.neighbour_start[-index]].tolist()
        assert got[: len(wanted)].tolist() == points[wanted].tolist()
        assert (got[len(wanted) :] == got[len(wanted) - 1]).all()


PROGRAM = """
import hashlib, sys
import numpy as np
from quantkernels.ggml import quantize

random = np.random.default_rng(7)
rows = random.standard_t(4, (9, 512)).astype(np.float32)
importance = np.exp(random.normal(size=512)).astype(np.float32)
for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S"):
    print(hashlib.sha256(quantize(rows, name, importance).tobytes()).hexdigest())
"""


def test_a_processor_without_wide_permutations_gives_the_same_bytes(tmp_path: Path) -> None:
    """The kernel compiled for a plain x86-64, ARM's shape of things, against this processor's own."""
    outputs = []
    for extra in ({}, {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}):
        environment = {**os.environ, **extra, "NUMBA_CACHE_DIR": str(tmp_path / str(len(extra)))}
        command = [sys.executable, "-c", PROGRAM]
        outputs.append(
            subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS
            ).stdout
        )
    assert outputs[0] == outputs[1]
