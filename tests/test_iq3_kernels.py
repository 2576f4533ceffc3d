"""IQ3_XXS and IQ3_S: what is theirs alone, and the thorough search against its truth.

`test_ggml_kernels.py` compares all types with stock ggml.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ggml_peer import library as peer_library
from ggml_peer import quantize as peer_quantize
from quantkernels.ggml import TYPES, dequantize, quantize
from quantkernels.ggml.cpu.iq3 import tables
from quantkernels.ggml.cpu.iq3_search import CODES
from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.packing.iq3 import pack_iq3, unpack_fields
from quantkernels.ggml.thorough.cpu_iq3 import quantize_thorough
from quantkernels.ggml.thorough.reference_iq3 import improve_blocks
from test_ggml_kernels import assert_same_blocks, hard_rows, heavy_tailed, importance_of

pytestmark = pytest.mark.slow

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

NAMES = ["IQ3_XXS", "IQ3_S"]
KINDS = ["none", "usual", "holes", "ones", "zeros", "wide"]
needs_peer = pytest.mark.skipif(peer_library() is None, reason="xllamacpp is not installed")


def thorough(rows: Floats, name: str, importance: Floats | None) -> Bytes:
    out = np.full((len(rows), rows.shape[1] // 256 * TYPES[name].size_bytes), 0xA5, np.uint8)
    quantize_thorough(rows, importance, name, out)
    return out


def block_errors(rows: Floats, blocks: Bytes, name: str, importance: Floats | None) -> NDArray[np.float64]:
    """The weighted square error of each super-block, in float64."""
    off = rows.astype(np.float64) - dequantize(blocks, name)
    errors: NDArray[np.float64] = (off * off * (1 if importance is None else importance)).reshape(-1, 256).sum(axis=1)
    return errors


@needs_peer
@pytest.mark.parametrize("kind", ["none", "usual", "ones"])
@pytest.mark.parametrize("name", NAMES)
def test_values_on_the_borders_of_cells_equal_ggml(name: str, kind: str) -> None:
    """There the neighbours that the kernel leaves out elsewhere may win: each value is a few last places off one."""
    random = np.random.default_rng(2)
    scale = (1 / (15 + 0.2 * random.integers(-15, 16, (300, 1)))).astype(np.float32)
    rows = np.float32(2) * random.integers(-8, 9, (300, 256)).astype(np.float32) * scale
    rows[:, ::32] = 1  # the largest of each sub-block, so that one trial in 31 has this scale
    rows *= 1 + random.integers(-3, 4, rows.shape).astype(np.float32) * np.float32(2**-23)
    importance = importance_of(random, 256, kind)
    assert_same_blocks(quantize(rows, name, importance), peer_quantize(rows, name, importance), name)


@needs_peer
@pytest.mark.parametrize("name", NAMES)
def test_a_heavy_weight_on_small_values_wraps_around_as_in_ggml(name: str) -> None:
    """Where only tiny values count, a turned sign may be millions of scales away: past 2**22 ggml's rounding wraps."""
    random = np.random.default_rng(3)
    rows = heavy_tailed(random, 60, 512)
    importance = np.zeros(512, np.float32)
    importance[::3] = 1
    rows[:, ::3] *= np.exp(-16 * random.random((60, 1))).astype(np.float32)
    wild = random.random(rows[:, 1::3].shape)
    rows[:, 1::3] *= np.where(wild < 0.9, np.float32(1e-20), np.float32(-1) * np.exp(16 * wild).astype(np.float32))
    rows[:, 2::3] *= np.float32(1e-9)
    assert_same_blocks(quantize(rows, name, importance), peer_quantize(rows, name, importance), name)


@needs_peer
def test_empty_sub_blocks_shift_the_others_as_in_ggml() -> None:
    random = np.random.default_rng(4)
    rows = heavy_tailed(random, 256, 256)
    rows.reshape(256, 8, 32)[(np.arange(256)[:, None] >> np.arange(8)) & 1 == 0] = 0
    for backend in ("cpu", "reference"):
        assert_same_blocks(quantize(rows, "IQ3_S", backend=backend), peer_quantize(rows, "IQ3_S"), "IQ3_S")
    errors, theirs = (
        block_errors(rows, blocks, "IQ3_S", None)
        for blocks in (thorough(rows, "IQ3_S", None), peer_quantize(rows, "IQ3_S"))
    )
    assert errors.sum() < 0.2 * theirs.sum()  # the thorough search puts every sub-block in its place


@pytest.mark.parametrize("name", NAMES)
def test_fields_survive_packing(name: str) -> None:
    blocks = np.random.default_rng(6).integers(0, 256, (64, TYPES[name].size_bytes), np.uint8)
    blocks[:, 1] &= 0x7B
    assert np.array_equal(pack_iq3(name, unpack_fields(blocks, name)), blocks)


