"""Compute statistics of a split in one pass: domains, documents, budgets, padding.

Rows are read through `Corpora` in chunks, so memory stays flat and all storage layouts are counted
the same way. Nothing here prints or draws.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dataset.common import DatasetMetadata
from utils.corpus.corpora import Corpora

CHUNK_TOKENS = 1 << 20
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass
class Figures:
    """Counts of one domain, or of all domains."""

    rows: int = 0
    positions: int = 0
    tokens: int = 0
    """Non-padding positions of `inputs`; overlapping windows contain some tokens twice."""
    text_bytes: int = 0
    text_tokens: int = 0
    """Tokens whose bytes are counted in `text_bytes`."""
    documents: int = 0
    """Documents terminated by eos."""

    def add(
        self, rows: dict[str, np.ndarray], real: np.ndarray, byte_lengths: np.ndarray | None
    ) -> None:
        """Count rows with `real` (n,) non-padding tokens each."""
        inputs = rows["inputs"]
        self.rows += len(inputs)
        self.positions += inputs.size
        self.tokens += int(real.sum())
        if "scored_bytes" in rows:  # ids alone do not determine the bytes of text
            known = rows["scored_bytes"] >= 0
            self.text_bytes += int(rows["scored_bytes"][known].sum())
            self.text_tokens += int((rows["labels"][known] >= 0).sum())
        elif byte_lengths is not None:
            self.text_bytes += int(byte_lengths[inputs].sum(dtype=np.int64))
            self.text_tokens += int(real.sum())

    @property
    def padding(self) -> float:
        """Share of positions that are padding."""
        return 1 - self.tokens / self.positions if self.positions else 0.0

    @property
    def bytes_per_token(self) -> float | None:
        return self.text_bytes / self.text_tokens if self.text_bytes else None


@dataclass
class SplitStatistics:
    """All statistics of a split."""

    total: Figures
    domains: dict[str, Figures]
    lengths: Counter[int]
    """Documents by length in tokens, including eos. Exact yet small: k different lengths need at
    least k²/2 tokens."""
    unended: int
    """Token runs without eos, cut off at row ends."""
    budgets: Counter[int]
    """Rows by iteration budget; empty if the corpus has none."""
    filled: np.ndarray
    """(S + 1,) rows by their number of non-padding tokens."""
    token_ids: np.ndarray
    """(V,) positions of `inputs` by token id."""
    identifiers: np.ndarray
    """(I,) rows by identifier."""
    scored: int
    """Labels that are not ignored."""


@dataclass
class _Documents:
    """Counts the document lengths of one domain, across rows.

    A row continues the previous row of its domain if its first token is that row's last label or,
    with overlapping windows, if it repeats that row's end.
    """

    eos_id: int
    overlap: int
    lengths: Counter[int] = field(default_factory=Counter)
    unended: int = 0
    _tail: np.ndarray | None = None  # (1, n), the first tokens of a row that continues this one
    _length: int = 0  # of the token run that may continue in the next row
    _ends: bool = False  # whether the label of its last token is the run's eos

    def add(self, inputs: np.ndarray, labels: np.ndarray, real: np.ndarray) -> None:
        """Count the next rows: inputs and labels (n, S), of which `real` (n,) are not padding."""
        size, width = inputs.shape
        # Nothing continues after padding, whose labels are ignored and which no row starts with.
        tails = inputs[:, width - self.overlap :] if self.overlap else labels[:, -1:]
        heads = inputs[:, : tails.shape[1]]
        previous = np.full_like(tails[:1], -1) if self._tail is None else self._tail
        continues = (np.concatenate([previous, tails[:-1]]) == heads).all(axis=1)
        self._tail = tails[-1:].copy()
        if not continues[0]:
            self.finish()
        # Tokens repeated from the end of the previous row are already counted.
        first = np.where(continues, self.overlap, 0)
        kept = (np.arange(width) >= first[:, None]) & (np.arange(width) < real[:, None])
        tokens = inputs[kept]
        row_starts = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        last_label = labels[np.arange(size), np.maximum(real, 1) - 1]
        ends = np.flatnonzero(tokens == self.eos_id) + 1
        cuts = row_starts[:-1][~continues]
        borders = np.unique(np.concatenate([[0], ends, cuts, [len(tokens)]]))
        lengths = np.diff(borders)
        lengths[:1] += self._length
        last_row = np.searchsorted(row_starts, borders[1:], side="left") - 1
        by_token = tokens[borders[1:] - 1] == self.eos_id
        by_label = ~by_token & (last_label[last_row] == self.eos_id)
        still_open = len(lengths) > 0 and not by_token[-1]
        stop = len(lengths) - still_open
        self._count(lengths[:stop] + by_label[:stop], (by_token | by_label)[:stop])
        self._length = int(lengths[-1]) if still_open else 0
        self._ends = bool(last_label[-1] == self.eos_id)

    def finish(self) -> None:
        """Count the last run."""
        if self._length:
            self._count(np.array([self._length + self._ends]), np.array([self._ends]))
        self._length = 0

    def _count(self, lengths: np.ndarray, ended: np.ndarray) -> None:
        _add_counts(self.lengths, lengths[ended])
        self.unended += int((~ended).sum())


def count_real_tokens(inputs: np.ndarray, metadata: DatasetMetadata) -> np.ndarray:
    """Count the non-padding tokens of each row (n, S): (n,).

    If padding equals eos, the first token of the trailing run of eos is the end of the document.
    """
    if metadata.pad_id != metadata.eos_id:
        return (inputs != metadata.pad_id).sum(axis=1)
    width = inputs.shape[1]
    other = inputs[:, ::-1] != metadata.pad_id
    before = np.where(other.any(axis=1), width - other.argmax(axis=1), 0)
    return np.minimum(before + 1, width)


def measure(
    corpora: Corpora,
    byte_lengths: np.ndarray | None = None,
    overlap: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> SplitStatistics:
    """Compute the statistics of a split.

    Args:
        byte_lengths: (V,) bytes of text per token id, if known.
        overlap: tokens shared by consecutive windows (seq_len - stride).
        progress: called with the number of rows read since the last call.
    """
    meta = corpora.metadata
    names = corpora.domains or ["(none)"]
    domains = [Figures() for _ in names]
    documents = [_Documents(meta.eos_id, overlap) for _ in names] if meta.eos_id is not None else []
    statistics = SplitStatistics(
        total=Figures(),
        domains={},
        lengths=Counter(),
        unended=0,
        budgets=Counter(),
        filled=np.zeros(meta.seq_len + 1, np.int64),
        token_ids=np.zeros(meta.vocab_size, np.int64),
        identifiers=np.zeros(len(corpora.identifiers), np.int64),
        scored=0,
    )
    size = max(1, CHUNK_TOKENS // meta.seq_len)
    for start in range(0, corpora.num_rows, size):
        rows = corpora.rows(np.arange(start, min(start + size, corpora.num_rows)))
        real = count_real_tokens(rows["inputs"], meta)
        statistics.filled += np.bincount(real, minlength=meta.seq_len + 1)
        ids = np.bincount(rows["inputs"].ravel(), minlength=meta.vocab_size)
        statistics.token_ids += ids[: meta.vocab_size]
        statistics.identifiers += np.bincount(
            rows["puzzle_identifiers"], minlength=len(corpora.identifiers)
        )
        statistics.scored += int((rows["labels"] >= 0).sum())
        if corpora.has_targets:
            _add_counts(statistics.budgets, rows["iteration_targets"])
        for domain in np.unique(rows["domain_ids"]).tolist():
            own = rows["domain_ids"] == domain
            own_rows = {name: values[own] for name, values in rows.items()}
            domains[domain].add(own_rows, real[own], byte_lengths)
            if documents:
                documents[domain].add(own_rows["inputs"], own_rows["labels"], real[own])
        if progress:
            progress(len(real))
    for each, figures in zip(documents, domains, strict=False):
        each.finish()
        figures.documents = each.lengths.total()
        statistics.lengths += each.lengths
        statistics.unended += each.unended
    used = [(name, figures) for name, figures in zip(names, domains, strict=True) if figures.rows]
    statistics.domains = dict(sorted(used, key=lambda item: -item[1].rows))
    for name in vars(statistics.total):
        setattr(statistics.total, name, sum(getattr(figures, name) for figures in domains))
    return statistics


def _add_counts(counts: Counter[int], values: np.ndarray) -> None:
    found, numbers = np.unique(values, return_counts=True)
    counts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))


def quantiles(counts: Counter[int], shares: tuple[float, ...] = QUANTILES) -> list[int]:
    """Return the smallest values that at least these shares of all counted items do not exceed."""
    values = np.array(sorted(counts))
    reached = np.cumsum([counts[value] for value in values.tolist()])
    places = np.searchsorted(reached, np.ceil(np.array(shares) * reached[-1]).clip(1))
    return values[places].tolist()
