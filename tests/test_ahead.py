"""Stages of a stream: in order, ahead by a little, errors where they are used, no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.ahead import ahead


@given(items=st.lists(st.integers() | st.none()), depth=st.integers(1, 4))
def test_items_come_in_order_whatever_the_depth(items: list[int | None], depth: int) -> None:
    assert list(ahead(ahead(items, depth), depth)) == items


def test_no_more_than_a_few_items_are_made_before_they_are_asked_for() -> None:
    made = []

    def make() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with closing(ahead(make(), depth=2)) as items:
        assert next(items) == 0
        time.sleep(0.3)
        assert len(made) <= 4  # one taken, two waiting, one in hand


def test_an_error_is_raised_behind_the_items_that_were_made() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    items = ahead(ahead(make()))
    assert next(items) == 1
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_closing_early_ends_every_thread() -> None:
    before = threading.active_count()
    with closing(ahead(range(1000))) as first, closing(ahead(first)) as second:
        assert next(second) == 0
    assert threading.active_count() == before


def test_stages_overlap() -> None:
    together = threading.Barrier(3, timeout=60)  # which nobody passes alone

    def wait_at(number: int, items: Iterable[int]) -> Iterator[int]:
        for item in items:
            if item == number:
                together.wait()
            yield item

    assert list(wait_at(0, ahead(wait_at(1, ahead(wait_at(2, range(10))))))) == list(range(10))
