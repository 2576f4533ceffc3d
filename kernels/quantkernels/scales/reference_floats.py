"""The truth for the search for scales of floats: candidates side by side, columns from left to right, in f32.

Sums of a row are added up in f64, row after row, so that `cpu_floats.py` gives the same bits however large a block is.

# O out, I in, P blocks of rows, Q blocks of columns, K candidates; r, c rows and columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SMALL = np.float32(1e-30)  # what the reciprocal of a scale is still a number of
CANDIDATES = 32  # in an octave: beyond it the same mantissas return


@dataclass(frozen=True, kw_only=True)
class Float:
    """A type of floats: `split` is 2^s + 1 for the s bits of an f32 that it lacks; below `normal` its steps are even.

    centre + x - centre rounds x to a multiple of that even step.
    """

    top: np.float32
    split: np.float32
    normal: np.float32
    centre: np.float32

    def numbers(self) -> tuple[Any, ...]:
        """The fields as the numba kernel takes them."""
        return self.top, self.split, self.normal, self.centre


def _float(*, top: float, mantissa: int, normal: float) -> Float:
    return Float(
        top=np.float32(top),
        split=np.float32(2 ** (23 - mantissa) + 1),
        normal=np.float32(normal),
        centre=np.float32(1.5 * 2**23 * normal / 2**mantissa),
    )


E2M1 = _float(top=6, mantissa=1, normal=1)
E4M3 = _float(top=448, mantissa=3, normal=2.0**-6)
E5M2 = _float(top=57344, mantissa=2, normal=2.0**-14)


def search(weight_OI: Floats, share_I: Floats, height: int, width: int, kind: Float, scale_PQ: Floats) -> None:
    """Fills scale_PQ; see `quantkernels.scales.search_floats`."""
    inverse_K = inverses(kind)
    for p in range(scale_PQ.shape[0]):
        for q in range(scale_PQ.shape[1]):
            columns = slice(q * width, (q + 1) * width)
            block_rc, share_c = weight_OI[p * height : (p + 1) * height, columns], share_I[columns]
            largest = np.abs(block_rc).max()
            if largest == 0:
                scale_PQ[p, q] = 0
                continue
            sums_K3 = _sums(block_rc / largest, share_c if share_c.any() else np.ones_like(share_c), inverse_K, kind)
            scale_PQ[p, q] = np.float32(_best(sums_K3, inverse_K)) * largest


def choose(
    weight_OI: Floats,
    share_I: Floats,
    values_OGK: Floats,
    group_size: int,
    kind: Float,
    fourth: bool,
    by_size: bool,
    best_OG: NDArray[np.int64],
) -> None:
    """Fills best_OG; see `quantkernels.scales.choose_float`."""
    for g in range(values_OGK.shape[1]):
        columns = slice(g * group_size, (g + 1) * group_size)
        weight_ON, values_OK = weight_OI[:, columns], values_OGK[:, g]
        share_N = share_I[columns] if share_I[columns].any() else np.ones_like(share_I[columns])
        squares_O = np.add.accumulate(share_N * weight_ON * weight_ON, 1)[:, -1]
        heavy_ON = np.broadcast_to(share_N, weight_ON.shape)
        if by_size:
            heavy_ON = share_N * np.sqrt(weight_ON * weight_ON + (squares_O / np.add.accumulate(share_N)[-1])[:, None])
        error_OK, unit_O1 = np.zeros_like(values_OK), np.float32(1) / np.maximum(values_OK[:, :1], SMALL)
        for n in range(weight_ON.shape[1]):
            with np.errstate(divide="ignore"):
                steps_OK = weight_ON[:, n : n + 1] / np.where(values_OK == 0, np.float32(np.inf), values_OK)
            off_OK = nearest(np.clip(steps_OK, -kind.top, kind.top), kind) * values_OK - weight_ON[:, n : n + 1]
            square_OK = (off_OK * unit_O1) ** 2
            error_OK += heavy_ON[:, n : n + 1] * (square_OK * square_OK if fourth else square_OK)
        best_OG[:, g] = error_OK.argmin(1)


def inverses(kind: Float) -> Floats:
    """The inverse steps to try, f32 [K], for weights as parts of their largest: it becomes from top down to top / 2."""
    return (kind.top * 2.0 ** -(np.arange(CANDIDATES) / CANDIDATES)).astype(np.float32)


def _sums(x_rc: Floats, share_c: Floats, inverse_K: Floats, kind: Float) -> NDArray[np.float64]:
    """What rounding leaves, squared; that times the code; and the code squared, each weighed and summed."""
    rows = np.zeros((len(x_rc), len(inverse_K), 3), np.float32)
    for c in range(x_rc.shape[1]):
        steps = x_rc[:, c : c + 1] * inverse_K
        code = nearest(steps, kind)
        rest = steps - code
        shared, coded = share_c[c] * rest, share_c[c] * code
        rows += np.stack([shared * rest, shared * code, coded * code], 2)
    total: NDArray[np.float64] = np.add.accumulate(rows.astype(np.float64), axis=0)[-1]
    return total


def nearest(steps: Floats, kind: Float) -> Floats:
    """The nearest values of the type, ties as they come; steps [...] are not beyond its largest."""
    wide = steps * kind.split
    normal = wide - (wide - steps)
    small = (steps + kind.centre) - kind.centre
    return np.where(np.abs(steps) < kind.normal, small, normal)


def _best(sums_K3: NDArray[np.float64], inverse_K: Floats) -> float:
    """The least-squares scale of the candidate that has the least error with it."""
    left, mixed, squares = sums_K3.T
    with np.errstate(all="ignore"):
        error = (left - mixed * mixed / squares) / (inverse_K.astype(np.float64) ** 2)
    best = int(np.where(squares > 0, error, np.inf).argmin())
    return float((1 + mixed[best] / squares[best]) / np.float64(inverse_K[best])) if squares[best] > 0 else 0.0
