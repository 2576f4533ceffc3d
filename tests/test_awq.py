"""AWQ: scales searched from statistics alone, folded into norms and linears, never worse than not scaling."""

# O out, I in, N rows.
from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from converter.architecture import Folding, Tap
from converter.compare.unfolding import unfold
from converter.errors import NumericsError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.plain import PlainGrid
from converter.methods import Block, Options
from converter.methods.awq import Trial, awq, candidates, search, weight_part
from converter.methods.folding import rows_of
from converter.methods.gptq import gptq
from converter.methods.rtn import round_to_nearest
from converter.stats import observe
from test_methods import without_grams

HEADS, SHARED, WIDTH = 4, 2, 16  # query heads, heads of keys and values, columns of a head
HIDDEN, MIDDLE = 64, 96
TAPS = (
    Tap(name="attention_input", linears=("q", "v")),
    Tap(name="attention_output", linears=("o",)),
    Tap(name="mlp_input", linears=("gate_up",)),
    Tap(name="mlp_middle", linears=("down",)),
)
FOLDINGS = (
    Folding(norm="norm", tap="attention_input"),
    Folding(linear="v", tap="attention_output", heads=("h", "k"), counts=(HEADS, SHARED)),
    Folding(linear="gate_up", tap="mlp_middle", fused=True),
)
INT4 = AffineGrid(bits=4, granularity="group", group_size=32, symmetric=False, scale_dtype="BF16")
INT3 = dataclasses.replace(INT4, bits=3)
BF16 = PlainGrid(dtype="BF16")


