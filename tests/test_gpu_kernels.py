"""The Triton kernels: their bytes are those of the CPU, and what they are compiled to keeps ggml's arithmetic.

On a GPU where there is one; else in Triton's interpreter, and compiled for a GPU that need not be there.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install hubmill[gpu]", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_worker import Case, Outcome, outcomes
from quantkernels.ggml import TYPES, block_size, dequantize, quantize, row_bytes
from quantkernels.ggml.gpu import FIELDS, FLOATS, launches, reading
from quantkernels.ggml.gpu.launch import Launch
from test_ggml_kernels import Floats, assert_same_blocks, hard_rows, heavy_tailed, importances

pytestmark = pytest.mark.slow

NAMES = list(FIELDS)
WEIGHED = [name for name in NAMES if TYPES[name].uses_importance]
TOO_LARGE = ["Q8_0", "Q4_1", "Q2_K", "IQ4_XS", "TQ1_0", "NVFP4"]
SEARCHED = ["Q3_K", "Q6_K", "IQ4_XS"]
# With these every kernel is compiled; the other types differ in constants, and are compiled by the long suite.
COMPILED = ["Q4_0", "Q4_K", "Q3_K", "Q6_K", "IQ4_XS", "TQ1_0", "MXFP4", "NVFP4"]


def random_rows(seed: int, count: int, columns: int) -> Floats:
    return heavy_tailed(np.random.default_rng(seed), count, columns)


def small_rows() -> Floats:
    return hard_rows(np.random.default_rng(1), 256)


def small_importance(kind: str) -> Floats:
    return importances(np.random.default_rng(2), 256)[kind]


def weighed_cases(*kinds: str) -> dict[str, Case]:
    return {
        f"{name} {kind}": Case(type=name, values=small_rows(), importance=small_importance(kind))
        for name in WEIGHED
        for kind in kinds
    }


def cases() -> dict[str, Case]:
    """What the short suite asks the kernels for, so that one process answers it all."""
    made = {f"{name} alone": Case(type=name, values=small_rows()) for name in NAMES} | weighed_cases("holes")
    for name in (*NAMES, *FLOATS):
        made[f"{name} read"] = Case(type=name, values=quantize(random_rows(3, 3, 512), name))
    random = np.random.default_rng(4)
    for name in NAMES:
        bytes_of_rows = random.integers(0, 256, (40, row_bytes(name, 256)), np.uint8)
        for offset in TYPES[name].half_fields:
            bytes_of_rows[:, offset + 1 :: TYPES[name].size_bytes] &= 0xBF  # no infinities
        made[f"{name} read random"] = Case(type=name, values=bytes_of_rows)
    for dtype in ("float16", "bfloat16"):
        for name in ("Q8_0", "Q6_K", "IQ4_XS", "NVFP4", *FLOATS):
            made[f"{name} {dtype}"] = Case(type=name, values=random_rows(5, 3, 512), dtype=dtype)
    made["strided"] = Case(type="Q4_K", values=random_rows(6, 9, 768), skip=256)
    made["long"] = Case(type="Q4_0", values=random_rows(7, 700, 256))  # more lanes than a tile has
    not_finite = np.ones((30, 256), np.float32)
    not_finite[11, 200] = np.nan
    too_large = np.full((30, 512), 0.5, np.float32)
    too_large[13, 256::2] = -3e9
    for name in NAMES:
        made[f"{name} not finite"] = Case(type=name, values=not_finite)
    for name in TOO_LARGE:
        made[f"{name} too large"] = Case(type=name, values=too_large)
    search_overflows = random_rows(8, 3, 512)
    search_overflows[1, 256 + 64 : 256 + 96] = np.linspace(-1e20, 1e20, 32, dtype=np.float32)
    for name in SEARCHED:
        made[f"{name} search overflows"] = Case(type=name, values=search_overflows)
    return made


@pytest.fixture(scope="module")
def made() -> dict[str, Outcome]:
    return outcomes(cases())


@pytest.fixture(scope="module")
def made_weighed() -> dict[str, Outcome]:
    return outcomes(weighed_cases("usual", "ones", "zeros", "wide"))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_the_cpu_without_importance(name: str, made: dict[str, Outcome]) -> None:
    got = made[f"{name} alone"].values
    assert got is not None, made[f"{name} alone"].refusal
    assert_same_blocks(got, quantize(small_rows(), name), name)


@pytest.mark.parametrize("name", WEIGHED)
def test_bytes_equal_the_cpu_with_importance(name: str, made: dict[str, Outcome]) -> None:
    got = made[f"{name} holes"].values
    assert got is not None, made[f"{name} holes"].refusal
    assert_same_blocks(got, quantize(small_rows(), name, small_importance("holes")), name)


@pytest.mark.parametrize("kind", ["usual", "ones", "zeros", "wide"])
@pytest.mark.parametrize("name", WEIGHED)
def test_bytes_equal_the_cpu_with_any_importance(name: str, kind: str, made_weighed: dict[str, Outcome]) -> None:
    got = made_weighed[f"{name} {kind}"].values
    assert got is not None, made_weighed[f"{name} {kind}"].refusal
    assert_same_blocks(got, quantize(small_rows(), name, small_importance(kind)), name)


@pytest.mark.parametrize("what", ["read", "read random"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_read_equal_the_cpu_bit_for_bit(name: str, what: str, made: dict[str, Outcome]) -> None:
    case, got = cases()[f"{name} {what}"], made[f"{name} {what}"].values
    with np.errstate(all="ignore"):
        wanted = dequantize(np.asarray(case.values, np.uint8), name)
    assert got is not None
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "IQ4_XS", "NVFP4", *FLOATS])
def test_half_precision_rows_give_the_bytes_of_their_values(name: str, dtype: str, made: dict[str, Outcome]) -> None:
    rows = torch.from_numpy(random_rows(5, 3, 512)).to(torch.float16 if dtype == "float16" else torch.bfloat16)
    got = made[f"{name} {dtype}"].values
    assert got is not None
    assert np.array_equal(got, quantize(rows, name).numpy())


def test_strided_rows_and_many_tiles_change_no_byte(made: dict[str, Outcome]) -> None:
    for key, rows, name in (
        ("strided", random_rows(6, 9, 768)[:, 256:], "Q4_K"),
        ("long", random_rows(7, 700, 256), "Q4_0"),
    ):
        got = made[key].values
        assert got is not None
        assert_same_blocks(got, quantize(rows, name), name)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused_by_row_and_column(name: str, made: dict[str, Outcome]) -> None:
    assert "row 11 column 200 holds nan" in made[f"{name} not finite"].refusal


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_scale_that_does_not_fit_is_refused_by_row_and_columns(name: str, made: dict[str, Outcome]) -> None:
    assert f"row 13 columns 256 to {256 + block_size(name) - 1} is beyond" in made[f"{name} too large"].refusal


@pytest.mark.parametrize("name", SEARCHED)
def test_a_search_that_overflows_is_refused(name: str, made: dict[str, Outcome]) -> None:
    assert re.search(r"row 1 columns (256|320) to .* beyond float16", made[f"{name} search overflows"].refusal)


def test_types_without_a_kernel_and_rows_elsewhere_are_refused() -> None:
    rows = torch.ones(1, 256)
    blocks = torch.empty(1, 144, dtype=torch.uint8)
    unheard = replace(TYPES["Q4_K"], name="Q9_K")
    with pytest.raises(ValueError, match="no GPU kernel makes Q9_K"):
        launches(rows, unheard, None, blocks)
    with pytest.raises(ValueError, match="no GPU kernel reads Q9_K"):
        reading(blocks, unheard, rows)
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        quantize(rows, "Q4_K", backend="triton")
    with pytest.raises(ValueError, match="no GPU kernel makes Q4_K with the search 'thorough'"):
        quantize(rows, "Q4_K", backend="triton", search="thorough")


POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


def type_of(argument: torch.Tensor | float) -> str:
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i64"


def compiled_text(launch: Launch) -> tuple[str, Any]:
    """The PTX of a launch on an H100 or H200, and the options that ptxas got."""
    constants = {**launch.constants, "T": launch.tile}
    names = [name for name in launch.kernel.arg_names if name not in constants]
    signature = dict(zip(names, map(type_of, (*launch.arguments, launch.count)), strict=True))
    source = ASTSource(
        fn=launch.kernel,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(launch.options))
    assert made.asm["cubin"]
    return made.asm["ptx"], made.metadata


def all_launches(name: str, dtype: torch.dtype) -> list[Launch]:
    known = TYPES[name]
    rows = torch.zeros(2, 512, dtype=dtype)
    out = torch.zeros(2, row_bytes(name, 512), dtype=torch.uint8)
    weighed = [torch.ones(512)] if known.uses_importance else []
    found = [launch for importance in (None, *weighed) for launch in launches(rows, known, importance, out)]
    return [*found, reading(out, known, torch.zeros(2, 512))]


def check_arithmetic(name: str, dtype: torch.dtype) -> None:
    for launch in all_launches(name, dtype):
        text, options = compiled_text(launch)
        kernel = f"{name} {launch.kernel.__name__}"
        wrong = re.findall(r"\b(?:fma|mad)\.\S*f32|\S+\.ftz\S*|\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)\S*", text)
        assert not wrong, f"{kernel} is compiled to {sorted(set(wrong))}"
        assert not options.enable_fp_fusion, f"{kernel} lets ptxas fuse"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_kernels_never_fuse_flush_or_approximate(name: str) -> None:
    check_arithmetic(name, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_all_compiled_kernels_never_fuse_flush_or_approximate(name: str, dtype: torch.dtype) -> None:
    check_arithmetic(name, dtype)


def test_the_types_compiled_have_every_kernel() -> None:
    rows = torch.float32
    kernels = [{launch.kernel for name in names for launch in all_launches(name, rows)} for names in (COMPILED, NAMES)]
    assert kernels[0] == kernels[1]


def test_compiled_kernels_divide_and_take_roots_with_ieee_rounding() -> None:
    made = all_launches("Q4_K", torch.float32)
    search = next(launch for launch in made if launch.constants.get("WEIGHTS") == "importance * root")
    text, _ = compiled_text(search)
    assert "div.rn.f32" in text
    assert "sqrt.rn.f32" in text
