"""Methods: rounding to nearest, GPTQ and SmoothQuant, alone and every entry of their tables on every grid."""

# O out, I in, N rows.
from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from converter.architecture import Folding, Tap
from converter.errors import NumericsError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.ggml import GgmlGrid
from converter.grids.kmeans import KMeansGrid
from converter.grids.levels import LevelGrid
from converter.grids.plain import PlainGrid
from converter.methods import Block, Options
from converter.methods.gptq import PIECE_ROWS, factorize, gptq
from converter.methods.rtn import round_to_nearest
from converter.methods.smoothquant import smoothquant
from converter.methods.tables import NEEDS, ROUNDERS, TRANSFORMS
from converter.residual import Residual
from converter.schemes import ROUNDERS as ROUNDER_NAMES
from converter.schemes import TRANSFORMS as TRANSFORM_NAMES
from converter.stats import observe
from converter.workers import Workers

WIDTH = 64
TAPS = (
    Tap(name="attention_input", linears=("q", "k", "v")),
    Tap(name="mlp_middle", linears=("down",)),
)
FOLDINGS = (Folding(norm="norm", tap="attention_input"),)
INT4 = AffineGrid(bits=4, granularity="group", group_size=32)
BF16 = PlainGrid(dtype="BF16")
WEIGHTED = Options(importance=True)


def hidden(rows: int = 300, seed: int = 1) -> Tensor:
    """Correlated rows [N, I] whose columns differ in power by a factor of a thousand, as activations do."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=random) * 0.4 + torch.eye(WIDTH)
    return torch.randn(rows, WIDTH, generator=random) @ mix * torch.logspace(-1, 0.5, WIDTH)


def block(rows: Tensor | None = None, gram: bool = True) -> Block:
    """A block with q, k and v behind a norm, a down projection, the norm's gain, and statistics of both taps."""
    random = torch.Generator().manual_seed(0)
    shapes = {"q": 48, "k": 16, "v": 16, "down": 32}
    tensors = {f"{name}.weight": torch.randn(rows_of, WIDTH, generator=random) for name, rows_of in shapes.items()}
    tensors["norm.weight"] = torch.rand(WIDTH, generator=random) + 0.5
    stats = observe(hidden() if rows is None else rows, gram)
    return Block(
        where="block 3",
        tensors=tensors,
        stats={tap.name: stats for tap in TAPS},
        taps=TAPS,
        foldings=FOLDINGS,
        residual=Residual(reads={"norm": ("q", "k", "v")}, writes=("down",)),
    )


def grids(of: Block, grid: Grid = INT4) -> dict[str, Grid]:
    return {name: grid if weight.ndim == 2 else BF16 for name, weight in of.tensors.items()}


def output_power(of: Block, name: str, weight: Tensor) -> float:
    """The squared output of `weight` in the place of the block's tensor `name`; the squared weight if it is a gain."""
    stats = of.stats_of(name)
    if stats is None or stats.gram is None:
        return float(weight.square().sum())
    return float((weight @ stats.gram * weight).sum())


def output_error(off: Tensor, rows: Tensor) -> float:
    """The squared error of the linear's output on `rows`."""
    return float((rows.double() @ off.double().T).square().sum())


def without_grams(given: Block) -> Block:
    """The block as a target sees it that asks for sums only: scales are then fitted by them."""
    return dataclasses.replace(
        given, stats={name: dataclasses.replace(stats, gram=None) for name, stats in given.stats.items()}
    )


@pytest.mark.parametrize("scale", [1.0, 37.5])
@pytest.mark.parametrize("grid", [INT4, AffineGrid(bits=2, symmetric=False), AffineGrid(bits=8, granularity="tensor")])
def test_identity_hessian_makes_gptq_equal_rtn(scale: float, grid: AffineGrid) -> None:
    given = block(torch.eye(WIDTH) * scale)
    solved = gptq(given, grids(given, grid), Options(sweeps=0))
    plain = round_to_nearest(without_grams(given), grids(given, grid), Options())
    for name in given.tensors:
        for part, values in plain.coded[name].parts.items():
            assert torch.equal(solved.coded[name].parts[part], values), (name, part)
    assert solved.notes == {}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_has_less_output_error_than_rtn_on_the_same_grid(bits: int, symmetric: bool) -> None:
    given = block()
    chosen = grids(given, dataclasses.replace(INT4, bits=bits, symmetric=symmetric))
    plain = round_to_nearest(without_grams(given), chosen, WEIGHTED)
    fitted = round_to_nearest(given, chosen, WEIGHTED)
    solved = gptq(given, chosen, dataclasses.replace(WEIGHTED, sweeps=0))
    refitted = gptq(given, chosen, WEIGHTED)
    for name in ("q.weight", "k.weight", "v.weight", "down.weight"):
        errors = [
            output_error(rounded.coded[name].decode() - given.tensors[name], hidden())
            for rounded in (plain, fitted, solved, refitted)
        ]
        assert errors[2] < 0.8 * errors[0] and errors[3] < errors[2] and errors[1] < 1.02 * errors[0]
        assert torch.equal(solved.coded[name].parts["scale"], plain.coded[name].parts["scale"])


