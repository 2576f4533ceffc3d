"""The least error that any bytes of a ggml type can have, to hold the thorough search against.

Where a block or sub-block stores one scale of its own this is exact: every float16 (or every byte) that could be best
is tried with the nearest codes, in float64, by code that shares nothing with the kernels. Q4_1 and Q5_1 have a loop of
their own too, over 10,000 ranges. Super-blocks have too many combinations for that; their figure is a long search: the
kernels' own, with each pair of d and dmin on a wide grid as a start of its own (with both signs), several times the
integers around it, and more sweeps; some thousand times the candidates.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quantkernels.compiling import compiled
from quantkernels.ggml import TYPES, dequantize
from quantkernels.ggml.packing.fp4 import half_e8m0, half_ue4m3
from quantkernels.ggml.packing.iq4 import LEVELS
from quantkernels.ggml.thorough import search
from quantkernels.ggml.thorough.effort import Effort, effort_of

Floats = NDArray[np.float32]
Wide = NDArray[np.float64]

FLOAT4 = np.array([-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12], np.float64)


def block_errors(rows: Floats, stored: Floats, importance: Floats | None, size: int) -> Wide:
    """The weighted square error of each block of `size`, in float64."""
    difference = stored.astype(np.float64) - rows
    weight = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    errors: Wide = (weight * difference**2).reshape(-1, size).sum(axis=1)
    return errors


def optimum(rows: Floats, name: str, importance: Floats | None) -> Wide | None:
    """The least error of each block of `rows` [R, C]; None for a type that has no such search here."""
    if name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL"):
        half = 1 << (int(name[1]) - 1) if name.startswith("Q") else 0
        levels = np.array(LEVELS, np.float64) if name == "IQ4_NL" else np.arange(-half, half, dtype=np.float64)
        scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
        return _over_scales(rows, importance, 32, levels, np.concatenate([scales, -scales]), 1.5)
    if name in ("TQ1_0", "TQ2_0"):
        scales = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
        return _over_scales(rows, importance, 256, np.array([-1.0, 0.0, 1.0]), scales, 1.0)
    if name in ("MXFP4", "NVFP4"):
        scales = (
            half_e8m0(np.arange(255, dtype=np.uint8)) if name == "MXFP4" else half_ue4m3(np.arange(127).astype("u1"))
        )
        size = 32 if name == "MXFP4" else 16
        errors = _over_scales(rows, importance, size, FLOAT4, scales[scales > 0].astype(np.float64), 8.0)
        return errors.reshape(-1, TYPES[name].weights // size).sum(axis=1)
    if name in ("Q4_1", "Q5_1"):
        return _least_pair_errors(*_blocks(rows, importance, 32), (1 << int(name[1])) - 1)
    if name in ("Q2_K", "Q4_K", "Q5_K"):
        efforts = [_long_pairs(name, share) for share in np.linspace(0, 1, 33)]
        return np.minimum(_searched(rows, name, importance, efforts), _searched(-rows, name, importance, efforts))
    if name in ("Q3_K", "Q6_K", "IQ4_XS"):
        top = 128 if name == "Q6_K" else 32
        tops = np.concatenate([np.linspace(0.7, 1.2, 51), -np.linspace(0.7, 1.2, 51)]) * top
        plain = replace(effort_of(name), first=(40, 40), late=(9, 9), sweeps=3)
        return _searched(rows, name, importance, [replace(plain, d_tops=np.float32([d_top])) for d_top in tops])
    return None


def _long_pairs(name: str, share: float) -> Effort:
    """A grid of d for one of dmin, `share` of the way from the smallest to the largest."""
    top, low, high = (15, 0.7, 1.3) if name == "Q2_K" else (63, 0.8, 1.06)
    return replace(
        effort_of(name),
        cuts=np.linspace(-0.1, 0.3, 17).astype(np.float32),
        d_tops=(top * np.linspace(low, high, 53)).astype(np.float32),
        dmin_tops=np.float32([top * (low + share * (high - low))]),
        first=(14, 8),
        late=(5, 5),
        sweeps=4,
    )


def _searched(rows: Floats, name: str, importance: Floats | None, efforts: list[Effort]) -> Wide:
    known = TYPES[name]
    blocks = np.empty((len(rows), rows.shape[1] // known.weights * known.size_bytes), np.uint8)
    best = np.full(rows.size // known.weights, np.inf)
    for effort in efforts:
        search(rows, name, importance, effort, blocks)
        best = np.minimum(best, block_errors(rows, dequantize(blocks, name), importance, known.weights))
    return best


def _blocks(rows: Floats, importance: Floats | None, size: int) -> tuple[Wide, Wide]:
    weight = np.ones(rows.shape[1]) if importance is None else importance.astype(np.float64)
    weights = np.ascontiguousarray(np.broadcast_to(weight, rows.shape).reshape(-1, size))
    return rows.astype(np.float64).reshape(-1, size), weights


def _over_scales(rows: Floats, importance: Floats | None, size: int, levels: Wide, scales: Wide, most: float) -> Wide:
    return _least_errors(*_blocks(rows, importance, size), levels, scales, most)


@compiled
def _least_errors(x: Wide, weights: Wide, levels: Wide, scales: Wide, most: float) -> Wide:
    """The least error of each row of x over `scales` that bring the extreme level to 0.1 ... most times the extreme."""
    errors = np.empty(len(x))
    reach = max(abs(levels[0]), abs(levels[-1]))
    for row in range(len(x)):
        extreme = 0.0
        least = 0.0
        for i in range(x.shape[1]):
            extreme = max(extreme, abs(x[row, i]))
            least += weights[row, i] * x[row, i] ** 2
        for scale in scales:
            if abs(scale) * reach < 0.1 * extreme or abs(scale) * reach > most * extreme:
                continue
            error = 0.0
            for i in range(x.shape[1]):
                wanted = x[row, i] / scale
                low = 0
                high = len(levels) - 1
                while high - low > 1:
                    middle = (low + high) // 2
                    if levels[middle] <= wanted:
                        low = middle
                    else:
                        high = middle
                nearer = min(abs(wanted - levels[low]), abs(wanted - levels[high]))
                error += weights[row, i] * (nearer * scale) ** 2
                if error >= least:
                    break
            least = min(least, error)
        errors[row] = least
    return errors


@compiled
def _least_pair_errors(x: Wide, weights: Wide, top: int) -> Wide:
    """The least error of scale * code + minimum for each row of x, with neither of them rounded to float16.

    Each of 101 x 101 ranges is rounded to and solved by least squares, twice.
    """
    errors = np.empty(len(x))
    for row in range(len(x)):
        low = x[row].min()
        reach = x[row].max() - low
        least = np.inf
        for trial in range(101 * 101):
            minimum = low + reach * (trial // 101 * 0.005 - 0.15)
            scale = (low + reach * (1.15 - trial % 101 * 0.005) - minimum) / top
            for _ in range(2):
                w = wl = wl2 = wx = wxl = 0.0
                for i in range(x.shape[1]):
                    weight = weights[row, i]
                    code = min(max(np.rint((x[row, i] - minimum) / scale), 0), top)
                    w += weight
                    wl += weight * code
                    wl2 += weight * code * code
                    wx += weight * (x[row, i] - low)
                    wxl += weight * (x[row, i] - low) * code
                determinant = w * wl2 - wl * wl
                if determinant <= 0:
                    break
                scale = (w * wxl - wx * wl) / determinant
                minimum = low + (wl2 * wx - wl * wxl) / determinant
            error = 0.0
            for i in range(x.shape[1]):
                code = min(max(np.rint((x[row, i] - minimum) / scale), 0), top)
                error += weights[row, i] * (x[row, i] - minimum - scale * code) ** 2
            if error < least:
                least = error
        errors[row] = least
    return errors
