"""How far the thorough search looks, type by type: the candidates that both its backends try.

Found by trial on Gaussian, heavy-tailed and trained weights, with and without importance: more candidates than these
lower the error of the types up to 4 bits by less than half a percent. At 5 bits and more the error hardly depends on a
scale being right, only on where the weights fall between codes, so that every further candidate gains a little; there
the time decided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What to try for one type.

    beyond: how many levels past the last one the extreme weight may lie, below 0 how many before it; each is tried
    toward the lowest and toward the highest level;
    cuts: shares of the range of a sub-block's weights that are left out at either end, below 0 added, for types with a
    minimum;
    d_tops, dmin_tops: the integers that the largest free scale or depth of a super-block may be given (not whole);
    first, late: how many integer scales and depths are tried around the free fit, and around the integers so far;
    sweeps: how often d and dmin are refitted, and integers searched again.
    """

    beyond: Floats
    cuts: Floats
    d_tops: Floats
    dmin_tops: Floats
    first: tuple[int, int]
    late: tuple[int, int]
    sweeps: int


def _floats(*values: float | NDArray[np.float64]) -> Floats:
    return np.concatenate([np.atleast_1d(value) for value in values]).astype(np.float32) if values else _NOTHING


_NOTHING: Floats = np.zeros(0, np.float32)


def _effort(
    beyond: Floats = _NOTHING,
    cuts: Floats = _NOTHING,
    d_tops: Floats = _NOTHING,
    dmin_tops: Floats = _NOTHING,
    first: tuple[int, int] = (1, 1),
    late: tuple[int, int] = (1, 1),
    sweeps: int = 2,
) -> Effort:
    return Effort(beyond=beyond, cuts=cuts, d_tops=d_tops, dmin_tops=dmin_tops, first=first, late=late, sweeps=sweeps)


def effort_of(name: str) -> Effort:
    """The effort for a type. Raises ValueError for a type that this search does not make."""
    span = np.linspace
    match name:
        case "Q4_0":
            return _effort(beyond=_floats(span(-0.9, 2.2, 12), 3, 4.5, 6.5))
        case "Q5_0":
            return _effort(beyond=_floats(span(-5.0, 2.5, 15)))
        case "Q8_0":
            return _effort(beyond=_floats(span(-20.0, 2.0, 25)))
        case "IQ4_NL":
            return _effort(beyond=_floats(span(-32.0, 22.0, 10), 35, 60))
        case "Q4_1":
            return _effort(cuts=_floats(-0.1, -0.06, span(-0.03, 0.13, 8)))
        case "Q5_1":
            return _effort(cuts=_floats(span(-0.08, 0.06, 10)))
        case "Q2_K":
            return _effort(
                cuts=_floats(span(-0.05, 0.3, 8)),
                d_tops=_floats(span(11.25, 17.25, 12)),
                dmin_tops=_floats(span(11.25, 17.25, 16)),
                first=(6, 3),
                late=(3, 3),
                sweeps=3,
            )
        case "Q4_K":
            return _effort(
                cuts=_floats(span(-0.05, 0.15, 9)),
                d_tops=_floats(span(56.0, 64.0, 6)),
                dmin_tops=_floats(span(56.0, 65.0, 16)),
                first=(12, 6),
                late=(5, 5),
            )
        case "Q5_K":
            return _effort(
                cuts=_floats(span(-0.1, 0.1, 9)),
                d_tops=_floats(span(52.0, 64.0, 6)),
                dmin_tops=_floats(span(52.0, 65.0, 16)),
                first=(12, 6),
                late=(5, 5),
            )
        case "Q3_K":
            return _effort(
                beyond=_floats(span(-0.9, 1.8, 10)),
                d_tops=_floats(-span(28.8, 33.6, 5), span(27.9, 32.6, 5)),
                first=(3, 2),
                late=(3, 2),
                sweeps=3,
            )
        case "Q6_K":
            return _effort(
                beyond=_floats(span(-4.0, 1.0, 14)),
                d_tops=_floats(-span(115.0, 131.0, 3), span(114.0, 130.0, 3)),
                first=(24, 24),
                late=(7, 3),
                sweeps=3,
            )
        case "IQ4_XS":
            return _effort(
                beyond=_floats(span(-32.0, 22.0, 10), 35, 60),
                d_tops=_floats(-span(28.8, 33.6, 5), span(27.9, 32.6, 5)),
                first=(3, 2),
                late=(3, 2),
                sweeps=3,
            )
        case "MXFP4" | "NVFP4":
            return _effort()
    raise ValueError(f"the search of scales does not make {name}")