def test_linears_of_a_tap_are_solved_together_as_if_alone() -> None:
    given = block()
    chosen = grids(given) | {"k.weight": dataclasses.replace(INT4, bits=8), "v.weight": AffineGrid(bits=4)}
    together = gptq(given, chosen, Options())
    for name in ("q.weight", "k.weight", "v.weight"):
        alone = gptq(dataclasses.replace(given, tensors={name: given.tensors[name]}), {name: chosen[name]}, Options())
        for part, values in alone.coded[name].parts.items():
            assert torch.equal(together.coded[name].parts[part], values), (name, part)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_rows_have_the_same_bits_on_any_number_of_threads(products: torch.dtype) -> None:
    given = block()
    tall = torch.randn(2 * PIECE_ROWS + 7, WIDTH, generator=torch.Generator().manual_seed(5))
    given = dataclasses.replace(given, tensors={**given.tensors, "q.weight": tall})
    options = Options(products=products)
    one, three = (gptq(given, grids(given), dataclasses.replace(options, threads=count)) for count in (1, 3))
    for name, coded in one.coded.items():
        for part, values in coded.parts.items():
            assert torch.equal(values, three.coded[name].parts[part]), (name, part)


def test_columns_are_rounded_in_activation_order_on_scales_of_contiguous_groups() -> None:
    given, minmax = block(), dataclasses.replace(INT4, observer="minmax")
    alone = Options(sweeps=0)  # of descent, which goes by position
    solved = gptq(given, grids(given, minmax), alone)
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(5))
    order = torch.cat([shuffle, 32 + shuffle])  # within the groups, so that the groups keep their columns
    mixed = dataclasses.replace(
        given,
        tensors={name: weight[..., order] for name, weight in given.tensors.items()},
        stats={name: observe(hidden()[:, order], True) for name in given.stats},
    )
    again = gptq(mixed, grids(mixed, minmax), alone)
    for name in ("q.weight", "down.weight"):
        # The order of processing follows the activations, not the positions: codes move with their columns. The Gram
        # matrix sums in another order, so a value within 1e-5 steps of a tie may go the other way, and its row with it.
        moved = again.coded[name].parts["codes"] != solved.coded[name].parts["codes"][:, order]
        assert int(moved.any(1).sum()) <= 1


def test_an_input_never_seen_is_rounded_to_nearest() -> None:
    rows = hidden()
    rows[:, [3, 40]] = 0
    given = block(rows)
    solved = gptq(given, grids(given), dataclasses.replace(WEIGHTED, sweeps=0))
    plain = round_to_nearest(without_grams(given), grids(given), WEIGHTED)
    codes = [rounded.coded["q.weight"].parts["codes"] for rounded in (solved, plain)]
    assert torch.equal(codes[0][:, [3, 40]], codes[1][:, [3, 40]]) and not torch.equal(*codes)
    assert solved.notes == {}


def test_a_tap_that_was_never_reached_is_noted() -> None:
    given = block(torch.zeros(5, WIDTH))
    solved = gptq(given, grids(given), Options())
    assert set(solved.notes) == {"q.weight", "k.weight", "v.weight", "down.weight"}
    assert "never reached" in solved.notes["q.weight"]
    plain = round_to_nearest(given, grids(given), Options())
    assert torch.equal(solved.coded["q.weight"].parts["codes"], plain.coded["q.weight"].parts["codes"])


