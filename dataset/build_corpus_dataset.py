r"""Build a corpus for language modelling from text files.

    python -m dataset.build_corpus_dataset --tokenizer-json tok.json \
        --input-files c4.jsonl.zst github.txt.gz --output-dir data/athena_base \
        --seq-len 2048 --stride 2048 --format jsonl --text-key text

Documents are tokenized, ended with eos, and packed into windows that never mix domains or splits.
A document's split is a keyed hash of its text, so it depends on nothing but the seed.
"""

import argparse
import fnmatch
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.array_writer import (
    SplitWriter,
    add_output_options,
    check_output_dir,
    corpus_folder,
)
from dataset.common import UserError, command_parser, run_cli, token_byte_lengths
from dataset.corpus import (
    SPLITS,
    CorpusSplit,
    DocumentRouter,
    check_iterations,
    finish_corpus,
    print_summary,
)
from dataset.packing import PackOptions, Rows, WindowPacker, iteration_targets
from dataset.text_sources import (
    DocumentReader,
    ReadOptions,
    Source,
    add_input_options,
    find_sources,
)
from dataset.tokenization import TextTokenizer, add_tokenizer_options

DEFAULT_TRAIN_RATIO = 0.995
BATCH_CHARS = 2_000_000
"""Text tokenized at once: enough to keep all threads busy, little enough to keep memory flat."""


@dataclass(frozen=True)
class Input:
    """One source with what the command line says about it."""

    source: Source
    domain: int
    held_out: bool


def plan_inputs(args: argparse.Namespace) -> tuple[list[Input], list[str]]:
    """Inputs in reading order (held-out files first) and the names of the domains."""
    groups = find_sources(args.input_files, args.format)
    sources = [source for group in groups for source in group]
    held_out, extra_groups = _held_out(args, sources)
    labels = _labels(args.domain_labels, groups, extra_groups)
    domains = {label: index for index, label in enumerate(dict.fromkeys(labels.values()))}
    inputs = [Input(source, domains[label], source in held_out) for source, label in labels.items()]
    return sorted(inputs, key=lambda entry: not entry.held_out), list(domains)


def _held_out(
    args: argparse.Namespace, sources: list[Source]
) -> tuple[set[Source], list[list[Source]]]:
    """Sources that are wholly test, and those among them that are not inputs, per argument."""
    by_path = {source.path.resolve(): source for source in sources if not source.is_stdin}
    held_out: set[Source] = set()
    extra_groups = []
    for pattern in args.test_files or []:
        matches = [
            source
            for source in sources
            if fnmatch.fnmatchcase(source.path.name, pattern)
            or fnmatch.fnmatchcase(str(source.path), pattern)
        ]
        extra = []
        if not matches or Path(pattern).exists():
            for source in find_sources([pattern], args.format)[0]:
                known = by_path.get(source.path.resolve())
                matches.append(known or source)
                if known is None and source not in held_out:
                    extra.append(source)
        held_out.update(matches)
        extra_groups.append(extra)
    return held_out, extra_groups


def _labels(
    given: list[str] | None, groups: list[list[Source]], extra_groups: list[list[Source]]
) -> dict[Source, str]:
    """Domain of each source: one label per argument or per file; else the file's stem."""
    sources = [source for group in groups for source in group]
    extras = [source for group in extra_groups for source in group]
    labels = {source: source.label for source in sources + extras}
    if not given:
        return labels
    if len(given) == len(groups) + len(extra_groups) and extras:
        groups = groups + extra_groups
    if len(given) == len(groups):
        labels.update(
            (source, label) for group, label in zip(groups, given, strict=True) for source in group
        )
    elif len(given) == len(sources):
        labels.update(zip(sources, given, strict=True))
    else:
        raise UserError(
            f"--domain-labels names {len(given)} ({', '.join(given[:5])}); give one for each of "
            f"the {len(groups)} --input-files arguments or for each of their {len(sources)} files."
        )
    if len(set(given)) == 1:  # a corpus of one domain: files held out beside it are of it too
        labels.update((source, given[0]) for source in extras)
    return labels


@dataclass
class LengthFilter:
    """Leaves out documents that are too short or too long to be worth learning; counts them."""

    min_chars: int
    max_chars: int | None
    left_out: int = 0

    def keeps(self, text: str) -> bool:
        kept = self.min_chars <= len(text) <= (self.max_chars or len(text))
        self.left_out += not kept
        return kept


