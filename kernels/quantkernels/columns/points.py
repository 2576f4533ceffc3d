"""Lattices and metrics made ready for rounding eight columns as one: what reference and kernel share.

# O out, I in, G groups, B blocks of eight columns, P points, D dimensions, J and K columns of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkernels.columns.frame import EIGHT
from quantkernels.columns.reference import Floats

NONE, EVEN, FREE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Points:
    """A lattice in lexicographic order: points_PD, how many first coordinates each shares with the one before it, and
    its index in the type's own order; signs is NONE, EVEN or FREE."""

    points_PD: Floats
    shared_P: NDArray[np.int64]
    index_P: NDArray[np.int64]
    signs: int


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What an error of eight columns costs, for each block of them: e metric e^T, with metric = (U^T U)^-1, U upper.

    Errors are pushed on by ratio_BJK = U_JK / U_JJ; what is left of column J costs weight_BJ = 1 / U_JJ^2.
    """

    metric_BJK: Floats
    ratio_BJK: Floats
    weight_BJ: Floats


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A PointFrame as arrays; group_I is the group of each column in the order of solving."""

    scale_OG: Floats
    zero_OG: Floats
    group_I: NDArray[np.int64]
    points: Points


def ordered(points_PD: Floats, signs: str) -> Points:
    """The lattice of a PointFrame as the search walks it."""
    order_P = np.lexsort(points_PD.T[::-1])
    sorted_PD = np.ascontiguousarray(points_PD[order_P])
    same_PD = np.cumprod(sorted_PD[1:] == sorted_PD[:-1], axis=1)
    shared_P = np.concatenate([[0], same_PD.sum(axis=1)]).astype(np.int64)
    return Points(
        points_PD=sorted_PD,
        shared_P=shared_P,
        index_P=order_P.astype(np.int64),
        signs={"none": NONE, "even": EVEN, "free": FREE}[signs],
    )


def metric_of(upper_BJK: NDArray[np.floating[Any]]) -> Metric:
    """The metrics of upper factors U [B, 8, 8], worked out in f64."""
    upper_BJK = upper_BJK.astype(np.float64)
    diagonal_BJ = np.diagonal(upper_BJK, axis1=1, axis2=2)
    inverse_BJK = np.linalg.inv(upper_BJK)
    return Metric(
        metric_BJK=_floats(inverse_BJK @ inverse_BJK.swapaxes(1, 2)),
        ratio_BJK=_floats(upper_BJK / diagonal_BJ[:, :, None]),
        weight_BJ=_floats(1 / diagonal_BJ**2),
    )


def metric_of_root(shares_BJK: Floats, pivots_BJ: Floats) -> tuple[Floats, Metric]:
    """The inverses of the blocks [B, 8, 8] of a root's shares, and the metrics of the root's own blocks."""
    inverse_BJK = np.linalg.inv(shares_BJK.astype(np.float64))
    return _floats(inverse_BJK), metric_of(inverse_BJK / pivots_BJ.astype(np.float64)[:, :, None])


def metric_of_hessian(hessian_BJK: Floats) -> tuple[Floats, Metric]:
    """The inverses of Hessians [B, 8, 8], and the metrics that these Hessians are."""
    inverse_BJK = np.linalg.inv(hessian_BJK.astype(np.float64))
    return _floats(inverse_BJK), metric_of(np.linalg.cholesky(inverse_BJK).swapaxes(1, 2))


def blocks_of(matrix_II: Floats) -> Floats:
    """The blocks of eight on the diagonal, [B, 8, 8]."""
    count = len(matrix_II) // EIGHT
    blocks: Floats = matrix_II.reshape(count, EIGHT, count, EIGHT)[np.arange(count), :, np.arange(count), :]
    return blocks


def _floats(values: NDArray[np.floating[Any]]) -> Floats:
    """As f32 in C order: kernels must be called with the same layouts always, and casting keeps whatever there was."""
    return np.ascontiguousarray(values, np.float32)
