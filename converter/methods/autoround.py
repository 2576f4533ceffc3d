"""AutoRound: learn which way to round, and how far to stretch scales, from the output of the whole block.

Every weight has a shift of at most half a code, every scale a factor; both begin where the start has them and go a
fixed step against the sign of their gradient, steps that shrink to nothing. The block's output is what is compared, so
its linears make up for each other's errors as no solver can that sees one Hessian at a time. The price: some fifty
passes forward and back over the calibration rows for each block where statistics take one forward. The paper starts
from rounding to nearest; what GPTQ gives is a better place to start from and next to the rest costs nothing.

Signs need no more of the quantizer than a straight-through gradient, which has a closed form: the block is
differentiated with respect to its weights as they are read back, by whoever runs it, and all that is learned is here.

Zero points stay where they were searched: they matter to weights that are cut off at the ends of the codes, and these
are taken to lie within their start's codes.

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
from converter.methods.gptq import gptq
from converter.methods.rtn import is_quantized, round_to_nearest
from quantkernels import columns
from quantkernels.columns import Frame

REACH = 0.499  # of a code: how far from its start's code a weight is taken to be at most, so that it begins there
FIXED = "no code of its own for each weight: not learned"
NO_BETTER = "no step erred less than the start, which was kept"
HALF = 0.5  # of a code: how far a weight is shifted at most
FACTORS = (0.5, 1.5)  # of the start's scales


def autoround(block: Block, grids: Mapping[str, Grid], options: Options) -> Rounded:
    """Every linear with a grid of single codes rounded so that the block's output is near the original's.

    The start is the block's, or what gptq gives, or round_to_nearest with importance where no Gram matrix is. Without
    rows, and for grids without codes, that is the result. Which sequences a step sees follows from options.seed. Of all
    steps that one is kept which erred least on its sequences, as a share of the start's error on the same; it, the last
    one and the start are then compared on all rows, so that the result errs no more than the start. Where nothing was
    better, a note says so.
    Source: Cheng et al. 2023, arXiv:2309.05516.
    """
    measured = any(stats.gram is not None for stats in block.stats.values())
    rounder = gptq if measured else round_to_nearest
    start = block.start or rounder(block, grids, replace(options, importance=True, gain=False))
    rows = block.rows
    if rows is None:
        return start
    linears = _linears(block, start.coded, rows.device)
    fixed = [name for name, coded in start.coded.items() if is_quantized(block.tensors[name], coded.grid)]
    notes = dict(start.notes) | {name: FIXED for name in fixed if name not in linears}
    if not linears:
        return replace(start, notes=notes)
    start = replace(start, notes=notes)
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
    return _best(start, linears, rows, read_back, float(first_N.sum()))


def _best(
    start: Rounded,
    linears: Mapping[str, Learned],
    rows: Rows,
    read_back: Mapping[str, Tensor],
    first: float,
) -> Rounded:
    """What was kept or where the steps ended, whichever errs less on all rows, if it errs less than the start."""
    errors = {}
    for last in (False, True):
        tried = {name: linear.decode() if last else linear.decode_kept() for name, linear in linears.items()}
        errors[last] = float(_errors(rows, {**read_back, **tried}).sum())
    better = {last: error for last, error in errors.items() if error < first}
    if not better:
        return replace(start, notes={**start.notes, **dict.fromkeys(linears, NO_BETTER)})
    if min(better, key=better.__getitem__):
        for linear in linears.values():
            linear.keep()
    learned = {name: replace(start.coded[name], parts=linear.parts()) for name, linear in linears.items()}
    return replace(start, coded={name: learned.get(name, coded) for name, coded in start.coded.items()})


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


def _linears(block: Block, start: Mapping[str, Coded], device: torch.device) -> dict[str, Learned]:
    """The linears whose codes can be learned, by name, where the start left them."""
    found: dict[str, Learned] = {}
    for name, coded in start.items():
        weight = block.tensors[name]
        framed = coded.grid.framed(coded.parts) if is_quantized(weight, coded.grid) else None
        if framed is not None and isinstance(framed.frame, Frame):
            found[name] = Learned(weight.to(device), coded.decode().to(device), framed)
    return found


class Learned:
    """A linear under way: shifts of its weights, factors of its scales, and the codes and scales that were kept.

    A weight beyond the reach of the code that it starts with is taken to lie at its border. A row's last group is
    filled up with weights that nothing reads.
    """

    def __init__(self, weight_OI: Tensor, start_OI: Tensor, framed: Framed) -> None:
        self._framed = framed
        frame = columns.on(framed.frame, weight_OI.device)
        assert isinstance(frame, Frame)
        self._frame = frame
        ladder = frame.scales
        self._scales = ladder if ladder and not ladder.rungs and ladder.group_size == frame.group_size else None
        self._columns = weight_OI.shape[1]
        # What codes mean where they are no steps of one size: [L], or of each group [O, G, L]
        self._levels = torch.tensor(frame.table, device=weight_OI.device) if frame.table else frame.levels_OGL
        # A step moves what the outermost code means by as much as it shifts a weight.
        self._widest = max(abs(level) for level in frame.table or (frame.low, frame.high))
        self._zero_OG1, self._offset_OG1 = frame.zero_OG[:, :, None], frame.offset_OG[:, :, None]
        codes_OGN = self._place(self._grouped(start_OI) - self._offset_OG1, frame.scale_OG).round_()
        at_OGN = self._place(self._grouped(weight_OI) - self._offset_OG1, frame.scale_OG)
        at_OGN = torch.maximum(torch.minimum(at_OGN, codes_OGN + REACH), codes_OGN - REACH)
        self._weight_OGN = self._level(at_OGN).sub_(self._zero_OG1).mul_(frame.scale_OG[:, :, None])  # less the offset
        self._shift_OGN = torch.zeros_like(self._weight_OGN)
        self._factor_OG = torch.ones_like(frame.scale_OG)
        self._codes_OGN, self._scale_OG = codes_OGN.to(torch.int8), frame.scale_OG
        self._kept = self._codes_OGN, self._scale_OG

    def decode(self) -> Tensor:
        """The weight [O, I] as it would be read back now."""
        if self._scales:
            self._scale_OG = self._scales.nearest(self._frame.scale_OG * self._factor_OG)
        self._codes_OGN = self._free().clamp_(self._frame.low, self._frame.high).to(torch.int8)
        return self._read(self._codes_OGN, self._scale_OG)

    def decode_kept(self) -> Tensor:
        """The weight [O, I] as it would be read back from what was kept."""
        return self._read(*self._kept)

    def keep(self) -> None:
        """Keep the codes and scales that the last `decode` gave."""
        self._kept = self._codes_OGN, self._scale_OG

    def move(self, gradient_OI: Tensor, rate: float) -> None:
        """Go a step against the sign of the gradient with respect to what the last `decode` gave.

        Rounding is taken to have slope 1, also in how a code follows its scale; a code held at a bound has none.
        """
        gradient_OGN = self._grouped(gradient_OI.nan_to_num(0.0))  # of a block that overflowed
        free_OGN = self._free()
        moves_OGN = (free_OGN >= self._frame.low) & (free_OGN <= self._frame.high)
        if self._scales:
            slope_OGN = self._weight_OGN / self._divisor(self._scale_OG)
            slope_OGN = self._meant(self._codes_OGN) - self._zero_OG1 - slope_OGN.mul_(moves_OGN)
            slope_OG = slope_OGN.mul_(gradient_OGN).sum(2)
            self._factor_OG.sub_(rate / self._widest * (slope_OG * self._frame.scale_OG).sign_()).clamp_(*FACTORS)
        signs_OGN = (gradient_OGN * self._scale_OG[:, :, None]).sign_().mul_(moves_OGN)
        self._shift_OGN.sub_(signs_OGN, alpha=rate).clamp_(-HALF, HALF)

    def parts(self) -> Mapping[str, Tensor]:
        """What was kept, as the grid stores it."""
        codes_OGN, scale_OG = (values.cpu() for values in self._kept)
        frame = self._framed.frame
        return self._framed.with_frame(replace(frame, scale_OG=scale_OG), self._flat(codes_OGN).contiguous())

    def _free(self) -> Tensor:
        """The codes [O, G, N] f32 that weights and shifts ask for, whatever their bounds."""
        return self._place(self._weight_OGN, self._scale_OG).add_(self._shift_OGN).round_()

    def _grouped(self, values_OI: Tensor) -> Tensor:
        return grouped(values_OI, self._frame.group_size)

    def _flat(self, values_OGN: Tensor) -> Tensor:
        return values_OGN.flatten(1)[:, : self._columns]

    def _divisor(self, scale_OG: Tensor) -> Tensor:
        """Scales [O, G, 1] to divide by: where one is 0, everything lies at 0."""
        return torch.where(scale_OG == 0, torch.inf, scale_OG)[:, :, None]

    def _place(self, weight_OGN: Tensor, scale_OG: Tensor) -> Tensor:
        """Where weights less their offset lie in units of a code: the nearest code is the nearest whole number."""
        level_OGN = weight_OGN / self._divisor(scale_OG) + self._zero_OG1
        if self._levels is None:
            return level_OGN
        inner = self._levels[..., 1:-1].contiguous()
        below_OGN = torch.searchsorted(inner, level_OGN, right=True)
        first_OGN, gap_OGN = self._interval(below_OGN)
        return below_OGN + (level_OGN - first_OGN) / torch.where(gap_OGN == 0, torch.inf, gap_OGN)

    def _level(self, place_OGN: Tensor) -> Tensor:
        """What lies at places in units of a code, in units of the scale: the inverse of `_place` but for the zero."""
        if self._levels is None:
            return place_OGN
        below_OGN = place_OGN.floor().long().clamp_(0, self._levels.shape[-1] - 2)
        first_OGN, gap_OGN = self._interval(below_OGN)
        return first_OGN + (place_OGN - below_OGN) * gap_OGN

    def _interval(self, below_OGN: Tensor) -> tuple[Tensor, Tensor]:
        """The levels of these codes, and how much further up the next ones are."""
        first_OGN = self._meant(below_OGN)
        return first_OGN, self._meant(below_OGN + 1) - first_OGN

    def _meant(self, codes_OGN: Tensor) -> Tensor:
        """What codes mean in units of the scale, f32, but for the zero."""
        if self._levels is None:
            return codes_OGN.float()
        if self._levels.ndim == 1:
            return self._levels[codes_OGN.long()]
        return self._levels.gather(2, codes_OGN.long())

    def _read(self, codes_OGN: Tensor, scale_OG: Tensor) -> Tensor:
        """The weight [O, I] that a reader makes of codes [O, G, N] i8, in the operations of Frame.decode."""
        level_OGN = self._meant(codes_OGN) - self._zero_OG1
        return self._flat(level_OGN.mul_(scale_OG[:, :, None]).add_(self._offset_OG1))