def outlying(rows: int, columns: int, seed: int) -> Tensor:
    """Rows [N, I] of which every sixteenth column is thirty times the others, and no two are independent."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.2 * torch.randn(columns, columns, generator=random)
    size = torch.where(torch.arange(columns) % 16 == 5, 30.0, 1.0)
    return torch.randn(rows, columns, generator=random) @ mix * size


ROWS = {"attention_input": outlying(300, HIDDEN, 1), "attention_output": outlying(300, HEADS * WIDTH, 2)}
ROWS |= {"mlp_input": outlying(300, HIDDEN, 3), "mlp_middle": outlying(300, MIDDLE, 4)}


def block() -> Block:
    """A block with a norm before q and v, shared value heads, and gate and up in one."""
    random = torch.Generator().manual_seed(0)
    shapes = {"q": (HEADS * WIDTH, HIDDEN), "v": (SHARED * WIDTH, HIDDEN), "o": (HIDDEN, HEADS * WIDTH)}
    shapes |= {"gate_up": (2 * MIDDLE, HIDDEN), "down": (HIDDEN, MIDDLE)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=random) for name, shape in shapes.items()}
    tensors["norm.weight"] = torch.rand(HIDDEN, generator=random) + 0.5
    tensors["v.bias"] = torch.randn(SHARED * WIDTH, generator=random)
    stats = {tap: observe(rows, True) for tap, rows in ROWS.items()}
    return Block(where="block 3", tensors=tensors, stats=stats, taps=TAPS, foldings=FOLDINGS)


def grids(of: Block, grid: Grid = INT4) -> dict[str, Grid]:
    return {name: grid if weight.ndim == 2 else BF16 for name, weight in of.tensors.items()}


def trial(weight_OI: Tensor) -> Trial:
    return Trial(where="here", weight_SI=weight_OI, grid=INT4, importance_I=None)


def test_the_score_is_the_error_of_the_outputs() -> None:
    given, rows = block(), ROWS["attention_input"]
    weight, scale = given.tensors["q.weight"], torch.rand(HIDDEN, generator=torch.Generator().manual_seed(9)) + 0.5
    stored = INT4.decode(INT4.encode(weight * scale, None))
    off = (rows / scale).double() @ stored.double().T - rows.double() @ weight.double().T
    # f32 sums of 300 rows and 64 columns, each within 2^-24 of its size
    assert trial(weight).error(scale, given.stats["attention_input"]) == pytest.approx(
        float(off.square().sum()), rel=1e-4
    )


def test_the_first_trial_is_rounding_to_nearest() -> None:
    given = block()
    weight = given.tensors["q.weight"]
    ones = next(candidates(torch.rand(HIDDEN) + 1, torch.rand(HIDDEN)))
    assert torch.equal(ones, torch.ones(HIDDEN))
    rounded = round_to_nearest(without_grams(given), grids(given), Options()).coded["q.weight"].decode()
    off = (rounded - weight).double()
    error = float((ROWS["attention_input"].double() @ off.T).square().sum())
    assert trial(weight).error(ones, given.stats["attention_input"]) == pytest.approx(error, rel=1e-4)


def test_trials_are_the_published_scales() -> None:
    x, w = torch.rand(HIDDEN) + 0.1, torch.rand(HIDDEN) + 0.1
    found = list(candidates(x, w))
    assert len(found) == 20
    for number, ratio in enumerate(torch.linspace(0, 1, 10).tolist()):
        for scale, expected in (
            (found[2 * number], x**ratio),
            (found[2 * number + 1], x**ratio / (w ** (1 - ratio) + 1e-4)),
        ):
            torch.testing.assert_close(scale, expected / (expected.max() * expected.min()).sqrt())
    dark = next(reversed(list(candidates(x.index_fill(0, torch.tensor([4]), 0), w))))
    assert float(dark[4]) == 1


def test_the_weights_part_is_the_share_of_each_groups_largest() -> None:
    weight = torch.randn(5, 70)
    expected = torch.cat([
        (part.abs() / part.abs().amax(1, keepdim=True)).mean(0) for part in torch.split(weight, 32, dim=1)
    ])  # fmt: skip
    torch.testing.assert_close(weight_part([weight[:2], weight[2:]], [INT4, INT4]), expected)


def test_columns_of_heads_that_share_a_row_share_a_scale() -> None:
    given = block()
    scale = search(given, FOLDINGS[1], ["o.weight"], grids(given), Options())
    heads = scale.reshape(HEADS, WIDTH)
    assert torch.equal(heads[0], heads[1]) and torch.equal(heads[2], heads[3]) and not torch.equal(heads[1], heads[2])
    assert rows_of(FOLDINGS[1], HEADS * WIDTH).reshape(HEADS, WIDTH)[:, 0].tolist() == [0, 0, 16, 16]


def outputs(of: Block, seed: int) -> list[Tensor]:
    """What the block's linears give, f64, with attention that mixes rows of values and a gate as in llama."""
    random = torch.Generator().manual_seed(seed)
    tensors = {name: weight.double() for name, weight in of.tensors.items()}
    rows = torch.randn(20, HIDDEN, generator=random).double()
    mix = torch.rand(HEADS, 20, 20, generator=random).double()
    gained = rows * tensors["norm.weight"]
    values = (gained @ tensors["v.weight"].T + tensors["v.bias"]).reshape(20, SHARED, WIDTH)
    attended = torch.einsum("hts,shd->thd", mix, values.repeat_interleave(HEADS // SHARED, 1)).flatten(1)
    gate, up = (rows @ tensors["gate_up.weight"].T).chunk(2, dim=1)
    middle = torch.nn.functional.silu(gate) * up
    return [gained @ tensors["q.weight"].T, attended @ tensors["o.weight"].T, middle @ tensors["down.weight"].T]


def test_awq_leaves_the_output_as_it_was() -> None:
    given = dataclasses.replace(block(), tensors={name: weight.double() for name, weight in block().tensors.items()})
    scaled = awq(given, grids(given), Options())
    for name in ("norm.weight", "q.weight", "v.weight", "v.bias", "o.weight", "gate_up.weight", "down.weight"):
        assert not torch.equal(scaled.tensors[name], given.tensors[name]), name
    assert torch.equal(scaled.tensors["gate_up.weight"][:MIDDLE], given.tensors["gate_up.weight"][:MIDDLE])
    for found, expected in zip(outputs(scaled, 5), outputs(given, 5), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))  # f32 scales


def test_the_norm_is_stored_as_it_was_divided() -> None:
    given = block()
    scaled = awq(given, grids(given), Options())
    norm = scaled.tensors["norm.weight"]
    assert torch.equal(norm, norm.bfloat16().float())


def test_statistics_after_awq_are_those_of_the_scaled_rows() -> None:
    given = block()
    scaled = awq(given, grids(given), Options())
    for tap, name in (("attention_input", "q"), ("attention_output", "o"), ("mlp_middle", "down")):
        scale = (scaled.tensors[f"{name}.weight"][0] / given.tensors[f"{name}.weight"][0]).abs()
        if name == "down":
            scale = (scaled.tensors["down.weight"] / given.tensors["down.weight"]).median(0).values
        found, expected = scaled.stats[tap].gram, observe(ROWS[tap] / scale, True).gram
        assert found is not None and expected is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def output_errors(before: Block, scaled: Block, grid: Grid, rounder: str, options: Options) -> dict[str, float]:
    """The squared error of each tap's outputs, in the units of the block as it was."""
    rounded = (gptq if rounder == "gptq" else round_to_nearest)(scaled, grids(scaled, grid), options)
    errors = {}
    for tap, linear in (("attention_input", "q"), ("attention_output", "o"), ("mlp_middle", "down")):
        name = f"{linear}.weight"
        scale = (scaled.tensors[name].double() / before.tensors[name].double()).median(0).values
        off = rounded.coded[name].decode().double() * (1 / scale) - before.tensors[name].double()
        errors[tap] = float((ROWS[tap].double() @ off.T).square().sum())
    return errors


@pytest.mark.parametrize("grid", [INT4, INT3], ids=lambda grid: grid.name)
@pytest.mark.parametrize("importance", [False, True])
def test_awq_errs_less_than_rounding_alone_where_columns_stand_out(grid: AffineGrid, importance: bool) -> None:
    given, options = block(), Options(importance=importance)
    plain = output_errors(given, without_grams(given), grid, "rtn", options)
    better = output_errors(given, awq(given, grids(given, grid), options), grid, "rtn", options)
    for tap, error in better.items():
        assert error < (0.9 if importance else 0.7) * plain[tap], tap


def test_what_nothing_stands_out_in_is_never_made_worse() -> None:
    rows = torch.randn(300, HIDDEN, generator=torch.Generator().manual_seed(8))
    given = dataclasses.replace(block(), stats={"attention_input": observe(rows, True)}, foldings=FOLDINGS[:1])
    chosen = search(given, FOLDINGS[0], ["q.weight"], grids(given), Options())
    one = trial(given.tensors["q.weight"])
    stats = given.stats["attention_input"]
    assert one.error(chosen, stats) <= one.error(torch.ones(HIDDEN), stats)


def test_a_tap_that_no_row_reached_keeps_its_scale_and_is_noted() -> None:
    given = block()
    given = dataclasses.replace(given, stats={tap: stats for tap, stats in given.stats.items() if tap != "mlp_middle"})
    scaled = awq(given, grids(given), Options())
    assert torch.equal(scaled.tensors["down.weight"], given.tensors["down.weight"])
    assert set(scaled.notes) == {"down.weight"} and "no calibration row" in scaled.notes["down.weight"]


def test_awq_without_statistics_refuses_and_without_codes_or_foldings_changes_nothing() -> None:
    given = block()
    with pytest.raises(NumericsError, match="block 3 attention_input: awq needs the Gram matrix"):
        awq(dataclasses.replace(given, stats={}), grids(given), Options())
    sums = {tap: dataclasses.replace(stats, gram=None) for tap, stats in given.stats.items()}
    with pytest.raises(NumericsError, match="block 3 attention_input: awq needs the Gram matrix"):
        awq(dataclasses.replace(given, stats=sums), grids(given), Options())
    assert awq(given, grids(given, BF16), Options()) == given
    bare = dataclasses.replace(given, foldings=())
    assert awq(bare, grids(bare), Options()) == bare


def test_weights_are_compared_without_what_was_folded() -> None:
    given = block()
    scaled = awq(given, grids(given, INT4), Options())
    rounded = round_to_nearest(without_grams(scaled), grids(scaled, AffineGrid(bits=8)), Options())
    copy = {name: coded.decode() for name, coded in rounded.coded.items()}
    undone = unfold(TAPS, FOLDINGS, given.tensors, copy)
    for name in ("q.weight", "v.weight", "o.weight", "gate_up.weight", "down.weight"):
        weight = given.tensors[name]
        error = float((undone[name] - weight).square().sum() / weight.square().sum())
        # Steps of 8 bits leave some 1e-4 of the squares at the worst; scales left in place leave more than 0.01.
        assert error < 5e-4 < 0.01 < float((copy[name] - weight).square().sum() / weight.square().sum()), name
