"""What the lattice types share on a GPU: the tables of a lattice, the weights of a search, the walk along neighbours.

A group of 8 (IQ3: 4) weights that is off the lattice at some scale takes the best of a list of neighbours, and this
walk is nearly all the work: up to 31 scales, up to some hundred neighbours. A lane of it is one group at one scale.
Groups of one sub-block do not wait for each other so, lanes side by side differ in the scale only and mostly walk the
same list, and what is found goes through memory, 4 bytes for each group and scale. The alternative, a lane for each
sub-block with its trials one after the other, saves that traffic (some 12 bytes a weight) and makes a warp walk the
longest of 32 lists, four or eight times a trial. A program here is one warp for the same reason.

A neighbour is one number, an entry: its levels in the lowest 16 bits as `lattice.py` codes them, its index above.
Shapes: P points, D dimensions.
"""

# Triton knows no * in tuples, and mypy no tuples that grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated, misc"

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import triton.language as tl

from quantkernels.ggml.gpu.launch import Launch, Slab
from quantkernels.ggml.gpu.numbers import jitted, lane_of, load_tuple, store_byte, wrapped
from quantkernels.ggml.gpu.search import mean_square_kernel
from quantkernels.ggml.lattice import lattice
from quantkernels.ggml.layout import SUPER_BLOCK

ROUNDED = 1 << 30  # an entry that is on the lattice without a walk
LOST = 1 << 29  # the list had no neighbour at a finite distance
ENTRY_ROUNDED = tl.constexpr(ROUNDED)
ENTRY_LOST = tl.constexpr(LOST)
# A neighbour must be nearer than this to be chosen. A literal beyond the largest float32 is compared in float64.
FARTHEST = tl.constexpr(float(np.finfo(np.float32).max))
WARP = 32


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A lattice on a device.

    Each code has the entries from bounds[code] up to bounds[code + 1]; a code on the lattice has itself. values f32
    [P * D] is what the decoder multiplies.
    """

    bounds: torch.Tensor
    entries: torch.Tensor
    values: torch.Tensor


@cache
def tables(name: str, device: torch.device) -> Tables:
    """The tables of the lattice `name` of `lattice.py` on `device`, made once."""
    known = lattice(name)
    dimensions = known.points.shape[1]
    levels_PD = known.points.astype(np.int64) + 1 if name == "IQ1" else (known.points.astype(np.int64) - 1) // 2
    codes_P = (levels_PD << ((2 if dimensions == 8 else 3) * np.arange(dimensions))).sum(axis=1)
    entries_P = (np.arange(len(codes_P)) << 16) | codes_P
    assert codes_P[0] == 0  # entry 0 is the point 0, where a search that finds nothing ends

    row_K = known.index_of.astype(np.int64)
    on_K, off_K = row_K >= 0, (row_K < 0) & (row_K > -len(row_K))
    first_R = known.neighbour_start.astype(np.int64)
    counts_K = np.where(on_K, 1, np.where(off_K, np.diff(first_R)[np.where(off_K, -1 - row_K, 0)], 0))
    bounds = np.concatenate([[0], np.cumsum(counts_K)])
    code = np.repeat(np.arange(len(row_K)), counts_K)
    place = np.arange(bounds[-1]) - bounds[code]
    listed = known.neighbours[np.where(off_K[code], first_R[np.where(off_K[code], -1 - row_K[code], 0)] + place, 0)]
    entries = np.where(on_K[code], entries_P[np.where(on_K[code], row_K[code], 0)] | ROUNDED, entries_P[listed])
    return Tables(
        bounds=torch.from_numpy(bounds.astype(np.int32)).to(device),
        entries=torch.from_numpy(entries.astype(np.int32)).to(device),
        values=torch.from_numpy(known.values.reshape(-1).copy()).to(device),
    )


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The weights of a slab as its search takes them: values and how much each counts, f32 [weights].

    sums f32 [super-blocks] are sums of squares; roots f32 are those of `weight`; signs u8 [weights / 8], bit i is set
    where weight i of eight is minus.
    """

    launches: tuple[Launch, ...]
    sums: torch.Tensor
    values: torch.Tensor
    weight: torch.Tensor
    root: torch.Tensor
    signs: torch.Tensor