def coupled(strength: float) -> Tensor:
    """A matrix with unit diagonal whose least eigenvalue is 1 - strength."""
    gram = torch.eye(WIDTH)
    gram[0, 1] = gram[1, 0] = strength
    return gram


@pytest.mark.parametrize(
    ("strength", "damping", "expected"),
    [(0.99, 0.01, ""), (1.05, 0.01, "raised to 0.1"), (1.5, 0.01, "raised to 1"), (1.005, 0.0, "raised to 0.01"),
     (3.0, 0.01, "rounded to nearest with importance"), (1.5, 2.0, ""), (9.0, 2.0, "at damping 2: rounded")],
)  # fmt: skip
def test_damping_that_had_to_grow_is_noted(strength: float, damping: float, expected: str) -> None:
    given = block()
    broken = dataclasses.replace(given.stats["mlp_middle"], gram=coupled(strength))
    given = dataclasses.replace(given, stats={"mlp_middle": broken})
    notes = gptq(given, grids(given), Options(damping=damping)).notes
    assert expected in notes.get("down.weight", "") and ("down.weight" in notes) == bool(expected)


def test_a_hopeless_hessian_leaves_rounding_to_nearest_with_importance() -> None:
    given = block()
    broken = {name: dataclasses.replace(stats, gram=coupled(3.0)) for name, stats in given.stats.items()}
    given = dataclasses.replace(given, stats=broken)
    solved = gptq(given, grids(given), dataclasses.replace(WEIGHTED, sweeps=0))
    plain = round_to_nearest(without_grams(given), grids(given), WEIGHTED)
    assert torch.equal(solved.coded["q.weight"].parts["codes"], plain.coded["q.weight"].parts["codes"])


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_the_root_is_that_of_the_damped_hessian_in_activation_order(damping: float) -> None:
    gram = observe(hidden(), True).gram
    assert gram is not None
    factor = factorize(gram, damping, "here")
    power = gram.diagonal()[factor.order_I]
    assert bool((power[:-1] >= power[1:]).all())
    ordered = gram.double()[factor.order_I][:, factor.order_I] / gram.diagonal().double().mean()
    damped = ordered + damping * torch.eye(WIDTH)
    shares = factor.root.shares_II.double()
    assert torch.equal(shares, shares.triu()) and bool((shares.diagonal() == 1).all())
    upper = shares * factor.root.pivots_I.double()
    # Every entry is a sum in f32 of up to WIDTH products, each no larger than the diagonal's root allows.
    size = torch.outer(damped.diagonal(), damped.diagonal()).sqrt()
    assert float(((upper @ upper.T - damped) / size).abs().max()) < WIDTH * 2**-24


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-5])
def test_the_root_is_good_whatever_the_condition(damping: float) -> None:
    """Ten rows for 64 columns leave a condition of up to 64 / damping."""
    gram = observe(hidden(10), True).gram
    assert gram is not None
    factor = factorize(gram, damping, "here")
    ordered = gram.double()[factor.order_I][:, factor.order_I] / gram.diagonal().double().mean()
    damped = ordered + damping * torch.eye(WIDTH)
    expected = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    apart = (factor.root.pivots_I.double() / expected.diagonal() - 1).abs()
    assert float(apart.max()) < 1e-3 and factor.note == ""


@pytest.mark.parametrize("size", [1, 255, 256, 257, 700])
def test_the_root_has_the_same_bits_on_any_number_of_threads(size: int) -> None:
    rows = torch.randn(900, size, generator=torch.Generator().manual_seed(size))
    one, three = (factorize(rows.T @ rows, 0.01, "here", workers=Workers(count)).root for count in (1, 3))
    assert torch.equal(one.shares_II, three.shares_II) and torch.equal(one.pivots_I, three.pivots_I)
    upper = one.shares_II.double() * one.pivots_I.double()
    assert float((upper @ upper.T).diagonal().mean()) == pytest.approx(1.01, rel=1e-4)


def test_columns_of_a_code_stay_together_in_the_order_of_their_power() -> None:
    gram = observe(hidden(), True).gram
    assert gram is not None
    order = factorize(gram, 0.01, "here", together=8).order_I.reshape(-1, 8)
    assert torch.equal(order - order[:, :1], torch.arange(8).expand_as(order)) and bool((order[:, 0] % 8 == 0).all())
    power = gram.diagonal()[order].sum(1)
    assert bool((power[:-1] >= power[1:]).all()) and sorted(order.flatten().tolist()) == list(range(WIDTH))