def routed_batches(
    inputs: list[Input],
    reader: DocumentReader,
    length_filter: LengthFilter,
    router: DocumentRouter,
) -> Iterator[list[tuple[str, int, str]]]:
    """Batches of (split, domain, text), about `BATCH_CHARS` characters each."""
    batch, size = [], 0
    for entry in inputs:
        for text in reader.texts(entry.source):
            if not length_filter.keeps(text):
                continue
            split = router.route(text.encode(), entry.held_out)
            if split is None:
                continue
            batch.append((split, entry.domain, text))
            size += len(text)
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class PackedCorpus:
    """Packs both splits' documents: one stream of tokens per (split, domain)."""

    def __init__(
        self, args: argparse.Namespace, tokenizer: TextTokenizer, splits: dict[str, CorpusSplit]
    ) -> None:
        self._tokenizer = tokenizer
        self._splits = splits
        self._iterations = (args.min_iterations, args.max_iterations)
        self._pack = {
            name: PackOptions(
                seq_len=args.seq_len,
                stride=args.stride,
                eos_id=tokenizer.eos_id,
                pad_id=tokenizer.pad_id,
                ignore_label_id=tokenizer.ignore_label_id,
                score_once=name == "test",
            )
            for name in splits
        }
        self._packers: dict[tuple[str, int], WindowPacker] = {}
        self.empty_documents = 0

    def add(self, batch: list[tuple[str, int, str]]) -> None:
        """Tokenize documents (split, domain, text) and write the rows that they complete."""
        encoded = self._tokenizer.encode([text for _, _, text in batch])
        eos = np.array([self._tokenizer.eos_id], self._tokenizer.dtype)
        runs: dict[str, tuple[int, list[np.ndarray]]] = {}  # per split, documents of one domain
        for (split, domain, text), tokens in zip(batch, encoded, strict=True):
            if not len(tokens):  # a normalizer may leave nothing of a text
                self.empty_documents += 1
                continue
            self._splits[split].count_document(domain, len(text.encode()), len(tokens) + 1)
            if split in runs and runs[split][0] != domain:
                self._pack_run(split, *runs.pop(split))
            runs.setdefault(split, (domain, []))[1].extend((tokens, eos))
        for split, run in runs.items():
            self._pack_run(split, *run)

    def finish(self) -> None:
        """Pad and write the last window of each stream, in the order of the domains."""
        for split, domain in sorted(self._packers):
            self._write(split, domain, self._packers[split, domain].finish())

    def _pack_run(self, split: str, domain: int, pieces: list[np.ndarray]) -> None:
        key = (split, domain)
        if key not in self._packers:
            self._packers[key] = WindowPacker(self._pack[split])
        self._write(split, domain, self._packers[key].add(np.concatenate(pieces)))

    def _write(self, split: str, domain: int, blocks: Iterator[Rows]) -> None:
        for rows in blocks:
            targets = iteration_targets(rows.inputs, rows.lengths, *self._iterations)
            self._splits[split].write(domain, rows, targets)


def check_options(args: argparse.Namespace) -> None:
    """Everything about the numbers that can be said before a file is opened."""
    if args.seq_len < 1:
        raise UserError(f"--seq-len is {args.seq_len}; it must be at least 1.")
    args.stride = args.seq_len if args.stride is None else args.stride
    if not 1 <= args.stride <= args.seq_len:
        raise UserError(
            f"--stride is {args.stride}; it must lie in 1..{args.seq_len} (--seq-len), because a "
            "longer one would lose tokens."
        )
    if args.train_ratio is not None and not 0 <= args.train_ratio <= 1:
        raise UserError(f"--train-ratio is {args.train_ratio}; it must lie in 0..1.")
    check_iterations(args)
    if args.max_chars is not None and args.max_chars < max(1, args.min_chars):
        raise UserError(
            f"--min-chars {args.min_chars} and --max-chars {args.max_chars} leave no document; "
            "raise --max-chars."
        )
    if args.layout != "arrays":
        raise UserError("--layout stream is not supported yet; use --layout arrays.")
    check_output_dir(args.output_dir.expanduser().resolve(), args.overwrite)


def open_splits(
    args: argparse.Namespace, folder: Path, tokenizer: TextTokenizer, inputs: list[Input]
) -> dict[str, CorpusSplit]:
    """Empty splits in the temporary folder, with the identifiers that their rows will carry."""
    trained = {entry.domain for entry in inputs if not entry.held_out}
    byte_lengths = token_byte_lengths(folder / "tokenizer.json")

    def identifier_of(domain: int) -> int:
        # One that no training row carries would be evaluated untrained: blank is better.
        return domain + 1 if args.identifiers == "domain" and domain in trained else 0

    return {
        name: CorpusSplit(
            writer=SplitWriter(folder / name / "all", tokenizer.dtype, args.seq_len),
            ignore_label_id=tokenizer.ignore_label_id,
            byte_lengths=byte_lengths,
            identifier_of=(
                None if args.identifiers == "sequence" and name == "train" else identifier_of
            ),
        )
        for name in SPLITS
    }


