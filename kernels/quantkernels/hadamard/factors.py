"""The small factor of a width: what is left beside a power of two, as an orthogonal matrix with entries alike in size.

A Hadamard matrix has entries of 1 and -1 and exists, as far as known, only for orders 1, 2 and multiples of 4. Paley
made them from the squares modulo a prime q: of order q + 1 where q leaves 3 when divided by 4, of order 2 (q + 1) where
it leaves 1. That gives 12, 20, 28, 36, 44, 60, 68, 84, 104, 180 and many more, so nearly every width of a model. Where
none of an order up to LARGEST divides the width by a power of two, Hartley's transform takes the place: orthogonal in
every order, symmetric, its entries at most root 2 times as large as those of a Hadamard matrix.

Sources: Paley 1933, J. Math. Phys. 12; Bracewell 1983, J. Opt. Soc. Am. 73.
"""

# F order of the factor

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
LARGEST = 256  # order of a Hadamard factor: it costs as many products for each value


@cache
def factor(width: int) -> Matrix:
    """The orthogonal factor [F, F] of rows of `width` columns: width / F is a power of two."""
    odd = width
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return np.ones((1, 1))
    order = odd
    while order <= min(width, LARGEST):
        if width % order == 0 and (found := paley(order)) is not None:
            scaled: Matrix = found / np.sqrt(order)
            return scaled
        order *= 2
    return hartley(odd)


def paley(order: int) -> Matrix | None:
    """Paley's Hadamard matrix [order, order] of 1 and -1; None where neither of his constructions gives one."""
    if order % 4:
        return None
    if _is_prime(order - 1):  # which leaves 3 when divided by 4
        return _bordered(order - 1, -1) + np.eye(order)
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):  # 1 when divided by 4
        symmetric = _bordered(half - 1, 1)
        ones, turned = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(symmetric, ones) + np.kron(np.eye(half), turned)
    return None


def hartley(order: int) -> Matrix:
    """Hartley's matrix [order, order]: cos + sin of 2 pi i j / order, over the root of the order."""
    angle = 2 * np.pi / order * (np.outer(np.arange(order), np.arange(order)) % order)
    matrix: Matrix = (np.cos(angle) + np.sin(angle)) / np.sqrt(order)
    return matrix


def _bordered(prime: int, sign: int) -> Matrix:
    """The matrix [prime + 1, prime + 1] of the quadratic residues' signs, with a row of 1 and a column of `sign`."""
    residue = np.full(prime, -1.0)
    residue[np.arange(1, prime) ** 2 % prime] = 1
    residue[0] = 0
    bordered = np.zeros((prime + 1, prime + 1))
    bordered[0, 1:], bordered[1:, 0] = 1, sign
    bordered[1:, 1:] = residue[(np.arange(prime)[:, None] - np.arange(prime)) % prime]
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
