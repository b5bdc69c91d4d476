"""Turn batches of documents into rows on disk: tokenize ahead, pack in order, save periodically.

One thread reads, one feeds the tokenizer's own threads, and one packs and writes, so that none
waits for another. All process the batches in reading order, so the result does not depend on the
number of workers.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from dataset.corpus import CorpusSplit, group_runs
from dataset.input.documents import Batch
from dataset.packing.best_fit import BestFitPacker
from dataset.packing.windows import Packer, PackOptions, Rows, WindowPacker, iteration_targets
from dataset.tokens.encoders import Encoded, Encoder
from dataset.tokens.tokenization import TextTokenizer

PACKERS: dict[str, Callable[[PackOptions], Packer]] = {
    "concat": WindowPacker,
    "bestfit": BestFitPacker,
}
_AHEAD = 3  # batches in flight: one being tokenized, one being packed, one waiting


class Stopwatch:
    """Measures seconds per stage; stages of different threads overlap, so they may not add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def time_items(self, stage: str, items: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the items and measure the time it takes to produce them."""
        iterator = iter(items)
        while True:
            with self(stage):
                item = next(iterator, None)
            if item is None:
                return
            yield item


def tokenize_all(
    batches: Iterable[Batch],
    encoder: Encoder,
    add: Callable[[Batch, np.ndarray, np.ndarray], None],
    watch: Stopwatch,
    save: Callable[[], None],
    save_every: float,
) -> None:
    """Tokenize batches and pass them on, in order.

    Args:
        add: called with each batch, its tokens (n,), and the count of each document (documents,).
        save: called about every `save_every` seconds, when all batches read so far were added.
    """

    def encode(batch: Batch) -> Encoded:
        with watch("tokenizing"):
            return encoder.encode(batch.texts)

    def pack(batch: Batch, future: Future[Encoded]) -> None:
        ids, counts = future.result()
        with watch("packing and writing"):
            add(batch, ids, counts)

    in_flight: deque[Future[None]] = deque()
    saved = time.monotonic()
    with ThreadPoolExecutor(1) as tokenizing, ThreadPoolExecutor(1) as packing:
        try:
            for batch in watch.time_items("reading", batches):
                in_flight.append(packing.submit(pack, batch, tokenizing.submit(encode, batch)))
                if len(in_flight) >= _AHEAD:
                    in_flight.popleft().result()
                if time.monotonic() - saved >= save_every:
                    while in_flight:
                        in_flight.popleft().result()
                    with watch("saving"):
                        save()
                    saved = time.monotonic()
            while in_flight:
                in_flight.popleft().result()
        finally:
            tokenizing.shutdown(cancel_futures=True)
            packing.shutdown(cancel_futures=True)


class PackedCorpus:
    """Packs the documents of both splits, one token stream per (split, domain)."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        splits: dict[str, CorpusSplit],
        *,
        pack: str,
        seq_len: int,
        stride: int,
        iterations: tuple[int, int],
    ) -> None:
        self._tokenizer = tokenizer
        self._splits = splits
        self._iterations = iterations
        self._make_packer = PACKERS[pack]
        self._options = {
            name: PackOptions(
                seq_len=seq_len,
                stride=stride,
                eos_id=tokenizer.eos_id,
                pad_id=tokenizer.pad_id,
                ignore_label_id=tokenizer.ignore_label_id,
                score_once=name == "test",
            )
            for name in splits
        }
        self._packers: dict[tuple[str, int], Packer] = {}
        self.empty_documents = 0

    def add(self, batch: Batch, ids: np.ndarray, counts: np.ndarray) -> None:
        """Pack documents and write the rows they complete."""
        ends = np.cumsum(counts)
        keys: list[tuple[str, int] | None] = []
        documents = zip(batch.splits, batch.domains, batch.sizes, counts.tolist(), strict=True)
        for split, domain, size, tokens in documents:
            if tokens:
                self._splits[split].count_document(domain, size, tokens + 1)
                keys.append((split, domain))
            else:  # a normalizer may remove all of a text
                self.empty_documents += 1
                self._splits[split].count_lost_text(domain, size)
                keys.append(None)
        for (split, domain), run in group_runs(keys):
            chosen = ids
            if len(run) < len(counts):
                chosen = np.concatenate([ids[ends[n] - counts[n] : ends[n]] for n in run])
            self._splits[split].count_unencodable(domain, chosen)
            stream = self._tokenizer.append_eos(chosen, counts[run])
            packer = self._get_packer(split, domain)
            self._write(split, domain, packer.add(stream, np.cumsum(counts[run] + 1)))

    def finish(self) -> None:
        """Write the last rows of each stream, in domain order."""
        for split, domain in sorted(self._packers):
            self._write(split, domain, self._packers[split, domain].finish())

    def _get_packer(self, split: str, domain: int) -> Packer:
        if (split, domain) not in self._packers:
            self._packers[split, domain] = self._make_packer(self._options[split])
        return self._packers[split, domain]

    def _write(self, split: str, domain: int, blocks: Iterator[Rows]) -> None:
        for rows in blocks:
            targets = iteration_targets(rows.inputs, rows.input_lengths, *self._iterations)
            self._splits[split].write(domain, rows, targets)

    def state_dict(self) -> dict[str, Any]:
        """Return the data not yet written and the lengths of the files; flushes them to disk."""
        return {
            "empty_documents": self.empty_documents,
            "packers": [
                {"split": split, "domain": domain, "state": packer.state_dict()}
                for (split, domain), packer in self._packers.items()
            ],
            "splits": {name: split.state_dict() for name, split in self._splits.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the packers; splits restore their own state when constructed."""
        self.empty_documents = state["empty_documents"]
        for entry in state["packers"]:
            self._get_packer(entry["split"], entry["domain"]).load_state_dict(entry["state"])
