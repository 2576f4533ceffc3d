"""The first scale of IQ2_XXS in Triton: a fit with levels 0 to 4, `search_nonnegative` of `reference/search.py`.

A lane is a sub-block, as in `gpu_search.search_nonnegative`, which keeps values and codes in registers. Unrolled for
32 weights that takes 45 s to compile. Here they are in memory, transposed so that the lanes of a warp read neighbours,
and loops stay loops: some 600 coalesced loads for each sub-block, little beside its walks along neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
import triton.language as tl

from quantkernels.ggml.gpu.lattice import Prepared
from quantkernels.ggml.gpu.launch import Launch, Slab
from quantkernels.ggml.gpu.numbers import jitted, lane_of, load_byte, low_byte, nearest, store_byte


def first_fit(slab: Slab, prepared: Prepared, size: int, scale: torch.Tensor, reach: torch.Tensor) -> list[Launch]:
    """The launches that write the fitted scale of each sub-block of `size`, and reach, three times of it."""
    values, weight = slab.found(1, 1), slab.found(1, 1)
    deltas = (-4, -3, -2, -1, 1, 2, 3, 4)
    trials = slab.floats(np.float32(0.1) * np.float32(delta) + np.float32(4) for delta in deltas)
    subs = scale.numel()
    transposing = Launch(
        kernel=transpose_kernel,
        arguments=(prepared.values, prepared.weight, values, weight, subs),
        count=values.numel(),
        constants={"N": size},
    )
    fitting = Launch(
        kernel=first_fit_kernel,
        arguments=(values, weight, trials, slab.codes, scale, reach),
        count=subs,
        constants={"N": size},
    )
    return [transposing, fitting]


@jitted
def transpose_kernel(
    values: tl.tensor,
    weights: tl.tensor,
    values_NB: tl.tensor,
    weights_NB: tl.tensor,
    subs: tl.tensor,
    count: tl.tensor,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Values and weights [subs, N] as [N, subs]."""
    lane = lane_of(T)
    present = lane < count
    at = lane % subs * N + lane // subs
    tl.store(values_NB + lane, tl.load(values + at, mask=present, other=0.0), mask=present)
    tl.store(weights_NB + lane, tl.load(weights + at, mask=present, other=0.0), mask=present)


@jitted
def code_error(
    values_NB: tl.tensor,
    weights_NB: tl.tensor,
    lane: tl.tensor,
    count: tl.tensor,
    inverse: tl.tensor,
    FIRST: tl.constexpr,
    N: tl.constexpr,
) -> tl.tensor:
    """The weighted square error of an inverse scale; the FIRST one keeps codes as a byte does, others have a top."""
    present = lane < count
    scale = tl.math.div_rn(1.0, inverse)
    error = tl.zeros_like(inverse)
    for i in range(N):
        value = tl.load(values_NB + i * count + lane, mask=present, other=0.0)
        weight = tl.load(weights_NB + i * count + lane, mask=present, other=0.0)
        code = nearest(inverse * value)
        code = low_byte(code) if FIRST else tl.where(code > 4.0, 4.0, code)
        difference = value - scale * code
        error += weight * difference * difference
    return error


@jitted
def first_fit_kernel(
    values_NB: tl.tensor,
    weights_NB: tl.tensor,
    trials: tl.tensor,
    codes_NB: tl.tensor,
    scales: tl.tensor,
    reach: tl.tensor,
    count: tl.tensor,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Nine scales, then five sweeps that move one code at a time while the fit grows."""
    lane = lane_of(T)
    present = lane < count
    high = tl.zeros((T,), tl.float32)
    for i in range(N):
        value = tl.load(values_NB + i * count + lane, mask=present, other=0.0)
        high = tl.where(value > high, value, high)
    best_inverse = tl.math.div_rn(4.0, high)
    best = code_error(values_NB, weights_NB, lane, count, best_inverse, True, N)
    for trial in range(8):
        inverse = tl.math.div_rn(tl.load(trials + trial), high)
        error = code_error(values_NB, weights_NB, lane, count, inverse, False, N)
        better = error < best
        best = tl.where(better, error, best)
        best_inverse = tl.where(better, inverse, best_inverse)
    sum_xl = tl.zeros((T,), tl.float32)
    sum_l2 = tl.zeros((T,), tl.float32)
    for i in range(N):
        value = tl.load(values_NB + i * count + lane, mask=present, other=0.0)
        weight = tl.load(weights_NB + i * count + lane, mask=present, other=0.0)
        code = nearest(best_inverse * value)
        code = tl.where(code > 4.0, 4.0, code)
        sum_xl += weight * value * code
        sum_l2 += weight * code * code
        store_byte(codes_NB, i * count + lane, code.to(tl.int32), present)
    going = present
    for _ in range(5):
        changed = lane < 0
        for i in range(N):
            value = tl.load(values_NB + i * count + lane, mask=present, other=0.0)
            weight = tl.load(weights_NB + i * count + lane, mask=present, other=0.0)
            old = load_byte(codes_NB, i * count + lane, present).to(tl.float32)
            rest_xl = sum_xl - weight * value * old
            rest_l2 = sum_l2 - weight * old * old
            new = nearest(tl.math.div_rn(value * rest_l2, rest_xl))
            new = tl.where(new > 4.0, 4.0, new)
            new_xl = rest_xl + weight * value * new
            new_l2 = rest_l2 + weight * new * new
            move = going & (rest_xl > 0.0) & (rest_l2 > 0.0) & (new != old) & (new_l2 > 0.0)
            move = move & (new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2)
            store_byte(codes_NB, i * count + lane, new.to(tl.int32), move)
            sum_xl = tl.where(move, new_xl, sum_xl)
            sum_l2 = tl.where(move, new_l2, sum_l2)
            changed = changed | move
        going = going & changed
    scale = tl.where(sum_l2 > 0.0, tl.math.div_rn(sum_xl, sum_l2), 0.0)
    scale = tl.where(high < 1e-15, 0.0, scale)
    tl.store(scales + lane, scale, mask=present)
    tl.store(reach + lane, scale * 3.0, mask=present)
