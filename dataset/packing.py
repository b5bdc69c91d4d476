"""Packing token streams into rows: windows, shifted labels, ignored positions, budgets.

Pure arithmetic on arrays; what a row means on disk is the writer's concern.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

BLOCK_TOKENS = 1 << 21


@dataclass(frozen=True)
class PackOptions:
    """How a stream becomes rows."""

    seq_len: int
    stride: int
    eos_id: int
    pad_id: int
    ignore_label_id: int
    score_once: bool
    """Where windows overlap, ignore labels that an earlier window scored."""


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one stream: inputs and labels (n, S), lengths (n,) of real inputs."""

    inputs: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


class WindowPacker:
    """Cuts one stream of documents, each ended with eos, into windows of `seq_len + 1` tokens.

    Windows start every `stride` tokens; the last, short one is padded. Rows come out as soon as
    they are complete, so that their order does not depend on how the stream was handed in.
    """

    def __init__(self, options: PackOptions) -> None:
        self.options = options
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._covered = 0
        """Index, in the pending tokens, of the last one that is a label of an earlier window."""

    def add(self, tokens: np.ndarray) -> Iterator[Rows]:
        """Append tokens (n,) to the stream; yields the rows that this completes."""
        self._pending.append(tokens)
        self._pending_tokens += len(tokens)
        width = self.options.seq_len + 1
        if self._pending_tokens < width:
            return
        stream = np.concatenate(self._pending)
        count = (len(stream) - width) // self.options.stride + 1
        windows = sliding_window_view(stream, width)[:: self.options.stride]
        block = max(1, BLOCK_TOKENS // width)
        for start in range(0, count, block):
            yield from self._rows(windows[start : min(start + block, count)], width)
        rest = stream[count * self.options.stride :].copy()
        self._pending, self._pending_tokens = [rest], len(rest)

    def finish(self) -> Iterator[Rows]:
        """Yield the last, short window if it holds anything that is not yet a label."""
        if self._pending_tokens - 1 > self._covered:
            stream = np.concatenate(self._pending)
            window = np.full((1, self.options.seq_len + 1), self.options.pad_id, stream.dtype)
            window[0, : len(stream)] = stream
            yield from self._rows(window, len(stream))
        self._pending, self._pending_tokens = [], 0

    def _rows(self, windows: np.ndarray, real_tokens: int) -> Iterator[Rows]:
        """Rows of windows (n, S+1) of `real_tokens` each; those without a label are left out."""
        options = self.options
        inputs = windows[:, :-1].copy()
        labels = windows[:, 1:].copy()
        # What follows an eos is the next document's first token: nothing predicts it.
        labels[inputs == options.eos_id] = options.ignore_label_id
        labels[:, real_tokens - 1 :] = options.ignore_label_id
        if options.score_once:
            labels[:1, : self._covered] = options.ignore_label_id
            labels[1:, : options.seq_len - options.stride] = options.ignore_label_id
        self._covered = options.seq_len - options.stride
        lengths = np.full(len(inputs), min(real_tokens, options.seq_len))
        if not (scored := (labels != options.ignore_label_id).any(axis=1)).all():
            inputs, labels, lengths = inputs[scored], labels[scored], lengths[scored]
        if len(inputs):
            yield Rows(inputs, labels, lengths)


def iteration_targets(
    inputs: np.ndarray, lengths: np.ndarray, min_iterations: int, max_iterations: int
) -> np.ndarray:
    """`iteration_target` of each row: inputs (n, S) with lengths (n,) -> (n,) int32.

    Sorting rows and counting where neighbours differ is ten times faster than `np.unique` per row.
    Padding stands at a row's end and gets its neighbour's value first, so that it adds nothing.
    """
    tokens = inputs
    if (lengths < inputs.shape[1]).any():
        padding = np.arange(inputs.shape[1]) >= lengths[:, None]
        tokens = np.where(padding, inputs[:, :1], inputs)
    ordered = np.sort(tokens, axis=1)
    distinct = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    ratio = distinct / lengths
    return np.floor(min_iterations + ratio * (max_iterations - min_iterations)).astype(np.int32)
