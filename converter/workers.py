"""Python threads that run torch operations with the same bits however many there are.

Torch's own threads split one operation, and a sum split differently rounds differently. Here every operation runs on
one thread and whole sequences or column stripes go to different threads; torch lets go of the interpreter lock inside
an operation. The price: one sequence alone does not get faster, and the thread setting of torch is process-wide, so
two maps must not run at once in one process unless both are of this kind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def row_threads(count: int) -> Iterator[None]:
    """Inside, torch and our kernels have `count` threads: for what computes each row alone, and no matrix product."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Workers:
    """`count` threads; with one, everything is a plain call in the caller's thread, so that pdb works."""

    def __init__(self, count: int = 1) -> None:
        assert count >= 1
        self.count = count
        self._pool = (
            ThreadPoolExecutor(count, "worker", initializer=torch.set_num_threads, initargs=(1,)) if count > 1 else None
        )

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], ahead: int | None = None
    ) -> Iterator[Result]:
        """`function` of each item, in order of the items; at most `ahead` results, `count`, are under way or waiting.

        A map may run while the results of another are consumed or its items made, not inside `function`.
        """
        with row_threads(1):
            if self._pool is None:
                yield from map(function, items)
            else:
                yield from _in_order(self._pool, ahead or self.count, function, items)


def _in_order(
    pool: ThreadPoolExecutor, ahead: int, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
