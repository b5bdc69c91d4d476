"""Shared parts of the text corpus builders: assign documents to splits, write rows to files.

The builders decide what a row is. This module handles what they have in common: splitting and
deduplication, the counts behind bits per byte, and the files around the arrays.
"""

import argparse
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import xxhash

from dataset.common import (
    BLANK_IDENTIFIER,
    FORMAT_VERSION,
    IGNORE_LABEL_ID,
    DatasetMetadata,
    sha256_file,
)
from dataset.output.array_writer import SplitWriter, write_json
from dataset.output.journal import Journal
from dataset.packing.windows import Rows
from dataset.tokens.sizes import bytes_of
from dataset.tokens.tokenization import TextTokenizer
from utils.core.errors import UserError

SPLITS = ("train", "test")
_HELD_OUT = 1  # digest kind of held-out documents


@dataclass
class Counts:
    """Counts of one domain in one split."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    """Tokens of the documents, including eos."""
    rows: int = 0
    stored_tokens: int = 0
    """Non-padding tokens in `inputs`; overlapping windows store some twice."""
    scored_tokens: int = 0
    scored_bytes: int = 0
    unknown_tokens: int = 0
    """Tokens that replace text the vocabulary cannot represent."""
    unknown_bytes: int = 0
    """Bytes of text represented by those tokens."""
    lost_bytes: int = 0
    """Bytes of text not covered by any token."""


class DocumentRouter:
    """Assigns each document to a split and drops duplicates.

    The hash is keyed with the seed, so identical texts get the same split in any order.
    Held-out files must come first, so that their documents never reach the training split.
    """

    def __init__(self, seed: int, train_ratio: float, dedup: bool, journal: Journal) -> None:
        self._seed = seed % 2**64
        self._train_ratio = train_ratio
        self._dedup = dedup
        self._journal = journal
        self._holds_out = False
        self.duplicates = 0
        self.held_out_copies = 0

    def route(self, text: bytes, held_out: bool) -> str | None:
        """Return the split of a document given as UTF-8, or None to skip the document."""
        if self._dedup and self.is_copy(text):
            return None
        if held_out:
            if not self._dedup:
                self._holds_out = True
                self._journal.add(self._digest(text), _HELD_OUT)
            return "test"
        split = self.assign_split(text)
        if split == "test" or not self._holds_out:
            return split
        if self._journal.contains(self._digest(text), _HELD_OUT):
            self.held_out_copies += 1
            return None
        return split

    def is_copy(self, text: bytes) -> bool:
        """Return whether this text was seen before, and count it if so."""
        new = self._journal.add(self._digest(text))
        self.duplicates += not new
        return not new

    def assign_split(self, text: bytes) -> str:
        """Return the split determined by the text's hash."""
        share = int.from_bytes(self._digest(text)[:8], "big") / 2**64
        return "train" if share < self._train_ratio else "test"

    def _digest(self, text: bytes) -> bytes:
        return xxhash.xxh3_128_digest(text, self._seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; the digests are in the journal."""
        names = ("duplicates", "held_out_copies", "_holds_out")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class CorpusSplit:
    """Writes the files of one split and counts what each domain contributes.

    Args:
        layout: `npy` stores the inputs and labels of every row; `stream` stores each token once,
            plus the start of each row.
        identifier_of: maps a domain to the identifier of its rows; None numbers rows from 1.
        state: output of `state_dict` to resume from.
    """

    def __init__(
        self,
        folder: Path,
        layout: str,
        tokenizer: TextTokenizer,
        seq_len: int,
        identifier_of: Callable[[int], int] | None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.layout = layout
        self.ignore_label_id = tokenizer.ignore_label_id
        self._identifier_of = identifier_of
        # One extra entry for the ignored label: lookups past the end are clipped to it.
        self._byte_lengths = np.append(tokenizer.byte_lengths, 0)
        self.counts: dict[int, Counts] = {}
        self._last = (-1, 0, 0)  # domain and end of the last row written, and its end in tokens
        row, per_row = (seq_len,), (np.int32, ())
        arrays: dict[str, tuple[Any, tuple[int, ...]]]
        if layout == "npy":
            arrays = {"inputs": (tokenizer.dtype, row), "labels": (tokenizer.dtype, row)}
        else:
            # Ignored labels are not stored in this layout, so they need no value of their own.
            token = np.min_scalar_type(tokenizer.vocab_size - 1)
            length = (np.min_scalar_type(seq_len + 1), ())
            arrays = {"tokens": (token, ()), "row_starts": (np.int64, ())}
            arrays |= {"row_lengths": length, "label_starts": length}
        arrays |= dict.fromkeys(("puzzle_identifiers", "iteration_targets", "domain_ids"), per_row)
        self._unknown_id = tokenizer.unknown_id
        if not tokenizer.lossless:
            arrays["scored_bytes"] = (np.int64, ())
        if layout == "stream":
            arrays["iteration_targets"] = (np.uint16, ())  # `check_iterations` ensures it fits
        rows = None
        if state is not None:
            rows, self._last = state["rows"], tuple(state["last"])
            self.counts = {int(domain): Counts(**c) for domain, c in state["counts"].items()}
        self.writer = SplitWriter(folder, arrays, indices=layout == "npy", rows=rows)

    def count(self, domain: int) -> Counts:
        return self.counts.setdefault(domain, Counts())

    def count_document(self, domain: int, text_bytes: int, tokens: int) -> None:
        """Count a document of `text_bytes` bytes and `tokens` tokens, including eos."""
        counts = self.count(domain)
        counts.documents += 1
        counts.text_bytes += text_bytes
        counts.tokens += tokens

    def count_unencodable(self, domain: int, tokens: np.ndarray) -> None:
        """Count the text that tokens (n,) fail to represent; a no-op for plain ids."""
        if not tokens.dtype.names:
            return
        counts, unknown = self.count(domain), tokens[tokens["id"] == self._unknown_id]
        counts.unknown_tokens += len(unknown)
        counts.unknown_bytes += int(unknown["bytes"].sum(dtype=np.int64))
        counts.lost_bytes += int(tokens["lost"].sum(dtype=np.int64))

    def count_lost_text(self, domain: int, text_bytes: int) -> None:
        """Count a text of `text_bytes` bytes that produced no tokens."""
        counts = self.count(domain)
        counts.text_bytes += text_bytes
        counts.lost_bytes += text_bytes

    def write(self, domain: int, rows: Rows, targets: np.ndarray) -> None:
        """Append rows of one domain and their iteration targets (n,)."""
        count = len(rows.inputs)
        if self._identifier_of is None:
            identifiers = np.arange(self.writer.rows + 1, self.writer.rows + count + 1)
        else:
            identifiers = np.full(count, self._identifier_of(domain))
        stored = self._to_views(domain, rows) if self.layout == "stream" else {
            "inputs": rows.inputs, "labels": rows.labels
        }  # fmt: skip
        if rows.label_bytes is not None:
            stored["scored_bytes"] = rows.label_bytes
        self.writer.append(
            **stored,
            puzzle_identifiers=identifiers,
            iteration_targets=targets,
            domain_ids=np.full(count, domain),
        )
        counts = self.count(domain)
        counts.rows += count
        counts.stored_tokens += int(rows.input_lengths.sum())
        counts.scored_tokens += int(np.count_nonzero(rows.labels != self.ignore_label_id))
        sizes = rows.label_bytes
        if sizes is None:
            sizes = bytes_of(rows.labels, self._byte_lengths)
        counts.scored_bytes += int(sizes.sum(dtype=np.int64))

    def _to_views(self, domain: int, rows: Rows) -> dict[str, np.ndarray]:
        """Return the tokens not stored yet, and each row's location in the token stream."""
        first, last = int(rows.starts[0]), int(rows.starts[-1] + rows.lengths[-1])
        end, written = self._last[1] - rows.origin, self._last[2]
        # A window may overlap the previous one, whose tokens are already stored.
        known = end - first if self._last[0] == domain and 0 <= end - first <= last - first else 0
        tokens = rows.stream[first + known : last]
        shift = written - known - first
        self._last = (domain, rows.origin + last, written + len(tokens))
        return {
            "tokens": tokens,
            "row_starts": rows.starts + shift,
            "row_lengths": rows.lengths,
            "label_starts": rows.label_starts,
        }

    @property
    def total(self) -> Counts:
        parts = [asdict(counts) for counts in self.counts.values()]
        return Counts(**{name: sum(part[name] for part in parts) for name in asdict(Counts())})

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the rows flushed to disk."""
        return {
            "rows": self.writer.saved_rows(),
            "last": self._last,
            "counts": {domain: asdict(counts) for domain, counts in self.counts.items()},
        }


def group_runs(keys: Iterable[tuple[str, int] | None]) -> list[tuple[tuple[str, int], list[int]]]:
    """Group the indices of consecutive documents of one (split, domain), within each split.

    Documents with None are left out.
    Written group by group in this order, rows come out as if written document by document.
    """
    runs: list[tuple[tuple[str, int], list[int]]] = []
    last: dict[str, int] = {}  # index of each split's current run
    for number, key in enumerate(keys):
        if key is None:
            continue
        run = last.get(key[0], -1)
        if run < 0 or runs[run][0] != key:
            last[key[0]] = run = len(runs)
            runs.append((key, []))
        runs[run][1].append(number)
    return runs


def open_splits(
    args: argparse.Namespace,
    folder: Path,
    tokenizer: TextTokenizer,
    seq_len: int,
    trained: Container[int] | None = None,
    states: Mapping[str, Any] | None = None,
) -> dict[str, CorpusSplit]:
    """Open both splits in the directory of a build.

    Args:
        trained: domains that may have an identifier, because training inputs belong to them;
            identifiers of other domains would stay untrained. None: all.
        states: output of `CorpusSplit.state_dict` by split, to resume from.
    """

    def identifier_of(domain: int) -> int:
        named = args.identifiers == "domain" and (trained is None or domain in trained)
        return domain + 1 if named else 0

    return {
        name: CorpusSplit(
            folder / name / "all",
            args.layout,
            tokenizer,
            seq_len,
            None if args.identifiers == "sequence" and name == "train" else identifier_of,
            (states or {}).get(name),
        )
        for name in SPLITS
    }


def finish_corpus(
    args: argparse.Namespace,
    folder: Path,
    splits: dict[str, CorpusSplit],
    tokenizer: TextTokenizer,
    domains: list[str],
    seq_len: int,
    report: dict[str, Any],
    domain_weights: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Close both splits and write their metadata and `identifiers.json`.

    Returns:
        The contents of `build_report.json`: `report` plus the counts of both splits.
    """
    train = splits["train"]
    metadata = {
        name: split.writer.finish(
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            ignore_label_id=(
                tokenizer.ignore_label_id if split.layout == "npy" else IGNORE_LABEL_ID
            ),
            layout=split.layout,
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
    write_json(folder / "identifiers.json", _name_identifiers(args.identifiers, metadata["train"]))
    options = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}
    return {
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
    }


def _name_identifiers(kind: str, train: DatasetMetadata) -> list[str]:
    """Return the name of each identifier.

    Names of sequences start with a digest of the corpus, because joined corpora match identifiers
    by name.
    """
    if kind == "none":
        return [BLANK_IDENTIFIER]
    if kind == "domain":
        return [BLANK_IDENTIFIER, *train.domains]
    tokens = train.checksums["inputs.npy" if train.layout == "npy" else "tokens.npy"]
    corpus = tokens.rpartition(":")[2][:12]
    return [BLANK_IDENTIFIER, *(f"{corpus}/{row}" for row in range(train.total_puzzles))]


def add_layout_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that selects the storage layout."""
    parser.add_argument(
        "--layout",
        choices=("npy", "stream"),
        default="npy",
        help="npy: store inputs and labels of every row; stream: store each token once, which "
        "takes about half the space; both are read by the same programs (default: npy)",
    )


def check_iterations(args: argparse.Namespace) -> None:
    """Raise UserError if the iteration-budget bounds are inconsistent."""
    if not 1 <= args.min_iterations <= args.max_iterations:
        raise UserError(
            f"--min-iterations {args.min_iterations} and --max-iterations {args.max_iterations} "
            "are inconsistent; use 1 <= min <= max."
        )
    if args.max_iterations > np.iinfo(np.uint16).max:
        raise UserError(f"--max-iterations is {args.max_iterations}; it must be at most 65535.")


def print_unencodable(splits: dict[str, CorpusSplit]) -> None:
    """Print how much of the text the tokens fail to represent, if any."""
    totals = [split.total for split in splits.values()]
    unknown, unknown_bytes, lost, text = (
        sum(getattr(total, name) for total in totals)
        for name in ("unknown_tokens", "unknown_bytes", "lost_bytes", "text_bytes")
    )
    found = []
    if unknown:
        found.append(f"{unknown:,} unknown tokens replace {unknown_bytes:,} bytes")
    if lost:
        found.append(f"{lost:,} bytes are not covered by any token")
    if found:
        print(
            f"note: the tokenizer cannot represent all of the text: of {text:,} bytes, "
            f"{' and '.join(found)}; no model can learn these bytes, and bits per byte includes "
            "them except for texts without any tokens"
        )


def print_summary(
    output_dir: Path, splits: dict[str, CorpusSplit], skipped: dict[str, int], seconds: float
) -> None:
    """Print a short summary of the finished corpus."""
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
        print(f"skipped: {', '.join(counted)}")
    print_unencodable(splits)
    if not splits["train"].writer.rows:
        print("note: the training split is empty; this corpus can only be used for evaluation")
    if not splits["test"].writer.rows:
        print("note: the test split is empty; training on this corpus will skip evaluation")
    print(f"built {output_dir} in {seconds:.1f} s")
