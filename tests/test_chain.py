"""A target's own chain: what its blocks are corrected for, its hidden states, and whole runs."""

# O out, I in, N rows.
from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from converter.architecture import Tap
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.ggml import GgmlGrid
from converter.methods import Block, Options
from converter.methods.gptq import aimed, factorize, gptq
from converter.stats import Collector, TapStats

WIDTH = 256


def hidden(rows: int = 600, seed: int = 1) -> Tensor:
    """Correlated rows [N, I] whose columns differ in power by a factor of thirty."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=random) * 0.1 + torch.eye(WIDTH)
    return torch.randn(rows, WIDTH, generator=random) @ mix * torch.logspace(-1, 0.5, WIDTH)


def drifted(original: Tensor, size: float = 0.2, seed: int = 2) -> Tensor:
    """Rows of a chain [N, I]: the original's through a matrix near the identity, with noise."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.eye(WIDTH) + size / WIDTH**0.5 * torch.randn(WIDTH, WIDTH, generator=random)
    chain: Tensor = original @ mix + size * original.std(0) * torch.randn(original.shape, generator=random)
    return chain


def stats_of(chain: Tensor, original: Tensor) -> TapStats:
    collector = Collector(columns=WIDTH, gram=True, drift=True)
    collector.add(chain, original)
    return collector.stats()


def block(stats: TapStats) -> Block:
    weight = torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(0))
    taps = (Tap(name="tap", linears=("up", "gate")),)
    return Block(
        where="block 1", tensors={"up.weight": weight, "gate.weight": weight[:32] + 1}, stats={"tap": stats}, taps=taps
    )


def output_error(decoded: Tensor, weight: Tensor, chain: Tensor, original: Tensor) -> float:
    """The squared distance of a linear's output on the chain's rows from the original's on its own."""
    return float((chain.double() @ decoded.double().T - original.double() @ weight.double().T).square().sum())


@pytest.mark.parametrize("grid", [AffineGrid(bits=2, symmetric=False), GgmlGrid(type="Q2_K"), GgmlGrid(type="IQ2_XS")])
def test_a_chain_like_the_original_changes_no_bit(grid: Grid) -> None:
    rows = hidden()
    given = block(stats_of(rows, rows.clone()))
    plain = dataclasses.replace(given, stats={"tap": dataclasses.replace(given.stats["tap"], drift=None)})
    grids = dict.fromkeys(given.tensors, grid)
    first, second = (gptq(one, grids, Options(importance=True)) for one in (given, plain))
    for name in grids:
        for part, values in second.coded[name].parts.items():
            assert torch.equal(first.coded[name].parts[part], values)
    assert first.notes == {}


def test_what_is_aimed_at_is_the_least_squares_solution() -> None:
    original = hidden()
    chain = drifted(original)
    stats, weight = stats_of(chain, original), block(stats_of(chain, original)).tensors["up.weight"]
    assert stats.gram is not None and stats.drift is not None
    damping = 0.01
    unit = float(stats.gram.diagonal().double().mean())
    # |W o - V x|^2 + damping |W - V|^2, as rows: V [x, r I] = W [o, r I] with r the root of the damping
    ridge = torch.eye(WIDTH).double() * (damping * unit) ** 0.5
    inputs, outputs = torch.cat([chain.double(), ridge]), torch.cat([original.double(), ridge]) @ weight.double().T
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    found = aimed(weight, stats.drift, factorize(stats.gram, damping, "here"))
    # H and the drift are sums in f32, and a condition of up to I / damping multiplies their rounding.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)
    assert float((expected - weight).abs().max()) > 0.1


@pytest.mark.parametrize(
    "grid",
    [AffineGrid(bits=2, group_size=32, granularity="group"), AffineGrid(bits=4), GgmlGrid(type="Q3_K")],
    ids=lambda grid: grid.name,
)
def test_the_correction_makes_up_for_earlier_blocks(grid: Grid) -> None:
    """On rows that nothing was fitted to, too."""
    original, held_out = hidden(4000), hidden(500, seed=7)
    held_out = held_out @ torch.linalg.lstsq(hidden(seed=7), hidden(seed=1)).solution  # of the same kind
    chain, beside = drifted(original), drifted(held_out)
    given = block(stats_of(chain, original))
    plain = dataclasses.replace(given, stats={"tap": dataclasses.replace(given.stats["tap"], drift=None)})
    grids = dict.fromkeys(given.tensors, grid)
    corrected, alone = (gptq(one, grids, Options(importance=True)) for one in (given, plain))
    for name, weight in given.tensors.items():
        before = output_error(alone.coded[name].decode(), weight, beside, held_out)
        assert output_error(corrected.coded[name].decode(), weight, beside, held_out) < 0.9 * before


def test_a_correction_that_is_not_finite_is_left_out_and_noted() -> None:
    stats = stats_of(hidden(), hidden())
    assert stats.drift is not None
    stats.drift[0, 1] = torch.inf
    given = block(stats)
    plain = dataclasses.replace(given, stats={"tap": dataclasses.replace(stats, drift=None)})
    grids = dict.fromkeys(given.tensors, AffineGrid(bits=4))
    found, expected = gptq(given, grids, Options()), gptq(plain, grids, Options())
    assert torch.equal(found.coded["up.weight"].parts["codes"], expected.coded["up.weight"].parts["codes"])
    assert all("not finite: left out" in found.notes[name] for name in grids)


def test_a_hessian_that_is_not_definite_leaves_the_weight_alone() -> None:
    stats = stats_of(hidden(), drifted(hidden()))
    gram = torch.eye(WIDTH)
    gram[0, 1] = gram[1, 0] = 9.0
    given = block(dataclasses.replace(stats, gram=gram))
    plain = dataclasses.replace(given, stats={"tap": dataclasses.replace(stats, gram=gram, drift=None)})
    grids = dict.fromkeys(given.tensors, AffineGrid(bits=4))
    found, expected = gptq(given, grids, Options()), gptq(plain, grids, Options())
    assert torch.equal(found.coded["up.weight"].parts["codes"], expected.coded["up.weight"].parts["codes"])
    assert "rounded to nearest" in found.notes["up.weight"]
