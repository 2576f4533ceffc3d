"""GPTQ: round column by column, pushing each column's error onto those not yet rounded.

Columns go in the order of falling activation power, while scales stay those of contiguous groups, fitted before
("static activation order"): the accuracy of the order without an index array in the file. One factorisation serves all
linears of a tap, stacked on the output axis, because rows do not depend on each other. The alternative, refitting each
group's scale on the corrected weights, forbids that order.

# O out, I in, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converter.errors import NumericsError
from converter.grids import Coded, Grid
from converter.grids.affine import AffineGrid, per_row
from converter.methods import Block, Options, Rounded
from converter.methods.rtn import fit, importance_of, is_quantized, round_to_nearest
from quantkernels import columns

LEAF = 128  # columns below which a triangular inverse is not halved again
LEAST_RAISED = 0.01  # where raising the damping starts when none was asked for


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A Hessian made ready: upper_II^T upper_II is the inverse of the damped Hessian with its columns in order_I.

    note tells what was not as asked; it is empty when all was.
    """

    order_I: Tensor
    upper_II: Tensor
    note: str = ""


def gptq(block: Block, grids: Mapping[str, Grid], options: Options) -> Rounded:
    """Every linear that has a Gram matrix solved by GPTQ on its affine grid; everything else rounded to nearest.

    Scales are fitted with the mean squares of the tap as importance. With a diagonal Hessian this equals
    round_to_nearest with importance, code for code. Matrices that could not be solved, and damping that had to grow,
    are in the notes.
    Raises NumericsError when a Hessian or a weight is not finite.
    Source: Frantar et al. 2022, arXiv:2210.17323.
    """
    coded: dict[str, Coded] = {}
    notes: dict[str, str] = {}
    for tap in block.taps:
        stats = block.stats.get(tap.name)
        names = [f"{linear}.weight" for linear in tap.linears]
        affine = {name: grid for name in names if isinstance(grid := grids.get(name), AffineGrid)}
        if stats is None or stats.gram is None or not affine:
            continue
        factor = factorize(stats.gram, options.damping, f"{block.where} {tap.name}")
        alike: dict[tuple[int, int | None], dict[str, AffineGrid]] = {}
        for name, grid in affine.items():
            alike.setdefault((grid.bits, grid.group_size), {})[name] = grid
        for some in alike.values():
            coded.update(_solve(block, some, factor))
        notes.update(dict.fromkeys(affine, factor.note) if factor.note else {})
    rest = {name: weight for name, weight in block.tensors.items() if name not in coded}
    rounded = round_to_nearest(replace(block, tensors=rest), grids, options)
    unsolved = [name for name, weight in rest.items() if is_quantized(weight, grids[name])]
    notes.update(dict.fromkeys(unsolved, "no Gram matrix: rounded to nearest"))
    coded.update(rounded.coded)
    return Rounded(coded={name: coded[name] for name in block.tensors}, notes=notes)


