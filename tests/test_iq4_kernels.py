"""IQ4_NL and IQ4_XS: what is theirs alone; `test_ggml_kernels.py` compares all types with stock ggml."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggml_peer import dequantize as peer_dequantize
from ggml_peer import library as peer_library
from ggml_peer import quantize as peer_quantize
from quantkernels.compiling import compiled
from quantkernels.ggml import Backend, dequantize, quantize
from quantkernels.ggml.cpu.iq4 import nearest_code, nearest_level
from quantkernels.ggml.cpu.lanes import WIDTH, load, store
from quantkernels.ggml.packing.iq4 import LEVELS, MIDDLES
from quantkernels.ggml.reference.iq4 import nearest_level as reference_nearest_level
from test_ggml_kernels import Floats, assert_same_blocks, hard_rows, heavy_tailed, importances

NAMES = ["IQ4_NL", "IQ4_XS"]
needs_peer = pytest.mark.skipif(peer_library() is None, reason="xllamacpp is not installed")


@needs_peer
@pytest.mark.parametrize("kind", [None, "usual", "holes", "ones", "zeros", "wide"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_ggml(name: str, backend: Backend, kind: str | None) -> None:
    random = np.random.default_rng(1)
    rows = hard_rows(random, 768)
    importance = importances(random, 768)[kind] if kind else None
    assert_same_blocks(quantize(rows, name, importance, backend=backend), peer_quantize(rows, name, importance), name)


@needs_peer
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    width=st.integers(1, 3),
    weighed=st.booleans(),
    exponent=st.integers(-44, 36),
    shift=st.sampled_from([0.0, -1.0, 1.0, 30.0]),
)
def test_any_shape_and_scale_equals_truth_and_ggml(
    name: str, seed: int, count: int, width: int, weighed: bool, exponent: int, shift: float
) -> None:
    random = np.random.default_rng(seed)
    wide = (heavy_tailed(random, count, width * 256) + np.float32(shift)).astype(np.float64) * 10.0**exponent
    rows = np.clip(wide, -3e38, 3e38).astype(np.float32)
    importance = np.exp(random.normal(size=width * 256)).astype(np.float32) if weighed else None
    try:
        got = quantize(rows, name, importance)
    except ValueError as error:
        assert "beyond float16" in str(error)
        with pytest.raises(ValueError, match="beyond float16"):
            quantize(rows, name, importance, backend="reference")
        return
    assert_same_blocks(got, quantize(rows, name, importance, backend="reference"), name)
    assert_same_blocks(got, peer_quantize(rows, name, importance), name)


@needs_peer
@pytest.mark.parametrize("name", NAMES)
def test_dequantized_random_bytes_equal_ggml_bit_for_bit(name: str) -> None:
    blocks = np.random.default_rng(2).integers(0, 256, (50, 18 * 8 if name == "IQ4_NL" else 136), np.uint8)
    with np.errstate(invalid="ignore"):
        got = dequantize(blocks, name, 256)
    wanted = peer_dequantize(blocks, name, 256)
    both_nan = np.isnan(got) & np.isnan(wanted)  # random scales may be NaN
    assert (both_nan | (got.view(np.uint32) == wanted.view(np.uint32))).all()


@compiled
def _round(values: Floats, levels: Floats, codes: Floats) -> None:
    for at in range(0, len(values), WIDTH):
        store(levels, at, nearest_level(load(values, at)))
        store(codes, at, nearest_code(load(values, at)))


def test_levels_are_chosen_by_distance_and_the_upper_one_half_way() -> None:
    middles = np.array(MIDDLES, np.float32)
    around = [np.nextafter(middles, np.float32(side)) for side in (-1e9, 1e9)]
    special = np.array([-np.inf, -1e30, -127, 113, 1e30, np.inf, np.nan, 0, -0.0], np.float32)
    random = np.random.default_rng(3).uniform(-140, 130, 4096 - 45 - 9).astype(np.float32)
    values = np.concatenate([middles, *around, special, random])
    levels, codes = np.full((2, len(values)), np.nan, np.float32)
    _round(values, levels, codes)
    assert np.array_equal(codes, reference_nearest_level(values))
    assert np.array_equal(levels, np.array(LEVELS)[codes.astype(int)])
    distances = np.abs(values[:, None].astype(np.float64) - np.array(LEVELS))
    upper_of_the_nearest = 15 - np.argmin(distances[:, ::-1], axis=1)
    close = np.abs(values) < 1000  # where distances differ in float64
    assert np.array_equal(codes[close], upper_of_the_nearest[close])
    assert codes[np.isnan(values)] == 15


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e9, 1e13, 1e20, 3e38])
def test_a_sub_block_too_large_for_the_search_is_refused_and_never_stored_as_zeros(
    name: str, size: float, backend: Backend
) -> None:
    rows = heavy_tailed(np.random.default_rng(4), 3, 512)
    rows[1, 256 + 64 : 256 + 96] = np.linspace(-size, size, 32, dtype=np.float32)
    with pytest.raises(ValueError, match=r"row 1 columns (256|320) to"):
        quantize(rows, name, backend=backend)
