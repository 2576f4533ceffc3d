"""MXFP4 and NVFP4: what is theirs alone; `test_ggml_kernels.py` compares all types with stock ggml."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggml_peer import library as peer_library
from ggml_peer import quantize as peer_quantize
from quantkernels.ggml import Backend, dequantize, quantize
from test_ggml_kernels import Floats, assert_same_blocks, heavy_tailed

NAMES = ["MXFP4", "NVFP4"]
LARGEST = {"MXFP4": 3.4e38, "NVFP4": 2688.0}  # 2688 = 448 * 6
needs_peer = pytest.mark.skipif(peer_library() is None, reason="xllamacpp is not installed")


@needs_peer
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    width=st.integers(1, 5),
    exponent=st.integers(-44, 38),
    shift=st.sampled_from([0.0, -1.0, 1.0, 30.0]),
)
def test_any_shape_and_scale_equals_truth_and_ggml(
    name: str, seed: int, count: int, width: int, exponent: int, shift: float
) -> None:
    random = np.random.default_rng(seed)
    wide = (heavy_tailed(random, count, width * 64) + np.float32(shift)).astype(np.float64) * 10.0**exponent
    rows = np.clip(wide, -3.4e38, 3.4e38).astype(np.float32)
    try:
        got = quantize(rows, name)
    except ValueError as error:
        assert "beyond its one byte" in str(error)
        with pytest.raises(ValueError, match="beyond its one byte"):
            quantize(rows, name, backend="reference")
        return
    assert_same_blocks(got, quantize(rows, name, backend="reference"), name)
    assert_same_blocks(got, peer_quantize(rows, name), name)


def rows_by_largest(largest: Floats) -> Floats:
    """Rows of 64 with the given largest magnitudes, with ties: multiples of 1/24 of it."""
    fractions = np.random.default_rng(2).integers(-24, 25, (len(largest), 64)) / 24
    fractions[:, ::16] = 1
    return (largest[:, None] * fractions).astype(np.float32)


@needs_peer
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_exponents_just_below_powers_of_two_round_as_log2f_does(backend: Backend) -> None:
    powers = np.exp2(np.arange(-124.0, 128.0)).astype(np.float32).view(np.int32)
    steps = np.array([*range(-2, 12), 21, 22, 23, 43, 44, 45, 87, 88, 89])
    rows = rows_by_largest((powers[:, None] - steps).astype(np.int32).view(np.float32).reshape(-1))
    assert_same_blocks(quantize(rows, "MXFP4", backend=backend), peer_quantize(rows, "MXFP4"), "MXFP4")


@needs_peer
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_denormal_blocks_equal_ggml(backend: Backend) -> None:
    bits = np.concatenate([np.arange(1, 300), np.random.default_rng(3).integers(1, 1 << 23, 1000)]).astype(np.int32)
    rows = rows_by_largest(bits.view(np.float32))
    assert_same_blocks(quantize(rows, "MXFP4", backend=backend), peer_quantize(rows, "MXFP4"), "MXFP4")


@needs_peer
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_scale_of_nvfp4_and_its_middles_equal_ggml(backend: Backend) -> None:
    sixteenths = np.outer(np.exp2(np.arange(-12.0, 9.0)), 1 + np.arange(16) / 16).reshape(-1)
    exact = (sixteenths[sixteenths <= 448] * 6).astype(np.float32)
    around = [np.nextafter(exact, np.float32(side)) for side in (0, 2688)]
    rows = rows_by_largest(np.concatenate([exact, *around]))
    assert_same_blocks(quantize(rows, "NVFP4", backend=backend), peer_quantize(rows, "NVFP4"), "NVFP4")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("MXFP4", 1.2e-38), ("MXFP4", -2.3e-38), ("NVFP4", 2688.01), ("NVFP4", -1e9), ("NVFP4", 3e38)],
)
def test_a_scale_that_its_byte_cannot_hold_is_refused(name: str, value: float, backend: Backend) -> None:
    rows = np.zeros((3, 128), np.float32)
    rows[2, 64 + 31] = value
    start = 64
    with pytest.raises(ValueError, match=rf"row 2 columns {start} to .* beyond its one byte, so {name}"):
        quantize(rows, name, backend=backend)


@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_half_a_step_of_the_level(name: str) -> None:
    rows = heavy_tailed(np.random.default_rng(5), 16, 256) * np.float32(100)
    size = 32 if name == "MXFP4" else 16
    blocks = quantize(rows, name)
    error = np.abs(dequantize(blocks, name) - rows).reshape(-1, size).max(axis=1)
    largest = np.abs(rows).reshape(-1, size).max(axis=1)
    # MXFP4 may clip from 8 to 6 of 4 to 8 times the scale: 1/4. NVFP4's widest gap is 4 to 6, half of it 1/6, and its
    # scale is off by up to 1/16.
    assert (error <= largest * (0.25 if name == "MXFP4" else 1 / 6 + 1 / 16)).all()
