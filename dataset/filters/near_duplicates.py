"""Find near-duplicate documents by banded MinHash signatures, kept on disk.

A signature has 14 bands of 8 minima over hashed 5-grams of tokens. A given minimum is equal for two
documents with probability J, the Jaccard similarity of their sets of 5-grams (Broder 1997), so a
pair shares a band, and is found, with probability `1 - (1 - J^8)^14`: 0.3 % at J = 0.35, 5 % at
0.5, 56 % at 0.7, 92 % at 0.8, 99.96 % at 0.9, and always at 1. These parameters are FineWeb's
(Penedo et al. 2024, arXiv 2406.17557).

Each 5-gram is hashed once, into one of 112 bins that keep their minimum (Li, Owen & Zhang 2012,
arXiv 1208.1259). An empty bin borrows from a full one, each in its own random order ("optimal
densification", Shrivastava 2017, arXiv 1703.04664). For documents of 11 to 1,000 5-grams the
measured detection rate matches the formula within 2 percentage points, at 1% of the hashing cost.

Only the band keys are stored, 112 bytes per document, in one file per band; memory grows only with
the result.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from utils.core.errors import UserError
from utils.corpus.permutation import scramble

SHINGLE = 5
"""Tokens per n-gram; a shorter document counts as a single n-gram."""
BANDS = 14
ROWS = 8
BINS = BANDS * ROWS
EMPTY = np.uint64(2**64 - 1)

BLOCK_TOKENS = 1 << 15
"""Tokens hashed at once, few enough to keep the intermediate arrays in cache."""
BLOCK_DOCUMENTS = 1 << 10
"""Number of signatures in memory at once, which take 896 bytes each."""
SORT_KEYS = 1 << 23
"""Number of keys sorted at once, which take about 40 bytes each."""

KEY = np.dtype("<u8")


class BandKeys:
    """Computes band keys, a pure function of a document's tokens and the seed."""

    def __init__(self, seed: int) -> None:
        def random(count: int, purpose: str) -> np.ndarray:
            stream = hashlib.shake_256(f"near duplicates, {purpose} {seed}".encode())
            return np.frombuffer(stream.digest(8 * count), "<u8").astype(np.uint64)

        self._token_factors = random(SHINGLE, "tokens")
        self._row_factors = random(ROWS, "rows") | np.uint64(1)
        order = random(BINS * BINS, "bins").reshape(BINS, BINS)
        np.fill_diagonal(order, 0)  # a full bin lends to itself
        self._codes = order.argsort(axis=0).argsort(axis=0).astype(np.uint16) << 8
        self._codes |= np.arange(BINS, dtype=np.uint16)[:, None]
        """(lenders, borrowers): the lender's rank in the borrower's random order, and its index."""

    def compute(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Compute the keys (documents, BANDS) uint64 of documents given as token ids (n,)."""
        keys = np.empty((len(documents), BANDS), np.uint64)
        for start in range(0, len(documents), BLOCK_DOCUMENTS):
            part = documents[start : start + BLOCK_DOCUMENTS]
            bands = self._compute_signatures(part).reshape(len(part), BANDS, ROWS)
            keys[start : start + len(part)] = scramble((bands * self._row_factors).sum(axis=2))
        return keys

    def _compute_signatures(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Compute the minima (documents, BINS) uint64."""
        minima = np.full((len(documents), BINS), EMPTY)
        for rows, pieces in _split_blocks(documents):
            hashes = scramble(self._combine_shingles(pieces))
            bins = (hashes >> np.uint64(32)) * np.uint64(BINS) >> np.uint64(32)
            places = np.repeat(rows * BINS, [len(piece) - SHINGLE + 1 for piece in pieces])
            np.minimum.at(minima.reshape(-1), places + bins.view(np.int64), hashes)
        full = minima != EMPTY
        rows = np.flatnonzero(~full.all(axis=1))
        minima[rows] = np.take_along_axis(minima[rows], self._find_lenders(full[rows]), axis=1)
        return minima

    def _find_lenders(self, full: np.ndarray) -> np.ndarray:
        """Return the bin (n, BINS) that each bin copies its minimum from; full (n, BINS) bool."""
        best = np.full(full.shape, np.iinfo(np.uint16).max, np.uint16)
        for lender in range(BINS):
            rows = np.flatnonzero(full[:, lender])
            best[rows] = np.minimum(best[rows], self._codes[lender])
        return (best & 0xFF).astype(np.int64)

    def _combine_shingles(self, pieces: list[np.ndarray]) -> np.ndarray:
        """Combine each 5-gram within the pieces into a uint64, in order: (n,).

        A sum of products with random factors; different 5-grams collide about once in 2^60.
        """
        tokens = np.concatenate(pieces, dtype=np.int64, casting="same_kind").view(np.uint64)
        count = len(tokens) - SHINGLE + 1
        states = tokens[:count] * self._token_factors[0]
        for place in range(1, SHINGLE):
            states += tokens[place : place + count] * self._token_factors[place]
        if len(pieces) == 1:
            return states
        within = np.ones(len(tokens), bool)
        ends = np.cumsum([len(piece) for piece in pieces])
        within[(ends[:, None] - np.arange(1, SHINGLE)).ravel()] = False
        return states[within[:count]]


def _split_blocks(documents: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Split documents into blocks of about `BLOCK_TOKENS` tokens.

    A longer document is split into overlapping pieces, so that each of its 5-grams is in exactly
    one. Yields the row (p,) that each piece belongs to, and the pieces, of SHINGLE tokens or more.
    """
    rows: list[int] = []
    pieces: list[np.ndarray] = []
    size = 0
    for row, document in enumerate(documents):
        if len(document) < SHINGLE:
            absent = SHINGLE - len(document)  # padded with -1, which is not a token id
            document = np.pad(document.astype(np.int64), (0, absent), constant_values=-1)
        for start in range(0, len(document) - SHINGLE + 1, BLOCK_TOKENS):
            piece = document[start : start + BLOCK_TOKENS + SHINGLE - 1]
            rows.append(row)
            pieces.append(piece)
            size += len(piece)
            if size >= BLOCK_TOKENS:
                yield np.array(rows), pieces
                rows, pieces, size = [], [], 0
    if pieces:
        yield np.array(rows), pieces


class NearDuplicates:
    """Stores the band keys of documents on disk, in reading order, and finds near duplicates.

    Opening an existing directory continues with its contents; the seed must be the same. Calls of
    `add` may contain any number of documents without affecting the result; larger calls are faster.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._band_keys = BandKeys(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self._paths = [folder / f"band_{band:02d}.u64" for band in range(BANDS)]
        for path in self._paths:
            path.touch()
        self.documents = min(path.stat().st_size for path in self._paths) // KEY.itemsize
        """Number of documents added so far."""

    def add(self, documents: Sequence[np.ndarray]) -> None:
        """Append documents, each given as token ids (n,) of any integer dtype."""
        keys = self._band_keys.compute(documents)
        for path, column in zip(self._paths, keys.T, strict=True):
            with open(path, "r+b") as file:
                file.seek(self.documents * KEY.itemsize)
                file.write(np.ascontiguousarray(column, KEY).data)
        self.documents += len(documents)

    def flush(self) -> None:
        """Flush everything added so far to disk."""
        for path in self._paths:
            with open(path, "r+b") as file:
                os.fsync(file.fileno())

    def truncate(self, documents: int) -> None:
        """Drop all but the first `documents`; raise UserError if there are fewer."""
        if documents > self.documents:
            raise UserError(
                f"{self._folder} has the keys of {self.documents} documents instead of "
                f"{documents}: files are missing or damaged; start over."
            )
        for path in self._paths:
            os.truncate(path, documents * KEY.itemsize)
        self.documents = documents

    def find_duplicates(self) -> np.ndarray:
        """Return which documents share a band with an earlier one: (documents,) bool.

        Earlier documents count even if they are duplicates themselves: in a chain where each
        document resembles the previous one, only the first is kept. The probability of a false
        match is at most `14 * documents / 2^64` per document.
        """
        later = np.zeros(self.documents, bool)
        parts = -(-self.documents // SORT_KEYS)
        for path in self._paths if parts else ():
            stored = np.memmap(path, KEY, "r", shape=(self.documents,))
            for part in range(parts):
                chosen = [
                    start + np.flatnonzero(stored[start : start + SORT_KEYS] % parts == part)
                    for start in range(0, self.documents, SORT_KEYS)
                ]
                documents = np.concatenate(chosen)
                keys = stored[documents]
                order = np.argsort(keys, kind="stable")
                repeated = keys[order[1:]] == keys[order[:-1]]
                later[documents[order[1:][repeated]]] = True
        return later
