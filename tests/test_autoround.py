"""AutoRound: what it learns on a block of two linears, and what it leaves as it is."""

# N sequences, T tokens, I in.
from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from block_rows import TinyRows
from converter.architecture import Tap
from converter.grids import Coded, Grid
from converter.grids.affine import AffineGrid
from converter.grids.floats import Fp8Grid
from converter.grids.ggml import GgmlGrid
from converter.grids.kmeans import KMeansGrid
from converter.grids.levels import LevelGrid
from converter.grids.micro import MicroGrid
from converter.grids.plain import PlainGrid
from converter.methods import Block, Options, Rounded
from converter.methods.autoround import Learned, autoround
from converter.methods.gptq import gptq
from converter.methods.rtn import round_to_nearest
from converter.stats import observe

WIDTH, MIDDLE = 64, 96
TAPS = (Tap(name="mlp_input", linears=("up",)), Tap(name="mlp_middle", linears=("down",)))
INT2 = AffineGrid(bits=2, granularity="group", group_size=32)
FEW = Options(iterations=30, batch_size=4, seed="some commit")


def hidden(sequences: int = 12) -> Tensor:
    """Correlated rows [N, T, I] whose columns differ in power by a factor of a thousand, as activations do."""
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(WIDTH, WIDTH, generator=random) * 0.4 + torch.eye(WIDTH)
    return torch.randn(sequences, 24, WIDTH, generator=random) @ mix * torch.logspace(-1, 0.5, WIDTH)


def block(rows_NTI: Tensor | None = None, gram: bool = False) -> Block:
    random = torch.Generator().manual_seed(0)
    tensors = {
        "norm.weight": torch.rand(WIDTH, generator=random) + 0.5,
        "up.weight": torch.randn(MIDDLE, WIDTH, generator=random) / 8,
        "down.weight": torch.randn(WIDTH, MIDDLE, generator=random) / 8,
    }
    rows_NTI = hidden() if rows_NTI is None else rows_NTI
    read = (rows_NTI * tensors["norm.weight"]).flatten(0, 1)
    middle = torch.nn.functional.silu(read @ tensors["up.weight"].T)
    stats = {"mlp_input": observe(read, gram), "mlp_middle": observe(middle, gram)}
    return Block(where="block 3", tensors=tensors, stats=stats, taps=TAPS, rows=TinyRows(tensors, rows_NTI))


def grids(of: Block, grid: Grid) -> dict[str, Grid]:
    return {name: grid if weight.ndim == 2 else PlainGrid(dtype="F32") for name, weight in of.tensors.items()}


def error(of: Block, rounded: Rounded) -> float:
    """The squared error of the block's output on all rows."""
    assert of.rows is not None
    decoded = {name: coded.decode() for name, coded in rounded.coded.items()}
    return float(of.rows.errors(decoded, range(of.rows.count)).sum())


def nearest(of: Block, grid: Grid) -> Rounded:
    return round_to_nearest(of, grids(of, grid), Options(importance=True))


def same(one: Coded, other: Coded) -> bool:
    return all(torch.equal(one.parts[part], other.parts[part]) for part in one.parts)


LEARNED = [
    *(AffineGrid(bits=bits, granularity="group", group_size=32, symmetric=symmetric)
      for bits in (2, 3, 4, 8) for symmetric in (True, False)),
    AffineGrid(bits=3, granularity="group", group_size=48, scale_dtype="BF16"),
    AffineGrid(bits=4),
    AffineGrid(bits=4, granularity="tensor"),
    *(MicroGrid(values=values) for values in ("mxfp4", "nvfp4")),
    *(LevelGrid(values=values, group_size=32) for values in ("log3", "ternary")),
    LevelGrid(values="seq2", group_size=16, offset=True, scale_bits=4),
    KMeansGrid(bits=3, group_size=32),
    *(GgmlGrid(type=type) for type in ("Q4_0", "Q8_0", "IQ4_NL")),
]  # fmt: skip


@pytest.mark.parametrize("grid", LEARNED, ids=lambda grid: grid.name)
def test_the_output_errs_less_than_that_of_rounding_to_nearest(grid: Grid) -> None:
    given = block()
    learned = autoround(given, grids(given, grid), FEW)
    assert error(given, learned) < 0.95 * error(given, nearest(given, grid)) and learned.notes == {}
    assert list(learned.coded) == list(given.tensors)


@pytest.mark.parametrize("grid", LEARNED, ids=lambda grid: grid.name)
def test_what_is_tried_is_what_a_reader_will_have(grid: Grid) -> None:
    given = block()
    coded = nearest(given, grid).coded["up.weight"]
    framed = grid.framed(coded.parts)
    assert framed is not None
    linear = Learned(given.tensors["up.weight"], coded.decode(), framed)
    random = torch.Generator().manual_seed(3)
    for _ in range(3):
        linear.move(torch.randn(MIDDLE, WIDTH, generator=random), 0.2)
        tried = linear.decode()
        linear.keep()
        assert torch.equal(grid.decode(linear.parts()), tried) and torch.equal(linear.decode_kept(), tried)


