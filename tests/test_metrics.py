"""Distances between tensors and between distributions: what must hold whatever the numbers are."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from converter.compare.metrics import RUN, Difference, difference, summary, token_figures

# Sums over at most 3 * RUN elements: f32 inside a run, see `difference`; far below this for values of mixed sign.
CLOSE = {"rel": 1e-5, "abs": 1e-9}
SIZES = (0, 1, 7, RUN - 1, RUN, RUN + 1, 2 * RUN, 3 * RUN - 5)


def pair(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(*shape, generator=generator)
    return original, original + 0.1 * torch.randn(*shape, generator=generator)


def same(one: Difference, other: Difference) -> bool:
    return astuple(one) == pytest.approx(astuple(other), **CLOSE)


@pytest.mark.parametrize("size", SIZES)
def test_sums_agree_with_f64(size: int) -> None:
    original, copy = pair(size, size)
    a, b = original.double(), copy.double()
    truth = Difference(
        original_squares=float(a @ a),
        copy_squares=float(b @ b),
        products=float(a @ b),
        error_squares=float((a - b) @ (a - b)),
    )
    assert same(difference(original, copy), truth)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), first=st.sampled_from(SIZES), second=st.sampled_from(SIZES))
def test_sum_of_differences_describes_both_tensors_together(seed: int, first: int, second: int) -> None:
    original, copy = pair(seed, first + second)
    apart = difference(original[:first], copy[:first]) + difference(original[first:], copy[first:])
    assert same(apart, difference(original, copy))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), rows=st.integers(1, 40), columns=st.integers(1, 200))
def test_order_of_elements_does_not_matter(seed: int, rows: int, columns: int) -> None:
    original, copy = pair(seed, rows, columns)
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed))
    assert same(difference(original.flatten()[order], copy.flatten()[order]), difference(original, copy))


@settings(deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=50)
)
def test_cosine_stays_in_its_bounds_and_bounds_the_error(values: list[tuple[float, float]]) -> None:
    original, copy = (torch.tensor(column, dtype=torch.float32) for column in zip(*values, strict=True))
    found = difference(original, copy)
    assert -1.0 <= found.cosine <= 1.0
    assume(found.original_squares > 1e-20 and found.copy_squares > 1e-20)
    # The best multiple of the copy still misses 1 - cosine^2 of the original; 50 products in f32 are off by 50 eps.
    assert found.relative_mse >= 1 - found.cosine**2 - 100 * 2**-23 * max(1.0, found.relative_mse)


@pytest.mark.parametrize("scale", [0.5, 3.0, -2.0])
def test_scaled_copy_keeps_its_direction_and_costs_the_square_of_the_change(scale: float) -> None:
    original, _ = pair(1, 300)
    found = difference(original, scale * original)
    assert found.cosine == pytest.approx(math.copysign(1.0, scale), abs=1e-6)
    assert found.relative_mse == pytest.approx((1 - scale) ** 2, rel=1e-5)


def test_zeros_have_defined_figures() -> None:
    zeros, ones = torch.zeros(9), torch.ones(9)
    assert (difference(zeros, zeros).cosine, difference(zeros, zeros).relative_mse) == (1.0, 0.0)
    assert (difference(zeros, ones).cosine, difference(zeros, ones).relative_mse) == (0.0, math.inf)
    assert (difference(ones, zeros).cosine, difference(ones, zeros).relative_mse) == (0.0, 1.0)
    assert (Difference().cosine, Difference().relative_mse) == (1.0, 0.0)


def logits(seed: int, positions: int = 12, vocabulary: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original, copy = (3 * torch.randn(positions, vocabulary, generator=generator) for _ in range(2))
    return original, copy, torch.randint(vocabulary, (positions,), generator=generator)


def test_equal_distributions_have_no_divergence() -> None:
    original, _, following = logits(0)
    found = summary([token_figures(original, original, following)])
    assert found["kl_mean"] == found["kl_p99"] == 0.0
    assert found["top1_agreement"] == 1.0
    assert found["perplexity"] == found["original_perplexity"]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 9999))
def test_divergence_is_that_of_the_definition_and_never_negative(seed: int) -> None:
    original, copy, following = logits(seed)
    p, q = original.double().softmax(-1), copy.double().softmax(-1)
    truth = (p * (p / q).log()).sum(-1)
    found = token_figures(original, copy, following)
    assert (found.kl_N >= 0).all()
    torch.testing.assert_close(found.kl_N, truth, rtol=1e-5, atol=17 * 2**-20)  # 17 terms below 16 in f32
    torch.testing.assert_close(found.nll_N, -q.log().gather(-1, following[:, None])[:, 0], rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 9999), shift=st.floats(-20, 20))
def test_shifted_logits_are_the_same_distribution(seed: int, shift: float) -> None:
    original, copy, following = logits(seed)
    plain, moved = token_figures(original, copy, following), token_figures(original, copy + shift, following)
    torch.testing.assert_close(plain.kl_N, moved.kl_N, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain.nll_N, moved.nll_N, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 9999))
def test_names_of_tokens_do_not_matter(seed: int) -> None:
    original, copy, following = logits(seed)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(seed))
    renamed = token_figures(original[:, order], copy[:, order], order.argsort()[following])
    plain = token_figures(original, copy, following)
    torch.testing.assert_close(renamed.kl_N, plain.kl_N, rtol=1e-5, atol=1e-6)
    assert torch.equal(renamed.same_top_N, plain.same_top_N)


def test_divergence_charges_what_the_original_says() -> None:
    """KL(original || copy) is large when the copy rules out what the original expects, not the other way round."""
    sure, unsure = torch.tensor([[10.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    following = torch.tensor([0])
    lost = float(token_figures(unsure, sure, following).kl_N)
    gained = float(token_figures(sure, unsure, following).kl_N)
    assert gained == pytest.approx(math.log(2), abs=1e-3)
    assert lost > 4


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    _, _, following = logits(0)
    flat = torch.zeros(12, 17)
    assert summary([token_figures(flat, flat, following)])["perplexity"] == pytest.approx(17.0)


def test_summary_does_not_depend_on_how_tokens_were_grouped() -> None:
    original, copy, following = logits(5)
    whole = summary([token_figures(original, copy, following)])
    cuts = [(6, 12), (0, 1), (1, 6)]
    parts = summary([token_figures(original[a:b], copy[a:b], following[a:b]) for a, b in cuts])
    assert parts == pytest.approx(whole)
    assert parts["tokens"] == 12
    assert parts["kl_median"] <= parts["kl_p99"]


def test_hopeless_copy_still_has_a_finite_perplexity() -> None:
    original = torch.zeros(2, 3)
    copy = torch.tensor([[0.0, 5000.0, 0.0]]).repeat(2, 1)
    found = summary([token_figures(original, copy, torch.tensor([0, 0]))])
    assert math.isfinite(found["perplexity"])


@pytest.mark.parametrize("size", [1e-38, 1e-25, 3e37])
def test_values_whose_squares_leave_f32_are_compared_all_the_same(size: float) -> None:
    weight = torch.randn(40, 130, generator=torch.Generator().manual_seed(0)).clamp(-8, 8)
    zeros = difference(weight * size, torch.zeros(40, 130))
    assert (zeros.cosine, zeros.relative_mse) == (0.0, 1.0)
    plain, scaled = difference(weight, weight.round()), difference(weight * size, weight.round() * size)
    assert scaled.cosine == pytest.approx(plain.cosine, rel=1e-5)
    assert scaled.relative_mse == pytest.approx(plain.relative_mse, rel=1e-5)