def prepare(slab: Slab, weights: str, factor: float, signs: str) -> Prepared:
    """`Prepared` by the rules that `prepare_kernel` names."""
    sums = slab.found(1, SUPER_BLOCK)
    values, weight = slab.found(1, 1), slab.found(1, 1)
    root = values if signs == "kept" else slab.found(1, 1)
    bytes_of_signs = torch.empty(slab.rows.numel() // 8, dtype=torch.uint8, device=slab.rows.device)
    importance = slab.rows if slab.importance is None else slab.importance
    arguments = (slab.rows, importance, sums, values, weight, root, bytes_of_signs, slab.rows.shape[1])
    launches = (
        Launch(kernel=mean_square_kernel, arguments=(slab.rows, sums, SUPER_BLOCK, 1.0, 1.0), count=sums.numel()),
        Launch(
            kernel=prepare_kernel,
            arguments=arguments,
            count=bytes_of_signs.numel(),
            constants={"WEIGHTS": weights, "FACTOR": factor, "SIGNS": signs},
        ),
    )
    return Prepared(launches=launches, sums=sums, values=values, weight=weight, root=root, signs=bytes_of_signs)


@jitted
def prepare_kernel(
    rows: tl.tensor,
    importance: tl.tensor,
    sums: tl.tensor,
    values: tl.tensor,
    weights: tl.tensor,
    roots: tl.tensor,
    signs: tl.tensor,
    columns: tl.tensor,
    count: tl.tensor,
    WEIGHTS: tl.constexpr,
    FACTOR: tl.constexpr,
    SIGNS: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Values, weights, roots and signs; a lane is eight weights.

    WEIGHTS "square" is x * x, "mean + square" a quarter of the mean square more, "importance * root" the importance
    times the root of mean square + x * x, where the mean square is FACTOR times that of the super-block.
    SIGNS "kept" leaves x as it is and no roots, "free" gives magnitudes, "even" turns the weight of least cost where
    the count of minuses is odd: its magnitude is then below zero.
    """
    lane = lane_of(T)
    present = lane < count
    x = load_tuple(rows, lane * 8, present, 8)
    given = x
    if WEIGHTS == "importance * root":
        given = load_tuple(importance, lane * 8 % columns, present, 8)
    mean = tl.math.div_rn(FACTOR * tl.load(sums + lane // 32, mask=present, other=0.0), 256.0)
    weight = ()
    for i in tl.static_range(8):
        if WEIGHTS == "square":
            value = x[i] * x[i]
        elif WEIGHTS == "mean + square":
            value = 0.25 * mean + x[i] * x[i]
        else:
            value = given[i] * tl.math.sqrt_rn(mean + x[i] * x[i])
        weight = weight + (value,)
        tl.store(weights + lane * 8 + i, value, mask=present)
    if SIGNS == "kept":
        for i in tl.static_range(8):
            tl.store(values + lane * 8 + i, x[i], mask=present)
    else:
        minus = tl.zeros((T,), tl.int32)
        for i in tl.static_range(8):
            minus = minus | tl.where(x[i] < 0.0, 1 << i, 0)
        turned = tl.zeros((T,), tl.int32)
        if SIGNS == "even":
            least = weight[0] * x[0] * x[0]
            cheapest = tl.full((T,), 1, tl.int32)
            odd = minus & 1
            for i in tl.static_range(1, 8):
                cost = weight[i] * x[i] * x[i]
                cheapest = tl.where(cost < least, 1 << i, cheapest)
                least = tl.where(cost < least, cost, least)
                odd = odd ^ ((minus >> i) & 1)
            turned = tl.where(odd == 1, cheapest, 0)
        for i in tl.static_range(8):
            size = tl.where((turned >> i) & 1 == 1, tl.abs(x[i]) * -1.0, tl.abs(x[i]))
            tl.store(values + lane * 8 + i, size, mask=present)
            tl.store(roots + lane * 8 + i, tl.math.sqrt_rn(weight[i]), mask=present)
        store_byte(signs, lane, minus ^ turned, present)


@jitted
def with_eighth(seven: tl.tensor) -> tl.tensor:
    """Seven signs, and an eighth that makes the count of minuses even."""
    folded = seven ^ (seven >> 4)
    folded = folded ^ (folded >> 2)
    return seven | (((folded ^ (folded >> 1)) & 1) << 7)


@jitted
def level_of(entry: tl.tensor, i: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """Level i of an entry or a code."""
    return (entry >> (2 * i)) & 3 if D == 8 else (entry >> (3 * i)) & 7


@jitted
def term_of(terms: tl.tuple, entry: tl.tensor, i: tl.constexpr) -> tl.tensor:
    """Of the terms for levels 0, 1 and 2 of weight i the one for an entry's level."""
    middle = tl.where((entry >> (2 * i)) & 1 == 1, terms[3 * i + 1], terms[3 * i])
    return tl.where((entry >> (2 * i)) & 2 == 2, terms[3 * i + 2], middle)


@jitted
def nearest_entry(
    code: tl.tensor,
    x: tl.tuple,
    factor: tl.tuple,
    scale: tl.tensor,
    shift: tl.tensor,
    bounds: tl.tensor,
    entries: tl.tensor,
    present: tl.tensor,
    FIRST: tl.constexpr,
    STEP: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """The entry of a code on the lattice, else the first neighbour of least factor * (scale * level - x)**2.

    Levels stand for FIRST, FIRST + STEP and so on, plus shift. With three levels their terms are computed once.
    """
    terms = ()
    if D == 8:
        for i in tl.static_range(8):
            for level in tl.static_range(3):
                off = scale * (FIRST + STEP * level + shift) - x[i]
                terms = terms + (factor[i] * off * off,)
    first = tl.load(bounds + code, mask=present, other=0)
    length = tl.load(bounds + code + 1, mask=present, other=0) - first
    chosen = tl.load(entries + first, mask=present, other=0)
    best = tl.full(code.shape, FARTHEST, tl.float32)
    for j in range(tl.max(length, axis=0)):
        inside = j < length
        entry = tl.load(entries + first + j, mask=inside, other=0)
        if D == 8:
            distance = term_of(terms, entry, 0)
            for i in tl.static_range(1, 8):
                distance += term_of(terms, entry, i)
        else:
            off = scale * (FIRST + STEP * level_of(entry, 0, D).to(tl.float32) + shift) - x[0]
            distance = factor[0] * off * off
            for i in tl.static_range(1, D):
                off = scale * (FIRST + STEP * level_of(entry, i, D).to(tl.float32) + shift) - x[i]
                distance += factor[i] * off * off
        nearer = inside & (distance < best)
        best = tl.where(nearer, distance, best)
        chosen = tl.where(nearer, entry, chosen)
    found = (best < FARTHEST) | (chosen >= ENTRY_ROUNDED)
    return tl.where(found, chosen, chosen | ENTRY_LOST)


@jitted
def choose_kernel(
    sizes: tl.tensor,
    roots: tl.tensor,
    reach: tl.tensor,
    trials: tl.tensor,
    bounds: tl.tensor,
    entries: tl.tensor,
    chosen: tl.tensor,
    count: tl.tensor,
    TRIALS: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    TOP: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """chosen i32 [groups, TRIALS]: the entry of each group of D at each trial scale; a lane is one of them.

    A trial rounds with the inverse scale trial / reach; the LAST rounding with 1 / reach, where reach is the scale
    itself, that of a sub-block of N.
    """
    lane = lane_of(T)
    present = lane < count
    group = lane // TRIALS
    x = load_tuple(sizes, group * D, present, D)
    root = load_tuple(roots, group * D, present, D)
    scale = tl.load(reach + group // (N // D), mask=present, other=0.0)
    if LAST:
        inverse = tl.math.div_rn(1.0, scale)
    else:
        inverse = tl.math.div_rn(tl.load(trials + lane % TRIALS, mask=present, other=0.0), scale)
        scale = tl.math.div_rn(1.0, inverse)
    code = tl.zeros((T,), tl.int32)
    for i in tl.static_range(D):
        level = wrapped(0.5 * (inverse * x[i] - 1.0), 0.0, TOP).to(tl.int32)
        code = code | (level << ((2 if D == 8 else 3) * i))
    entry = nearest_entry(code, x, root, scale, 0.0, bounds, entries, present, 1.0, 2.0, D)
    tl.store(chosen + lane, entry, mask=present)
