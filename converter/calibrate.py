"""One calibration step: run a block over the calibration rows, keep its taps' statistics, hand the rows on.

The rows see the original weights, so one pass serves every target. The alternative is a pass for each target through
its own quantized blocks (`calibrate_chain`): it costs several forwards for each block and pays at three bits and
below, where what a block makes of the errors of those before it is no longer small.
"""

# N sequences, T tokens of a sequence, D hidden width
from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.blocks import Decoder
from converter.caches import CacheRounding
from converter.errors import NumericsError
from converter.schemes import Activations
from converter.stats import Collector, Counted, RowSums, TapStats

# Sequences of a chain that run after as many of the original, whose taps' rows are kept for so long. A GPU loads the
# block's weights anew for each such piece.
PAIRS = 4


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A block on its way to being quantized: its tensors as they are so far, how inputs of those linears are quantized
    and, once keys and values are made of such tensors, those; and the taps whose turn it is.
    """

    tensors: Mapping[str, Tensor]
    activations: Mapping[str, Activations]
    taps: Set[str]
    rounding: CacheRounding | None = None


@dataclass(frozen=True, kw_only=True)
class CalibratedBlock:
    """hidden [N, T, D] behind the block, stats by tap name, skipped: sequences left out because they overflowed."""

    hidden: Tensor
    stats: Mapping[str, TapStats]
    skipped: int


def calibrate_block(
    decoder: Decoder,
    b: int,
    tensors: Mapping[str, Tensor],
    hidden: Tensor,
    gram_for: Set[str] = frozenset(),
    skip_bad_rows: bool = False,
    counted_for: Mapping[str, Counted] | None = None,
    watch_cache: bool = False,
) -> CalibratedBlock:
    """Run block b over `hidden` [N, T, D] and gather the statistics of its taps; gram for the taps in `gram_for`.

    tensors: the block's, by checkpoint name relative to it. counted_for: taps that get a histogram, and of what.
    watch_cache: the keys and values that attention keeps are taps, too.
    Sequences are added in order, so the result is the same on any number of workers. A sequence with a value that is
    not finite in any tap is left out of all taps when skip_bad_rows is set; otherwise NumericsError tells the first tap
    and how many sequences.
    """
    found = _Found(decoder, gram_for, counted_for=counted_for)
    behind = decoder.run_block(
        b, tensors, hidden, found.add, watch_cache=watch_cache, measure=lambda _, rows: RowSums(rows)
    )
    for n, one in enumerate(behind):
        found.check(n, one)
    found.refuse_bad(f"{decoder.where} block {b}", len(hidden), skip_bad_rows)
    return CalibratedBlock(hidden=behind, stats=found.stats(), skipped=len(found.bad))


def calibrate_chain(
    decoder: Decoder,
    b: int,
    tensors: Mapping[str, Tensor],
    original: Tensor,
    chain: Tensor,
    gram_for: Set[str] = frozenset(),
    drift_for: Set[str] = frozenset(),
    skip_bad_rows: bool = False,
    stage: Stage | None = None,
    counted_for: Mapping[str, Counted] | None = None,
    watch_cache: bool = False,
) -> tuple[Mapping[str, TapStats], int]:
    """The statistics of block b's taps on the hidden state `chain` [N, T, D] of a target, and how many were skipped.

    The original block runs over it and, sequence by sequence, over `original`, the original's hidden state in the same
    place: for taps in drift_for that tells how far their rows lie apart, token by token. A tap that routing decides on
    sees other tokens in one than in the other and cannot be among them. stage: what differs for the chain, where some
    linears of the block are quantized already. Otherwise as calibrate_block.
    """
    found = _Found(decoder, gram_for, drift_for, counted_for)
    own, activations, taps = (stage.tensors, stage.activations, stage.taps) if stage else (tensors, {}, None)
    rounding = stage.rounding if stage else None
    for start in range(0, len(chain), PAIRS):
        piece, first = slice(start, start + PAIRS), dict[int, Mapping[str, Tensor]]()

        def keep(n: int, seen: Mapping[str, Tensor], first: dict[int, Mapping[str, Tensor]] = first) -> None:
            first[n] = {tap: rows for tap, rows in seen.items() if tap in drift_for and (taps is None or tap in taps)}

        def add(
            n: int,
            seen: Mapping[str, RowSums | None],
            start: int = start,
            first: dict[int, Mapping[str, Tensor]] = first,
        ) -> None:
            found.add(start + n, {tap: rows for tap, rows in seen.items() if rows}, first.pop(n))

        def measure(tap: str, rows: Tensor) -> RowSums | None:
            return RowSums(rows) if taps is None or tap in taps else None

        before = decoder.run_block(b, tensors, original[piece], keep)
        behind = decoder.run_block(b, own, chain[piece], add, activations, rounding, watch_cache, measure)
        for n, (one, other) in enumerate(zip(before, behind, strict=True)):
            found.check(start + n, one)
            found.check(start + n, other)
    found.refuse_bad(f"{decoder.where} block {b}", len(chain), skip_bad_rows)
    return found.stats(), len(found.bad)


class _Found:
    """What the taps of a block saw so far, and by sequence where it was not finite; such a sequence is left out."""

    def __init__(
        self,
        decoder: Decoder,
        gram_for: Set[str],
        drift_for: Set[str] = frozenset(),
        counted_for: Mapping[str, Counted] | None = None,
    ) -> None:
        self.bad: dict[int, str] = {}
        self._workers, self._products = decoder.workers, decoder.products
        self._gram_for, self._drift_for, self._counted_for = gram_for, drift_for, counted_for or {}
        self._collectors: dict[str, Collector] = {}

    def add(self, n: int, seen: Mapping[str, RowSums], original: Mapping[str, Tensor] | None = None) -> None:
        """Add sequence n as the taps saw it; original: as they saw it in the original, for drifts."""
        broken = [tap for tap, one in seen.items() if not one.are_finite()]
        broken += [tap for tap, rows in (original or {}).items() if not _is_finite(rows)]
        if broken:
            self.bad[n] = broken[0]
            return
        steps = []
        for tap, one in seen.items():
            if tap not in self._collectors:
                self._collectors[tap] = Collector(
                    columns=one.rows.shape[-1],
                    gram=tap in self._gram_for,
                    drift=tap in self._drift_for,
                    counted=self._counted_for.get(tap),
                    device=one.rows.device,
                    products=self._products,
                )
            steps += self._collectors[tap].steps(one, original[tap] if original and tap in self._drift_for else None)
        for _ in self._workers.map(lambda step: step(), steps):
            pass

    def check(self, n: int, behind: Tensor) -> None:
        """Look at what came out of the block for sequence n."""
        if n not in self.bad and not _is_finite(behind):
            self.bad[n] = "output"

    def refuse_bad(self, where: str, count: int, skip: bool) -> None:
        """Raise NumericsError for sequences that were not finite, unless they may be skipped and others are left."""
        if self.bad and (not skip or not self._collectors):
            tap = self.bad[min(self.bad)]
            alike = sum(name == tap for name in self.bad.values())
            raise NumericsError(
                f"{where} {tap}",
                f"the hidden state is not finite in {alike} of {count} sequences",
                "Check the model's weights for overflow, or choose another calibration text"
                if skip
                else "Set calibration.skip_bad_rows, or check the model's weights for overflow",
            )

    def stats(self) -> dict[str, TapStats]:
        return {tap: collector.stats() for tap, collector in self._collectors.items()}


def _is_finite(values: Tensor) -> bool:
    """Whether all of them are. A NaN becomes both extremes, and to find those takes a tenth of the time of isfinite."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())
