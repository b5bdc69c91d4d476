"""A corpus in the making, as every text builder needs it: documents to splits, rows to files.

The builders decide what a row is; here is what they share: the split and the copies of a document,
the counts that bits per byte rest on, and the files around the arrays.
"""

import argparse
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dataset.array_writer import SplitWriter, write_json
from dataset.common import (
    BLANK_IDENTIFIER,
    FORMAT_VERSION,
    DatasetMetadata,
    UserError,
    sha256_file,
)
from dataset.packing import Rows
from dataset.tokenization import TextTokenizer

SPLITS = ("train", "test")


@dataclass
class Counts:
    """What one domain put into one split."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    """Tokens of the documents, eos included."""
    rows: int = 0
    stored_tokens: int = 0
    """Real tokens in `inputs`; windows that overlap store some twice."""
    scored_tokens: int = 0
    scored_bytes: int = 0


class DocumentRouter:
    """Sends each document to a split, or nowhere when it is a duplicate.

    The digest is keyed with the seed, so that identical texts share their fate whatever their
    order. Held-out files must come first: their documents never reach the training split.
    """

    def __init__(self, seed: int, train_ratio: float, dedup: bool) -> None:
        self._key = str(seed).encode()[:64]
        self._train_ratio = train_ratio
        self._dedup = dedup
        self._seen: set[bytes] = set()
        self._held_out: set[bytes] = set()
        self.duplicates = 0
        self.held_out_copies = 0

    def route(self, text: bytes, held_out: bool) -> str | None:
        """The split of a document given as UTF-8; None if it is to be left out."""
        if self._dedup and self.is_copy(text):
            return None
        if held_out:
            if not self._dedup:
                self._held_out.add(self._digest(text))
            return "test"
        split = self.split_of(text)
        if split == "train" and self._held_out and self._digest(text) in self._held_out:
            self.held_out_copies += 1
            return None
        return split

    def is_copy(self, text: bytes) -> bool:
        """Whether this text came before; copies are counted."""
        digest = self._digest(text)
        if digest in self._seen:
            self.duplicates += 1
            return True
        self._seen.add(digest)
        return False

    def split_of(self, text: bytes) -> str:
        """The split that the text's digest falls to."""
        share = int.from_bytes(self._digest(text)[:8], "big") / 2**64
        return "train" if share < self._train_ratio else "test"

    def _digest(self, text: bytes) -> bytes:
        return hashlib.blake2b(text, digest_size=16, key=self._key).digest()


@dataclass
class CorpusSplit:
    """One split in the making: its files, and the counts of what each domain put into them."""

    writer: SplitWriter
    ignore_label_id: int
    byte_lengths: np.ndarray
    """(V,) int32: bytes of text that a token id stands for."""
    identifier_of: Callable[[int], int] | None
    """Identifier of a domain's rows; None numbers the rows from 1."""
    counts: dict[int, Counts] = field(default_factory=dict)

    def count(self, domain: int) -> Counts:
        return self.counts.setdefault(domain, Counts())

    def count_document(self, domain: int, text_bytes: int, tokens: int) -> None:
        """Count a document of `text_bytes` bytes and `tokens` tokens, eos included."""
        counts = self.count(domain)
        counts.documents += 1
        counts.text_bytes += text_bytes
        counts.tokens += tokens

    def write(self, domain: int, rows: Rows, targets: np.ndarray) -> None:
        """Append rows (n, S) of one domain with their iteration targets (n,)."""
        count = len(rows.inputs)
        if self.identifier_of is None:
            identifiers = np.arange(self.writer.rows + 1, self.writer.rows + count + 1)
        else:
            identifiers = np.full(count, self.identifier_of(domain))
        self.writer.append(
            inputs=rows.inputs,
            labels=rows.labels,
            puzzle_identifiers=identifiers,
            iteration_targets=targets,
            domain_ids=np.full(count, domain),
        )
        scored = rows.labels[rows.labels != self.ignore_label_id]
        counts = self.count(domain)
        counts.rows += count
        counts.stored_tokens += int(rows.lengths.sum())
        counts.scored_tokens += len(scored)
        counts.scored_bytes += int(self.byte_lengths[scored].sum(dtype=np.int64))

    @property
    def total(self) -> Counts:
        parts = [asdict(counts) for counts in self.counts.values()]
        return Counts(**{name: sum(part[name] for part in parts) for name in asdict(Counts())})


