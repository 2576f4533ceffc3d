"""The Triton kernels of the lattice types: their bytes and weights are those of the reference, compiled they stay so.

On a GPU where there is one; else in Triton's interpreter, and compiled for a GPU that need not be there.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install hubmill[gpu]", allow_module_level=True)

from gpu_worker import Case, Outcome, outcomes
from quantkernels.ggml import TYPES, dequantize, quantize, row_bytes
from quantkernels.ggml.gpu.lattice import ROUNDED, tables
from quantkernels.ggml.lattice import SHELLS, lattice
from test_ggml_kernels import Floats, assert_same_blocks, hard_rows, heavy_tailed, importances
from test_gpu_kernels import check_arithmetic

pytestmark = pytest.mark.slow

NAMES = ["IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"]
ALONE = [name for name in NAMES if not TYPES[name].needs_importance]
REFUSED = [*((name, "overflowing") for name in NAMES), ("IQ3_XXS", "outliers"), ("IQ2_S", "outliers")]


def few_rows() -> Floats:
    """A row of every kind, and one with sub-blocks of zeros between others."""
    holes = heavy_tailed(np.random.default_rng(5), 1, 256)
    holes[:, 32:64] = 0
    holes[:, 128:144] = 0
    return np.concatenate([hard_rows(np.random.default_rng(1), 256)[1::3], holes, np.zeros_like(holes)])


def many_rows() -> Floats:
    return hard_rows(np.random.default_rng(2), 512)


def importance(kind: str, columns: int) -> Floats:
    return importances(np.random.default_rng(3), columns)[kind]


def random_blocks(name: str) -> NDArray[np.uint8]:
    """Blocks of any bytes, but for infinite scales."""
    known = TYPES[name]
    blocks = np.random.default_rng(4).integers(0, 256, (9, row_bytes(name, 512)), np.uint8)
    for offset in known.half_fields:
        blocks[:, offset + 1 :: known.size_bytes] &= 0xBF
    for offset in known.half_nibbles[-1:]:
        blocks[:, offset :: known.size_bytes] &= 0xBF
    return blocks


def overflowing() -> Floats:
    rows = heavy_tailed(np.random.default_rng(6), 2, 512)
    rows[1, 256:] *= 1e22
    return rows


def outliers() -> Floats:
    """Sub-blocks of which ggml's own scale is too large for float16."""
    rows = heavy_tailed(np.random.default_rng(6), 2, 512)
    rows[1, 256:] *= 1e9
    return rows


def cases() -> dict[str, Case]:
    """What the short suite asks for, so that one process answers it all."""
    made = {
        f"{name} weighed": Case(type=name, values=few_rows(), importance=importance("holes", 256)) for name in NAMES
    }
    made |= {f"{name} alone": Case(type=name, values=few_rows()) for name in ALONE}
    made |= {f"{name} read": Case(type=name, values=random_blocks(name)) for name in NAMES}
    for name, kind in REFUSED:
        rows = overflowing() if kind == "overflowing" else outliers()
        made[f"{name} {kind}"] = Case(type=name, values=rows, importance=importance("usual", 512))
    bits16 = heavy_tailed(np.random.default_rng(7), 1, 512)
    made["bfloat16"] = Case(type="IQ1_M", values=bits16, dtype="bfloat16", skip=256)
    return made


@pytest.fixture(scope="module")
def made() -> dict[str, Outcome]:
    return outcomes(cases())


def check_equal(name: str, case: Case, outcome: Outcome) -> None:
    assert outcome.values is not None, outcome.refusal
    wanted = quantize(case.values.astype(np.float32), name, case.importance, backend="reference")
    assert_same_blocks(outcome.values.astype(np.uint8), wanted, name)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_the_reference_with_importance(name: str, made: dict[str, Outcome]) -> None:
    check_equal(name, cases()[f"{name} weighed"], made[f"{name} weighed"])


@pytest.mark.parametrize("name", ALONE)
def test_bytes_equal_the_reference_without_importance(name: str, made: dict[str, Outcome]) -> None:
    check_equal(name, cases()[f"{name} alone"], made[f"{name} alone"])


@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_the_reference_on_many_rows_and_tiles(name: str) -> None:
    rows = many_rows()
    given = {
        kind: Case(type=name, values=rows, importance=importance(kind, 512))
        for kind in ("usual", "ones", "zeros", "wide")
    }
    if name in ALONE:
        given["alone"] = Case(type=name, values=rows)
    answers = outcomes(given)
    for kind, case in given.items():
        check_equal(name, case, answers[kind])


@pytest.mark.parametrize("name", NAMES)
def test_weights_read_equal_the_cpu_bit_for_bit(name: str, made: dict[str, Outcome]) -> None:
    got = made[f"{name} read"].values
    with np.errstate(all="ignore"):
        wanted = dequantize(random_blocks(name), name)
    assert got is not None
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_what_no_scale_can_hold_is_refused_as_on_the_cpu(name: str, kind: str, made: dict[str, Outcome]) -> None:
    case = cases()[f"{name} {kind}"]
    with pytest.raises(ValueError, match="row 1 columns 256 to 511 is beyond float16") as refused:
        quantize(case.values, name, case.importance, backend="reference")
    assert made[f"{name} {kind}"].refusal == str(refused.value)


def test_half_precision_and_strided_rows_give_the_bytes_of_their_values(made: dict[str, Outcome]) -> None:
    case, got = cases()["bfloat16"], made["bfloat16"].values
    rows = torch.from_numpy(case.values).to(torch.bfloat16)[:, 256:].float().numpy()
    assert got is not None
    assert_same_blocks(got.astype(np.uint8), quantize(rows, "IQ1_M", backend="reference"), "IQ1_M")


@pytest.mark.parametrize("name", SHELLS)
def test_tables_list_the_neighbours_of_every_code_in_order(name: str) -> None:
    known, made = lattice(name), tables(name, torch.device("cpu"))
    bounds, entries = made.bounds.numpy(), made.entries.numpy()
    for code in range(0, len(known.index_of), 7):
        listed = entries[bounds[code] : bounds[code + 1]]
        index = int(known.index_of[code])
        if index >= 0:
            assert listed.tolist() == [ROUNDED | index << 16 | code]
        elif index > -len(bounds):
            first, last = known.neighbour_start[-1 - index], known.neighbour_start[-index]
            assert np.array_equal(listed >> 16, known.neighbours[first:last])
            assert np.array_equal(known.index_of[listed & 0xFFFF], listed >> 16)
        else:
            assert not len(listed)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", ["IQ3_S", "IQ2_XXS", "IQ1_M"])
def test_compiled_kernels_never_fuse_flush_or_approximate(name: str) -> None:
    check_arithmetic(name, torch.bfloat16)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_all_compiled_kernels_never_fuse_flush_or_approximate(name: str, dtype: torch.dtype) -> None:
    check_arithmetic(name, dtype)
