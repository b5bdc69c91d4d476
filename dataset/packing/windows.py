"""Pack documents into rows: windows of a token stream, shifted labels, ignored positions, budgets.

Pure array arithmetic, independent of how rows are stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dataset.tokens.sizes import ids_of

BLOCK_TOKENS = 1 << 18
"""Number of tokens processed at once, small enough to stay in a core's cache."""


@dataclass(frozen=True)
class PackOptions:
    """Options for turning a token stream into rows."""

    seq_len: int
    stride: int
    eos_id: int
    pad_id: int
    ignore_label_id: int
    score_once: bool
    """Ignore labels already scored by an earlier overlapping window."""


@dataclass(frozen=True)
class Rows:
    """Rows (n) of one token stream, each a window of up to S + 1 tokens."""

    inputs: np.ndarray
    """(n, S)"""
    labels: np.ndarray
    """(n, S)"""
    stream: np.ndarray
    """(m,) tokens the windows are cut from"""
    origin: int
    """position of `stream[0]` in the full stream of its split and domain"""
    starts: np.ndarray
    """(n,) index in `stream` of each window's first token"""
    lengths: np.ndarray
    """(n,) number of tokens of each window, 2..S + 1"""
    label_starts: np.ndarray
    """(n,) row position of the first label that may be scored"""
    label_bytes: np.ndarray | None = None
    """(n,) number of text bytes of the scored labels, if tokens store their bytes"""

    @property
    def input_lengths(self) -> np.ndarray:
        """(n,) number of non-padding tokens in `inputs`."""
        return np.minimum(self.lengths, self.inputs.shape[1])


def make_rows(
    options: PackOptions,
    stream: np.ndarray,
    origin: int,
    starts: np.ndarray,
    lengths: np.ndarray,
    label_starts: np.ndarray,
) -> Rows:
    """Cut windows of `stream` into rows; see `Rows`. Rows without any label are dropped."""
    width = options.seq_len + 1
    windows = _cut_windows(stream, starts, lengths, width, options.pad_id)
    inputs, labels = ids_of(windows)[:, :-1], ids_of(windows)[:, 1:].copy()
    # The token after eos starts the next document and must not be predicted.
    labels.reshape(-1)[np.flatnonzero(inputs == options.eos_id)] = options.ignore_label_id
    for row in np.flatnonzero(lengths < width):
        labels[row, lengths[row] - 1 :] = options.ignore_label_id
    for first in np.unique(label_starts[label_starts > 0]):
        labels[label_starts == first, :first] = options.ignore_label_id
    counts = labels != options.ignore_label_id
    label_bytes = None
    if windows.dtype.names:
        label_bytes = np.where(counts, windows["bytes"][:, 1:], 0).sum(axis=1, dtype=np.int64)
    rows = Rows(inputs, labels, ids_of(stream), origin, starts, lengths, label_starts, label_bytes)
    scored = counts.any(axis=1)
    if scored.all():
        return rows
    per_row = ("inputs", "labels", "starts", "lengths", "label_starts", "label_bytes")
    arrays = {name: getattr(rows, name) for name in per_row}
    return replace(rows, **{n: a[scored] for n, a in arrays.items() if a is not None})


def _cut_windows(
    stream: np.ndarray, starts: np.ndarray, lengths: np.ndarray, width: int, pad_id: int
) -> np.ndarray:
    """Return the padded windows (n, width); a view if all are full and evenly spaced."""
    steps = np.diff(starts)
    if len(starts) and (lengths == width).all() and (len(steps) == 0 or (steps == steps[0]).all()):
        step = int(steps[0]) if len(steps) else 1
        return sliding_window_view(stream, width)[starts[0] : starts[-1] + 1 : step]
    windows = np.zeros((len(starts), width), stream.dtype)
    ids_of(windows)[...] = pad_id
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        windows[row, :length] = stream[start : start + length]
    return windows


