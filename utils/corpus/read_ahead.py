"""Hands out the examples of a run in order, their rows read when asked for or by threads before.

Which slot an example enters is known only once the device says which slots are free; which
examples come next is known for ever. So examples are read ahead, not batches, and what is lost
when a run stops is reading alone: where the run stands is what was taken.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from utils.corpus.order import ExampleOrder, Examples, Position, Upcoming
from utils.corpus.row_reader import Batch

Read = Callable[[Examples], Batch]


class InPlace:
    """Reads rows when they are asked for."""

    def __init__(self, order: ExampleOrder, read: Read):
        self._upcoming, self._read = Upcoming(order), read
        self._taken = Examples.joined([])

    def restart(self, position: Position) -> None:
        """Continue at a position."""
        self._upcoming.restart(position)

    def take(self, wanted: int) -> Examples:
        """The next examples; fewer than `wanted` only where the run ends."""
        self._taken = self._upcoming.take(wanted)
        return self._taken

    def rows(self, which: np.ndarray) -> Batch:
        """Rows of the examples taken last, by their number (n,) among them, ascending."""
        return self._read(self._taken.pick(which))

    def close(self) -> None:
        pass


class _Chunk(NamedTuple):
    """Consecutive examples; the rows of some of them are being read."""

    examples: Examples
    rows: Future[Batch]


class ReadAhead:
    """Like `InPlace`, with `workers` threads that read the rows of the next examples.

    Args:
        chunk: examples that one thread reads together.
        ahead: examples that are read, or being read, beyond those taken.
        keep: which examples of each chunk are read; `rows` may be asked for these alone.
    """

    def __init__(
        self,
        order: ExampleOrder,
        read: Read,
        *,
        workers: int,
        chunk: int,
        ahead: int,
        keep: slice,
    ):
        self._upcoming, self._read = Upcoming(order), read
        self._workers, self._size, self._ahead, self._keep = workers, chunk, ahead, keep
        self._pool: ThreadPoolExecutor | None = None
        self.restart(Position())

    def restart(self, position: Position) -> None:
        """Continue at a position; what was read ahead is dropped."""
        self._upcoming.restart(position)
        for chunk in getattr(self, "_chunks", ()):
            chunk.rows.cancel()
        self._chunks: deque[_Chunk] = deque()
        self._waiting = 0  # examples in chunks that were not taken
        self._used = 0  # examples of the first chunk that were taken
        self._pieces: list[tuple[_Chunk, int, int]] = []  # of chunks, from .. to, taken last

    def take(self, wanted: int) -> Examples:
        """The next examples; fewer than `wanted` only where the run ends."""
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
        return Examples.joined([c.examples.pick(slice(b, e)) for c, b, e in self._pieces])

    def _submit(self, wanted: int) -> None:
        """Have so many examples read, or being read, that were not taken."""
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
        """Rows of the examples taken last, by their number (n,) among them, ascending.

        Waits for them; an error that their reader met is raised here.
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
            return self._read(Examples.joined([]))
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """End the threads; taking on after this starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
