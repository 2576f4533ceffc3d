"""The column kernels of a GPU: the codes of the CPU's, and arithmetic that fuses nothing.

On a GPU where there is one; else in Triton's interpreter, and compiled for a GPU that need not be there.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Any

import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install hubmill[gpu]", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from columns_gpu_worker import Case, outcomes
from converter.architecture import Tap
from converter.grids.affine import AffineGrid
from converter.methods import Block, Options
from converter.methods.gptq import gptq
from converter.stats import observe
from quantkernels.columns import Frame, PointFrame, gpu, on, solve
from test_columns_kernel import Problem, even_frame, point_frame, problem, table_frame

# One block and less: the CPU's bits. More: the product behind a block may round otherwise, so errors are compared. The
# interpreter takes a millisecond for what a GPU does in a nanosecond.
QUICK = [(33, 9)]
WITHIN = [(1, 1), (3, 127), (33, 128), (600, 40)]
BEYOND = [(70, 129), (37, 333)]


def frames(rows: int, width: int) -> list[Frame]:
    with_zeros = even_frame(rows, width)
    with_zeros.scale_OG[0] = 0
    return [even_frame(rows, width), table_frame(rows, width), with_zeros]


def problems(shapes: list[tuple[int, int]]) -> list[Problem]:
    return [problem(frame, width) for rows, width in shapes for frame in frames(rows, width)]


def check(given: list[Problem]) -> None:
    cases = [
        Case(weight=one.weight, hessian=one.hessian, root=one.root, order_I=one.order_I, frame=frame)
        for one in given
        if isinstance(frame := one.frame, Frame)
    ]
    for one, found in zip(given, outcomes(cases), strict=True):
        codes = one.solve("cpu")
        if one.weight.shape[1] <= 128:
            assert torch.equal(found.codes, codes)
            assert torch.equal(found.refined, one.refine(codes))
        else:  # a value within rounding of a tie may fall either way, and what follows makes up for it
            assert float((found.codes != codes).double().mean()) < 0.01
            assert float(one.error(found.codes).sum()) == pytest.approx(float(one.error(codes).sum()), rel=0.01)
            assert bool((one.error(found.refined) <= one.error(found.codes) * (1 + 1e-6)).all())


def test_codes_are_those_of_the_cpu() -> None:
    check(problems(QUICK))


@pytest.mark.slow
def test_codes_of_every_shape_are_those_of_the_cpu() -> None:
    check(problems(WITHIN + BEYOND))


def test_lattices_are_solved_on_the_cpu_whatever_the_device() -> None:
    given: Problem = problem(point_frame(5, 64), 64)
    assert isinstance(given.frame, PointFrame)
    with pytest.raises(AssertionError, match="lattices"):
        given.solve("triton")
    moved = on(given.frame, torch.device("cpu"))
    assert torch.equal(solve(given.weight, given.root, moved, given.order_I), given.solve())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_whole_block_is_solved_where_the_options_say() -> None:
    weight_OI, rows_NI = torch.randn(96, 256), torch.randn(900, 256) @ torch.randn(256, 256)
    block = Block(
        where="block",
        tensors={"linear.weight": weight_OI},
        stats={"tap": observe(rows_NI, gram=True)},
        taps=(Tap(name="tap", linears=("linear",)),),
    )
    grids = {"linear.weight": AffineGrid(bits=3, granularity="group", group_size=64)}

    def error(device: str) -> float:
        coded = gptq(block, grids, Options(importance=True, device=device)).coded["linear.weight"]
        assert all(not part.is_cuda for part in coded.parts.values())
        return float(((coded.decode() - weight_OI) @ rows_NI.T).square().mean())

    assert error("cuda") == pytest.approx(error("cpu"), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["even", "table"])
def test_nothing_is_fused_or_approximated_in_what_is_compiled(levels: str) -> None:
    given = problem(even_frame(16, 128) if levels == "even" else table_frame(16, 128), 128)
    assert isinstance(given.frame, Frame)
    device = torch.device("cpu")
    grid, weight = gpu.grid_of(given.frame, given.order_I, device), given.weight
    codes, off = torch.zeros(weight.shape, dtype=torch.int8), torch.zeros_like(weight)
    for launch in (
        gpu.solving(weight, weight, given.root.shares_II, grid, codes, off, 0),
        gpu.refining(weight, weight, given.hessian, grid, codes, off, 0),
    ):
        text = compiled(launch)
        assert not re.search(r"\bfma\.|\.approx|\.ftz", text)
        assert "div.rn.f32" in text


def compiled(launch: gpu.Launch) -> str:
    """The PTX of a launch for sm_90."""
    names = launch.kernel.arg_names
    constants = {**launch.constants, "T": gpu.ROWS}
    signature: dict[str, Any] = {name: kind_of(value) for name, value in zip(names, launch.arguments, strict=False)}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(gpu.OPTIONS))
    text: str = made.asm["ptx"]
    return text


def kind_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        kinds = {torch.float32: "*fp32", torch.int8: "*i8", torch.int64: "*i64"}
        return kinds[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"
