"""Store tokenized documents on disk until all are read, when near duplicates are known."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataset.corpus import SPLITS
from dataset.filters.near_duplicates import NearDuplicates
from dataset.input.documents import Batch
from dataset.output.array_writer import ArrayWriter
from dataset.tokens.sizes import ids_of

_BLOCK_DOCUMENTS = 4096
_BLOCK_TOKENS = 1 << 21


class DocumentSpool:
    """Stores documents on disk and returns those that are not near duplicates.

    Args:
        state: output of `state_dict` to resume from.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype, seed: int, state: dict[str, Any] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._near = NearDuplicates(folder / "bands", seed)
        self._near.truncate(state["documents"] if state else 0)
        tokens, documents = (state["tokens"], state["documents"]) if state else (None, None)
        self._tokens = ArrayWriter(folder / "tokens.npy", dtype, rows=tokens)
        self._documents = ArrayWriter(folder / "documents.npy", np.int64, (4,), rows=documents)
        self._dtype = dtype
        self.skipped = 0
        """Number of near duplicates of earlier documents; known once `batches` has run."""

    def add(self, batch: Batch, ids: np.ndarray, counts: np.ndarray) -> None:
        """Store a batch with its tokens (n,) and the count of each document (documents,)."""
        ids = ids.astype(self._dtype)
        self._tokens.append(ids)
        splits = [SPLITS.index(split) for split in batch.splits]
        self._documents.append(np.stack([splits, batch.domains, batch.sizes, counts], axis=1))
        self._near.add(np.split(ids_of(ids), np.cumsum(counts)[:-1]))

    def batches(self) -> Iterator[tuple[Batch, np.ndarray, np.ndarray]]:
        """Yield the remaining documents in reading order, as passed to `add` but without text."""
        self._tokens.close()
        self._documents.close()
        self._near.flush()
        is_copy = self._near.find_duplicates()
        self.skipped = int(is_copy.sum())
        tokens = np.load(self._tokens.path, mmap_mode="r")
        documents = np.load(self._documents.path, mmap_mode="r")
        first_document = first_token = 0
        while first_document < len(documents):
            block = np.asarray(documents[first_document : first_document + _BLOCK_DOCUMENTS])
            ends = np.cumsum(block[:, 3])
            size = max(1, int(np.searchsorted(ends, _BLOCK_TOKENS, side="right")))
            block, ends = block[:size], ends[:size]
            keep = ~is_copy[first_document : first_document + size]
            ids = np.asarray(tokens[first_token : first_token + int(ends[-1])])
            splits, domains, sizes, counts = block[keep].T
            batch = Batch([SPLITS[n] for n in splits.tolist()], domains.tolist(), sizes.tolist())
            yield batch, ids[np.repeat(keep, block[:, 3])], counts
            first_document += size
            first_token += int(ends[-1])

    def state_dict(self) -> dict[str, Any]:
        """Flush the files to disk and return their lengths."""
        for writer in (self._tokens, self._documents):
            writer.sync()
        self._near.flush()
        return {"tokens": self._tokens.rows, "documents": self._documents.rows}
