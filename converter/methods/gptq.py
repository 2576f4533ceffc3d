"""GPTQ: round column by column, pushing each column's error onto those not yet rounded, then go over the codes again.

Scales and whatever else a grid stores are those that round-to-nearest fits with importance; where a grid allows it,
they move a little afterwards, with the codes held, to where the error is least. So one solver serves integer grids and
GGUF blocks alike (see quantkernels.columns.Frame), and a GGUF file keeps its size and its readers. Columns go in the
order of falling activation power, while scales stay those of contiguous groups ("static activation order"): the
accuracy of the order without an index array in the file. One factorisation serves all linears of a tap, stacked on the
output axis, because rows do not depend on each other. The alternative, refitting each group's scale on the corrected
weights, forbids that order.

Where statistics are of a target's own chain, what is rounded is not the weight but the one whose output on the chain's
inputs is nearest to the original's output on its own (`aimed`): so errors of earlier blocks are made up for. Inputs of
the chain without that were measured to bring nothing.

# O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from converter.errors import NumericsError
from converter.grids import Coded, Framed, Grid
from converter.methods import Block, Options, Rounded
from converter.methods.rtn import importance_of, is_quantized, nearest, round_to_nearest
from converter.workers import Workers, row_threads
from quantkernels import columns

PIECE_WEIGHTS = 1 << 24  # a GPU solves rows of this many weights at a time; each of some six temporaries takes 64 MB
PIECE_ROWS = 512  # and a thread of a CPU so many; enough for products to be as fast as they get
AHEAD = 4  # pieces that wait for each thread while what comes behind them is made ready
PANEL = 256  # columns of a block of a Cholesky factorisation
LEAST_RAISED = 0.01  # where raising the damping starts when none was asked for
# Where what the other columns leave of a column's power is less than this share of it, f32 has cancelled too much: f64.
LEAST_LEFT = 1e-4


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A Hessian made ready: root is that of the damped Hessian with its columns in order_I.

    hessian_II is the damped Hessian itself, columns in their own order, in units of the Gram matrix's mean diagonal,
    `unit`, which is None where only the diagonal was kept. rough_hessian_II is the same in the type of large products.
    All are where the Gram matrix was, but for order_I on the CPU. note tells what was not as asked; it is empty when
    all was.
    """

    order_I: Tensor
    root: columns.Root
    hessian_II: Tensor
    rough_hessian_II: Tensor
    unit: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """A linear to be solved: its name, its weight [O, I], how it was rounded, and that rounding's frame."""

    name: str
    weight_OI: Tensor
    coded: Coded
    framed: Framed


@dataclass(frozen=True, kw_only=True, eq=False)
class _Alike:
    """Linears of one tap with frames of one kind, which are solved as one matrix; note: what was not as asked."""

    linears: list[_Linear]
    factor: Factor
    note: str


_Piece = tuple[_Alike, Tensor, columns.AnyFrame]  # some rows of weights to be solved, and their frame
_Solved = tuple[_Alike, columns.AnyFrame, Tensor]  # their frame and codes


def gptq(block: Block, grids: Mapping[str, Grid], options: Options) -> Rounded:
    """Every linear that has a Gram matrix and a grid with codes solved by GPTQ; everything else rounded to nearest.

    Scales are fitted with the mean squares of the tap as importance. Passes of coordinate descent follow, as many as
    options.sweeps or `_sweeps` say, over the codes and, with those held, the scales, as far as a grid stores others.
    Before those, with a diagonal Hessian integer grids have what round_to_nearest with importance gives, code for code.
    Statistics with a drift correct what is aimed at, see `aimed`. Matrices that could not be solved, and damping that
    had to grow, are in the notes.
    Raises NumericsError when a Hessian or a weight is not finite.
    Source: Frantar et al. 2022, arXiv:2210.17323; Behdin et al. 2023, arXiv:2309.01885.
    """
    coded: dict[str, Coded] = {}
    notes: dict[str, str] = {}
    threads = options.threads if torch.device(options.device).type == "cpu" else 1
    preparing, solving = Workers(threads), Workers(threads)  # two: nothing is made ready behind what waits for it
    pieces = (piece for alike in _to_solve(block, grids, options, preparing) for piece in _pieces(alike))
    solved = solving.map(partial(_solve_rows, options=options), pieces, ahead=AHEAD * threads)
    for alike, rows in groupby(solved, itemgetter(0)):
        coded.update(_joined(alike, [(frame, codes) for _, frame, codes in rows]))
        notes.update({linear.name: alike.note for linear in alike.linears if alike.note})
    rest = {name: weight for name, weight in block.tensors.items() if name not in coded}
    with row_threads(options.threads):
        rounded = round_to_nearest(replace(block, tensors=rest), grids, options)
    unsolved = [name for name, weight in rest.items() if is_quantized(weight, grids[name])]
    if block.taps:  # outside of the blocks nothing has one
        notes.update(dict.fromkeys(unsolved, "no Gram matrix: rounded to nearest"))
    coded.update(rounded.coded)
    return Rounded(coded={name: coded[name] for name in block.tensors}, notes=notes)


