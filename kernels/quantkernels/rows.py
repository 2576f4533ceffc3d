"""Rows in parallel: a range of rows cut into pieces, one thread each.

The kernels release the interpreter lock and every row is computed alone, so results do not depend on how many threads
there are. The alternative, numba's own `prange`, keeps a second pool beside torch's, twice the threads that a task was
given, and its default layer aborts the process when two Python threads enter it. The price: some 0.1 ms to start.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def over_rows(rows: int, threads: int, work: Callable[[int, int], object]) -> None:
    """Calls `work(first, last)` for pieces that cover `range(rows)`, one piece per thread."""
    pieces = min(threads, rows)
    if pieces <= 1:
        work(0, rows)
        return
    bounds = [rows * piece // pieces for piece in range(pieces + 1)]
    with ThreadPoolExecutor(pieces) as pool:
        list(pool.map(work, bounds[:-1], bounds[1:]))
