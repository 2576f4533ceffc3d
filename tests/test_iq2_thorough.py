"""The thorough search for IQ2_XXS, IQ2_XS and IQ2_S: numba against the numpy truth, and errors against ggml's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantkernels.ggml import TYPES, block_size, dequantize, row_bytes
from quantkernels.ggml.cpu.iq2 import quantize_rows
from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.thorough.cpu_iq2 import quantize_thorough
from quantkernels.ggml.thorough.reference_iq2 import quantize_iq2_thorough
from test_ggml_kernels import assert_same_blocks, hard_rows, heavy_tailed, importances

pytestmark = pytest.mark.slow

Floats = NDArray[np.float32]

NAMES = ["IQ2_XXS", "IQ2_XS", "IQ2_S"]
KINDS = ["usual", "holes", "ones", "zeros", "wide", "none"]


def importance_of(random: np.random.Generator, columns: int, kind: str) -> Floats | None:
    return None if kind == "none" else importances(random, columns)[kind]


def thorough(rows: Floats, name: str, importance: Floats | None) -> NDArray[np.uint8]:
    out = np.zeros((len(rows), row_bytes(name, rows.shape[1])), np.uint8)
    quantize_thorough(rows, importance, name, out)
    return out


def stock(rows: Floats, name: str, importance: Floats | None) -> NDArray[np.uint8]:
    """ggml's bytes, with an importance of 1 where it takes none but demands some."""
    out = np.zeros((len(rows), row_bytes(name, rows.shape[1])), np.uint8)
    if importance is None:
        importance = np.ones(rows.shape[1] if name != "IQ2_S" else 0, np.float32)
    quantize_rows(rows.reshape(-1), importance, rows.shape[1], name, out.reshape(-1))
    return out


def block_errors(blocks: NDArray[np.uint8], name: str, rows: Floats, importance: Floats | None) -> NDArray[np.float64]:
    square = (dequantize(blocks, name).astype(np.float64) - rows) ** 2
    weighted = square if importance is None else importance * square
    return np.asarray(weighted.reshape(-1, block_size(name)).sum(axis=1))


def least_errors(rows: Floats, name: str, importance: Floats) -> NDArray[np.float64]:
    """The least error of each block for 160 values of d, with the best of all points and scale codes for each."""
    value = lattice(name).values.astype(np.float64) / 8
    count = 8 if name == "IQ2_XXS" else 16
    found = []
    for x, weight in zip(
        rows.reshape(-1, 32, 8).astype(np.float64),
        np.broadcast_to(importance, rows.shape).reshape(-1, 32, 8),
        strict=True,
    ):
        pull = weight * np.abs(x)
        linear, square = pull @ value.T, weight @ (value**2).T
        if name != "IQ2_S":
            odd = (x < 0).sum(axis=1) % 2 == 1
            linear -= 2 * (pull[:, None, :] * value).min(axis=2) * odd[:, None]
        scales = np.abs(x).max() * np.geomspace(2e-3, 1.2, 1300)  # steps of half a percent
        gain = np.stack(
            [(scale * (2 * linear - scale * square)).max(axis=1).reshape(count, -1).sum(axis=1) for scale in scales]
        )
        best = 0.0
        for d in np.abs(x).max() * np.geomspace(2e-3, 4e-2, 160):
            reachable = np.searchsorted(scales, d * np.arange(1, 32, 2)).clip(0, len(scales) - 1)
            best = max(best, gain[reachable].max(axis=0).sum())
        found.append((weight * x * x).sum() - best)
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_the_truth_and_no_block_is_worse_than_ggml(name: str, kind: str) -> None:
    random = np.random.default_rng(1)
    rows = np.concatenate([hard_rows(random, 512), heavy_tailed(random, 9, 512)])
    importance = importance_of(random, 512, kind)
    got = thorough(rows, name, importance)
    assert_same_blocks(got, quantize_iq2_thorough(rows, importance, name), name)
    errors = [block_errors(blocks, name, rows, importance) for blocks in (got, stock(rows, name, importance))]
    assert (errors[0] <= errors[1]).all()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 20),
    width=st.integers(1, 4),
    kind=st.sampled_from(KINDS),
    exponent=st.integers(-40, 5),
)
def test_any_shape_and_scale_equals_the_truth(
    name: str, seed: int, count: int, width: int, kind: str, exponent: int
) -> None:
    random = np.random.default_rng(seed)
    rows = (heavy_tailed(random, count, 256 * width) * np.float32(10.0**exponent)).astype(np.float32)
    importance = importance_of(random, 256 * width, kind)
    assert_same_blocks(thorough(rows, name, importance), quantize_iq2_thorough(rows, importance, name), name)


@pytest.mark.parametrize("kind", ["usual", "ones", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_least_a_tenth_below_ggml(name: str, kind: str) -> None:
    random = np.random.default_rng(2)
    rows = heavy_tailed(random, 16, 1024)
    importance = importance_of(random, 1024, kind)
    errors = [block_errors(make(rows, name, importance), name, rows, importance).sum() for make in (thorough, stock)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("kind", ["usual", "ones"])
@pytest.mark.parametrize("tails", ["gaussian", "heavy"])
@pytest.mark.parametrize("name", NAMES)
def test_error_is_within_two_percent_of_the_best_that_the_format_holds(name: str, tails: str, kind: str) -> None:
    random = np.random.default_rng(3)
    rows = heavy_tailed(random, 3, 512) if tails == "heavy" else random.normal(size=(3, 512)).astype(np.float32)
    importance = importances(random, 512)[kind]
    error = block_errors(thorough(rows, name, importance), name, rows, importance).sum()
    least = least_errors(rows, name, importance).sum()
    assert least * 0.999 < error < least * 1.02  # the best is itself one of 160 values of d


@pytest.mark.parametrize("name", NAMES)
def test_a_block_beyond_float16_is_left_as_ggml_makes_it(name: str) -> None:
    rows = np.full((2, 256), 0.5, np.float32)
    rows[1, ::2] = -1e25
    importance = np.ones(256, np.float32)
    got = thorough(rows, name, importance)
    assert np.array_equal(got[1], stock(rows, name, importance)[1])
    assert got[1, 1] & 0x7C == 0x7C


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    rows = np.zeros((2, 512), np.float32)
    assert not dequantize(thorough(rows, name, None), name).any()
    assert TYPES[name].size_bytes * 2 == thorough(rows, name, None).shape[1]
