"""Turn row numbers into batches: ignored rows, clipped budgets, document starts, relabeling.

Everything that happens to rows between disk and device, in training and evaluation alike. The
caller decides which rows are read, and in which order.
"""

import warnings
from collections.abc import Sequence

import numpy as np

from dataset.common import IGNORE_LABEL_ID
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora
from utils.corpus.permutation import hash64

Batch = dict[str, np.ndarray]

NO_BUDGET = np.iinfo(np.int32).max
"""`iteration_targets` of a row without budget in a batch where others have one."""


def document_starts(inputs: np.ndarray, labels: np.ndarray, eos_id: int, pad_id: int) -> np.ndarray:
    """Return for each token the row position where its document began; S for padding.

    A document begins at position 0 and after every eos. Padding is the row's tail of `pad_id` with
    ignored labels. If pad and eos share an id, the first token of that tail is the document's eos,
    unless the whole row is padding.

    Args: inputs, labels (n, S) integers, ignored labels as IGNORE_LABEL_ID.
    Returns: (n, S) int32 in 0..S.
    """
    rows, width = inputs.shape
    # Documents end rarely: find their starts in the concatenated rows and fill in between.
    ends = np.flatnonzero(np.ascontiguousarray(inputs).reshape(-1) == eos_id) + 1
    begins = np.concatenate([ends, np.arange(0, rows * width, width)])
    begins.sort()
    lengths = np.diff(begins, append=rows * width)
    starts = np.repeat((begins % width).astype(np.int32), lengths).reshape(rows, width)

    padded = np.flatnonzero((inputs[:, -1] == pad_id) & (labels[:, -1] == IGNORE_LABEL_ID))
    if padded.size:
        real = (inputs[padded] != pad_id) | (labels[padded] != IGNORE_LABEL_ID)
        tail = np.where(real.any(axis=1), width - np.argmax(real[:, ::-1], axis=1), 0)
        if pad_id == eos_id:
            tail += tail > 0
        for row, first in zip(padded.tolist(), tail.tolist(), strict=True):
            starts[row, first:] = width
    return starts


def relabel(inputs: np.ndarray, labels: np.ndarray, low: int, high: int, keys: np.ndarray) -> None:
    """Permute the ids low..high-1 in place, with one permutation per row for both arrays.

    Args: inputs, labels (n, S) int32; keys (n,) uint64, equal keys give equal permutations.
    """
    score = hash64(keys[:, None], np.arange(low, high)[None])
    table = (low + np.argsort(score, axis=1)).astype(np.int32)
    for tokens in (inputs, labels):
        row, column = np.nonzero((tokens >= low) & (tokens < high))
        tokens[row, column] = table[row, tokens[row, column] - low]


class RowReader:
    """Turns row numbers into batches: clipped budgets, document starts, ignored rows."""

    def __init__(
        self,
        corpora: Corpora,
        min_iterations: int | None,
        max_iterations: int | None,
        with_starts: bool,
        with_scored_bytes: bool = False,
    ):
        low, high = min_iterations, max_iterations
        limit = None if high == 1 else high  # a model with one step does not use budgets
        if low is not None and limit is not None and low > limit:
            raise UserError(
                f"min_iterations ({low}) exceeds the maximum number of ACT steps ({high}); "
                "lower min_iterations or raise halt_max_steps."
            )
        if corpora.has_targets and limit is not None and corpora.max_target > limit:
            warnings.warn(
                f"the corpus has iteration targets up to {corpora.max_target}; "
                f"targets above {high} are clipped.",
                stacklevel=3,
            )
        self._corpora = corpora
        self._low = 1 if low is None else max(1, low)
        self._high = NO_BUDGET if high is None else high
        self._eos_id = corpora.metadata.eos_id if with_starts else None
        self._with_scored_bytes = with_scored_bytes

    def read(self, rows: np.ndarray, relabel_keys: np.ndarray | None = None) -> Batch:
        """Read a batch of global row numbers (n,) int64.

        relabel_keys: (n,) uint64 to permute ids, or None to keep them as stored.
        """
        meta = self._corpora.metadata
        # One allocation: blocks of this size are reused by the allocator, while smaller ones are
        # returned to the system, and faulting in new pages costs more than reading the rows.
        tokens = np.empty((3, rows.size, meta.seq_len), np.int32)
        data = self._corpora.rows(rows, tokens[:2])
        if relabel_keys is not None:
            self._relabel(data, rows, relabel_keys)
        if self._eos_id is not None:
            tokens[2] = document_starts(tokens[0], tokens[1], self._eos_id, meta.pad_id)
            data["document_starts"] = tokens[2]
        if self._corpora.has_targets:
            targets = data["iteration_targets"]
            targets = np.where(targets > 0, np.maximum(targets, self._low), NO_BUDGET)
            data["iteration_targets"] = np.minimum(targets, self._high).astype(np.int32)
        else:
            del data["iteration_targets"]
        if not self._corpora.domains:
            del data["domain_ids"]
        if not self._with_scored_bytes:
            data.pop("scored_bytes", None)
        return data

    def _relabel(self, data: Batch, rows: np.ndarray, keys: np.ndarray) -> None:
        ranges = self._corpora.relabel_ranges(rows)
        for low, high in np.unique(ranges, axis=0):
            where = np.flatnonzero((ranges == (low, high)).all(axis=1))
            inputs, labels = data["inputs"][where], data["labels"][where]
            relabel(inputs, labels, low, high, keys[where])
            data["inputs"][where], data["labels"][where] = inputs, labels

    def scatter(self, parts: Sequence[tuple[np.ndarray, Batch]], size: int) -> Batch:
        """Return a batch of `size` rows with the rows of each part, (places (n,) ascending, rows
        (n, ..)), at its places.

        All other rows are marked as ignored.
        """
        if len(parts) == 1 and parts[0][0].size == size:
            return parts[0][1]
        meta = self._corpora.metadata
        ignored = {
            "inputs": meta.pad_id,
            "labels": IGNORE_LABEL_ID,
            "reasoning_labels": IGNORE_LABEL_ID,
            "puzzle_identifiers": meta.blank_identifier_id,
            "iteration_targets": 1,
            "domain_ids": 0,
            "document_starts": meta.seq_len,
            "scored_bytes": 0,
        }
        batch = {}
        for name, values in parts[0][1].items():
            batch[name] = np.full((size, *values.shape[1:]), ignored[name], values.dtype)
            for places, rows in parts:
                batch[name][places] = rows[name]
        return batch
