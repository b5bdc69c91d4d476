"""Compute statistics of a split in one pass: domains, documents, budgets, padding.

Rows are read through `Corpora` in chunks, so memory stays flat and all storage layouts are counted
the same way. Nothing here prints or draws.
"""

from collections import Counter
from collections.abc import Callable, Iterator
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
class _Open:
    """A domain's last row, and the token run that may continue in the next row."""

    length: int
    row: np.ndarray  # inputs (S,)
    next_token: int  # the row's last label
    ends: bool  # whether the label of the last non-padding token is the run's eos


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
    _open: _Open | None = None

    def add(self, inputs: np.ndarray, labels: np.ndarray, real: np.ndarray) -> None:
        """Count the next rows: inputs and labels (n, S), of which `real` (n,) are not padding."""
        size, width = inputs.shape
        continues = self._find_continuations(inputs, labels)
        if not continues[0]:
            self._close()
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
        if len(lengths) and self._open is not None:
            lengths[0] += self._open.length
        last_row = np.searchsorted(row_starts, borders[1:], side="left") - 1
        by_token = tokens[borders[1:] - 1] == self.eos_id
        by_label = ~by_token & (last_label[last_row] == self.eos_id)
        still_open = len(lengths) > 0 and not by_token[-1]
        stop = len(lengths) - still_open
        self._count(lengths[:stop] + by_label[:stop], (by_token | by_label)[:stop])
        self._open = _Open(
            int(lengths[-1]) if still_open else 0,
            inputs[-1].copy(),
            int(labels[-1, -1]),
            bool(last_label[-1] == self.eos_id),
        )

    def finish(self) -> None:
        self._close()

    def _find_continuations(self, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return (n,) whether each row continues the previous one.

        Never after padding, whose labels are ignored and which no row starts with.
        """
        width, overlap = inputs.shape[1], self.overlap
        result = np.zeros(len(inputs), bool)
        before = self._open
        if overlap:
            same = inputs[:-1, width - overlap :] == inputs[1:, :overlap]
            result[1:] = same.all(axis=1)
        else:
            result[1:] = labels[:-1, -1] == inputs[1:, 0]
        if before is not None:
            if overlap:
                result[0] = np.array_equal(before.row[width - overlap :], inputs[0, :overlap])
            else:
                result[0] = before.next_token == inputs[0, 0]
        return result

    def _close(self) -> None:
        if self._open is not None and self._open.length:
            ended = self._open.ends
            self._count(np.array([self._open.length + ended]), np.array([ended]))
        self._open = None

    def _count(self, lengths: np.ndarray, ended: np.ndarray) -> None:
        values, counts = np.unique(lengths[ended], return_counts=True)
        self.lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.unended += int((~ended).sum())


def count_real_tokens(inputs: np.ndarray, metadata: DatasetMetadata) -> np.ndarray:
    """Count the non-padding tokens of each row (n, S): (n,).

    If padding equals eos, the first one of a row's trailing run is the end of the document.
    """
    if metadata.pad_id != metadata.eos_id:
        return (inputs != metadata.pad_id).sum(axis=1)
    width = inputs.shape[1]
    other = inputs[:, ::-1] != metadata.pad_id
    before = np.where(other.any(axis=1), width - other.argmax(axis=1), 0)
    return np.minimum(before + 1, width)


def read_chunks(corpora: Corpora) -> Iterator[dict[str, np.ndarray]]:
    """Yield all rows in order, about a million tokens at a time."""
    size = max(1, CHUNK_TOKENS // corpora.metadata.seq_len)
    for start in range(0, corpora.num_rows, size):
        yield corpora.rows(np.arange(start, min(start + size, corpora.num_rows)))


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
    statistics = _make_empty(corpora)
    for rows in read_chunks(corpora):
        real = count_real_tokens(rows["inputs"], meta)
        _count_rows(statistics, rows, real, corpora.has_targets)
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


def _make_empty(corpora: Corpora) -> SplitStatistics:
    return SplitStatistics(
        total=Figures(),
        domains={},
        lengths=Counter(),
        unended=0,
        budgets=Counter(),
        filled=np.zeros(corpora.metadata.seq_len + 1, np.int64),
        token_ids=np.zeros(corpora.metadata.vocab_size, np.int64),
        identifiers=np.zeros(len(corpora.identifiers), np.int64),
        scored=0,
    )


def _count_rows(
    statistics: SplitStatistics, rows: dict[str, np.ndarray], real: np.ndarray, has_targets: bool
) -> None:
    """Update the statistics that do not depend on the domain; `rows` come from `Corpora.rows`."""
    statistics.filled += np.bincount(real, minlength=len(statistics.filled))
    ids = statistics.token_ids
    ids += np.bincount(rows["inputs"].ravel(), minlength=len(ids))[: len(ids)]
    identifiers = statistics.identifiers
    identifiers += np.bincount(rows["puzzle_identifiers"], minlength=len(identifiers))
    statistics.scored += int((rows["labels"] >= 0).sum())
    if has_targets:
        values, counts = np.unique(rows["iteration_targets"], return_counts=True)
        statistics.budgets.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def quantiles(counts: Counter[int], shares: tuple[float, ...] = QUANTILES) -> list[int]:
    """Return the smallest values that at least these shares of all counted items do not exceed."""
    values = np.array(sorted(counts))
    reached = np.cumsum([counts[value] for value in values.tolist()])
    places = np.searchsorted(reached, np.ceil(np.array(shares) * reached[-1]).clip(1))
    return values[places].tolist()
