"""IQ2_XXS, IQ2_XS and IQ2_S: numba against the numpy truth, and both against the bytes of stock ggml."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ggml_peer import dequantize as peer_dequantize
from ggml_peer import library as peer_library
from ggml_peer import quantize as peer_quantize
from quantkernels.ggml import TYPES, Backend, dequantize, quantize
from quantkernels.ggml.cpu.iq2 import search_tables
from quantkernels.ggml.lattice import UNREACHABLE, lattice
from quantkernels.ggml.packing.iq2 import pack_iq2, unpack_iq2_fields
from test_ggml_kernels import assert_same_blocks, exact_rows, hard_rows, heavy_tailed, importances

Floats = NDArray[np.float32]

NAMES = ["IQ2_XXS", "IQ2_XS", "IQ2_S"]
KINDS = ["usual", "holes", "ones", "zeros", "wide"]
CASES = [(name, kind) for name in NAMES for kind in KINDS] + [("IQ2_S", "none")]
needs_peer = pytest.mark.skipif(peer_library() is None, reason="xllamacpp is not installed")


def importance_of(random: np.random.Generator, columns: int, kind: str) -> Floats | None:
    return None if kind == "none" else importances(random, columns)[kind]


@needs_peer
@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bytes_equal_ggml(name: str, kind: str, backend: Backend) -> None:
    random = np.random.default_rng(1)
    rows = hard_rows(random, 768)
    importance = importance_of(random, 768, kind)
    assert_same_blocks(quantize(rows, name, importance, backend=backend), peer_quantize(rows, name, importance), name)


@needs_peer
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    width=st.integers(1, 5),
    kind=st.sampled_from(KINDS),
    exponent=st.integers(-40, 4),
    shift=st.sampled_from([0.0, -1.0, 1.0, 30.0]),
)
def test_any_shape_and_scale_equals_truth_and_ggml(
    name: str, seed: int, count: int, width: int, kind: str, exponent: int, shift: float
) -> None:
    random = np.random.default_rng(seed)
    rows = heavy_tailed(random, count, 256 * width) + np.float32(shift)
    rows = (rows * np.float32(10.0**exponent)).astype(np.float32)
    importance = importances(random, 256 * width)[kind]
    if name == "IQ2_S" and seed % 2:
        importance = None
    try:
        got = quantize(rows, name, importance)
    except ValueError as error:
        assert "beyond float16" in str(error)
        return
    assert_same_blocks(got, quantize(rows, name, importance, backend="reference"), name)
    assert_same_blocks(got, peer_quantize(rows, name, importance), name)


@needs_peer
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["usual", "holes", "wide", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_ggml_on_a_hundred_thousand_blocks(name: str, kind: str) -> None:
    if kind == "none" and name != "IQ2_S":
        pytest.skip("ggml makes this type with importance only")
    for seed in range(12):
        random = np.random.default_rng(seed)
        rows = np.concatenate([heavy_tailed(random, 480, 4096), hard_rows(random, 4096)])
        importance = importance_of(random, 4096, kind)
        assert_same_blocks(quantize(rows, name, importance), peer_quantize(rows, name, importance), name)


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


@needs_peer
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_dequantize_as_in_ggml(name: str) -> None:
    random = np.random.default_rng(3)
    blocks = random.integers(0, 256, (64, 2 * TYPES[name].size_bytes), np.uint8)
    blocks[:, 1 :: TYPES[name].size_bytes] &= 0x7B  # finite scales
    got = dequantize(blocks, name)
    assert np.array_equal(got.view(np.uint32), peer_dequantize(blocks, name, 512).view(np.uint32))
    theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    assert np.array_equal(got, theirs.reshape(got.shape))


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


# sha256 of ggml's own bytes for `exact_rows`, first 16 digits.
GOLDEN = {
    ("IQ2_XXS", True): "5b2bc98314fe6c70",
    ("IQ2_XS", True): "d1f53d583faeab77",
    ("IQ2_S", True): "da4560f5837620a8",
    ("IQ2_S", False): "134bc2b24ccea552",
}


@pytest.mark.parametrize(("name", "weighed"), GOLDEN)
def test_golden_bytes(name: str, weighed: bool) -> None:
    rows, importance = exact_rows()
    blocks = quantize(rows, name, importance if weighed else None)
    assert hashlib.sha256(blocks.tobytes()).hexdigest()[:16] == GOLDEN[name, weighed]


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_importance_is_demanded_where_ggml_demands_it(name: str, backend: Backend) -> None:
    with pytest.raises(ValueError, match=f"{name} .*importance"):
        quantize(np.ones((1, 256), np.float32), name, backend=backend)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    rows = np.zeros((2, 512), np.float32)
    assert not dequantize(quantize(rows, name, np.ones(512, np.float32)), name).any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [1e18, 1e25, 3e38])
def test_a_scale_beyond_float16_is_refused_by_row_and_columns(name: str, size: float, backend: Backend) -> None:
    rows = np.full((20, 512), 0.5, np.float32)
    rows[13, 256::2] = -size
    with pytest.raises(ValueError, match=r"row 13 columns 256 to 511 is beyond float16"):
        quantize(rows, name, np.ones(512, np.float32), backend=backend)


@pytest.mark.parametrize("name", NAMES)
def test_threads_and_slabs_never_change_a_byte(name: str) -> None:
    random = np.random.default_rng(6)
    rows = heavy_tailed(random, 70, 512)
    importance = importances(random, 512)["usual"]
    whole = quantize(rows, name, importance)
    assert np.array_equal(quantize(rows, name, importance, threads=3), whole)
    assert np.array_equal(np.concatenate([quantize(row[None], name, importance) for row in rows[:5]]), whole[:5])


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


@pytest.mark.slow
def test_a_processor_without_wide_permutations_gives_the_same_bytes(tmp_path: Path) -> None:
    """The kernel compiled for a plain x86-64, ARM's shape of things, against this processor's own."""
    outputs = []
    for extra in ({}, {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}):
        environment = {**os.environ, **extra, "NUMBA_CACHE_DIR": str(tmp_path / str(len(extra)))}
        command = [sys.executable, "-c", PROGRAM]
        outputs.append(
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=600).stdout
        )
    assert outputs[0] == outputs[1]
