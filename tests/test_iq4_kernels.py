"""IQ4_NL and IQ4_XS: what is theirs alone; `test_ggml_kernels.py` compares all types with stock ggml."""

from __future__ import annotations

import numpy as np
import pytest

from quantkernels.compiling import compiled
from quantkernels.ggml import Backend, quantize
from quantkernels.ggml.cpu.iq4 import nearest_code, nearest_level
from quantkernels.ggml.packing.iq4 import LEVELS, MIDDLES
from quantkernels.ggml.reference.iq4 import nearest_level as reference_nearest_level
from quantkernels.lanes import WIDTH, load, store
from test_ggml_kernels import Floats, heavy_tailed

NAMES = ["IQ4_NL", "IQ4_XS"]


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
