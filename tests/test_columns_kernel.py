"""The column kernels: each numba backend against its plain loop, and the loops against the algebra."""

# O out, I in, B blocks of eight columns, G groups of a row.
from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from quantkernels import columns
from quantkernels.columns import Frame, PointFrame, Root, root_of

SHAPES = [(1, 1), (3, 127), (33, 128), (70, 129), (37, 333)]
EIGHTS = [(1, 8), (33, 128), (5, 200)]
TABLE = (-9.0, -4.0, -2.0, -0.5, 0.25, 1.0, 3.0, 10.0)
LATTICES = [(4, "free"), (4, "even"), (8, "free"), (8, "even"), (8, "none")]
Frames = Frame | PointFrame


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A weight with a well-conditioned Hessian, its root in a shuffled order, and a frame."""

    weight: Tensor
    hessian: Tensor
    root: Root
    order_I: Tensor
    frame: Frames

    def solve(self, backend: columns.Backend = "cpu", threads: int = 1) -> Tensor:
        return columns.solve(self.weight, self.root, self.frame, self.order_I, threads=threads, backend=backend)

    def refine(self, codes: Tensor, sweeps: int = 2, backend: columns.Backend = "cpu", threads: int = 1) -> Tensor:
        frame, moved = columns.refine(
            self.weight, self.hessian, self.frame, codes, sweeps=sweeps, threads=threads, backend=backend
        )
        assert torch.equal(frame.scale_OG, self.frame.scale_OG), "without a ladder scales stay"
        return moved

    def error(self, codes: Tensor) -> Tensor:
        """(w' - w) H (w' - w)^T of each row, f64."""
        off = (self.frame.decode(codes) - self.weight).double()
        return ((off @ self.hessian.double()) * off).sum(1)


def problem(frame: Frames, width: int, hessian: Tensor | None = None, seed: int = 0) -> Problem:
    random = torch.Generator().manual_seed(seed)
    if hessian is None:
        mix = torch.randn(width, width, generator=random, dtype=torch.float64) * 0.3 + torch.eye(width)
        hessian = mix @ mix.T + 0.1 * torch.eye(width)
    order_B = torch.randperm(width // frame.together, generator=random)
    order_I = (order_B[:, None] * frame.together + torch.arange(frame.together)).flatten()
    backwards = hessian[order_I][:, order_I].double().flip(0, 1)
    return Problem(
        weight=torch.randn(len(frame.scale_OG), width, generator=random),
        hessian=hessian.float(),
        root=root_of(torch.linalg.cholesky(backwards).flip(0, 1)),
        order_I=order_I,
        frame=frame,
    )


def even_frame(rows: int, width: int, group_size: int = 32, offset: bool = True) -> Frame:
    random = torch.Generator().manual_seed(width)
    shape = (rows, -(-width // group_size))
    return Frame(
        scale_OG=torch.rand(shape, generator=random) * 0.2 + 0.1,
        zero_OG=torch.randint(-8, 8, shape, generator=random).float(),
        offset_OG=torch.randn(shape, generator=random) * 0.1 * offset,
        group_size=group_size,
        low=-8,
        high=7,
    )


def table_frame(rows: int, width: int) -> Frame:
    even = even_frame(rows, width)
    return dataclasses.replace(even, zero_OG=torch.zeros_like(even.zero_OG), low=0, high=7, table=TABLE)


def own_frame(rows: int, width: int) -> Frame:
    """Each group with eight levels of its own, the last two of which are one."""
    even = even_frame(rows, width)
    steps = torch.rand(*even.scale_OG.shape, 8, generator=torch.Generator().manual_seed(width)) * (torch.arange(8) < 7)
    levels_OGL = (steps * 8).round().cumsum(2) / 8 - 2
    return dataclasses.replace(even, zero_OG=torch.zeros_like(even.zero_OG), low=0, high=7, levels_OGL=levels_OGL)


def point_frame(rows: int, width: int, dimensions: int = 8, signs: str = "free") -> PointFrame:
    """Forty points: all combinations of a few levels would be no lattice, and these leave holes."""
    random = torch.Generator().manual_seed(dimensions)
    levels = torch.tensor([-1.0, 0.0, 1.0] if signs == "none" else [1.0, 3.0, 5.0])
    every = torch.tensor(list(itertools.product(range(3), repeat=dimensions)))
    shape = (rows, -(-width // 16))
    return PointFrame(
        scale_OG=torch.rand(shape, generator=random) * 0.3 + 0.2,
        zero_OG=torch.full(shape, 0.125 if signs == "none" else 0.0),
        group_size=16,
        lattice=f"{dimensions} {signs}",
        points_PD=levels[every[torch.randperm(len(every), generator=random)[:40]]],
        signs=signs,  # type: ignore[arg-type]
    )


def all_frames(rows: int, width: int) -> list[Frames]:
    found: list[Frames] = [even_frame(rows, width), table_frame(rows, width), own_frame(rows, width)]
    return found + [point_frame(rows, width, *lattice) for lattice in LATTICES] * (width % 8 == 0)


@pytest.mark.parametrize(("rows", "width"), [*SHAPES[:3], *EIGHTS[:2]])
def test_one_block_has_the_bits_of_the_reference(rows: int, width: int) -> None:
    for frame in all_frames(rows, width):
        given = problem(frame, width)
        codes = given.solve()
        assert torch.equal(codes, given.solve("reference")), frame.kind
        assert torch.equal(given.refine(codes, 1), given.refine(codes, 1, "reference")), frame.kind


@pytest.mark.parametrize(("rows", "width"), [*SHAPES, EIGHTS[2]])
@pytest.mark.parametrize("threads", [1, 3])
def test_several_blocks_equal_the_reference_where_arithmetic_is_exact(rows: int, width: int, threads: int) -> None:
    """Weights are multiples of 1/16, scales powers of two and shares -1, 0 or 1 with a unit diagonal: every sum is a
    multiple of 1/16 far below 2**20, exact in f32 in any order, so nothing may differ."""
    random = torch.Generator().manual_seed(width)
    sparse = torch.randint(-1, 2, (width, width), generator=random) * (
        torch.rand(width, width, generator=random) < 2 / width
    )
    upper = (sparse.triu(1) + torch.eye(width)).float()
    for frame in all_frames(rows, width):
        powers = 2.0 ** torch.randint(-1, 2, frame.scale_OG.shape, generator=random)
        frame = dataclasses.replace(frame, scale_OG=powers)
        if isinstance(frame, Frame):
            frame = dataclasses.replace(frame, offset_OG=torch.full_like(powers, 0.25))
        given = dataclasses.replace(
            problem(frame, width),
            weight=torch.randint(-160, 160, (rows, width), generator=random) / 16,
            root=root_of(upper),
        )
        codes = given.solve(threads=threads)
        assert torch.equal(codes, given.solve("reference")), frame.kind
        alone = dataclasses.replace(given, root=root_of(torch.eye(width)))
        assert not torch.equal(codes, alone.solve()) or width == 1 or rows * width == 8


@pytest.mark.parametrize(("rows", "width"), [(40, 64), (9, 200)])
def test_codes_are_those_of_gptq_as_it_was_published(rows: int, width: int) -> None:
    """Column by column, each error pushed along the upper root of the inverse, in f64."""
    given = problem(even_frame(rows, width), width)
    frame, order_I = given.frame, given.order_I
    assert isinstance(frame, Frame)
    upper = torch.linalg.cholesky(torch.linalg.inv(given.hessian[order_I][:, order_I].double()), upper=True)
    left = given.weight[:, order_I].double()
    expected = torch.empty_like(left)
    for i, column in enumerate(order_I.tolist()):
        scale, zero, offset = (
            one[:, column // 32].double() for one in (frame.scale_OG, frame.zero_OG, frame.offset_OG)
        )
        expected[:, column] = ((left[:, i] - offset) / scale + zero).round().clamp(frame.low, frame.high)
        value = (expected[:, column] - zero) * scale + offset
        left[:, i:] -= torch.outer((left[:, i] - value) / upper[i, i], upper[i, i:])
    # A value within rounding of a tie falls either way, and what follows makes up for it.
    assert float((given.solve() != expected).double().mean()) < 0.005


@pytest.mark.parametrize(("rows", "width"), [*SHAPES[1:], *EIGHTS[1:]])
def test_a_sweep_never_adds_error_and_nearly_always_takes_some(rows: int, width: int) -> None:
    for frame in all_frames(rows, width):
        given = problem(frame, width)
        codes = given.solve()
        errors = [given.error(codes)]
        errors += [given.error(given.refine(codes, sweeps, threads=3)) for sweeps in (1, 2, 4)]
        for before, after in itertools.pairwise(errors):
            assert bool((after <= before * (1 + 1e-6)).all()), frame.kind
        assert float(errors[-1].sum()) < 0.99 * float(errors[0].sum()), frame.kind


def test_rough_products_end_at_an_error_as_small() -> None:
    given = problem(even_frame(64, 640), 640)
    codes = given.solve()
    root = dataclasses.replace(given.root, rough_II=given.root.shares_II.bfloat16())
    rougher = dataclasses.replace(given, root=root).solve()
    assert not torch.equal(rougher, codes)
    assert float(given.error(rougher).sum()) == pytest.approx(float(given.error(codes).sum()), rel=0.01)
    _, rough = columns.refine(
        given.weight, given.hessian, given.frame, codes, sweeps=2, rough_hessian=given.hessian.bfloat16()
    )
    exact = given.refine(codes)
    assert not torch.equal(rough, exact)
    before, reached, wanted = (float(given.error(some).sum()) for some in (codes, rough, exact))
    assert abs(reached - wanted) < 0.01 * (before - wanted)


def test_after_many_sweeps_no_single_change_of_a_code_helps() -> None:
    for frame in (even_frame(6, 40), table_frame(6, 40)):
        given = problem(frame, 40)
        codes = given.refine(given.solve(), 60)
        least = given.error(codes)
        for column in range(40):
            for code in range(frame.low, frame.high + 1):
                other = codes.clone()
                other[:, column] = code
                # a change must be worth a ten-thousandth of the distance, which is below this share of the error
                assert bool((given.error(other) > least * (1 - 1e-3)).all())


@pytest.mark.parametrize(("dimensions", "signs"), LATTICES)
def test_points_are_the_nearest_there_are_under_a_diagonal_hessian(dimensions: int, signs: str) -> None:
    """Without correlation the bound of an odd count of minuses is exact for eight dimensions; two points of four are
    chosen one after the other, and then only the signs are made even together."""
    frame = point_frame(20, 16, dimensions, signs)
    given = problem(frame, 16, hessian=torch.linspace(0.5, 3, 16).diag())
    codes = given.solve()
    refined = given.refine(codes)
    index = torch.arange(40)
    pairs = index[:, None] if dimensions == 8 else torch.cartesian_prod(index, index)
    masks = torch.tensor([m for m in range(256) if signs == "free" or (signs == "even" and m.bit_count() % 2 == 0)])
    masks = torch.zeros(1, dtype=torch.int64) if signs == "none" else masks
    every = columns.join_code(pairs[:, None], torch.zeros(len(pairs), 1)) + (masks << 22)
    for block in range(2):
        least = torch.full((20,), torch.inf, dtype=torch.float64)
        inside = slice(8 * block, 8 * block + 8)
        values = dataclasses.replace(frame, scale_OG=torch.ones(1, 1), zero_OG=frame.zero_OG[:1, :1])
        units_K8 = values.decode(every.reshape(-1, 1).int())
        for row in range(20):
            off = units_K8 * frame.scale_OG[row, 0] - given.weight[row, inside]
            least[row] = (off.double().square() @ given.hessian.diagonal()[inside].double()).min()
        own = dataclasses.replace(given, weight=given.weight[:, inside], hessian=given.hessian[inside, inside])
        found = own.error(codes[:, block : block + 1])
        slack = 1.3 if (dimensions, signs) == (4, "even") else 1 + 1e-5
        assert bool((found <= slack * least).all()) and bool((found >= least * (1 - 1e-5)).all())
    if (dimensions, signs) != (4, "even"):
        assert torch.equal(refined, codes)


@pytest.mark.parametrize("signs", ["even", "free"])
def test_only_signs_that_the_lattice_has_are_used(signs: str) -> None:
    for dimensions in (4, 8):
        given = problem(point_frame(50, 64, dimensions, signs), 64)
        for codes in (given.solve(), given.refine(given.solve())):
            _, masks = columns.split_code(codes, 8 // dimensions)
            odd = torch.tensor([int(mask).bit_count() % 2 for mask in masks.flatten()])
            assert bool(odd.any()) == (signs == "free")


def test_a_diagonal_hessian_rounds_every_weight_to_nearest_and_leaves_it_there() -> None:
    frame = even_frame(9, 200)
    given = problem(frame, 200, hessian=torch.rand(200).add(0.5).diag())
    codes = given.solve()
    group = torch.arange(200) // 32
    steps = (given.weight - frame.offset_OG[:, group]) / frame.scale_OG[:, group]
    expected = (steps.round() + frame.zero_OG[:, group]).clamp(-8, 7).to(torch.int8)
    assert torch.equal(codes, expected)
    assert torch.equal(given.refine(codes), codes)


def test_a_level_of_a_table_is_the_nearest_one() -> None:
    frame = table_frame(9, 64)
    given = problem(frame, 64, hessian=torch.eye(64))
    codes = given.solve()
    group = torch.arange(64) // 32
    levels = torch.tensor(TABLE) * frame.scale_OG[:, group, None] + frame.offset_OG[:, group, None]
    assert torch.equal(codes, (levels - given.weight[..., None]).abs().argmin(2).to(torch.int8))


def test_a_scale_of_zero_means_the_offset_and_passes_its_error_on() -> None:
    for frame in (*all_frames(4, 64), even_frame(4, 64, offset=False)):
        frame.scale_OG[1] = 0
        frame.scale_OG[2, 0] = 0
        given = problem(frame, 64)
        for backend in ("cpu", "reference"):
            codes = given.solve(backend)
            offset = frame.offset_OG[1, torch.arange(64) // 32] if isinstance(frame, Frame) else torch.zeros(64)
            assert torch.equal(frame.decode(codes)[1], offset)
            assert torch.equal(frame.decode(given.refine(codes))[1], offset)


def test_weight_and_codes_are_left_as_they_were() -> None:
    for frame in all_frames(5, 40):
        given = problem(frame, 40)
        before = given.weight.clone()
        codes = given.solve()
        kept = codes.clone()
        given.refine(codes)
        assert torch.equal(given.weight, before) and torch.equal(codes, kept)


def test_stacked_frames_give_the_codes_of_each_alone() -> None:
    for frame in all_frames(12, 64):
        given = problem(frame, 64)
        whole = given.solve()
        halves = []
        for rows in (slice(0, 5), slice(5, 12)):
            fields = {"scale_OG": frame.scale_OG[rows], "zero_OG": frame.zero_OG[rows]}
            if isinstance(frame, Frame):
                fields["offset_OG"] = frame.offset_OG[rows]
                if frame.levels_OGL is not None:
                    fields["levels_OGL"] = frame.levels_OGL[rows]
            part = dataclasses.replace(frame, **fields)  # type: ignore[arg-type]
            halves.append((part, dataclasses.replace(given, frame=part, weight=given.weight[rows]).solve()))
        assert torch.equal(torch.cat([codes for _, codes in halves]), whole)
        assert torch.equal(columns.stack([part for part, _ in halves]).scale_OG, frame.scale_OG)
