"""Provide the examples of a run in order, reading rows on demand or prefetching them with threads.

Which slot an example enters is known only once the device reports the free slots, but the order of
examples is known in advance. So examples rather than batches are prefetched, and stopping a run
only discards reads: the run's position counts only examples taken.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from utils.corpus.order import ExampleOrder, Examples, Position
from utils.corpus.row_reader import Batch

Read = Callable[[Examples], Batch]


class InPlace:
    """Reads rows on demand; only the list of examples is computed in advance, in batches."""

    def __init__(self, order: ExampleOrder, read: Read):
        self._order, self._read = order, read
        self.restart(Position())

    def restart(self, position: Position) -> None:
        """Restart at `position` in the order."""
        self._drawn, self._used, self._end = Examples.concatenate([]), 0, position

    def take(self, wanted: int) -> Examples:
        """Return the next examples; fewer than `wanted` only at the end of the run."""
        if self._used + wanted > len(self._drawn):
            left = self._drawn.pick(slice(self._used, None))
            more = self._order.list_from(self._end, wanted - len(left))
            if len(more):
                self._end = more.end
            self._drawn = Examples.concatenate([left, more])
            self._used = 0
        begin, self._used = self._used, min(self._used + wanted, len(self._drawn))
        self._taken = self._drawn.pick(slice(begin, self._used))
        return self._taken

    def rows(self, which: np.ndarray) -> Batch:
        """Return rows of the examples taken last, selected by ascending indices (n,)."""
        return self._read(self._taken.pick(which))

    def close(self) -> None:
        pass


class _Chunk(NamedTuple):
    """Consecutive examples and the future of the rows being read for some of them."""

    examples: Examples
    rows: Future[Batch]


class ReadAhead:
    """Like `InPlace`, but prefetches the rows of the next examples with `workers` threads.

    Args:
        chunk: number of examples that a thread reads at once.
        ahead: number of examples prefetched beyond those taken.
        keep: which examples of each chunk are read; only these can be requested from `rows`.
    """

    def __init__(
        self,
        order: ExampleOrder,
        read: Read,
        *,
        workers: int,
        chunk: int,
        ahead: int,
        keep: slice = slice(None),
    ):
        self._upcoming, self._read = InPlace(order, read), read
        self._workers, self._size, self._ahead, self._keep = workers, chunk, ahead, keep
        self._pool: ThreadPoolExecutor | None = None
        self.restart(Position())

    def restart(self, position: Position) -> None:
        """Continue from a position and drop prefetched examples."""
        self._upcoming.restart(position)
        for chunk in getattr(self, "_chunks", ()):
            chunk.rows.cancel()
        self._chunks: deque[_Chunk] = deque()
        self._waiting = 0  # examples in chunks not yet taken
        self._used = 0  # examples already taken from the first chunk
        self._pieces: list[tuple[_Chunk, int, int]] = []  # taken last: chunk, begin, end

    def take(self, wanted: int) -> Examples:
        """Return the next examples; fewer than `wanted` only at the end of the run."""
        self._submit(wanted)
        self._pieces = []
        while wanted > 0 and self._chunks:
            chunk, begin = self._chunks[0], self._used
            end = min(len(chunk.examples), begin + wanted)
            self._pieces.append((chunk, begin, end))
            wanted -= end - begin
            self._waiting -= end - begin
            self._used = end
            if end == len(chunk.examples):
                self._chunks.popleft()
                self._used = 0
        self._submit(self._ahead)
        return Examples.concatenate([c.examples.pick(slice(b, e)) for c, b, e in self._pieces])

    def _submit(self, wanted: int) -> None:
        """Submit reads until `wanted` examples are available or in flight."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="read-ahead")
        while self._waiting < wanted:
            examples = self._upcoming.take(self._size)
            if not len(examples):
                return
            rows = self._pool.submit(self._read, examples.pick(self._keep))
            self._chunks.append(_Chunk(examples, rows))
            self._waiting += len(examples)

    def rows(self, which: np.ndarray) -> Batch:
        """Return rows of the examples taken last, selected by ascending indices (n,).

        Waits for the reads; their errors are raised here.
        """
        parts, before, first_kept = [], 0, self._keep.start or 0
        for chunk, begin, end in self._pieces:
            here = which[(which >= before) & (which < before + end - begin)]
            if here.size:
                rows = chunk.rows.result()
                index = here - before + begin - first_kept
                whole = index.size == len(rows["inputs"])
                parts.append({k: v if whole else v[index] for k, v in rows.items()})
            before += end - begin
        if not parts:
            return self._read(Examples.concatenate([]))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """Stop the threads; a later call of `take` starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
