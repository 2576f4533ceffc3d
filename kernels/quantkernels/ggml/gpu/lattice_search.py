"""The searches of `reference/iq2.py` and `reference/iq3.py` in Triton: trials, the best of them, one more rounding.

`gpu_lattice.choose_kernel` finds the points of every group at every scale; the kernels here, where a lane is a
sub-block, fit scales to them in ggml's order. The rules in which the five types differ are the fields of `Rules`.
Shapes: N weights in a sub-block, D in a group, J sub-blocks in a super-block.
"""

# Triton knows no * in tuples, and mypy no tuples that grow.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl

from quantkernels.ggml.gpu.lattice import (
    ENTRY_ROUNDED,
    WARP,
    Prepared,
    choose_kernel,
    level_of,
    tables,
)
from quantkernels.ggml.gpu.lattice_fit import first_fit
from quantkernels.ggml.gpu.launch import Launch, Slab
from quantkernels.ggml.gpu.numbers import (
    jitted,
    lane_of,
    load_byte,
    load_tuple,
    not_a_number,
    store_byte,
    store_half,
    wrapped,
)
from quantkernels.ggml.layout import SUPER_BLOCK

NAN = tl.constexpr(float("nan"))
INFINITY = tl.constexpr(float("inf"))
NOTHING = tl.constexpr(16)  # in the place of a scale's code: all scales of the super-block are zero


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a type searches.

    size: weights of a sub-block; dimensions: of a group; top: the highest level; trials: the numerators of the inverse
    scales; middle: the trial that the first scale comes from, or None where that scale is a fit of its own.
    tiny: a sub-block with its largest magnitude below it is zeros. again: which groups the last rounding chooses anew:
    those "off" the lattice, "all" when one is off, or "always" all. fudge: what d is multiplied with.
    overflow: whether an infinite sum of squares makes d NaN.
    """

    size: int
    dimensions: int
    top: int
    trials: tuple[np.float32, ...]
    middle: float | None
    tiny: float
    again: str
    fudge: float
    overflow: bool


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search finds: entries i32 [groups], codes of scales u8 [sub-blocks], signs, magnitudes f32 [sub-blocks].

    d is in the blocks already. reach holds the largest magnitude of each sub-block.
    """

    launches: tuple[Launch, ...]
    entries: torch.Tensor
    codes: torch.Tensor
    signs: torch.Tensor
    reach: torch.Tensor


def steps(first: int, width: float, reach: int) -> tuple[np.float32, ...]:
    """The numerators first + step * width for steps from -reach to reach."""
    return tuple(np.float32(first) + np.float32(step) * np.float32(width) for step in range(-reach, reach + 1))


