"""IQ1_S and IQ1_M: sorting, packing, and the thorough search against every point at every scale.

`test_ggml_kernels.py` compares all types with stock ggml.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ggml_peer import library as peer_library
from ggml_peer import quantize as peer_quantize
from quantkernels.compiling import compiled
from quantkernels.ggml import TYPES, dequantize
from quantkernels.ggml.cpu.lanes_sort import network, sort_16, sort_32, sort_keys
from quantkernels.ggml.packing.iq1 import pack_iq1, unpack_fields
from quantkernels.ggml.thorough.cpu_iq1 import quantize_thorough
from quantkernels.ggml.thorough.reference_iq1 import errors_of_d, parabolas_of, split_groups
from quantkernels.ggml.thorough.reference_iq1 import quantize_thorough as thorough_truth
from quantkernels.lanes import WIDTH
from test_ggml_kernels import Floats, hard_rows, heavy_tailed, importance_of, importances

pytestmark = pytest.mark.slow

Bytes = NDArray[np.uint8]

NAMES = ["IQ1_S", "IQ1_M"]
WEIGHED_AND_NOT = [(name, kind) for name in NAMES for kind in ("usual", "holes", "ones", "zeros", "wide")]
WEIGHED_AND_NOT.append(("IQ1_M", "none"))
needs_peer = pytest.mark.skipif(peer_library() is None, reason="xllamacpp is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_packing_gives_back_the_bytes_it_read(name: str) -> None:
    blocks = np.random.default_rng(3).integers(0, 256, (200, TYPES[name].size_bytes), np.uint8)
    blocks[:, 1 if name == "IQ1_S" else 55] &= 0xBB
    assert np.array_equal(pack_iq1(name, unpack_fields(blocks, name)), blocks)


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