def factorize(gram_II: Tensor, damping: float, where: str) -> Factor:
    """The factor of the Hessian gram_II [I, I] f32, damped by a share of its mean diagonal, in activation order.

    An input never seen has no row to push errors along and is rounded to nearest. When the matrix is not positive
    definite, damping is raised tenfold up to 1; when that does not help either, only the diagonal is kept.
    f64, because f32 fails on matrices that are definite, only badly conditioned. The inverse's upper factor comes from
    one factorisation of the reversed matrix and a triangular inverse: with H = R R^T, R upper, it is R^-1.
    Raises NumericsError, naming `where`, when gram_II is not finite.
    """
    # Minimum and maximum carry what is not finite along, and cost a twentieth of looking at every value.
    if not bool(torch.stack(torch.aminmax(gram_II)).isfinite().all()):
        broken = int((~torch.isfinite(gram_II)).any(0).sum())
        what = f"the Hessian is not finite in {broken} of {len(gram_II)} columns"
        raise NumericsError(where, what, "Check the calibration text and the model's weights, or use method rtn")
    diagonal_I = gram_II.diagonal().double()
    seen_I = diagonal_I > 0
    if not bool(seen_I.any()):
        note = "the calibration rows never reached it: rounded to nearest"
        return Factor(order_I=torch.arange(len(gram_II)), upper_II=torch.eye(len(gram_II)), note=note)
    mean = diagonal_I[seen_I].mean()
    order_I = diagonal_I.argsort(descending=True, stable=True)
    backwards_I = order_I.flip(0)
    hessian_II = gram_II[backwards_I][:, backwards_I].double().div_(mean)
    hessian_II.diagonal()[~seen_I[backwards_I]] = 1
    added = 0.0
    for share in _dampings(damping):
        hessian_II.diagonal().add_(share - added)
        added = share
        lower_II, failed = torch.linalg.cholesky_ex(hessian_II)
        if not int(failed):
            del hessian_II  # two matrices of f64 less at the peak, which lies inside _upper_inverse
            upper_II = lower_II.flip(0, 1)
            del lower_II
            inverse_II = _upper_inverse(upper_II)
            raised = f"the Hessian is not positive definite: damping raised to {share:g}" if share > damping else ""
            return Factor(order_I=order_I, upper_II=inverse_II.float(), note=raised)
    powers_I = hessian_II.diagonal().flip(0).clamp(min=1)
    note = f"the Hessian is not positive definite at damping {added:g}: rounded to nearest with importance"
    return Factor(order_I=order_I, upper_II=powers_I.rsqrt().diag().float(), note=note)


def _upper_inverse(upper_II: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, half by half: a third of the operations of solving for an identity."""
    size = len(upper_II)
    if size <= LEAF:
        solved_II: Tensor = torch.linalg.solve_triangular(upper_II, torch.eye(size, dtype=upper_II.dtype), upper=True)
        return solved_II
    half = size // 2
    inverse_II = torch.zeros_like(upper_II)
    first, last = _upper_inverse(upper_II[:half, :half]), _upper_inverse(upper_II[half:, half:])
    inverse_II[:half, :half], inverse_II[half:, half:] = first, last
    inverse_II[:half, half:] = -(first @ upper_II[:half, half:]) @ last
    return inverse_II


def _dampings(first: float) -> Iterator[float]:
    """`first`, then ten times more each, up to 1."""
    yield first
    share = max(10 * first, LEAST_RAISED) if first < 1 else 1.0
    while share < 1:
        yield share
        share *= 10
    if first < 1:
        yield 1.0


def _solve(block: Block, grids: Mapping[str, AffineGrid], factor: Factor) -> dict[str, Coded]:
    """The linears in `grids`, which read one tap and have the same bits and group size, solved as one matrix."""
    grid = next(iter(grids.values()))
    weights = [block.tensors[name] for name in grids]
    params = [
        fit(f"{block.where} {name}", weight, own, importance_of(block, name))
        for weight, (name, own) in zip(weights, grids.items(), strict=True)
    ]
    stored = [per_row(own, len(weight)) for own, weight in zip(params, weights, strict=True)]
    ordered_OI, _ = columns.solve(
        torch.cat(weights)[:, factor.order_I],
        factor.upper_II,
        torch.cat([scale_OG for scale_OG, _ in stored]),
        torch.cat([zero_OG for _, zero_OG in stored]),
        factor.order_I // grid.columns_per_scale(len(factor.order_I)),
        low=grid.low,
        high=grid.high,
        threads=torch.get_num_threads(),
    )
    codes_OI = torch.empty_like(ordered_OI)
    codes_OI[:, factor.order_I] = ordered_OI
    split = torch.split(codes_OI, [len(weight) for weight in weights])
    return {
        name: Coded(grid=own, shape=tuple(weight.shape), parts={"codes": codes.clone(), **params_of})
        for (name, own), weight, codes, params_of in zip(grids.items(), weights, split, params, strict=True)
    }