def search(slab: Slab, prepared: Prepared, rules: Rules) -> Found:
    """The launches of a search by `rules` for the type of the slab, and what they will have found."""
    device, size = slab.rows.device, rules.size
    grid = tables(slab.known.name, device)
    groups, subs = slab.rows.numel() // rules.dimensions, slab.rows.numel() // size
    reach, scale = slab.found(1, size), slab.found(1, size)
    trial_entries = torch.empty((groups, len(rules.trials)), dtype=torch.int32, device=device)
    last_entries, entries = (torch.empty(groups, dtype=torch.int32, device=device) for _ in range(2))
    codes = torch.empty(subs, dtype=torch.uint8, device=device)
    shape = {"N": size, "D": rules.dimensions}

    def choose(scales: torch.Tensor, into: torch.Tensor, last: bool) -> Launch:
        trials = slab.floats(rules.trials)
        return Launch(
            kernel=choose_kernel,
            arguments=(prepared.values, prepared.root, scales, trials, grid.bounds, grid.entries, into),
            count=into.numel(),
            constants={"TRIALS": 1 if last else len(rules.trials), "LAST": last, "TOP": float(rules.top), **shape},
            tile=WARP,
        )

    if rules.middle is None:
        first_scales = first_fit(slab, prepared, size, scale, reach)
    else:
        constants = {"MIDDLE": rules.middle, "N": size}
        arguments = (prepared.values, scale, reach)
        first_scales = [Launch(kernel=reach_kernel, arguments=arguments, count=subs, constants=constants)]
    launches = (
        *prepared.launches,
        *first_scales,
        choose(reach, trial_entries, False),
        Launch(
            kernel=best_trial_kernel,
            arguments=(prepared.values, prepared.weight, trial_entries, scale, entries),
            count=subs,
            constants={"TRIALS": len(rules.trials), "DEFAULT": rules.again == "off", **shape},
        ),
        choose(scale, last_entries, True),
        Launch(
            kernel=last_fit_kernel,
            arguments=(prepared.values, prepared.weight, reach, last_entries, scale, entries, prepared.signs),
            count=subs,
            constants={"TINY": rules.tiny, "AGAIN": rules.again, **shape},
        ),
        Launch(
            kernel=scales_kernel,
            arguments=(scale, prepared.sums, slab.out, codes),
            count=slab.blocks,
            constants={
                "FUDGE": rules.fudge,
                "OVERFLOW": rules.overflow,
                "BYTES": slab.known.size_bytes,
                "J": SUPER_BLOCK // size,
            },
        ),
    )
    return Found(launches=launches, entries=entries, codes=codes, signs=prepared.signs, reach=reach)


