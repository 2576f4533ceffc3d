"""The ggml kernels: numba against the numpy truth, and both against the bytes of stock ggml."""

from __future__ import annotations

import hashlib
import re

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ggml_peer import dequantize as peer_dequantize
from ggml_peer import library as peer_library
from ggml_peer import quantize as peer_quantize
from quantkernels.compiling import compiled
from quantkernels.ggml import TYPES, Backend, block_size, dequantize, quantize
from quantkernels.lanes import WIDTH, load, nearest_wrapped, store

Floats = NDArray[np.float32]

BLOCK_TYPES = [name for name, known in TYPES.items() if known.weights > 1]
WEIGHED_TYPES = [name for name, known in TYPES.items() if known.uses_importance]
HALF_TYPES = [name for name, known in TYPES.items() if known.half_fields or known.half_nibbles]
needs_peer = pytest.mark.skipif(peer_library() is None, reason="xllamacpp is not installed")


def heavy_tailed(random: np.random.Generator, rows: int, columns: int) -> Floats:
    """Weights as models have them: Student's t with four degrees of freedom, a scale of its own for each row."""
    scale = np.exp(random.normal(size=(rows, 1)))
    return (random.standard_t(4, (rows, columns)) * scale * 0.02).astype(np.float32)


def hard_rows(random: np.random.Generator, columns: int) -> Floats:
    """A few rows of every kind that has its own branch or rounding in some search."""
    shape = (3, columns)
    plain = heavy_tailed(random, *shape)
    sparse = np.where(random.random(shape) < 0.01, plain, np.float32(0))
    zero_runs = plain.copy()
    zero_runs[:, : columns // 3] = 0
    zero_runs[0] = 0
    signed_zeros = plain.copy()
    signed_zeros[:, ::7] = -0.0
    signed_zeros[:, 32:64] = np.abs(signed_zeros[:, 32:64])
    signed_zeros[:, 32] = -0.0
    signed_zeros[0] = -0.0
    outliers = plain.copy()
    outliers[:, ::100] *= 1000
    block_scales = np.exp(-60 * random.random((3, columns // 16))).repeat(16, axis=1)
    kinds = [
        plain,
        sparse,
        zero_runs,
        signed_zeros,
        outliers,
        plain * block_scales,
        plain * np.exp(-80 * random.random(shape)),
        plain * 1e-30,
        np.clip(plain * 1e-38, -1e-38, 1e-38),  # denormal: inverse scales overflow
        np.full(shape, plain[0, 0]),
        plain[:, ::32].repeat(32, axis=1),  # constant blocks
        -1 - 1e-7 * random.integers(0, 5, shape),  # nearly constant: the 2x2 systems cancel, scales turn negative
        1 + 1e-7 * random.integers(0, 5, shape),
        -1 - 3e-3 * random.random(shape),
        random.integers(-8, 8, shape),  # ties in rounding
        random.integers(-1, 2, shape),
        np.abs(plain),
        -np.abs(plain),
        (plain.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),  # bfloat16
    ]
    return np.concatenate(kinds).astype(np.float32)


def importances(random: np.random.Generator, columns: int) -> dict[str, Floats]:
    """Importance as collected, and as it should not be: with runs of zeros, all zero, over 30 decades."""
    usual = np.exp(1.5 * random.normal(size=columns)).astype(np.float32)
    holes = np.where(random.random(columns) < 0.3, np.float32(0), usual)
    holes[: columns // 4] = 0
    return {
        "usual": usual,
        "holes": holes,
        "ones": np.ones(columns, np.float32),
        "zeros": np.zeros(columns, np.float32),
        "wide": (np.exp(12 * random.normal(size=columns)) * 1e-12).astype(np.float32),
    }


def importance_of(random: np.random.Generator, columns: int, kind: str) -> Floats | None:
    """One of `importances`; None for "none"."""
    return None if kind == "none" else importances(random, columns)[kind]


def least(name: str, columns: int) -> Floats | None:
    """The least that a type is made with: no importance, or the same for every column where ggml asks for it."""
    return np.ones(columns, np.float32) if TYPES[name].needs_importance else None


def assert_same_blocks(got: NDArray[np.uint8], wanted: NDArray[np.uint8], name: str) -> None:
    size = TYPES[name].size_bytes
    wrong = np.flatnonzero((got.reshape(-1, size) != wanted.reshape(-1, size)).any(axis=1))
    assert got.shape == wanted.shape
    assert not len(wrong), f"{len(wrong)} of {got.size // size} blocks of {name} differ, the first is {wrong[0]}"


@needs_peer
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", TYPES)
def test_bytes_equal_ggml_without_importance(name: str, backend: Backend) -> None:
    rows = hard_rows(np.random.default_rng(1), 768)
    weights = least(name, 768)
    assert_same_blocks(quantize(rows, name, weights, backend=backend), peer_quantize(rows, name, weights), name)


@needs_peer
@pytest.mark.parametrize("kind", ["usual", "holes", "ones", "zeros", "wide"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_bytes_equal_ggml_with_importance(name: str, backend: Backend, kind: str) -> None:
    random = np.random.default_rng(2)
    rows = hard_rows(random, 768)
    importance = importances(random, 768)[kind]
    assert_same_blocks(quantize(rows, name, importance, backend=backend), peer_quantize(rows, name, importance), name)


@needs_peer
@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    width=st.integers(1, 5),
    kind=st.sampled_from(["least", "usual", "holes", "ones", "zeros", "wide"]),
    exponent=st.integers(-44, 4),
    shift=st.sampled_from([0.0, -1.0, 1.0, 30.0]),
)
def test_any_shape_and_scale_equals_truth_and_ggml(
    name: str, seed: int, count: int, width: int, kind: str, exponent: int, shift: float
) -> None:
    random = np.random.default_rng(seed)
    columns = width * block_size(name)
    rows = ((heavy_tailed(random, count, columns) + np.float32(shift)) * np.float32(10.0**exponent)).astype(np.float32)
    importance = least(name, columns) if kind == "least" else importances(random, columns)[kind]
    try:
        got = quantize(rows, name, importance)
    except ValueError as error:
        assert re.search("beyond (float16|its one byte)", str(error))
        return
    assert_same_blocks(got, quantize(rows, name, importance, backend="reference"), name)
    assert_same_blocks(got, peer_quantize(rows, name, importance), name)


@needs_peer
@pytest.mark.slow
@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_bytes_equal_ggml_on_a_hundred_thousand_blocks(name: str, weighed: bool) -> None:
    blocks = 0
    for seed in range(1000):
        random = np.random.default_rng(seed)
        rows = np.concatenate([heavy_tailed(random, 512, 4096), hard_rows(random, 4096)])
        importance = importances(random, 4096)[["usual", "holes", "wide"][seed % 3]] if weighed else least(name, 4096)
        assert_same_blocks(quantize(rows, name, importance), peer_quantize(rows, name, importance), name)
        blocks += rows.size // block_size(name)
        if blocks >= 100_000:
            break


@needs_peer
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_any_bytes_dequantize_as_in_ggml_bit_for_bit(name: str) -> None:
    random = np.random.default_rng(3)
    size = 512 // block_size(name) * TYPES[name].size_bytes
    drawn = random.integers(0, 256, (64, size), np.uint8)
    made = quantize(hard_rows(random, 512), name, least(name, 512))
    with np.errstate(invalid="ignore", over="ignore"):  # a scale drawn at random may be infinite or NaN
        got = dequantize(np.concatenate([drawn, made]), name, 512)
    wanted = peer_dequantize(np.concatenate([drawn, made]), name, 512)
    same = got.view(np.uint32) == wanted.view(np.uint32)
    assert (same | (np.isnan(got) & np.isnan(wanted))).all() and same[64:].all()


@pytest.mark.parametrize("name", TYPES)
def test_dequantized_weights_equal_the_gguf_package(name: str) -> None:
    blocks = quantize(heavy_tailed(np.random.default_rng(4), 5, 512), name, least(name, 512))
    theirs = gguf.quants.dequantize(
        blocks.view(np.float32) if name == "F32" else blocks, gguf.GGMLQuantizationType[name]
    )
    assert np.array_equal(dequantize(blocks, name), theirs.reshape(5, 512))


# sha256 of ggml's own bytes for `exact_rows`, first 16 digits: (with the least importance, with importance).
GOLDEN: dict[str, tuple[str, str]] = {
    "Q4_0": ("d90075f4f5831275", "8fa7c64ead872db3"),
    "Q4_1": ("8336320d8a5483dc", "1657419002f944d5"),
    "Q5_0": ("92ff29fefa7f2a33", "7fc03c87a570f955"),
    "Q5_1": ("1738e19f720eee9f", "3bf70c3054e83e11"),
    "Q8_0": ("aadbfb48be85b959", "aadbfb48be85b959"),
    "Q2_K": ("97db5275acfeff2a", "d02eb30f12dbecb3"),
    "Q3_K": ("5826f5ccff7860bd", "e764bf7f0c65a584"),
    "Q4_K": ("b77e7ff05cdc54dc", "ad24054997fc7bd3"),
    "Q5_K": ("9d47a7427eefb988", "377c098e5a01cdcb"),
    "Q6_K": ("2eb4bf7326d9d1f7", "650b9832060fb3d7"),
    "IQ4_NL": ("c7dd4850b1b8fc4d", "4e0e4100040fb72d"),
    "IQ4_XS": ("f8dcf217346669e4", "877d86b627aa0052"),
    "IQ3_XXS": ("3e10a81b853ea282", "7d616c586a5103d4"),
    "IQ3_S": ("280460a2f513c5df", "86d71bf2f1da4b79"),
    "IQ1_M": ("5c1a67a6dd393bb6", "50a00f9d4db75637"),
    "IQ1_S": ("73cce3b17f213f02", "55f900ec556c7b75"),
    "IQ2_XXS": ("f84d16889161a5a9", "5b2bc98314fe6c70"),
    "IQ2_XS": ("3acc00fcd187cf2c", "d1f53d583faeab77"),
    "IQ2_S": ("134bc2b24ccea552", "da4560f5837620a8"),
    "TQ1_0": ("24ac9d5ea5ee3d48", "24ac9d5ea5ee3d48"),
    "TQ2_0": ("430360af0e54fb01", "430360af0e54fb01"),
    "MXFP4": ("6b5c91fd1662d784", "6b5c91fd1662d784"),
    "NVFP4": ("7385a3c27f21cb95", "7385a3c27f21cb95"),
}


def exact_rows() -> tuple[Floats, Floats]:
    """Rows and importance made of integers and powers of two only, so that every platform makes the same."""
    random = np.random.default_rng(5)
    powers = np.ldexp(np.float32(1), random.integers(-9, 0, (17, 1)).astype(np.int32))
    unit = random.integers(-(2**20), 2**20, (17, 512)).astype(np.float32) / np.float32(2**20)
    return unit * unit * unit * powers, (random.integers(0, 1024, 512) / 64).astype(np.float32)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_golden_bytes(name: str) -> None:
    rows, importance = exact_rows()
    digests = [hashlib.sha256(quantize(rows, name, weights).tobytes()) for weights in (least(name, 512), importance)]
    assert tuple(digest.hexdigest()[:16] for digest in digests) == GOLDEN[name]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_importance_changes_the_bytes_only_where_the_type_uses_it(name: str) -> None:
    rows, importance = exact_rows()
    same = np.array_equal(quantize(rows, name, least(name, 512)), quantize(rows, name, importance))
    assert same != TYPES[name].uses_importance


@pytest.mark.parametrize("name", WEIGHED_TYPES)
def test_importance_lowers_the_weighted_error(name: str) -> None:
    random = np.random.default_rng(6)
    rows = heavy_tailed(random, 64, 512)
    importance = importances(random, 512)["usual"]
    errors = [
        float((importance * (dequantize(quantize(rows, name, weights), name) - rows) ** 2).sum(dtype=np.float64))
        for weights in (least(name, 512), importance)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_zeros_stay_zeros(name: str) -> None:
    rows = np.zeros((2, 512), np.float32)
    assert not dequantize(quantize(rows, name, least(name, 512)), name).any()
    assert not dequantize(quantize(rows, name, np.ones(512, np.float32)), name).any()


def test_q8_0_error_is_at_most_half_a_step() -> None:
    rows = heavy_tailed(np.random.default_rng(7), 8, 512)
    largest = np.abs(rows.reshape(-1, 32)).max(axis=1).repeat(32).reshape(rows.shape)
    step = largest / 127
    bound = step / 2 * (1 + 1e-6) + largest * 2.0**-11  # half a step, and the scale's own rounding to float16
    assert (np.abs(dequantize(quantize(rows, "Q8_0"), "Q8_0") - rows) <= bound).all()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_gives_torch_and_the_bytes_of_the_float32_values(name: str, dtype: torch.dtype) -> None:
    random = np.random.default_rng(8)
    rows = torch.from_numpy(heavy_tailed(random, 7, 512)).to(dtype)
    importance = torch.from_numpy(importances(random, 512)["usual"])
    got = quantize(rows, name, importance)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == torch.uint8
    assert np.array_equal(got.numpy(), quantize(rows.float().numpy(), name, importance.numpy()))
    back = dequantize(got, name)
    assert back.dtype == torch.float32
    assert back.shape == rows.shape


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q6_K", "IQ1_M", "IQ2_XS", "IQ3_S", "IQ4_XS", "TQ1_0", "NVFP4"])
def test_threads_slabs_and_strides_never_change_a_byte(name: str) -> None:
    random = np.random.default_rng(9)
    wide = heavy_tailed(random, 600, 1024)
    importance = importances(random, 512)["usual"]
    rows = wide[::2, 512:]
    whole = quantize(np.ascontiguousarray(rows), name, importance)
    assert np.array_equal(quantize(rows, name, importance, threads=3), whole)
    assert np.array_equal(np.concatenate([quantize(row[None], name, importance) for row in rows[:20]]), whole[:20])


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_row_and_column(name: str, value: float) -> None:
    rows = np.ones((700, 512), np.float32)
    rows[611, 509] = value
    with pytest.raises(ValueError, match="row 611 column 509"):
        quantize(rows, name, least(name, 512))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", HALF_TYPES)
def test_a_scale_beyond_float16_is_refused_by_row_and_columns(name: str, backend: Backend) -> None:
    rows = np.full((700 if backend == "cpu" else 20, 512), 0.5, np.float32)
    rows[-7, 256::2] = -3e9
    with pytest.raises(ValueError, match=rf"row {len(rows) - 7} columns 25[67] to"):
        quantize(rows, name, least(name, 512), backend=backend)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("name", [name for name in HALF_TYPES if name in BLOCK_TYPES])
def test_weights_whose_squares_overflow_are_refused_and_never_stored_as_zeros(name: str, weighed: bool) -> None:
    rows = np.full((3, 512), 0.5, np.float32)
    rows[2, 300] = -1e20
    with pytest.raises(ValueError, match=r"row 2 columns \d+ to \d+ is beyond float16"):
        quantize(rows, name, np.ones(512, np.float32) if weighed else least(name, 512))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", [name for name, known in TYPES.items() if known.needs_importance])
def test_importance_is_demanded_where_ggml_demands_it(name: str, backend: Backend) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be made without importance"):
        quantize(np.ones((1, 256), np.float32), name, backend=backend)


def test_wrong_arguments_are_refused_with_what_would_fit() -> None:
    rows = np.ones((2, 256), np.float32)
    for call, message in (
        (lambda: quantize(rows, "Q9_K"), "unknown ggml type 'Q9_K'; known are F32"),
        (lambda: quantize(rows[0], "Q4_K"), r"rows must be \[R, C\]"),
        (lambda: quantize(rows[:, :250], "Q4_K"), "blocks of 256 weights; a row of 250 does not fit"),
        (lambda: quantize(rows.astype(np.float64), "Q4_K"), "rows must be f32 or f16; got float64"),
        (lambda: quantize(rows, "Q4_K", np.ones(255, np.float32)), r"one value per column: \[256\]"),
        (lambda: quantize(rows, "Q4_K", np.full(256, -1, np.float32)), "column 0 holds -1.0"),
        (lambda: quantize(rows, "Q4_K", np.full(256, np.nan, np.float32)), "column 0 holds nan"),
        (lambda: dequantize(np.zeros((1, 143), np.uint8), "Q4_K"), r"must be u8 \[R, multiple of 144\]"),
        (lambda: dequantize(np.zeros((1, 144), np.uint8), "Q4_K", 512), "hold 256 weights of Q4_K, not 512"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@compiled
def _multiply_add(left: Floats, right: Floats, out: Floats) -> None:
    for at in range(0, len(left), WIDTH):
        store(out, at, load(left, at) * load(right, at) + load(right, at))


@compiled
def _round(values: Floats, out: Floats) -> None:
    for at in range(0, len(values), WIDTH):
        store(out, at, nearest_wrapped(load(values, at)))


def test_multiply_and_add_are_never_fused() -> None:
    random = np.random.default_rng(10)
    left, right = random.normal(size=(2, 4096)).astype(np.float32)
    out = np.full(4096, np.nan, np.float32)
    _multiply_add(left, right, out)
    fused = (left.astype(np.float64) * right + right).astype(np.float32)
    assert np.array_equal(out, left * right + right)
    assert not np.array_equal(out, fused)


def test_rounding_goes_to_even_and_wraps_like_ggml() -> None:
    plain = [0.5, 1.5, 2.5, -0.5, -1.5, 3e6, 4194303, 0, -0.0, 7, -7, 0.49]
    values = np.array([*plain, np.nan, np.inf, -np.inf, 1e9], np.float32)
    out = np.full(WIDTH, np.nan, np.float32)
    _round(values, out)
    bits = (values + np.float32(12582912)).view(np.int32)
    assert np.array_equal(out, ((bits & 0x7FFFFF) - 0x400000).astype(np.float32))
    assert out[:13].tolist() == [0, 2, 2, 0, -2, 3e6, 4194303, 0, 0, 7, -7, 0, 0]
