"""Read, filter, deduplicate and split the documents of a build, in batches.

Everything here runs in reading order in one thread, so that the choice of skipped documents does
not depend on batches or workers; the state after a batch is enough to resume from there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from dataset.corpus import DocumentRouter
from dataset.filters.quality import QualityFilter
from dataset.input.document_reader import DocumentReader, ReadOptions
from dataset.input.inputs import Input

BATCH_BYTES = 2_000_000
"""Text per batch: enough to keep all threads busy, small enough to keep memory flat."""
BATCH_DOCUMENTS = 1 << 14
"""Documents per batch: tiny documents have an overhead of hundreds of times their size."""


@dataclass
class Batch:
    """Documents in reading order: split, domain, size in bytes and, until tokenized, UTF-8 text."""

    splits: list[str] = field(default_factory=list)
    domains: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    size: int = 0

    def __len__(self) -> int:
        return len(self.splits)

    def add(self, split: str, domain: int, text: bytes) -> None:
        self.splits.append(split)
        self.domains.append(domain)
        self.sizes.append(len(text))
        self.texts.append(text)
        self.size += len(text)


class DocumentFeed:
    """Iterates over batches of the documents of all inputs that belong in the corpus.

    chars: least and most characters of a document (None: no limit).
    """

    def __init__(
        self,
        inputs: list[Input],
        options: ReadOptions,
        chars: tuple[int, int | None],
        quality: QualityFilter,
        router: DocumentRouter,
        progress: Callable[[int], Any],
    ) -> None:
        self._inputs = inputs
        self._reader = DocumentReader(options, progress)
        self._least_chars, self._most_chars = chars
        self._wrong_length = 0
        self._quality = quality
        self._router = router
        self._progress = progress
        self._input, self._records = 0, 0
        self.documents_read = 0

    def __iter__(self) -> Iterator[Batch]:
        batch = Batch()
        # Count the inputs that were read before the build was resumed.
        self._progress(sum(entry.source.size for entry in self._inputs[: self._input]))
        while self._input < len(self._inputs):
            entry = self._inputs[self._input]
            for records, text in self._reader.documents(entry.source, self._records):
                self._records = records
                self.documents_read += 1
                if not self._least_chars <= len(text) <= (self._most_chars or len(text)):
                    self._wrong_length += 1
                    continue
                if self._quality.find_broken_rule(text):
                    continue
                data = text.encode()
                split = self._router.route(data, entry.held_out)
                if split is None:
                    continue
                batch.add(split, entry.domain, data)
                if batch.size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                    yield batch
                    batch = Batch()
            self._input, self._records = self._input + 1, 0
        self._reader.check_sources()
        if len(batch):
            yield batch

    def count_skipped(self) -> dict[str, int]:
        """Return the number of skipped documents and lines, by reason."""
        return {
            "duplicates": self._router.duplicates,
            "copies_of_held_out_documents": self._router.held_out_copies,
            "blank_documents": self._reader.blank_documents,
            "documents_by_length": self._wrong_length,
            "bad_lines": self._reader.bad_lines,
            **{f"quality_{name}": n for name, n in self._quality.counts.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch yielded, and the counts so far."""
        return {
            "input": self._input,
            "records": self._records,
            "documents_read": self.documents_read,
            "bad_lines": self._reader.bad_lines,
            "blank_documents": self._reader.blank_documents,
            "blank_sources": self._reader.blank_sources,
            "first_blank_sources": self._reader.first_blank_sources,
            "by_length": self._wrong_length,
            "router": self._router.state_dict(),
            "quality": {"counts": self._quality.counts},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._input, self._records = state["input"], state["records"]
        self.documents_read = state["documents_read"]
        self._reader.bad_lines = state["bad_lines"]
        self._reader.blank_documents = state["blank_documents"]
        self._reader.blank_sources = state.get("blank_sources", 0)
        self._reader.first_blank_sources = state.get("first_blank_sources", [])
        self._reader.found = self.documents_read > 0
        self._wrong_length = state["by_length"]
        self._router.load_state_dict(state["router"])
        self._quality.counts = state["quality"]["counts"]