@jitted
def reach_kernel(
    sizes: tl.tensor,
    scales: tl.tensor,
    reach: tl.tensor,
    count: tl.tensor,
    MIDDLE: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """reach: the largest magnitude of each sub-block, which trials are divided by; scales: what MIDDLE gives."""
    lane = lane_of(T)
    present = lane < count
    x = load_tuple(sizes, lane * N, present, N)
    high = x[0]
    for i in tl.static_range(1, N):
        high = tl.where(x[i] > high, x[i], high)
    tl.store(scales + lane, tl.math.div_rn(high, MIDDLE), mask=present)
    tl.store(reach + lane, high, mask=present)


@jitted
def best_trial_kernel(
    sizes: tl.tensor,
    weights: tl.tensor,
    trial_entries: tl.tensor,
    scales: tl.tensor,
    entries: tl.tensor,
    count: tl.tensor,
    TRIALS: tl.constexpr,
    DEFAULT: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """scales and entries of the trial that fits best; where none fits, the first scale and point 0.

    DEFAULT: whether point 0 then counts as on the lattice.
    """
    lane = lane_of(T)
    present = lane < count
    x = load_tuple(sizes, lane * N, present, N)
    weight = load_tuple(weights, lane * N, present, N)
    scale = tl.load(scales + lane, mask=present, other=0.0)
    best = tl.zeros((T,), tl.float32)
    best_trial = tl.full((T,), -1, tl.int32)
    for trial in range(TRIALS):
        sum_xq = tl.zeros((T,), tl.float32)
        sum_q2 = tl.zeros((T,), tl.float32)
        for g in tl.static_range(N // D):
            entry = tl.load(trial_entries + (lane * (N // D) + g) * TRIALS + trial, mask=present, other=0)
            for i in tl.static_range(D):
                q = (2 * level_of(entry, i, D) + 1).to(tl.float32)
                sum_xq += weight[g * D + i] * x[g * D + i] * q
                sum_q2 += weight[g * D + i] * q * q
        better = (sum_q2 > 0.0) & (sum_xq * sum_xq > best * sum_q2)
        scale = tl.where(better, tl.math.div_rn(sum_xq, sum_q2), scale)
        best = tl.where(better, scale * sum_xq, best)
        best_trial = tl.where(better, trial, best_trial)
    tl.store(scales + lane, scale, mask=present)
    fitting = best_trial >= 0
    for g in tl.static_range(N // D):
        at = (lane * (N // D) + g) * TRIALS + best_trial
        entry = tl.load(trial_entries + at, mask=present & fitting, other=0)
        if DEFAULT:
            entry = tl.where(fitting, entry, ENTRY_ROUNDED)
        tl.store(entries + lane * (N // D) + g, entry, mask=present)


@jitted
def last_fit_kernel(
    sizes: tl.tensor,
    weights: tl.tensor,
    reach: tl.tensor,
    last_entries: tl.tensor,
    scales: tl.tensor,
    entries: tl.tensor,
    signs: tl.tensor,
    count: tl.tensor,
    TINY: tl.constexpr,
    AGAIN: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """scales, entries and signs after the last rounding; those of a sub-block below TINY are 0. See `Rules`."""
    lane = lane_of(T)
    present = lane < count
    scale = tl.load(scales + lane, mask=present, other=0.0)
    rounded = tl.full((T,), ENTRY_ROUNDED, tl.int32)
    for g in tl.static_range(N // D):
        rounded = rounded & tl.load(entries + lane * (N // D) + g, mask=present, other=0)
    again = scale > 0.0
    if AGAIN != "always":
        again = again & (rounded == 0)
    largest = tl.load(reach + lane, mask=present, other=0.0)
    nothing = largest <= 0.0 if TINY == 0.0 else largest < TINY
    sum_xq = tl.zeros((T,), tl.float32)
    sum_q2 = tl.zeros((T,), tl.float32)
    for g in tl.static_range(N // D):
        at = lane * (N // D) + g
        entry = tl.load(entries + at, mask=present, other=0)
        new = again & (entry < ENTRY_ROUNDED) if AGAIN == "off" else again
        entry = tl.where(new, tl.load(last_entries + at, mask=present, other=0), entry)
        x = load_tuple(sizes, at * D, present, D)
        weight = load_tuple(weights, at * D, present, D)
        for i in tl.static_range(D):
            q = (2 * level_of(entry, i, D) + 1).to(tl.float32)
            sum_xq += weight[i] * x[i] * q
            sum_q2 += weight[i] * q * q
        tl.store(entries + at, tl.where(nothing, 0, entry), mask=present)
    scale = tl.where(again & (sum_q2 > 0.0), tl.math.div_rn(sum_xq, sum_q2), scale)
    scale = tl.where(nothing, 0.0, scale)
    for k in tl.static_range(N // 8):
        minus = load_byte(signs, lane * (N // 8) + k, present)
        minus = tl.where(nothing, 0, tl.where(scale < 0.0, minus ^ 255, minus))
        store_byte(signs, lane * (N // 8) + k, minus, present)
    tl.store(scales + lane, tl.abs(scale), mask=present)


@jitted
def scales_kernel(
    scales: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    codes: tl.tensor,
    count: tl.tensor,
    FUDGE: tl.constexpr,
    OVERFLOW: tl.constexpr,
    BYTES: tl.constexpr,
    J: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """d, to the start of each block of BYTES, and the codes u8 of its J scales; a lane is a super-block."""
    lane = lane_of(T)
    present = lane < count
    values = load_tuple(scales, lane * J, present, J)
    high = values[0]
    for i in tl.static_range(1, J):
        high = tl.where(values[i] > high, values[i], high)
    wrong = not_a_number(values, J)
    if OVERFLOW:
        wrong = wrong | (tl.load(sums + lane, mask=present, other=0.0) == INFINITY)
    high = tl.where(wrong, NAN, high)
    d = tl.math.div_rn(high, 31.0)
    store_half(out, lane * BYTES, d * FUDGE, present)
    inverse = tl.math.div_rn(1.0, d)
    for i in tl.static_range(J):
        code = wrapped(0.5 * (inverse * values[i] - 1.0), 0.0, 15.0).to(tl.int32)
        store_byte(codes, lane * J + i, tl.where(high == 0.0, NOTHING, code), present)
