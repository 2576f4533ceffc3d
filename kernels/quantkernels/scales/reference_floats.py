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


def float_of(*, top: float, mantissa: int, normal: float) -> Float:
    """The type whose largest value is `top`, with so many bits of mantissa and `normal` as its least normal value."""
    step = normal / 2**mantissa
    return Float(
        top=np.float32(top),
        split=np.float32(2 ** (23 - mantissa) + 1),
        normal=np.float32(normal),
        centre=np.float32(1.5 * 2**23 * step),
    )


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