class Packer(Protocol):
    """Turns one stream of documents into rows, yielding each as soon as it is complete."""

    def add(self, stream: np.ndarray, ends: np.ndarray) -> Iterator[Rows]:
        """Append documents that end with eos: tokens (m,) and document ends (d,)."""
        ...

    def finish(self) -> Iterator[Rows]:
        """Yield the remaining rows, padded if short."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class WindowPacker:
    """Cuts one stream into windows of `seq_len + 1` tokens, regardless of document boundaries.

    Windows start every `stride` tokens; the last, short one is padded. Rows are yielded as soon as
    they are complete, so they do not depend on how the stream was divided into calls of `add`.
    """

    def __init__(self, options: PackOptions) -> None:
        self.options = options
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._origin = 0
        self._covered = 0
        """Index, within the pending tokens, of the last one already used as a label."""

    def add(self, stream: np.ndarray, ends: np.ndarray) -> Iterator[Rows]:
        """See `Packer`; document ends are not used here."""
        self._pending.append(stream)
        self._pending_tokens += len(stream)
        width, stride = self.options.seq_len + 1, self.options.stride
        if self._pending_tokens < width:
            return
        stream = np.concatenate(self._pending) if len(self._pending) > 1 else stream
        count = (len(stream) - width) // stride + 1
        block = max(1, BLOCK_TOKENS // width)
        for first in range(0, count, block):
            size = min(block, count - first)
            yield from self._make_rows(
                stream[first * stride : (first + size - 1) * stride + width],
                np.arange(size) * stride,
                np.full(size, width),
            )
            self._origin += size * stride
        rest = stream[count * stride :].copy()
        self._pending, self._pending_tokens = [rest], len(rest)

    def finish(self) -> Iterator[Rows]:
        """Yield the last, short window if it has tokens not yet used as labels."""
        if self._pending_tokens - 1 > self._covered:
            stream = np.concatenate(self._pending)
            yield from self._make_rows(stream, np.zeros(1, np.int64), np.array([len(stream)]))
        self._pending, self._pending_tokens = [], 0

    def _make_rows(
        self, stream: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> Iterator[Rows]:
        label_starts = np.zeros(len(starts), np.int64)
        if self.options.score_once:
            label_starts[0] = self._covered
            label_starts[1:] = self.options.seq_len - self.options.stride
        self._covered = self.options.seq_len - self.options.stride
        rows = make_rows(self.options, stream, self._origin, starts, lengths, label_starts)
        if len(rows.inputs):
            yield rows

    def state_dict(self) -> dict[str, Any]:
        return {
            "pending": np.concatenate(self._pending) if self._pending else None,
            "origin": self._origin,
            "covered": self._covered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._origin, self._covered = state["origin"], state["covered"]
        self._pending = [] if state["pending"] is None else [state["pending"]]
        self._pending_tokens = sum(map(len, self._pending))


def iteration_targets(
    inputs: np.ndarray, lengths: np.ndarray, min_iterations: int, max_iterations: int
) -> np.ndarray:
    """Compute the ACT-step budget of each row: inputs (n, S), lengths (n,) -> (n,) int32.

    It grows with the share of distinct tokens, from `min_iterations` to `max_iterations`.
    Sorting rows and counting differing neighbors is ten times faster than `np.unique` per row.
    Padding is first replaced by the row's first token, so that it adds no distinct value.
    """
    tokens = inputs
    if (lengths < inputs.shape[1]).any():
        padding = np.arange(inputs.shape[1]) >= lengths[:, None]
        tokens = np.where(padding, inputs[:, :1], inputs)
    ordered = np.sort(tokens, axis=1)
    differ = ordered[:, 1:] != ordered[:, :-1]
    # Row by row: numpy counts this several times faster than along an axis.
    distinct = 1 + np.fromiter(map(np.count_nonzero, differ), np.int64, len(differ))
    ratio = distinct / lengths
    return np.floor(min_iterations + ratio * (max_iterations - min_iterations)).astype(np.int32)