def test_a_hessian_that_is_not_finite_is_refused_by_name() -> None:
    given = block()
    gram = given.stats["mlp_middle"].gram
    assert gram is not None
    gram[5, 7] = torch.nan
    with pytest.raises(NumericsError, match="block 3 attention_input: the Hessian is not finite in 1 of 64 columns"):
        gptq(given, grids(given), Options())


@pytest.mark.parametrize("rounder", list(ROUNDERS))
@pytest.mark.parametrize("grid", [INT4, GgmlGrid(type="Q8_0")], ids=lambda grid: grid.name)
def test_a_weight_that_is_not_finite_is_refused_by_name(rounder: str, grid: Grid) -> None:
    given = block()
    given.tensors["k.weight"][2, 2] = torch.nan
    with pytest.raises(NumericsError, match=r"^block 3 k\.weight: "):
        ROUNDERS[rounder](given, grids(given, grid), Options())


def test_what_has_no_statistics_is_rounded_to_nearest_and_noted() -> None:
    given = dataclasses.replace(block(), stats={})
    solved = gptq(given, grids(given), Options())
    assert set(solved.notes) == {"q.weight", "k.weight", "v.weight", "down.weight"}
    assert all(note == "no Gram matrix: rounded to nearest" for note in solved.notes.values())
    noted = round_to_nearest(given, grids(given), WEIGHTED).notes
    assert set(noted) == set(solved.notes) and "without importance" in noted["q.weight"]
    assert round_to_nearest(given, grids(given), Options()).notes == {}


def test_importance_lowers_the_output_error_of_rtn() -> None:
    given = block(gram=False)
    errors = [
        output_error(round_to_nearest(given, grids(given), options).coded["q.weight"].decode()
                     - given.tensors["q.weight"], hidden())
        for options in (WEIGHTED, Options())
    ]  # fmt: skip
    assert errors[0] < errors[1]


def outputs(of: Block, rows: Tensor, offset: float) -> dict[str, Tensor]:
    """What the linears behind the norm give for rows [N, I] that come out of the norm before its gain."""
    gained = rows * (of.tensors["norm.weight"] + offset)
    return {name: gained @ of.tensors[f"{name}.weight"].T for name in ("q", "k", "v")}


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_smoothquant_leaves_the_output_as_it_was(offset: float, strength: float) -> None:
    given = block()
    given = dataclasses.replace(
        given,
        tensors={name: weight.double() for name, weight in given.tensors.items()},
        foldings=(dataclasses.replace(FOLDINGS[0], offset=offset),),
    )
    rows = hidden(20, 9).double()
    smooth = smoothquant(given, grids(given), Options(smoothing_strength=strength))
    assert not torch.equal(smooth.tensors["q.weight"], given.tensors["q.weight"])
    assert torch.equal(smooth.tensors["down.weight"], given.tensors["down.weight"])
    expected = outputs(given, rows, offset)
    for name, found in outputs(smooth, rows, offset).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-11, atol=1e-11)


def test_statistics_after_a_fold_are_those_of_the_folded_rows() -> None:
    rows = hidden()
    given = block(rows)
    smooth = smoothquant(given, grids(given), Options())
    scale = given.tensors["norm.weight"] / smooth.tensors["norm.weight"]
    found, expected = smooth.stats["attention_input"], observe(rows / scale, True)
    assert found.gram is not None and expected.gram is not None
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-4, atol=1e-4 * float(expected.gram.abs().max()))
    torch.testing.assert_close(found.abs_max, expected.abs_max, rtol=1e-5, atol=0)
    assert found.rows == expected.rows
    assert smooth.stats["mlp_middle"] is given.stats["mlp_middle"]


def test_smoothing_evens_out_the_activations_as_published() -> None:
    given = block()
    weights = torch.cat([given.tensors[f"{name}.weight"] for name in "qkv"])
    smooth = smoothquant(
        given, {**grids(given), "norm.weight": PlainGrid(dtype="F32")}, Options(smoothing_strength=0.7)
    )
    activations = given.stats["attention_input"].abs_max
    scale = activations**0.7 / weights.abs().amax(0) ** 0.3
    torch.testing.assert_close(smooth.stats["attention_input"].abs_max, activations / scale)
    spread = [float(of.stats["attention_input"].abs_max.log().std()) for of in (smooth, given)]
    assert spread[0] < 0.5 * spread[1]


