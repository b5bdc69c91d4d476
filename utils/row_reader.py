"""From row numbers to batches: ignored rows, clipped budgets, document starts, relabelling.

Everything that is done to rows between the disk and the device, the same in training and in
evaluation; which rows, and in which order, is decided above.
"""

import warnings

import numpy as np

from dataset.common import IGNORE_LABEL_ID, UserError
from utils.corpora import Corpora
from utils.permutation import hash64

Batch = dict[str, np.ndarray]

NO_BUDGET = np.iinfo(np.int32).max
"""`iteration_targets` of a row without one, in a batch where other rows have one."""


def document_starts(inputs: np.ndarray, labels: np.ndarray, eos_id: int, pad_id: int) -> np.ndarray:
    """For each token the row position where its document began; S for padding.

    A document begins at position 0 and after every eos. Padding is the row's tail of `pad_id`
    with ignored labels. Where one id serves as pad and eos, the first of that tail still ends
    its document and is real, unless the whole row is padding.

    Args: inputs, labels (n, S) integers, ignored labels as IGNORE_LABEL_ID.
    Returns: (n, S) int32 in 0..S.
    """
    width = inputs.shape[1]
    position = np.arange(width, dtype=np.int32)
    starts = np.zeros(inputs.shape, np.int32)
    np.multiply(inputs[:, :-1] == eos_id, position[1:], out=starts[:, 1:])
    np.maximum.accumulate(starts, axis=1, out=starts)

    real = (inputs != pad_id) | (labels != IGNORE_LABEL_ID)
    tail = np.where(real.any(axis=1), width - np.argmax(real[:, ::-1], axis=1), 0)
    if pad_id == eos_id:
        tail += tail > 0
    np.copyto(starts, width, where=position >= tail[:, None])
    return starts


def relabel(inputs: np.ndarray, labels: np.ndarray, low: int, high: int, keys: np.ndarray) -> None:
    """Permute the ids low..high-1 in place, jointly in both, by a permutation of each row's own.

    Args: inputs, labels (n, S) int32; keys (n,) uint64, equal keys giving equal permutations.
    """
    score = hash64(keys[:, None], np.arange(low, high)[None])
    table = (low + np.argsort(score, axis=1)).astype(np.int32)
    for tokens in (inputs, labels):
        row, column = np.nonzero((tokens >= low) & (tokens < high))
        tokens[row, column] = table[row, tokens[row, column] - low]


class RowReader:
    """Turns row numbers into batches: ignored rows, clipped budgets, document starts."""

    def __init__(
        self,
        corpora: Corpora,
        min_iterations: int | None,
        max_iterations: int | None,
        with_starts: bool,
    ):
        low, high = min_iterations, max_iterations
        if low is not None and high is not None and low > high:
            raise UserError(
                f"min_iterations ({low}) is above the highest number of ACT steps ({high}); "
                "lower min_iterations or raise halt_max_steps."
            )
        if corpora.has_targets and high is not None and corpora.max_target > high:
            warnings.warn(
                f"the corpus has iteration targets up to {corpora.max_target}; "
                f"those above {high} are clipped to {high}.",
                stacklevel=3,
            )
        self._corpora = corpora
        self._low = 1 if low is None else max(1, low)
        self._high = NO_BUDGET if high is None else high
        self._eos_id = corpora.metadata.eos_id if with_starts else None

    def read(self, rows: np.ndarray, relabel_keys: np.ndarray | None = None) -> Batch:
        """Batch for global row numbers (b,); -1 makes an ignored row."""
        filled = np.flatnonzero(rows >= 0)
        data = self._corpora.rows(rows[filled])
        if relabel_keys is not None:
            self._relabel(data, rows[filled], relabel_keys[filled])
        targets = data["iteration_targets"]
        targets = np.where(targets > 0, np.maximum(targets, self._low), NO_BUDGET)
        data["iteration_targets"] = np.minimum(targets, self._high).astype(np.int32)
        meta = self._corpora.metadata
        if self._eos_id is not None:
            data["document_starts"] = document_starts(
                data["inputs"], data["labels"], self._eos_id, meta.pad_id
            )
        if not self._corpora.has_targets:
            del data["iteration_targets"]
        if not self._corpora.domains:
            del data["domain_ids"]
        return data if filled.size == rows.size else self._spread(data, filled, rows.size)

    def _relabel(self, data: Batch, rows: np.ndarray, keys: np.ndarray) -> None:
        ranges = self._corpora.relabel_ranges(rows)
        if ranges is None:
            return
        for low, high in np.unique(ranges, axis=0):
            where = np.flatnonzero((ranges == (low, high)).all(axis=1))
            inputs, labels = data["inputs"][where], data["labels"][where]
            relabel(inputs, labels, low, high, keys[where])
            data["inputs"][where], data["labels"][where] = inputs, labels

    def _spread(self, data: Batch, filled: np.ndarray, size: int) -> Batch:
        """Put rows (n, ..) at the places `filled` of `size` rows that are otherwise ignored."""
        meta = self._corpora.metadata
        ignored = {
            "inputs": meta.pad_id,
            "labels": IGNORE_LABEL_ID,
            "reasoning_labels": IGNORE_LABEL_ID,
            "puzzle_identifiers": meta.blank_identifier_id,
            "iteration_targets": 1,
            "domain_ids": 0,
            "document_starts": meta.seq_len,
        }
        batch = {}
        for name, values in data.items():
            batch[name] = np.full((size, *values.shape[1:]), ignored[name], np.int32)
            batch[name][filled] = values
        return batch