@pytest.mark.parametrize("name", NAMES)
def test_left_out_neighbours_lie_behind_one_that_stays(name: str) -> None:
    known, grid = tables(name), lattice(name)
    points = [tuple(point) for point in ((grid.points - 1) // 2).tolist()]
    for code in np.random.default_rng(7).choice(CODES, 400, replace=False).tolist():
        own = tuple(code >> shift & 7 for shift in (0, 3, 6, 9))
        index = int(grid.index_of[code])
        if index >= 0:
            assert all(known.lists[entry] & 255 == 0 for entry in (code, code + CODES))
            continue
        listed = grid.neighbours[grid.neighbour_start[-1 - index] : grid.neighbour_start[-index]].tolist()
        wanted = [points[i] for i in listed]
        short, whole = (_listed(known.neighbours, int(known.lists[entry])) for entry in (code, code + CODES))
        assert whole == wanted
        assert short == [point for point in wanted if point in short]  # ggml's order
        for point in wanted:
            earlier = [stays for stays in short if wanted.index(stays) <= wanted.index(point)]
            assert any(_between(stays, own, point) for stays in earlier)


def _listed(neighbours: NDArray[np.uint16], entry: int) -> list[tuple[int, ...]]:
    """The points of a list without what fills its last four."""
    found = neighbours[entry >> 8 :][: 4 * (entry & 255)].tolist()
    points = [tuple((point >> shift & 15) // 2 for shift in (0, 4, 8, 12)) for point in found]
    return list(dict.fromkeys(points))


def _between(point: tuple[int, ...], near: tuple[int, ...], far: tuple[int, ...]) -> bool:
    return all(min(a, b) <= value <= max(a, b) for value, a, b in zip(point, near, far, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_thorough_bytes_equal_the_truth_and_no_block_is_worse_than_ggml(name: str, kind: str) -> None:
    random = np.random.default_rng(9)
    rows = hard_rows(random, 512)
    importance = importance_of(random, 512, kind)
    stock = quantize(rows, name, importance)
    got = thorough(rows, name, importance)
    size = TYPES[name].size_bytes
    assert_same_blocks(got, improve_blocks(rows, name, importance, stock.reshape(-1, size)).reshape(got.shape), name)
    assert (block_errors(rows, got, name, importance) <= block_errors(rows, stock, name, importance)).all()


@pytest.mark.parametrize("kind", ["none", "usual"])
@pytest.mark.parametrize("tail", [4, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_thorough_error_is_at_least_a_tenth_below_ggml(name: str, tail: int, kind: str) -> None:
    random = np.random.default_rng(10)
    rows = random.standard_t(tail, (16, 1024)).astype(np.float32)
    importance = importance_of(random, 1024, kind)
    stock, got = quantize(rows, name, importance), thorough(rows, name, importance)
    limit = 0.7 if kind == "none" else 0.9
    assert block_errors(rows, got, name, importance).sum() < limit * block_errors(rows, stock, name, importance).sum()


@pytest.mark.parametrize("kind", ["none", "usual"])
@pytest.mark.parametrize("name", NAMES)
def test_thorough_error_is_within_a_hundredth_of_the_optimum(name: str, kind: str) -> None:
    random = np.random.default_rng(11)
    rows = random.standard_t(4, (10, 256)).astype(np.float32)
    importance = importance_of(random, 256, kind)
    got = thorough(rows, name, importance)
    weight = np.ones(256) if importance is None else importance.astype(np.float64)
    d = got[:, :2].copy().view(np.float16)[:, 0].astype(np.float64)
    best = [least_error(row.astype(np.float64), weight, name, own) for row, own in zip(rows, d, strict=True)]
    assert block_errors(rows, got, name, importance).sum() <= 1.01 * sum(best)


def least_error(x: NDArray[np.float64], weight: NDArray[np.float64], name: str, near: float) -> float:
    """The least error over 80 d from 0.6 to 1.7 times `near`, all sub-scales, points and signs."""
    value = lattice(name).values.astype(np.float64) * (0.25 if name == "IQ3_XXS" else 1)
    size = np.abs(x).reshape(64, 1, 4)
    linear = (weight.reshape(64, 1, 4) * size * value) * 2
    square = (weight.reshape(64, 1, 4) * value * value).sum(axis=2)
    straight = linear.sum(axis=2)
    turned = straight - 2 * linear.min(axis=2)
    odd = (x < 0).reshape(32, 8).sum(axis=1) % 2 == 1 if name == "IQ3_XXS" else np.zeros(32, np.bool_)
    most = 0.0
    for d in near * np.exp(np.linspace(np.log(0.6), np.log(1.7), 80)):
        gains = np.zeros((16, 8))
        for k in range(16):
            scale = float(np.float16(d)) * (2 * k + 1)
            plain, other = ((scale * (sums - scale * square)).max(axis=1).reshape(32, 2) for sums in (straight, turned))
            crossed = np.maximum(plain[:, 0] + other[:, 1], other[:, 0] + plain[:, 1])
            gains[k] = np.where(odd, crossed, plain.sum(axis=1)).reshape(8, 4).sum(axis=1)
        most = max(most, float(gains.max(axis=0).sum()))
    return float((weight * x * x).sum()) - most
