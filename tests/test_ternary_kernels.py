"""TQ1_0 and TQ2_0: the thorough search, which is exact; `test_ggml_kernels.py` compares all types with stock ggml."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ggml_peer import library as peer_library
from ggml_peer import quantize as peer_quantize
from quantkernels.ggml import TYPES, dequantize, quantize
from quantkernels.ggml.thorough import cpu_ternary as cpu_ternary_thorough
from quantkernels.ggml.thorough import reference_ternary as reference_ternary_thorough
from test_ggml_kernels import Floats, assert_same_blocks, hard_rows, heavy_tailed, importances

NAMES = ["TQ1_0", "TQ2_0"]
KINDS = ["none", "usual", "holes", "ones", "zeros", "wide"]
needs_peer = pytest.mark.skipif(peer_library() is None, reason="xllamacpp is not installed")


@pytest.mark.parametrize("name", NAMES)
def test_ternary_weights_come_back_as_they_were(name: str) -> None:
    rows = np.random.default_rng(3).integers(-1, 2, (8, 1024)).astype(np.float32) * np.float32(0.03125)
    assert np.array_equal(dequantize(quantize(rows, name), name), rows)
    assert np.array_equal(dequantize(thorough(rows, name, None), name), rows)


def thorough(rows: Floats, name: str, importance: Floats | None) -> NDArray[np.uint8]:
    out = np.full((len(rows), rows.shape[1] // 256 * TYPES[name].size_bytes), 0xAA, np.uint8)
    cpu_ternary_thorough.quantize_thorough(rows, importance, name, out)
    return out


def block_errors(rows: Floats, name: str, blocks: NDArray[np.uint8], importance: Floats | None) -> NDArray[np.float64]:
    weights = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    errors: NDArray[np.float64] = (weights * (dequantize(blocks, name).astype(np.float64) - rows) ** 2).reshape(-1, 256)
    return errors.sum(axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_thorough_kernel_equals_its_truth(name: str, kind: str) -> None:
    random = np.random.default_rng(4)
    rows = np.concatenate([hard_rows(random, 512), heavy_tailed(random, 37, 512)])
    importance = None if kind == "none" else importances(random, 512)[kind]
    wanted = reference_ternary_thorough.quantize_thorough(rows, importance, name)
    assert_same_blocks(thorough(rows, name, importance), wanted, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_thorough_error_is_the_least_of_all_scales(name: str, kind: str) -> None:
    random = np.random.default_rng(5)
    rows = heavy_tailed(random, 8, 256)
    importance = None if kind in ("none", "zeros") else importances(random, 256)[kind]
    weights = np.ones(256) if importance is None else importance.astype(np.float64)
    scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    got = block_errors(rows, name, thorough(rows, name, importance), importance)
    for row, error in zip(np.abs(rows.astype(np.float64)), got, strict=True):
        near = scales[(scales > row.max() / 50) & (scales < 2 * row.max())]
        least = (weights * np.minimum(row, np.abs(row - near[:, None])) ** 2).sum(axis=1).min()
        assert error <= least * (1 + 1e-4)  # weights below 2**-30 of the largest are raised to that


@needs_peer
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_thorough_error_is_not_above_ggml(name: str, kind: str) -> None:
    random = np.random.default_rng(6)
    rows = np.concatenate([hard_rows(random, 512), heavy_tailed(random, 16, 512)])
    importance = None if kind == "none" else importances(random, 512)[kind]
    got = block_errors(rows, name, thorough(rows, name, importance), importance)
    stock = block_errors(rows, name, peer_quantize(rows, name), importance)
    zeros = np.zeros((len(rows), 2 * TYPES[name].size_bytes), np.uint8)
    rounding = 256 * 2.0**-24 * block_errors(rows, name, zeros, importance)  # 256 terms, each rounded once
    highest = 1.0 if importance is None else float(importance.max())
    raised = 2.0**-30 * highest * block_errors(rows, name, zeros, None)  # what lower weights are searched with
    assert (got <= stock + rounding + raised).all()
    if kind in ("none", "usual"):
        assert got[-32:].sum() < 0.6 * stock[-32:].sum()
