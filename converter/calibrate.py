"""One calibration step: run a block over the calibration rows, keep its taps' statistics, hand the rows on.

The rows see the original weights, so one pass serves every target. The alternative, a pass per target through its own
quantized blocks, costs a forward each and pays at three bits and below.
"""

# N sequences, T tokens of a sequence, D hidden width
from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.blocks import Decoder
from converter.errors import NumericsError
from converter.stats import Collector, TapStats


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
) -> CalibratedBlock:
    """Run block b over `hidden` [N, T, D] and gather the statistics of its taps; gram for the taps in `gram_for`.

    tensors: the block's, by checkpoint name relative to it. Sequences are added in order, so the result is the same
    on any number of workers. A sequence with a value that is not finite in any tap is left out of all taps when
    skip_bad_rows is set; otherwise NumericsError tells the first tap and how many sequences.
    """
    collectors: dict[str, Collector] = {}
    bad: dict[int, str] = {}

    def observe(n: int, seen: Mapping[str, Tensor]) -> None:
        broken = [tap for tap, rows in seen.items() if not bool(torch.isfinite(rows).all())]
        if broken:
            bad[n] = broken[0]
            return
        for tap, rows in seen.items():
            if tap not in collectors:
                collectors[tap] = Collector(columns=rows.shape[-1], gram=tap in gram_for, device=rows.device)
        steps = [step for tap, rows in seen.items() for step in collectors[tap].steps(rows)]
        for _ in decoder.workers.map(lambda step: step(), steps):
            pass

    behind = decoder.run_block(b, tensors, hidden, observe)
    for n, one in enumerate(behind):
        if n not in bad and not bool(torch.isfinite(one).all()):
            bad[n] = "output"
    if bad and (not skip_bad_rows or not collectors):
        tap = bad[min(bad)]
        raise NumericsError(
            f"{decoder.where} block {b} {tap}",
            f"the hidden state is not finite in {sum(name == tap for name in bad.values())} of {len(hidden)} sequences",
            "Check the model's weights for overflow, or choose another calibration text"
            if skip_bad_rows
            else "Set calibration.skip_bad_rows, or check the model's weights for overflow",
        )
    return CalibratedBlock(
        hidden=behind,
        stats={tap: collector.stats() for tap, collector in collectors.items()},
        skipped=len(bad),
    )