def _to_solve(block: Block, grids: Mapping[str, Grid], options: Options, workers: Workers) -> Iterator[_Alike]:
    """The linears of every tap with a Gram matrix that have grids with codes, rounded to nearest and with a factor.

    Each is made ready while the ones before it are being solved.
    """
    for tap in block.taps:
        stats = block.stats.get(tap.name)
        if stats is None or stats.gram is None:
            continue
        gram_II, where = stats.gram.to(options.device), f"{block.where} {tap.name}"
        factor_of = cache(
            partial(factorize, gram_II, options.damping, where, products=options.products, workers=workers)
        )
        names = [name for linear in tap.linears if (name := f"{linear}.weight") in grids]
        weights = {name: block.tensors[name] for name in names if is_quantized(block.tensors[name], grids[name])}
        told = ""
        if stats.drift is not None and weights:
            weights, told = _aimed(weights, stats.drift, factor_of(1))
        alike: dict[tuple[object, ...], list[_Linear]] = {}
        for linear in _linears(block, weights, grids, workers):
            alike.setdefault((linear.framed.frame.together, *linear.framed.frame.kind), []).append(linear)
        for linears in alike.values():
            factor = factor_of(linears[0].framed.frame.together)
            yield _Alike(linears=linears, factor=factor, note="; ".join(note for note in (factor.note, told) if note))


def _aimed(weights: Mapping[str, Tensor], drift_II: Tensor, factor: Factor) -> tuple[dict[str, Tensor], str]:
    """Every weight as `aimed` gives it, or all as they are and a note why."""
    if factor.unit is None:  # factor.note says so
        return dict(weights), ""
    found = {name: aimed(weight_OI, drift_II, factor) for name, weight_OI in weights.items()}
    if all(bool(weight_OI.isfinite().all()) for weight_OI in found.values()):
        return found, ""
    return dict(weights), "what would make up for earlier blocks is not finite: left out"


def aimed(weight_OI: Tensor, drift_II: Tensor, factor: Factor) -> Tensor:
    """The weight [O, I] f32 that on the chain's inputs x comes nearest to weight_OI on the original's inputs o.

    drift_II [I, I] f32 is the sum of (o - x) x^T, factor that of H, the sum of x x^T. The sum of |W o - V x|^2 is least
    where V H = W (H + drift), so V = W + W drift H^-1; H is damped as the factor is, which keeps V near W where the
    inputs say little. Without drift V is W, bit for bit.
    """
    assert factor.unit is not None
    shares_II, pivots_I = factor.root.shares_II, factor.root.pivots_I
    away_OI = (weight_OI.to(shares_II.device) @ drift_II.to(shares_II.device)).div_(factor.unit)[:, factor.order_I]
    # H = N D^2 N^T, with the shares N and the pivots D
    away_OI = torch.linalg.solve_triangular(shares_II.T, away_OI, upper=False, left=False, unitriangular=True)
    away_OI.div_(pivots_I.square())
    away_OI = torch.linalg.solve_triangular(shares_II, away_OI, upper=True, left=False, unitriangular=True)
    aimed_OI = weight_OI.clone()
    aimed_OI[:, factor.order_I] += away_OI.to(weight_OI.device)
    return aimed_OI


def _linears(
    block: Block, weights: Mapping[str, Tensor], grids: Mapping[str, Grid], workers: Workers
) -> Iterator[_Linear]:
    """Those of the weights that have codes, rounded to nearest with importance."""

    def rounded(name: str) -> Coded:
        return nearest(f"{block.where} {name}", weights[name], grids[name], importance_of(block, name))

    for (name, weight_OI), coded in zip(weights.items(), workers.map(rounded, weights), strict=True):
        framed = grids[name].framed(coded.parts)
        if framed is not None:
            yield _Linear(name=name, weight_OI=weight_OI, coded=coded, framed=framed)


