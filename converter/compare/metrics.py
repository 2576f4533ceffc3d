"""How far one tensor, or one distribution, is from another. Pure functions; sums are kept in f64."""

# N positions, V vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 128  # positions whose logits are held at once: four times V numbers each
RUN = 4096  # elements whose products are summed in f32
SAFE = 1e-15  # squares of values between this and its inverse, 4096 of them summed, are f32's own
OUTLYING = 6.0
MOST_CHANNELS = 8
SLICE = RUN << 10  # elements taken at once, so that the copies stay small beside the tensors


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Sums over the elements of an original and a copy; `a + b` describes both tensors together."""

    original_squares: float = 0.0
    copy_squares: float = 0.0
    products: float = 0.0
    error_squares: float = 0.0

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            original_squares=self.original_squares + other.original_squares,
            copy_squares=self.copy_squares + other.copy_squares,
            products=self.products + other.products,
            error_squares=self.error_squares + other.error_squares,
        )

    @property
    def cosine(self) -> float:
        """The cosine of the angle between the two as vectors; 1 when both are zero, 0 when one of them is."""
        norms = math.sqrt(self.original_squares) * math.sqrt(self.copy_squares)
        if norms == 0.0:
            return float(self.original_squares == self.copy_squares)
        return max(-1.0, min(1.0, self.products / norms))

    @property
    def relative_mse(self) -> float:
        """The sum of squared errors over the sum of the original's squares; 0 when there is neither."""
        if self.original_squares == 0.0:
            return 0.0 if self.error_squares == 0.0 else math.inf
        return self.error_squares / self.original_squares


def difference(original: Tensor, copy: Tensor) -> Difference:
    """The sums that `cosine` and `relative_mse` need, for two tensors of one shape.

    Products of up to 4096 elements are summed in f32, which is good to 4096 * 2^-24 at the worst and far better when
    signs mix; those sums are added in f64. All in f64 took four times as long.
    """
    total = Difference()
    first, second = original.reshape(-1), copy.reshape(-1)
    whole = first.numel() // RUN * RUN
    for start, stop in [*((at, min(at + SLICE, whole)) for at in range(0, whole, SLICE)), (whole, first.numel())]:
        width = RUN if stop <= whole else max(1, stop - start)
        a, b = first[start:stop].reshape(-1, width), second[start:stop].reshape(-1, width)
        if a.numel() and not SAFE < float(torch.stack([*a.aminmax(), *b.aminmax()]).abs().max()) < 1 / SAFE:
            a, b = a.double(), b.double()  # squares of such values leave f32
        error = a - b
        total += Difference(
            original_squares=_dot(a, a),
            copy_squares=_dot(b, b),
            products=_dot(a, b),
            error_squares=_dot(error, error),
        )
    return total


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vecdot(a, b).double().sum())


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """How far single input columns stand out: the largest over the median column, and the columns that do, by size."""

    ratio: float
    channels: tuple[int, ...]


def outliers(inputs_NI: Tensor) -> Outliers:
    """The columns of a linear's inputs [N, I] whose largest magnitude is OUTLYING times the median column's, or more.

    At most MOST_CHANNELS of them, the largest first; ratio is 1 where nothing was read. A scale that all columns share
    is as coarse as the largest needs, so the others are left with 1 / ratio of its codes.
    Source: Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, for what an outlier does; the threshold is its 6.
    """
    largest_I = inputs_NI.abs().amax(0)
    middle, top = float(largest_I.median()), float(largest_I.max())
    if not top:
        return Outliers(ratio=1.0, channels=())
    found = largest_I.argsort(descending=True, stable=True)[:MOST_CHANNELS]
    channels = tuple(int(column) for column in found if float(largest_I[column]) >= max(OUTLYING * middle, middle))
    return Outliers(ratio=top / middle if middle else math.inf, channels=channels)


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """Figures of N predicted tokens, f64 each: nll in nats, kl in nats, and whether the likeliest token is the same."""

    original_nll_N: Tensor
    nll_N: Tensor
    kl_N: Tensor
    same_top_N: Tensor


def token_figures(original_NV: Tensor, copy_NV: Tensor, next_token_N: Tensor) -> TokenFigures:
    """Compare two models' logits [N, V] for the tokens [N] that really came next.

    kl is KL(original || copy): what is lost by using the copy where the original was meant.
    """
    original_log = torch.log_softmax(original_NV.float(), dim=-1)
    copy_log = torch.log_softmax(copy_NV.float(), dim=-1)
    kl = (original_log.exp() * (original_log - copy_log)).sum(-1)
    pick = next_token_N.unsqueeze(-1)
    return TokenFigures(
        original_nll_N=-original_log.gather(-1, pick).squeeze(-1).double(),
        nll_N=-copy_log.gather(-1, pick).squeeze(-1).double(),
        kl_N=kl.double().clamp(min=0.0),  # rounding makes it a little negative where the two are equal
        same_top_N=(original_log.argmax(-1) == copy_log.argmax(-1)).double(),
    )


def embedding_figures(original_ND: Tensor, copy_ND: Tensor) -> dict[str, float]:
    """Compare two models' embeddings of the same texts, vectors of length 1: cosines, and who is nearest to whom.

    neighbour_agreement is the share of texts whose nearest other text is the same one; of one text there is none.
    """
    cosine_N = (original_ND * copy_ND).sum(-1).clamp(-1.0, 1.0)
    figures = {"embedding_cosine": float(cosine_N.mean()), "embedding_cosine_min": float(cosine_N.min())}
    if len(original_ND) > 1:
        same_N = _nearest(original_ND) == _nearest(copy_ND)
        figures["neighbour_agreement"] = float(same_N.double().mean())
    return figures


def _nearest(vectors_ND: Tensor) -> Tensor:
    return (vectors_ND @ vectors_ND.T).fill_diagonal_(-math.inf).argmax(-1)


def summary(figures: Sequence[TokenFigures]) -> dict[str, float]:
    """The model-level figures over all tokens: perplexity, KL divergence (mean, median, 99th percentile), top-1."""
    nll = torch.cat([item.nll_N for item in figures])
    original = torch.cat([item.original_nll_N for item in figures])
    kl = torch.cat([item.kl_N for item in figures])
    same = torch.cat([item.same_top_N for item in figures])
    return {
        "perplexity": math.exp(min(700.0, float(nll.mean()))),  # e^700 still fits a double
        "original_perplexity": math.exp(min(700.0, float(original.mean()))),
        "kl_mean": float(kl.mean()),
        "kl_median": float(kl.median()),
        "kl_p99": float(kl.quantile(0.99)),
        "top1_agreement": float(same.mean()),
        "tokens": float(nll.numel()),
    }