@pytest.mark.parametrize("grid", LEARNED, ids=lambda grid: grid.name)
def test_without_steps_it_is_rounding_to_nearest_with_importance(grid: Grid) -> None:
    given = block()
    still = autoround(given, grids(given, grid), dataclasses.replace(FEW, iterations=0))
    assert all(same(coded, nearest(given, grid).coded[name]) for name, coded in still.coded.items())


@pytest.mark.parametrize("grid", LEARNED, ids=lambda grid: grid.name)
def test_with_gram_matrices_it_goes_on_from_gptq(grid: Grid) -> None:
    given = block(gram=True)
    still = autoround(given, grids(given, grid), dataclasses.replace(FEW, iterations=0))
    start = gptq(given, grids(given, grid), Options(importance=True, gain=False))
    assert all(same(coded, start.coded[name]) for name, coded in still.coded.items())
    # So small a block is nearly linear, where GPTQ leaves nothing to gain
    assert error(given, autoround(given, grids(given, grid), FEW)) <= error(given, start)


@pytest.mark.parametrize("rate", [0.5, 3.0])
def test_the_result_never_errs_more_than_the_start(rate: float) -> None:
    """With steps as long as codes, every batch is a leap in the dark."""
    given = block()
    grid = AffineGrid(bits=8, granularity="group", group_size=32)
    learned = autoround(given, grids(given, grid), dataclasses.replace(FEW, iterations=5, learning_rate=rate))
    assert error(given, learned) <= error(given, nearest(given, grid))
    if learned.notes:
        assert set(learned.notes) == {"up.weight", "down.weight"}
        assert all(same(coded, nearest(given, grid).coded[name]) for name, coded in learned.coded.items())


def test_what_is_learned_holds_on_rows_that_were_not_seen() -> None:
    rows = hidden(48)  # of one distribution: another seed would mix columns otherwise
    given, others = block(rows[:32]), block(rows[32:])
    learned, start = autoround(given, grids(given, INT2), FEW), nearest(given, INT2)
    assert error(others, learned) < error(others, start)


def test_a_code_is_at_most_one_from_its_start_where_scales_stay() -> None:
    """Shifts of at most half a code change the code by at most one."""
    given = block()
    grid = AffineGrid(bits=4, granularity="tensor")
    learned, start = autoround(given, grids(given, grid), FEW), nearest(given, grid)
    apart = learned.coded["up.weight"].parts["codes"].int() - start.coded["up.weight"].parts["codes"].int()
    assert int(apart.abs().max()) == 1 and torch.equal(
        learned.coded["up.weight"].parts["scale"], start.coded["up.weight"].parts["scale"]
    )


def test_weights_that_no_row_reaches_stay_as_they_are() -> None:
    rows = hidden()
    rows[:, :, 7] = 0
    given = block(rows)
    grid = AffineGrid(bits=4, granularity="tensor")  # scales stay
    learned, start = autoround(given, grids(given, grid), FEW), nearest(given, grid)
    assert torch.equal(learned.coded["up.weight"].parts["codes"][:, 7], start.coded["up.weight"].parts["codes"][:, 7])
    assert not same(learned.coded["up.weight"], start.coded["up.weight"])


def test_it_is_the_same_every_time_and_another_seed_takes_other_sequences() -> None:
    given, again, other = block(), block(), block()
    first = autoround(given, grids(given, INT2), FEW)
    second = autoround(again, grids(again, INT2), FEW)
    third = autoround(other, grids(other, INT2), dataclasses.replace(FEW, seed="another commit"))
    assert all(same(coded, second.coded[name]) for name, coded in first.coded.items())
    assert not all(same(coded, third.coded[name]) for name, coded in first.coded.items())


def test_every_sequence_is_seen_as_often() -> None:
    given = block()
    autoround(given, grids(given, INT2), dataclasses.replace(FEW, iterations=9))
    assert isinstance(given.rows, TinyRows)
    seen = [sequence for step in given.rows.seen for sequence in step]
    assert [seen.count(sequence) for sequence in range(12)] == [3] * 12 and len(given.rows.seen) == 9


@pytest.mark.parametrize("grid", [Fp8Grid(), MicroGrid(values="mxfp8")], ids=lambda grid: grid.name)
def test_grids_without_single_codes_keep_what_rounding_to_nearest_gives(grid: Grid) -> None:
    given = block()
    learned = autoround(given, grids(given, grid), FEW)
    assert all(same(coded, nearest(given, grid).coded[name]) for name, coded in learned.coded.items())


def test_without_rows_it_is_rounding_to_nearest_with_importance() -> None:
    given = dataclasses.replace(block(), rows=None)
    learned = autoround(given, grids(given, INT2), FEW)
    assert all(same(coded, nearest(given, INT2).coded[name]) for name, coded in learned.coded.items())
