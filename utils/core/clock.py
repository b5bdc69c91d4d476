"""Seconds of training."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Counts the seconds of training, without pauses."""

    def __init__(self, before: float = 0.0):
        self._start = time.monotonic() - before
        self._paused_at: float | None = None

    @property
    def seconds(self) -> float:
        now = time.monotonic() if self._paused_at is None else self._paused_at
        return now - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused_at = begun = time.monotonic()
        try:
            yield
        finally:
            self._start += time.monotonic() - begun
            self._paused_at = None
