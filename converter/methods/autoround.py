"""AutoRound: learn which way to round, and how far to stretch scales, from the output of the whole block.

Every weight has a shift of at most half a code, every scale a factor; both begin where the start has them and go a
fixed step against the sign of their gradient, steps that shrink to nothing. The block's output is what is compared, so
its linears make up for each other's errors as no solver can that sees one Hessian at a time. The price: some fifty
passes forward and back over the calibration rows for each block where statistics take one forward.

Signs need no more of the quantizer than a straight-through gradient, which has a closed form: the block is
differentiated with respect to its weights as they are read back, by whoever runs it, and all that is learned is here.

# O out, I in, G groups of a row
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from converter.grids import Coded, Framed, Grid
from converter.grids.observers import grouped
from converter.methods import Block, Options, Rounded, Rows
from converter.methods.rtn import is_quantized, round_to_nearest
from quantkernels import columns
from quantkernels.columns import Frame

REACH = 0.499  # of a code: how far from its start's code a weight is taken to be at most, so that it begins there
HALF = 0.5  # of a code: how far a weight is shifted at most
FACTORS = (0.5, 1.5)  # of the start's scales


def autoround(block: Block, grids: Mapping[str, Grid], options: Options) -> Rounded:
    """Every linear with a grid of single codes rounded so that the block's output is near the original's.

    The start is round_to_nearest with importance; without rows, and for grids without codes, that is the result. Which
    sequences a step sees follows from options.seed. Of all steps that one is kept which erred least on its sequences,
    as a share of the start's error on the same; it, the last one and the start are then compared on all rows, so that
    the result errs no more than the start. Where nothing was better, a note says so.
    Source: Cheng et al. 2023, arXiv:2309.05516.
    """
    start = round_to_nearest(block, grids, replace(options, importance=True))
    rows = block.rows
    linears = _linears(block, start.coded, rows.device) if rows else {}
    if rows is None or not linears:
        return start
    read_back = {name: coded.decode().to(rows.device) for name, coded in start.coded.items()}
    first_N = _errors(rows, read_back)
    least = torch.inf
    rate = options.learning_rate or 1 / max(1, options.iterations)
    for step, sequences in enumerate(_batches(rows.count, options)):
        read_back |= {name: linear.decode() for name, linear in linears.items()}
        errors_N, gradients = rows.gradients(read_back, sequences, linears.keys())
        share = float((errors_N / first_N[sequences].clamp(min=torch.finfo().tiny)).mean())
        if share < least:
            least = share
            for linear in linears.values():
                linear.keep()
        for name, linear in linears.items():
            linear.move(gradients[name], rate * (1 - step / options.iterations))
    return _best(block, start, linears, rows, read_back, float(first_N.sum()))


def _best(
    block: Block,
    start: Rounded,
    linears: Mapping[str, _Linear],
    rows: Rows,
    read_back: Mapping[str, Tensor],
    first: float,
) -> Rounded:
    """What was kept or where the steps ended, whichever errs less on all rows, if it errs less than the start."""
    errors = []
    for last in (False, True):
        tried = {name: linear.decode() if last else linear.decode_kept() for name, linear in linears.items()}
        errors.append(float(_errors(rows, {**read_back, **tried}).sum()))
    if not min(errors) < first:
        note = "no step of autoround erred less than rounding to nearest with importance, which was kept"
        return replace(start, notes={**start.notes, **dict.fromkeys(linears, note)})
    if errors[1] < errors[0]:
        for linear in linears.values():
            linear.keep()
    coded = {name: replace(start.coded[name], parts=linear.parts()) for name, linear in linears.items()}
    return replace(start, coded={name: coded.get(name, start.coded[name]) for name in block.tensors})


def _errors(rows: Rows, read_back: Mapping[str, Tensor]) -> Tensor:
    return rows.errors(read_back, range(rows.count))


def _batches(count: int, options: Options) -> Iterator[list[int]]:
    """Sequences for each step: all of them in a random order, then in another, so that each is seen as often."""
    digest = hashlib.sha256(options.seed.encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    order: list[int] = []
    for _ in range(options.iterations):
        while len(order) < min(options.batch_size, count):
            order += torch.randperm(count, generator=random).tolist()
        yield order[: options.batch_size]
        del order[: options.batch_size]


def _linears(block: Block, start: Mapping[str, Coded], device: torch.device) -> dict[str, _Linear]:
    """The linears whose codes can be learned, by name, where the start left them."""
    found: dict[str, _Linear] = {}
    for name, coded in start.items():
        weight = block.tensors[name]
        framed = coded.grid.framed(coded.parts) if is_quantized(weight, coded.grid) else None
        if framed is not None and isinstance(framed.frame, Frame):
            found[name] = _Linear(weight.to(device), coded.decode().to(device), framed)
    return found


class _Linear:
    """A linear under way: shifts of its weights, factors of its scales, and the codes and scales that were kept.

    A weight beyond the reach of the code that it starts with is taken to lie at its border.
    """

    def __init__(self, weight_OI: Tensor, start_OI: Tensor, framed: Framed) -> None:
        self._framed = framed
        frame = columns.on(framed.frame, weight_OI.device)
        assert isinstance(frame, Frame)
        self._frame = frame
        ladder = frame.scales
        self._scales = ladder if ladder and not ladder.rungs and ladder.group_size == frame.group_size else None
        self._columns = weight_OI.shape[1]
        self._zero_OI, self._offset_OI = self._spread(frame.zero_OG), self._spread(frame.offset_OG)
        codes_OI = self._place(start_OI - self._offset_OI, frame.scale_OG).round_()
        at_OI = self._place(weight_OI - self._offset_OI, frame.scale_OG)
        at_OI = torch.maximum(torch.minimum(at_OI, codes_OI + REACH), codes_OI - REACH)
        self._weight_OI = (self._level(at_OI) - self._zero_OI) * self._spread(frame.scale_OG)  # without the offset
        # A step moves what the outermost code means by as much as it shifts a weight.
        self._widest = max(abs(level) for level in frame.table or (frame.low, frame.high))
        self._shift_OI = torch.zeros_like(weight_OI)
        self._factor_OG = torch.ones_like(frame.scale_OG)
        self._codes, self._scale_OG = codes_OI.to(torch.int8), frame.scale_OG
        self._kept = self._codes, self._scale_OG

    def decode(self) -> Tensor:
        """The weight [O, I] as it would be read back now."""
        if self._scales:
            self._scale_OG = self._scales.nearest(self._frame.scale_OG * self._factor_OG)
        free_OI = (self._place(self._weight_OI, self._scale_OG) + self._shift_OI).round_()
        self._codes = free_OI.clamp_(self._frame.low, self._frame.high).to(torch.int8)
        return self._read(self._codes, self._scale_OG)

    def decode_kept(self) -> Tensor:
        """The weight [O, I] as it would be read back from what was kept."""
        return self._read(*self._kept)

    def keep(self) -> None:
        """Keep the codes and scales that the last `decode` gave."""
        self._kept = self._codes, self._scale_OG

    def move(self, gradient_OI: Tensor, rate: float) -> None:
        """Go a step against the sign of the gradient with respect to what the last `decode` gave.

        Rounding is taken to have slope 1, also in how a code follows its scale; a code held at a bound has none.
        """
        place_OI = self._place(self._weight_OI, self._scale_OG)
        free_OI = (place_OI + self._shift_OI).round_()
        moves_OI = (free_OI >= self._frame.low) & (free_OI <= self._frame.high)
        if self._scales:
            wide_OI = self._spread(torch.where(self._scale_OG == 0, torch.inf, self._scale_OG))
            slope_OI = self._level(self._codes.float()) - self._zero_OI - moves_OI * self._weight_OI / wide_OI
            slope_OG = grouped(slope_OI.mul_(gradient_OI), self._frame.group_size).sum(2)
            self._factor_OG.sub_(rate / self._widest * (slope_OG * self._frame.scale_OG).sign_()).clamp_(*FACTORS)
        signs_OI = (gradient_OI * self._spread(self._scale_OG)).sign_().mul_(moves_OI)
        self._shift_OI.sub_(rate * signs_OI).clamp_(-HALF, HALF)

    def parts(self) -> Mapping[str, Tensor]:
        """What was kept, as the grid stores it."""
        codes, scale_OG = (values.cpu() for values in self._kept)
        return self._framed.with_frame(replace(self._framed.frame, scale_OG=scale_OG), codes)

    def _spread(self, values_OG: Tensor) -> Tensor:
        """One value for each weight [O, I]."""
        return values_OG.repeat_interleave(self._frame.group_size, 1)[:, : self._columns]

    def _place(self, weight_OI: Tensor, scale_OG: Tensor) -> Tensor:
        """Where weights without their offset lie in units of a code: the nearest code is the nearest whole number."""
        level_OI = weight_OI / self._spread(torch.where(scale_OG == 0, torch.inf, scale_OG)) + self._zero_OI
        if not self._frame.table:
            return level_OI
        table = torch.tensor(self._frame.table, device=level_OI.device)
        below_OI = torch.bucketize(level_OI, table[1:-1], right=True)
        return below_OI + (level_OI - table[below_OI]) / table.diff()[below_OI]

    def _level(self, place_OI: Tensor) -> Tensor:
        """What lies at places in units of a code, in units of the scale: the inverse of `_place` but for the zero."""
        if not self._frame.table:
            return place_OI
        table = torch.tensor(self._frame.table, device=place_OI.device)
        below_OI = place_OI.floor().long().clamp_(0, len(table) - 2)
        return table[below_OI] + (place_OI - below_OI) * table.diff()[below_OI]

    def _read(self, codes_OI: Tensor, scale_OG: Tensor) -> Tensor:
        return replace(self._frame, scale_OG=scale_OG).decode(codes_OI)
