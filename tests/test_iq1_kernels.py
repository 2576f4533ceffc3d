"""IQ1_S and IQ1_M: byte equality with stock ggml, and the thorough search against every point at every scale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ggml_peer import dequantize as peer_dequantize
from ggml_peer import library as peer_library
from ggml_peer import quantize as peer_quantize
from quantkernels.compiling import compiled
from quantkernels.ggml import TYPES, Backend, dequantize, quantize
from quantkernels.ggml.cpu.lanes import WIDTH
from quantkernels.ggml.cpu.lanes_sort import network, sort_16, sort_32, sort_keys
from quantkernels.ggml.packing.iq1 import pack_iq1, unpack_fields
from quantkernels.ggml.thorough.cpu_iq1 import quantize_thorough
from quantkernels.ggml.thorough.reference_iq1 import errors_of_d, parabolas_of, split_groups
from quantkernels.ggml.thorough.reference_iq1 import quantize_thorough as thorough_truth
from test_ggml_kernels import Floats, assert_same_blocks, hard_rows, heavy_tailed, importances

Bytes = NDArray[np.uint8]

NAMES = ["IQ1_S", "IQ1_M"]
WEIGHED_AND_NOT = [(name, kind) for name in NAMES for kind in ("usual", "holes", "ones", "zeros", "wide")]
WEIGHED_AND_NOT.append(("IQ1_M", "none"))
needs_peer = pytest.mark.skipif(peer_library() is None, reason="xllamacpp is not installed")


def importance_of(random: np.random.Generator, columns: int, kind: str) -> Floats | None:
    return None if kind == "none" else importances(random, columns)[kind]


@needs_peer
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "kind"), WEIGHED_AND_NOT)
def test_bytes_equal_ggml(name: str, kind: str, backend: Backend) -> None:
    random = np.random.default_rng(1)
    rows = hard_rows(random, 768)
    importance = importance_of(random, 768, kind)
    assert_same_blocks(quantize(rows, name, importance, backend=backend), peer_quantize(rows, name, importance), name)


@needs_peer
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 20),
    width=st.integers(1, 3),
    exponent=st.integers(-44, 4),
    shift=st.sampled_from([0.0, -1.0, 1.0, 30.0]),
    kind=st.sampled_from(["none", "usual", "holes", "wide"]),
    steps=st.sampled_from([0, 1, 4]),
)
def test_any_shape_and_scale_equals_truth_and_ggml(
    name: str, seed: int, count: int, width: int, exponent: int, shift: float, kind: str, steps: int
) -> None:
    random = np.random.default_rng(seed)
    wide = (heavy_tailed(random, count, width * 256) + np.float32(shift)).astype(np.float64)
    if steps:  # many equal weights: the order of equals reaches the bytes
        wide = np.round(wide * 20 * steps) / steps
    rows = (wide * 10.0**exponent).astype(np.float32)
    importance = importance_of(random, width * 256, "usual" if name == "IQ1_S" and kind == "none" else kind)
    try:
        got = quantize(rows, name, importance)
    except ValueError as error:
        assert "beyond float16" in str(error)
        return
    assert_same_blocks(got, quantize(rows, name, importance, backend="reference"), name)
    assert_same_blocks(got, peer_quantize(rows, name, importance), name)


@needs_peer
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("IQ1_S", "usual"), ("IQ1_S", "wide"), ("IQ1_M", "usual"), ("IQ1_M", "none")]
)
def test_bytes_equal_ggml_on_a_hundred_thousand_blocks(name: str, kind: str) -> None:
    blocks = 0
    for seed in range(1000):
        random = np.random.default_rng(seed)
        rows = np.concatenate([heavy_tailed(random, 128, 4096), hard_rows(random, 4096)])
        importance = importance_of(random, 4096, kind)
        assert_same_blocks(quantize(rows, name, importance), peer_quantize(rows, name, importance), name)
        blocks += rows.size // 256
        if blocks >= 100_000:
            break


@needs_peer
@pytest.mark.parametrize("name", NAMES)
def test_dequantized_random_bytes_equal_ggml_bit_for_bit(name: str) -> None:
    blocks = np.random.default_rng(2).integers(0, 256, (200, TYPES[name].size_bytes), np.uint8)
    blocks[:, 1 if name == "IQ1_S" else 55] &= 0xBB  # no infinite or NaN d
    got = dequantize(blocks, name)
    assert np.array_equal(got.view(np.uint32), peer_dequantize(blocks, name, 256).view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
def test_packing_gives_back_the_bytes_it_read(name: str) -> None:
    blocks = np.random.default_rng(3).integers(0, 256, (200, TYPES[name].size_bytes), np.uint8)
    blocks[:, 1 if name == "IQ1_S" else 55] &= 0xBB
    assert np.array_equal(pack_iq1(name, unpack_fields(blocks, name)), blocks)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_a_scale_beyond_float16_is_refused_by_row_and_columns(name: str, backend: Backend) -> None:
    rows = np.full((20, 512), 0.5, np.float32)
    rows[13, 256::2] = -3e9
    with pytest.raises(ValueError, match="row 13 columns 256 to 511 is beyond float16"):
        quantize(rows, name, np.ones(512, np.float32), backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_sums_that_overflow_are_refused_where_ggml_stores_zeros_or_stops(name: str, backend: Backend) -> None:
    rows = heavy_tailed(np.random.default_rng(4), 3, 256)
    rows[1] *= np.float32(1e30)
    with pytest.raises(ValueError, match="row 1 columns 0 to 255 is beyond float16"):
        quantize(rows, name, np.ones(256, np.float32), backend=backend)


def test_iq1_s_is_refused_without_importance() -> None:
    with pytest.raises(ValueError, match="IQ1_S cannot be made without importance"):
        quantize(np.ones((1, 256), np.float32), "IQ1_S")


@pytest.mark.parametrize("count", [2, 16, 32, 256])
def test_the_network_sorts_every_row_of_zeros_and_ones_drawn(count: int) -> None:
    rows = np.random.default_rng(5).random((2000, count)) < np.linspace(0, 1, 2000)[:, None]  # the 0-1 principle
    for low, high in network(count):
        rows[:, low], rows[:, high] = rows[:, low] & rows[:, high], rows[:, low] | rows[:, high]
    assert (np.diff(rows.astype(int), axis=1) >= 0).all()


@compiled
def _sort(values: Floats, count: int, keys: NDArray[np.int64]) -> None:
    if count == 16:
        sort_16(values, 0, keys)
    else:
        sort_32(values, 0, keys)


@pytest.mark.parametrize("count", [16, 32])
def test_sorting_keeps_the_order_of_equals(count: int) -> None:
    values = np.random.default_rng(6).integers(-3, 4, (count, WIDTH)).astype(np.float32)
    values[::3] *= np.float32(-0.0)
    keys = np.zeros(count * WIDTH, np.int64)
    _sort(values.reshape(-1), count, keys)
    places = (keys & 0xFFFFFFFF).reshape(count, WIDTH)
    assert np.array_equal(places // WIDTH, np.argsort(values, axis=0, kind="stable"))
    assert np.array_equal(places % WIDTH, np.tile(np.arange(WIDTH), (count, 1)))


def test_sorting_in_memory_sorts_each_lane() -> None:
    keys = np.random.default_rng(7).integers(0, 2**62, (256, WIDTH))
    got = keys.reshape(-1).copy()
    sort_keys(got, 256)
    assert np.array_equal(got.reshape(256, WIDTH), np.sort(keys, axis=0))


def thorough(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    out = np.full((len(rows), rows.shape[1] // 256 * TYPES[name].size_bytes), 0xAA, np.uint8)
    quantize_thorough(rows, importance, name, out)
    return out


def block_errors(rows: Floats, stored: Floats, importance: Floats | None) -> NDArray[np.float64]:
    weights = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    errors: NDArray[np.float64] = (weights * (stored.astype(np.float64) - rows) ** 2).reshape(-1, 256).sum(axis=1)
    return errors


@pytest.mark.parametrize(("name", "kind"), WEIGHED_AND_NOT)
def test_thorough_error_is_that_of_its_truth(name: str, kind: str) -> None:
    random = np.random.default_rng(8)
    rows = np.concatenate([hard_rows(random, 256)[::3], heavy_tailed(random, 8, 256)])
    importance = importance_of(random, 256, kind)
    weights = None if kind == "zeros" else importance
    got = block_errors(rows, dequantize(thorough(rows, name, importance), name), weights)
    wanted = block_errors(rows, dequantize(thorough_truth(rows, importance, name), name), weights)
    energy = block_errors(rows, np.zeros_like(rows), weights)
    assert (got <= wanted + 0.006 * energy).all()  # an envelope may be off by 0.003 of that, and so may d's choice
    assert got.sum() <= 1.003 * wanted.sum()


@needs_peer
@pytest.mark.parametrize("kind", ["usual", "ones", "holes"])
@pytest.mark.parametrize("name", NAMES)
def test_thorough_error_is_far_below_ggml(name: str, kind: str) -> None:
    random = np.random.default_rng(9)
    rows = heavy_tailed(random, 32, 512)
    importance = importance_of(random, 512, kind)
    got = block_errors(rows, dequantize(thorough(rows, name, importance), name), importance)
    stock = block_errors(rows, dequantize(peer_quantize(rows, name, importance), name), importance)
    assert (got < stock).all()
    assert got.sum() < 0.85 * stock.sum()


@pytest.mark.parametrize("name", NAMES)
def test_thorough_error_is_near_the_least_of_all_d(name: str) -> None:
    random = np.random.default_rng(10)
    rows = heavy_tailed(random, 3, 512)
    importance = importances(random, 512)["usual"]
    got = block_errors(rows, dequantize(thorough(rows, name, importance), name), importance)
    every = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    least = []
    weights = np.broadcast_to(importance, rows.shape).reshape(-1, 256).astype(np.float64)
    for x, weight in zip(rows.reshape(-1, 256).astype(np.float64), weights, strict=True):
        largest = np.abs(x).max()
        tried = every[(every > largest / 200) & (every < largest / 2)][::4]
        energy = (weight * x * x).sum()
        signs = (split_groups(parabolas_of(sign * x, weight), name) for sign in (1, -1))  # d may be negative too
        least.append(energy + min(errors_of_d(sub_blocks, tried).min() for sub_blocks in signs))
    assert got.sum() <= 1.02 * np.sum(least)


@pytest.mark.parametrize("name", NAMES)
def test_thorough_takes_zeros_and_scales_of_any_size(name: str) -> None:
    rows = heavy_tailed(np.random.default_rng(11), 6, 256)
    rows *= np.array([0, 1e-30, 1e-7, 1e3, 1e9, 1e25], np.float32)[:, None]
    stored = dequantize(thorough(rows, name, None), name)
    assert np.isfinite(stored).all()
    errors, energy = block_errors(rows, stored, None), block_errors(rows, np.zeros_like(rows), None)
    assert (errors <= energy).all()
    assert errors[3] < 0.4 * energy[3]
