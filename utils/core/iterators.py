"""Iterators with side effects: prefetching, and calls after each item."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], workers: int) -> Iterator[T]:
    """Yield the same items in order, preparing the next one in a thread unless `workers` is 0."""
    if workers == 0:
        yield from items
        return
    end, iterator = object(), iter(items)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, iterator, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]


def call_after_each(items: Iterable[T], *ticks: Callable[[], object]) -> Iterator[T]:
    """Yield the same items, calling each of `ticks` after every one."""
    for item in items:
        yield item
        for tick in ticks:
            tick()