def build(args: argparse.Namespace) -> None:
    """Build the corpus that the command line asks for, whole or not at all."""
    started = time.perf_counter()
    check_options(args)
    tokenizer = TextTokenizer(args.tokenizer_json, args.eos_token, args.pad_token, args.workers)
    inputs, domains = plan_inputs(args)
    ratio = args.train_ratio
    if ratio is None:
        ratio = 1.0 if args.test_files else DEFAULT_TRAIN_RATIO
    router = DocumentRouter(args.seed, ratio, args.dedup == "exact")
    length_filter = LengthFilter(args.min_chars, args.max_chars)
    size = sum(entry.source.size for entry in inputs)
    with (
        corpus_folder(args.output_dir, args.overwrite) as folder,
        tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar,
    ):
        tokenizer.save(folder / "tokenizer.json")
        read_options = ReadOptions(args.documents, args.text_key, args.max_bad_lines)
        reader = DocumentReader(read_options, bar.update)
        splits = open_splits(args, folder, tokenizer, inputs)
        packed = PackedCorpus(args, tokenizer, splits)
        for batch in routed_batches(inputs, reader, length_filter, router):
            packed.add(batch)
        packed.finish()
        if not splits["train"].writer.rows and ratio > 0:
            raise UserError(
                "no document is left for the training split; name fewer --test-files or raise "
                f"--train-ratio (it is {ratio})."
            )
        skipped = {
            "duplicates": router.duplicates,
            "copies_of_held_out_documents": router.held_out_copies,
            "blank_documents": reader.blank_documents,
            "documents_by_length": length_filter.left_out,
            "documents_without_tokens": packed.empty_documents,
            "bad_lines": reader.bad_lines,
        }
        report = {
            "train_ratio": ratio,
            "inputs": describe_inputs(inputs, domains),
            "skipped": skipped,
        }
        finish_corpus(args, folder, splits, tokenizer, domains, args.seq_len, report)
    print_summary(args.output_dir, splits, skipped, time.perf_counter() - started)
    if args.documents == "line" and any(entry.source.format == "text" for entry in inputs):
        print("note: each line of the text files was a document of its own, a repeated one a "
              "duplicate; --documents file keeps files whole")  # fmt: skip


def describe_inputs(inputs: list[Input], domains: list[str]) -> list[dict]:
    """What the report says of the inputs, in reading order."""
    return [
        {
            "file": str(entry.source),
            "bytes": entry.source.size,
            "domain": domains[entry.domain],
            "held_out": entry.held_out,
        }
        for entry in inputs
    ]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("python -m dataset.build_corpus_dataset", __doc__)
    add_output_options(parser)
    add_input_options(parser)
    add_tokenizer_options(parser)
    add = parser.add_argument
    add("--seq-len", type=int, default=2048, help="tokens per row (default: 2048)")
    add("--stride", type=int, help="tokens from one window to the next (default: --seq-len)")
    add("--train-ratio", type=float, help=f"(default: {DEFAULT_TRAIN_RATIO}; 1 with --test-files)")
    add("--test-files", nargs="+", metavar="FILE", help="inputs, or further files, wholly test")
    add("--seed", type=int, default=0, help="decides which documents are test (default: 0)")
    add(
        "--min-iterations", type=int, default=4, metavar="N",
        help="ACT steps that a row of one token repeated is given; the share of distinct tokens "
        "decides in between (default: 4)",
    )  # fmt: skip
    add(
        "--max-iterations", type=int, default=48, metavar="N",
        help="ACT steps that a row of distinct tokens is given; training caps them at "
        "arch.halt_max_steps (default: 48)",
    )  # fmt: skip
    add("--domain-labels", nargs="+", help="one per --input-files argument, or one per file")
    add(
        "--identifiers", choices=("none", "domain", "sequence"), default="domain",
        help="what a learned identifier embedding stands for (default: domain)",
    )  # fmt: skip
    add(
        "--dedup",
        choices=("exact", "none"),
        default="exact",
        help="documents that came before are left out (default: exact)",
    )
    add("--min-chars", type=int, default=0, help="leave shorter documents out (default: 0)")
    add("--max-chars", type=int, help="leave longer documents out (default: keep them)")
    add("--layout", choices=("arrays", "stream"), default="arrays", help="(default: arrays)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the top of this file."""
    run_cli(lambda: build(parse_args(argv)))


if __name__ == "__main__":
    main()
