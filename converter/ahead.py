"""Work on one item while the next is being made: reading, rounding and writing overlap without holding more than a few.

Each stage of a stream is a generator; `ahead` lets it run in a thread of its own. What the stages spend their time in
(reading files, torch, our kernels) lets go of Python's lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
PATIENCE_SECONDS = 0.1


@dataclass(frozen=True)
class _Made(Generic[Item]):
    item: Item


@dataclass(frozen=True)
class _Ended:
    error: BaseException | None


def ahead(items: Iterable[Item], depth: int = 2) -> Generator[Item]:
    """The items in their order, up to `depth` of them made before they are asked for, in another thread.

    What goes wrong there is raised here, behind the items that were made. When this is closed early, the thread ends
    at its next item.
    """
    made: queue.Queue[_Made[Item] | _Ended] = queue.Queue(depth)
    stop = threading.Event()

    def put(answer: _Made[Item] | _Ended) -> bool:
        while not stop.is_set():
            try:
                made.put(answer, timeout=PATIENCE_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(_Made(item)):
                    return
            put(_Ended(None))
        except BaseException as error:  # raised again where the items are used
            put(_Ended(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while isinstance(answer := made.get(), _Made):
            yield answer.item
        if answer.error is not None:
            raise answer.error
    finally:
        stop.set()
        thread.join()