def finish_corpus(
    args: argparse.Namespace,
    folder: Path,
    splits: dict[str, CorpusSplit],
    tokenizer: TextTokenizer,
    domains: list[str],
    seq_len: int,
    report: dict[str, Any],
    domain_weights: dict[str, float] | None = None,
) -> None:
    """Close both splits and write their metadata, `identifiers.json` and `build_report.json`."""
    train = splits["train"]
    metadata = {
        name: split.writer.finish(
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            ignore_label_id=tokenizer.ignore_label_id,
            vocab_size=tokenizer.vocab_size,
            seq_len=seq_len,
            num_puzzle_identifiers=1
            + {"none": 0, "domain": len(domains), "sequence": train.writer.rows}[args.identifiers],
            min_iterations=args.min_iterations,
            max_iterations=args.max_iterations,
            domains=domains,
            domain_weights=domain_weights or {},
            format_version=FORMAT_VERSION,
            tokens=split.total.stored_tokens,
            documents=split.total.documents,
            scored_bytes=split.total.scored_bytes,
        )
        for name, split in splits.items()
    }
    write_json(folder / "identifiers.json", _identifiers(args.identifiers, metadata["train"]))
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    write_json(
        folder / "build_report.json",
        {
            "format_version": FORMAT_VERSION,
            "options": options,
            "tokenizers_version": tokenizers.__version__,
            "tokenizer_sha256": sha256_file(folder / "tokenizer.json"),
            **report,
            "splits": {
                name: {
                    "total": asdict(split.total),
                    "domains": {domains[d]: asdict(split.counts[d]) for d in sorted(split.counts)},
                }
                for name, split in splits.items()
            },
        },
    )


def _identifiers(kind: str, train: DatasetMetadata) -> list[str]:
    """Names by identifier. Those of sequences start with the corpus' own digest, because joined
    corpora match identifiers by name."""
    if kind == "none":
        return [BLANK_IDENTIFIER]
    if kind == "domain":
        return [BLANK_IDENTIFIER, *train.domains]
    corpus = train.checksums["inputs.npy"][:12]
    return [BLANK_IDENTIFIER, *(f"{corpus}/{row}" for row in range(train.total_puzzles))]


def check_iterations(args: argparse.Namespace) -> None:
    """Refuse bounds of the iteration budget that clash."""
    if not 1 <= args.min_iterations <= args.max_iterations:
        raise UserError(
            f"--min-iterations {args.min_iterations} and --max-iterations {args.max_iterations} "
            "clash; 1 <= min <= max is needed."
        )


def print_summary(
    output_dir: Path, splits: dict[str, CorpusSplit], skipped: dict[str, int], seconds: float
) -> None:
    """Say what was built, in a few lines."""
    for name, split in splits.items():
        total = split.total
        per_token = f"{total.text_bytes / total.tokens:.2f}" if total.tokens else "no"
        print(
            f"{name}: {total.documents:,} documents, {total.tokens:,} tokens, {total.rows:,} rows, "
            f"{per_token} bytes per token"
        )
    if counted := [
        f"{count:,} {name.replace('_', ' ')}" for name, count in skipped.items() if count
    ]:
        print(f"left out: {', '.join(counted)}")
    if not splits["test"].writer.rows:
        print("The test split is empty, so training on this corpus will skip evaluation.")
    print(f"built {output_dir} in {seconds:.1f} s")