def test_smoothquant_keeps_columns_without_activations_or_weights() -> None:
    rows = hidden()
    rows[:, 4] = 0
    given = block(rows)
    for name in "qkv":
        given.tensors[f"{name}.weight"][:, 6] = 0
    smooth = smoothquant(given, grids(given) | {"norm.weight": PlainGrid(dtype="F32")}, Options())
    for column in (4, 6):
        assert float(smooth.tensors["norm.weight"][column]) == float(given.tensors["norm.weight"][column])
    assert all(bool(torch.isfinite(weight).all()) for weight in smooth.tensors.values())


def test_smoothquant_folds_a_norms_bias_too() -> None:
    given = block()
    given = dataclasses.replace(given, tensors={**given.tensors, "norm.bias": torch.ones(WIDTH)})
    smooth = smoothquant(given, grids(given), Options())
    gain = smooth.tensors["norm.bias"] * given.tensors["norm.weight"]
    torch.testing.assert_close(gain, smooth.tensors["norm.weight"])


def test_smoothquant_without_foldings_changes_nothing_and_without_statistics_refuses() -> None:
    given = block()
    bare = dataclasses.replace(given, foldings=())
    assert smoothquant(bare, grids(bare), Options()) == bare
    with pytest.raises(NumericsError, match="block 3 attention_input: smoothquant needs activation statistics"):
        smoothquant(dataclasses.replace(given, stats={}), grids(given), Options())


AFFINE = [
    AffineGrid(
        bits=bits, symmetric=symmetric, granularity=granularity, group_size=size, scale_dtype=dtype, observer=observer
    )
    for (bits, dtype), symmetric, (granularity, size), observer in itertools.product(
        ((2, "BF16"), (3, "F32"), (4, "F16"), (8, "BF16")),
        (True, False),
        (("tensor", None), ("channel", None), ("group", 48)),
        ("mse", "minmax"),
    )
]
OTHERS = [AffineGrid(bits=8, observer="kl"), AffineGrid(bits=4, observer="percentile"), GgmlGrid(type="Q8_0")]
OTHERS += [LevelGrid(values="ternary"), LevelGrid(values="log3", group_size=48, scale_dtype="BF16")]
OTHERS += [LevelGrid(values="seq2", group_size=16, offset=True, scale_bits=4), LevelGrid(values="seq3", offset=True)]
OTHERS += [LevelGrid(values="nf4", group_size=32, scale_bits=8), KMeansGrid(bits=2, group_size=48), KMeansGrid(bits=4)]
OTHERS += [GgmlGrid(type="Q4_0"), *(PlainGrid(dtype=dtype) for dtype in ("F32", "F16", "BF16"))]


@pytest.mark.parametrize("rounder", list(ROUNDERS))
@pytest.mark.parametrize("transform", ["", *TRANSFORMS])
@pytest.mark.parametrize("grid", [*AFFINE, *OTHERS], ids=lambda grid: f"{grid.name}")
def test_every_method_runs_on_every_grid(rounder: str, transform: str, grid: Grid) -> None:
    given = block()
    if transform:
        given = TRANSFORMS[transform](given, grids(given, grid), Options())
    rounded = ROUNDERS[rounder](given, grids(given, grid), WEIGHTED)
    assert list(rounded.coded) == list(given.tensors) and set(rounded.notes) <= set(given.tensors)
    for name, coded in rounded.coded.items():
        weight = given.tensors[name]
        decoded = coded.decode()
        assert decoded.shape == weight.shape and decoded.dtype == torch.float32
        # Two bits for a whole tensor are worth little, but the output is nearer than that of storing zeros.
        assert output_power(given, name, decoded - weight) < output_power(given, name, weight)
        assert all(isinstance(part, Tensor) and part.is_contiguous() for part in coded.parts.values())


def test_the_tables_name_what_a_manifest_may_ask_for() -> None:
    assert tuple(TRANSFORMS) == TRANSFORM_NAMES and tuple(ROUNDERS) == ROUNDER_NAMES
    assert set(NEEDS) == {*TRANSFORMS, *ROUNDERS}
    assert not NEEDS["rtn"](False).sums and NEEDS["rtn"](True).sums and NEEDS["gptq"](False).gram