def _pieces(alike: _Alike) -> Iterator[_Piece]:
    """Some rows of the weights at a time, with their frame."""
    weight_OI = torch.cat([linear.weight_OI for linear in alike.linears])
    on_cpu = alike.factor.hessian_II.device.type == "cpu"
    pieces = torch.split(weight_OI, PIECE_ROWS if on_cpu else max(1, PIECE_WEIGHTS // weight_OI.shape[1]))
    stacked = columns.stack([linear.framed.frame for linear in alike.linears])
    for piece_OI, frame in zip(pieces, columns.split(stacked, [len(piece) for piece in pieces]), strict=True):
        yield alike, piece_OI, frame


def _solve_rows(piece: _Piece, options: Options) -> _Solved:
    """The frame, with better scales where it may have others, and the codes; solved where the factor is."""
    alike, weight_OI, frame = piece
    factor = alike.factor
    there_OI, rough_II = weight_OI.to(factor.hessian_II.device), factor.rough_hessian_II
    codes = columns.solve(there_OI, factor.root, frame, factor.order_I)
    if factor.unit is None:  # nothing is known to go over them by
        return alike, frame, codes.to(weight_OI.device)
    sweeps = _sweeps(frame) if options.sweeps is None else options.sweeps
    better, codes = columns.refine(there_OI, factor.hessian_II, frame, codes, sweeps=sweeps, rough_hessian=rough_II)
    if sweeps and options.gain and _is_coarse(frame):
        better = columns.restore_gain(there_OI, rough_II, better, codes)
    return alike, columns.on(better, weight_OI.device), codes.to(weight_OI.device)


def _sweeps(frame: columns.AnyFrame) -> int:
    """How often codes are gone over again: once where they have sixteen values and more, which is what pays there.

    A second time costs a tenth of a conversion, or more where columns are many. It took 0 to 2 % off the KL divergence
    at 4 bits (the first 2 to 5 %), 2 % at 3 and 6 % at 2 bits; a third next to nothing.
    """
    return 2 if _is_coarse(frame) else 1


def _is_coarse(frame: columns.AnyFrame) -> bool:
    """Whether codes have less than sixteen values: then so much is lost that more work pays."""
    return not isinstance(frame, columns.Frame) or frame.high - frame.low < 15


def _joined(alike: _Alike, solved: list[tuple[columns.AnyFrame, Tensor]]) -> dict[str, Coded]:
    """The linears with the frames and codes of their pieces, in order."""
    rows = [len(linear.weight_OI) for linear in alike.linears]
    frames = columns.split(columns.stack([frame for frame, _ in solved]), rows)
    codes = torch.split(torch.cat([codes for _, codes in solved]), rows)
    return {
        linear.name: replace(linear.coded, parts=linear.framed.with_frame(frame, own.clone()))
        for linear, frame, own in zip(alike.linears, frames, codes, strict=True)
    }


def factorize(
    gram_II: Tensor,
    damping: float,
    where: str,
    together: int = 1,
    products: torch.dtype = torch.float32,
    workers: Workers | None = None,
) -> Factor:
    """The factor of the Hessian gram_II [I, I] f32, damped by a share of its mean diagonal, in activation order.

    Columns that share a code, `together` of them, stay together and are ordered by the sum of their powers.
    An input never seen has no row to push errors along and is rounded to nearest. When the matrix is not positive
    definite, damping is raised tenfold up to 1; when that does not help either, only the diagonal is kept.
    f32 where that leaves enough of every column, which is half of the time and memory; f64 where it does not. products:
    the type of large products. workers: over which blocks of columns are spread.
    Raises NumericsError, naming `where`, when gram_II is not finite.
    """
    workers = workers or Workers()
    # Minimum and maximum carry what is not finite along, and cost a twentieth of looking at every value.
    if not bool(torch.stack(torch.aminmax(gram_II)).isfinite().all()):
        broken = int((~torch.isfinite(gram_II)).any(0).sum())
        what = f"the Hessian is not finite in {broken} of {len(gram_II)} columns"
        raise NumericsError(where, what, "Check the calibration text and the model's weights, or use method rtn")
    diagonal_I = gram_II.diagonal().double().cpu()
    seen_I = diagonal_I > 0
    made = partial(_factor, products=products)
    if not bool(seen_I.any()):
        note = "the calibration rows never reached it: rounded to nearest"
        one_II = torch.eye(len(gram_II), device=gram_II.device)
        return made(torch.arange(len(gram_II)), one_II, one_II, note=note)
    mean = float(diagonal_I[seen_I].mean())
    order_B = diagonal_I.reshape(-1, together).sum(1).argsort(descending=True, stable=True)
    order_I = (order_B[:, None] * together + torch.arange(together)).flatten()
    hessian_II = _damped(gram_II, mean, damping)
    upper_II = _upper_root(_in_order(hessian_II, order_I), workers)
    if upper_II is not None:
        left_I = upper_II.diagonal().square() / hessian_II.diagonal()[order_I]
        if float(left_I.min()) > LEAST_LEFT:
            return made(order_I, upper_II, hessian_II, unit=mean)
    del upper_II, hessian_II
    for share in _dampings(damping):
        upper_II = _upper_root(_in_order(_damped(gram_II, mean, share, torch.float64), order_I), workers)
        if upper_II is not None:
            raised = f"the Hessian is not positive definite: damping raised to {share:g}" if share > damping else ""
            return made(order_I, upper_II, _damped(gram_II, mean, share), unit=mean, note=raised)
    powers_I = _damped(gram_II, mean, share).diagonal().clamp(min=1)
    note = f"the Hessian is not positive definite at damping {share:g}: rounded to nearest with importance"
    return made(order_I, powers_I[order_I].sqrt().diag(), powers_I.diag(), note=note)


def _factor(
    order_I: Tensor,
    upper_II: Tensor,
    hessian_II: Tensor,
    products: torch.dtype,
    unit: float | None = None,
    note: str = "",
) -> Factor:
    return Factor(
        order_I=order_I,
        root=columns.root_of(upper_II, products),
        hessian_II=hessian_II,
        rough_hessian_II=hessian_II.to(products),
        unit=unit,
        note=note,
    )


def _damped(gram_II: Tensor, mean: float, share: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The Hessian in units of its mean diagonal, `share` added to its own; inputs never seen have 1 there."""
    hessian_II = gram_II / mean if gram_II.dtype == dtype else gram_II.to(dtype).div_(mean)
    diagonal_I = hessian_II.diagonal()
    diagonal_I.add_(share + (diagonal_I <= 0).to(dtype))
    return hessian_II


def _in_order(matrix_II: Tensor, order_I: Tensor) -> Tensor:
    """The matrix with its rows and columns in this order."""
    there_I = order_I.to(matrix_II.device)
    return matrix_II.index_select(0, there_I).index_select(1, there_I)


def _upper_root(matrix_II: Tensor, workers: Workers) -> Tensor | None:
    """The upper root R of a matrix R R^T, in its place, block by block from the end; None when it is not definite.

    LAPACK knows the lower one only, of a block here turned about, and rounds differently on several threads.
    """
    if matrix_II.is_cuda:
        lower_II, failed = torch.linalg.cholesky_ex(matrix_II.flip(0, 1))
        return None if int(failed) else lower_II.flip(0, 1)
    for stop in range(len(matrix_II), 0, -PANEL):
        start = max(0, stop - PANEL)
        lower_CC, failed = torch.linalg.cholesky_ex(matrix_II[start:stop, start:stop].flip(0, 1))
        if int(failed):
            return None
        upper_CC = lower_CC.flip(0, 1)
        matrix_II[start:stop, start:stop] = upper_CC
        panel_IC = torch.linalg.solve_triangular(upper_CC.T, matrix_II[:start, start:stop], upper=False, left=False)
        matrix_II[:start, start:stop] = panel_IC

        def subtract(left: int, panel_IC: Tensor = panel_IC) -> None:
            right = min(left + PANEL, len(panel_IC))
            matrix_II[:right, left:right].addmm_(panel_IC[:right], panel_IC[left:right].T, alpha=-1)

        for _ in workers.map(subtract, range(0, start, PANEL)):
            pass
    return matrix_II.triu_()


def _dampings(first: float) -> Iterator[float]:
    """`first`, then ten times more each, up to 1."""
    yield first
    share = max(10 * first, LEAST_RAISED) if first < 1 else 1.0
    while share < 1:
        yield share
        share *= 10
    if first < 1:
        yield 1.0
