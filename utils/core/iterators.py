"""Iterators that do something beside."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterable[T], workers: int) -> Iterator[T]:
    """The same items in order, the next one made ready in a thread (if `workers` is not 0)."""
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
    """The same items; each of `ticks` is called after each of them."""
    for item in items:
        yield item
        for tick in ticks:
            tick()
