"""Q2_K, Q4_K and Q5_K with the thorough search: sixteen super-blocks at a time, one per lane.

The steps are those of `thorough/reference.py`. A candidate holds its error, d, dmin, the integer scales and then the
integer depths of the sub-blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled, kernel
from quantkernels.ggml.cpu.half import store_half
from quantkernels.ggml.cpu.k_scale_min import pack_pairs
from quantkernels.ggml.cpu.pack import pack_crumbs, pack_flags, pack_nibbles, split_high
from quantkernels.ggml.cpu.search import ONE, ZERO, bounded_codes, gather
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.thorough.cpu_search import (
    HALF,
    HIGHEST,
    as_half,
    clear,
    inverse_of,
    largest,
    place,
    take_better,
    weigh,
    whole_within,
)
from quantkernels.lanes import WIDTH, Lanes, buffer, load, select, spread, store

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

HEAD = 3  # lines of a candidate before its integers
TWO = np.float32(2)


@compiled
def code_sums(
    x: Floats, weight: Floats, at: int, count: int, inverse: Lanes, low: Lanes, top: np.float32
) -> tuple[Lanes, Lanes, Lanes]:
    """Weighted sums of code, code * code and x * code, for the codes nearest to (x - low) * inverse."""
    sum_l = spread(ZERO)
    sum_l2 = spread(ZERO)
    sum_xl = spread(ZERO)
    for i in range(at, at + count):
        value = load(x, i * WIDTH)
        code = bounded_codes((value - low) * inverse, ZERO, top)
        weighted = load(weight, i * WIDTH) * code
        sum_l += weighted
        sum_l2 += weighted * code
        sum_xl += weighted * value
    return sum_l, sum_l2, sum_xl


@compiled
def pair_error(x: Floats, weight: Floats, at: int, count: int, scale: Lanes, low: Lanes, top: np.float32) -> Lanes:
    """The weighted square error of scale * code + low with the nearest codes in [0, top]."""
    inverse = inverse_of(scale)
    total = spread(ZERO)
    for i in range(at, at + count):
        value = load(x, i * WIDTH) - low
        error = value - scale * bounded_codes(value * inverse, ZERO, top)
        total += load(weight, i * WIDTH) * (error * error)
    return total


@compiled
def survey(x: Floats, weight: Floats, at: int, count: int) -> tuple[Lanes, Lanes, Lanes, Lanes]:
    """The smallest and the largest value, the sum of the weights and the weighted sum of the values."""
    low = load(x, at * WIDTH)
    high = low
    sum_w = spread(ZERO)
    sum_x = spread(ZERO)
    for i in range(at, at + count):
        value = load(x, i * WIDTH)
        factor = load(weight, i * WIDTH)
        low = select(value < low, value, low)
        high = select(value > high, value, high)
        sum_w += factor
        sum_x += factor * value
    return low, high, sum_w, sum_x


@compiled
def solve_pair(sum_w: Lanes, sum_x: Lanes, sum_l: Lanes, sum_l2: Lanes, sum_xl: Lanes) -> tuple[Lanes, Lanes, Lanes]:
    """Scale, minimum (at most 0) and the square error they take away, by least squares; NaN where singular."""
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = low > ZERO
    scale = select(positive, sum_xl / sum_l2, scale)
    low = select(positive, ZERO, low)
    return scale, low, scale * sum_xl + low * sum_x


@compiled
def fit_pair(x: Floats, weight: Floats, j: int, size: int, top: np.float32, cuts: Floats, free: Floats) -> None:
    """The best scale and minimum of sub-block j before any of them is stored.

    Fills its places in `free`: scales, depths, mean codes, sums of weight * code * code, sums of weights.
    """
    count = SUPER_BLOCK // size
    at = j * size
    low, high, sum_w, sum_x = survey(x, weight, at, size)
    low = select(low > ZERO, ZERO, low)
    reach = high - low
    best = spread(-HIGHEST)
    scale = reach / top
    base = low
    tries = len(cuts)
    for r in range(tries * tries + 2):
        inverse = inverse_of(scale)
        start = base
        if r < tries * tries:
            start = low + cuts[r // tries] * reach
            inverse = top / ((ONE - cuts[r // tries] - cuts[r % tries]) * reach)
        sum_l, sum_l2, sum_xl = code_sums(x, weight, at, size, inverse, start, top)
        trial, trial_low, gain = solve_pair(sum_w, sum_x, sum_l, sum_l2, sum_xl)
        better = gain > best
        best = select(better, gain, best)
        scale = select(better, trial, scale)
        base = select(better, trial_low, base)
    sum_l, sum_l2, sum_xl = code_sums(x, weight, at, size, inverse_of(scale), base, top)
    store(free, j * WIDTH, scale)
    store(free, (count + j) * WIDTH, -base)
    store(free, (2 * count + j) * WIDTH, sum_l / sum_w)
    store(free, (3 * count + j) * WIDTH, sum_l2)
    store(free, (4 * count + j) * WIDTH, sum_w)


@compiled
def choose_dmin(free: Floats, count: int, d: Lanes, tops: Floats, limit: np.float32) -> Lanes:
    """The dmin, the largest depth over one of `tops`, with the integer pairs nearest to the free ones.

    Nearest in the quadratic error around the free fit, its codes held: no pass over the weights is needed.
    """
    deepest = largest(free, count, count)
    inverse_d = inverse_of(d)
    best = spread(HIGHEST)
    chosen = spread(ZERO)
    for r in range(len(tops)):
        dmin = as_half(deepest / tops[r])
        inverse = inverse_of(dmin)
        total = spread(ZERO)
        for j in range(count):
            scale = load(free, j * WIDTH)
            depth = load(free, (count + j) * WIDTH)
            mean = load(free, (2 * count + j) * WIDTH)
            sum_l2 = load(free, (3 * count + j) * WIDTH)
            sum_w = load(free, (4 * count + j) * WIDTH)
            below = whole_within(scale * inverse_d - HALF, ZERO, limit)
            least = spread(HIGHEST)
            for step in range(2):
                code = below + np.float32(step)
                code = select(code > limit, limit, code)
                off = d * code - scale
                off_depth = dmin * whole_within((depth + mean * off) * inverse, ZERO, limit) - depth
                error = sum_l2 * off * off + sum_w * off_depth * (off_depth - TWO * mean * off)
                least = select(error < least, error, least)
            total += least
        better = total < best
        best = select(better, total, best)
        chosen = select(better, dmin, chosen)
    return chosen


@compiled
def search_pairs(
    x: Floats,
    weight: Floats,
    size: int,
    top: np.float32,
    limit: np.float32,
    window: tuple[int, int],
    near: Floats,
    candidate: Floats,
) -> None:
    """Fill `candidate`, which holds d and dmin, with the best integers for them and the error.

    near: scales, depths and mean codes around which `window` = (scales, depths) integers are tried; for each scale the
    depths lie around the one that leaves the mean code where it was.
    """
    count = SUPER_BLOCK // size
    d = load(candidate, WIDTH)
    dmin = load(candidate, 2 * WIDTH)
    inverse_d = inverse_of(d)
    inverse_dmin = inverse_of(dmin)
    total = spread(ZERO)
    for j in range(count):
        scale = load(near, j * WIDTH)
        depth = load(near, (count + j) * WIDTH)
        mean = load(near, (2 * count + j) * WIDTH)
        first = scale * inverse_d - HALF * np.float32(window[0] - 1)
        best = spread(HIGHEST)
        best_code = spread(ZERO)
        best_deep = spread(ZERO)
        for i in range(window[0]):
            code = whole_within(first + np.float32(i), ZERO, limit)
            wanted = (depth + mean * (d * code - scale)) * inverse_dmin - HALF * np.float32(window[1] - 1)
            for k in range(window[1]):
                deep = whole_within(wanted + np.float32(k), ZERO, limit)
                error = pair_error(x, weight, j * size, size, d * code, -(dmin * deep), top)
                better = error < best
                best = select(better, error, best)
                best_code = select(better, code, best_code)
                best_deep = select(better, deep, best_deep)
        store(candidate, (HEAD + j) * WIDTH, best_code)
        store(candidate, (HEAD + count + j) * WIDTH, best_deep)
        total += best
    store(candidate, 0, total)


@compiled
def refit_pairs(
    x: Floats, weight: Floats, size: int, top: np.float32, best: Floats, candidate: Floats, near: Floats
) -> None:
    """Put into `candidate` the least-squares d and dmin for the integers and codes of `best`, and fill `near`."""
    count = SUPER_BLOCK // size
    d = load(best, WIDTH)
    dmin = load(best, 2 * WIDTH)
    aa = ab = bb = xa = xb = spread(ZERO)
    for j in range(count):
        code = load(best, (HEAD + j) * WIDTH)
        deep = load(best, (HEAD + count + j) * WIDTH)
        _, _, sum_w, sum_x = survey(x, weight, j * size, size)
        sum_l, sum_l2, sum_xl = code_sums(x, weight, j * size, size, inverse_of(d * code), -(dmin * deep), top)
        aa += code * code * sum_l2
        ab += code * deep * sum_l
        bb += deep * deep * sum_w
        xa += code * sum_xl
        xb += deep * sum_x
        store(near, (2 * count + j) * WIDTH, sum_l / sum_w)
    determinant = aa * bb - ab * ab
    solvable = determinant > ZERO
    d = as_half(select(solvable, (xa * bb - xb * ab) / determinant, d))
    dmin = as_half(select(solvable, (xa * ab - xb * aa) / determinant, dmin))
    store(candidate, WIDTH, d)
    store(candidate, 2 * WIDTH, dmin)
    for j in range(count):
        store(near, j * WIDTH, d * load(best, (HEAD + j) * WIDTH))
        store(near, (count + j) * WIDTH, dmin * load(best, (HEAD + count + j) * WIDTH))


@compiled
def write_pairs(
    rows: Floats, start: int, best: Floats, lane: int, bits: int, codes: Floats, out: Bytes, at: int
) -> None:
    """The bytes of the super-block in one lane."""
    size = 16 if bits == 2 else 32
    count = SUPER_BLOCK // size
    top = np.float32((1 << bits) - 1)
    field = at + (80 if bits == 2 else 0)
    d = store_half(out, field, best[WIDTH + lane])
    dmin = store_half(out, field + 2, best[2 * WIDTH + lane])
    scales = best[HEAD * WIDTH :]
    depths = best[(HEAD + count) * WIDTH :]
    for j in range(count):
        scale = scales[j * WIDTH + lane]
        depth = depths[j * WIDTH + lane]
        if bits == 2:
            out[at + j] = int(scale) | (int(depth) << 4)
        inverse = inverse_of(spread(d * scale))
        for i in range(j * size, (j + 1) * size, WIDTH):
            value = load(rows, start + i) - (-(dmin * depth))
            store(codes, i, bounded_codes(value * inverse, ZERO, top))
    if bits == 2:
        pack_crumbs(codes, out, at + 16)
        return
    pack_pairs(scales, depths, lane, 63, out, at + 4)
    if bits == 5:
        high = codes[SUPER_BLOCK:]
        split_high(codes, high, np.float32(16))
        pack_flags(high, out, at + 16)
        pack_nibbles(codes, out, at + 48, 32)
    else:
        pack_nibbles(codes, out, at + 16, 32)


@kernel
def quantize_pairs(
    rows: Floats,
    importance: Floats,
    columns: int,
    bits: int,
    cuts: Floats,
    d_tops: Floats,
    dmin_tops: Floats,
    first: tuple[int, int],
    late: tuple[int, int],
    sweeps: int,
    out: Bytes,
) -> None:
    """Q4_K (bits 4), Q5_K (bits 5) or Q2_K (bits 2) of flat `rows` into flat `out`; importance may be empty."""
    size = 16 if bits == 2 else 32
    count = SUPER_BLOCK // size
    top = np.float32((1 << bits) - 1)
    limit = np.float32(15 if bits == 2 else 63)
    block_bytes = 84 if bits == 2 else (144 if bits == 4 else 176)
    x = buffer(SUPER_BLOCK)
    weight = buffer(SUPER_BLOCK)
    free = buffer(5 * count)
    near = buffer(3 * count)
    candidate = buffer(HEAD + 2 * count)
    best = buffer(HEAD + 2 * count)
    codes = buffer(2 * SUPER_BLOCK // WIDTH)
    offsets = np.empty(WIDTH, np.int64)
    importance_offsets = np.empty(WIDTH, np.int64)
    blocks = len(rows) // SUPER_BLOCK
    for group in range((blocks + WIDTH - 1) // WIDTH):
        present = place(group, blocks, columns, SUPER_BLOCK, offsets, importance_offsets)
        gather(rows, offsets, SUPER_BLOCK, x)
        weigh(importance, importance_offsets, SUPER_BLOCK, weight)
        for j in range(count):
            fit_pair(x, weight, j, size, top, cuts, free)
        steepest = largest(free, 0, count)
        clear(best, HEAD + 2 * count)
        for r in range(len(d_tops) + sweeps):  # one loop, because each call here is compiled into the kernel anew
            begun = r >= len(d_tops)
            if begun:
                refit_pairs(x, weight, size, top, best, candidate, near)
            else:
                d = as_half(steepest / d_tops[r])
                store(candidate, WIDTH, d)
                store(candidate, 2 * WIDTH, choose_dmin(free, count, d, dmin_tops, limit))
            search_pairs(x, weight, size, top, limit, late if begun else first, near if begun else free, candidate)
            take_better(candidate, best, HEAD + 2 * count)
        for k in range(present):
            write_pairs(rows, offsets[k], best, k, bits, codes, out, (group * WIDTH + k) * block_bytes)
