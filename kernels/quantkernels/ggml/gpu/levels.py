"""The search of `reference/iq4.py` in Triton: one thread has one block of 32."""

from __future__ import annotations

import triton.language as tl

from quantkernels.ggml.gpu.numbers import extreme_of, jitted, lane_of, load_tuple
from quantkernels.ggml.gpu.search import weights_of
from quantkernels.ggml.packing.iq4 import LEVELS, MIDDLES

IQ4_LEVELS = tl.constexpr(LEVELS)
IQ4_MIDDLES = tl.constexpr(MIDDLES)


@jitted
def nearest_level(value: tl.tensor) -> tl.tensor:
    """The nearest level of IQ4, the upper one half-way between two and the highest one for NaN."""
    level = tl.full(value.shape, IQ4_LEVELS[0], tl.float32)
    for k in tl.static_range(15):
        level = tl.where(value < IQ4_MIDDLES[k], level, IQ4_LEVELS[k + 1] + 0.0)
    return level


@jitted
def level_sums(x: tl.tuple, weight: tl.tuple, inverse: tl.tensor, N: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The sums of w * level * x and w * level * level."""
    sum_xl = tl.zeros_like(inverse)
    sum_l2 = tl.zeros_like(inverse)
    for i in tl.static_range(N):
        level = nearest_level(inverse * x[i])
        sum_xl += weight[i] * level * x[i]
        sum_l2 += weight[i] * level * level
    return sum_xl, sum_l2


@jitted
def levels_kernel(
    rows: tl.tensor,
    importance: tl.tensor,
    means: tl.tensor,
    trials: tl.tensor,
    found: tl.tensor,
    columns: tl.tensor,
    span: tl.tensor,
    count: tl.tensor,
    WEIGHTS: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """found [2, count]: scales of IQ4 and their inverses."""
    lane = lane_of(T)
    present = lane < count
    x = load_tuple(rows, lane * N, present, N)
    weight = weights_of(x, importance, means, lane * N, columns, span, present, WEIGHTS, N)
    extreme = extreme_of(x, N)
    first = tl.math.div_rn(1.0, tl.math.div_rn(extreme, 127.0))
    scale = tl.zeros_like(extreme)
    best = tl.zeros_like(extreme)
    for trial in range(16):
        inverse = tl.where(trial == 0, first, tl.math.div_rn(tl.load(trials + trial), extreme))
        sum_xl, sum_l2 = level_sums(x, weight, inverse, N)
        better = ((sum_l2 > 0.0) & (sum_xl * sum_xl > best * sum_l2)) | (trial == 0)  # the first is taken as it is
        ratio = tl.where(sum_l2 > 0.0, tl.math.div_rn(sum_xl, sum_l2), 0.0)
        scale = tl.where(better, ratio, scale)
        best = tl.where(better, ratio * sum_xl, best)
    scale = tl.where(tl.abs(extreme) < 1e-15, 0.0, scale)
    tl.store(found + lane, scale, mask=present)
    tl.store(found + count + lane, tl.where(scale == 0.0, 0.0, tl.math.div_rn(1.0, scale)), mask=present)
