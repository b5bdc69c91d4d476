"""Inspect a corpus: statistics, documents, budgets, and a few rows as text.

    python -m dataset.inspect_corpus data/athena_base
    python -m dataset.inspect_corpus gs://bucket/athena_base --split test --rows 10 --png corpus.png

Checksums are verified first; the command exits with code 1 if a file does not match. Data is read
in chunks, in any layout.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.common import (
    DatasetMetadata,
    byte_lengths,
    find_split,
    load_metadata,
    read_tokenizer,
    sha256_file,
    verify_array,
)
from dataset.corpus import SPLITS
from dataset.output.corpus_statistics import (
    Figures,
    SplitStatistics,
    count_real_tokens,
    measure,
    quantiles,
)
from dataset.output.corpus_views import draw, format_histogram, format_row
from utils.core.console import command_parser, run_cli, seed_number
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora
from utils.remote.cache import is_remote, local_path

WIDTH = 92
MOST_DOMAINS = 20
# Builder options that do not affect the contents.
HIDDEN_OPTIONS = {"output_dir", "overwrite", "input_files", "tokenizer_json", "workers"}


@dataclass
class Corpus:
    """The parts shared by all splits of a corpus."""

    path: str
    """The path or URL that the user passed; `root` is the local directory."""
    root: Path
    folders: dict[str, Path]
    metadata: dict[str, DatasetMetadata]
    report: dict[str, Any]
    tokenizer: Any = None
    """The corpus' `tokenizers.Tokenizer`; None if it has none."""
    tokenizer_kind: str = ""
    byte_lengths: np.ndarray | None = None

    @classmethod
    def open(cls, path: str, split: str) -> "Corpus":
        """Open a corpus, with one split or all of them."""
        root = Path(local_path(path))
        wanted = [split]
        if split == "all":  # if there are none, find_split reports the first as missing
            wanted = [name for name in SPLITS if (root / name).is_dir()] or ["train"]
        folders = {name: find_split(root, name) for name in wanted}
        metadata = {name: load_metadata(folder) for name, folder in folders.items()}
        corpus = cls(path, root, folders, metadata, _load_report(root / "build_report.json"))
        if (file := root / "tokenizer.json").is_file():
            corpus.tokenizer, description = read_tokenizer(file)
            corpus.tokenizer_kind = description.get("model", {}).get("type", "unknown kind")
            corpus.byte_lengths = byte_lengths(corpus.tokenizer, description)
        return corpus

    @property
    def any_metadata(self) -> DatasetMetadata:
        return next(iter(self.metadata.values()))

    @property
    def overlap(self) -> int:
        """Number of tokens shared by consecutive windows, according to the report."""
        stride, width = get_section(self.report, "options").get("stride"), self.any_metadata.seq_len
        return width - stride if isinstance(stride, int) and 0 < stride < width else 0

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def _load_report(path: Path) -> dict[str, Any]:
    """Load a build_report.json of any version; {} if there is none."""
    try:
        report = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}.") from error
    return report if isinstance(report, dict) else {}


def verify_files(corpus: Corpus) -> list[str]:
    """Return one message per file that does not match its checksum; reads every byte."""
    checks = [
        (folder / name, checksum)
        for split, folder in corpus.folders.items()
        for name, checksum in corpus.metadata[split].checksums.items()
    ]
    faults = []
    for path, checksum in tqdm(checks, desc="checksums", unit="file", disable=None, leave=False):
        try:
            verify_array(path, checksum)
        except UserError as error:
            faults.append(str(error))
    tokenizer, known = corpus.root / "tokenizer.json", corpus.report.get("tokenizer_sha256")
    if known and tokenizer.is_file() and sha256_file(tokenizer) != known:
        faults.append(f"{tokenizer} is not the tokenizer that the corpus was built with.")
    return faults


# --- text ---------------------------------------------------------------------------------------


def _field(name: str, text: str) -> str:
    return textwrap.fill(
        text, WIDTH, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16,
        break_on_hyphens=False,
    )  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def _table(rows: list[list[str]]) -> list[str]:
    """Format rows as a table: the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "    " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in rows
    ]


def describe(corpus: Corpus, verified: bool) -> list[str]:
    """Describe the properties shared by all splits."""
    meta = corpus.any_metadata
    lines = [corpus.path]
    if is_remote(corpus.path):
        lines.append(_field("copy", str(corpus.root)))
    lines += [_field("rows", f"{meta.seq_len:,} tokens, layout {meta.layout}")]
    if corpus.byte_lengths is None:
        lines.append(_field("tokenizer", f"none; {meta.vocab_size:,} token ids"))
    else:
        eos, pad = (
            f"no {name}" if index is None
            else f"{name} {index} {corpus.tokenizer.id_to_token(index) or '(no such token)'}"
            for name, index in (("eos", meta.eos_id), ("pad", meta.pad_id))
        )  # fmt: skip
        kind = f"{corpus.tokenizer_kind}, {len(corpus.byte_lengths):,} ids"
        lines.append(_field("tokenizer", f"{kind}; {eos}, {pad}"))
        if len(corpus.byte_lengths) != meta.vocab_size:
            lines.append(_field("", f"but the corpus was built for {meta.vocab_size:,} ids"))
    if meta.relabel_ids:
        lines.append(_field("relabelled", "ids {} to {}".format(*meta.relabel_ids)))
    files = sum(len(each.checksums) for each in corpus.metadata.values())
    found = f"{_count(files, 'file')} verified" if verified else "not verified"
    lines.append(_field("checksums", found if files else "none recorded"))
    return lines + describe_report(corpus.report)


def get_section(report: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a section of the report, with nested keys as `outer.inner`; {} if there is none."""

    def flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    found = report.get(name)
    return dict(flatten(found)) if isinstance(found, dict) else {}


def describe_report(report: dict[str, Any]) -> list[str]:
    """Describe the build report; every key is optional, and unknown keys are ignored."""

    def get_numbers(name: str) -> dict[str, float]:
        section = get_section(report, name)
        return {key: value for key, value in section.items() if isinstance(value, int | float)}

    lines = []
    inputs = [entry for entry in report.get("inputs") or [] if isinstance(entry, dict)]
    if inputs:
        size = sum(entry.get("bytes") or 0 for entry in inputs)
        lines.append(_field("built from", f"{_count(len(inputs), 'file')}, {size / 1e6:,.1f} MB"))
    options = [
        f"{name}={value}"
        for name, value in get_section(report, "options").items()
        if name not in HIDDEN_OPTIONS and value not in (None, False, [])
    ]
    if options:
        lines.append(_field("options", " ".join(options)))
    if skipped := get_numbers("skipped"):
        counted = [f"{n:,} {name.replace('_', ' ')}" for name, n in skipped.items() if n]
        lines.append(_field("skipped", ", ".join(counted) or "nothing"))
    counts = get_numbers("splits").items()
    unknown, lost = (
        sum(int(count) for name, count in counts if name.endswith(f".total.{ending}"))
        for ending in ("unknown_tokens", "lost_bytes")
    )
    if unknown or lost:
        text = f"{_count(unknown, 'unknown token')}, {_count(lost, 'byte')} of text without token"
        lines.append(_field("unencodable", text))
    if seconds := get_numbers("seconds"):
        lines.append(_field("seconds", ", ".join(f"{name} {v:.1f}" for name, v in seconds.items())))
    return lines


def describe_split(name: str, corpora: Corpora, statistics: SplitStatistics) -> list[str]:
    """Describe the statistics of one split."""
    total, meta = statistics.total, corpora.metadata
    lines = ["", f"{name}: {total.rows:,} rows, {total.tokens:,} tokens"]
    lines.append(_field("padding", f"{_share(total.padding)} of all positions"))
    positions = max(1, total.positions)
    lines.append(_field("scored", f"{_share(statistics.scored / positions)} of all positions"))
    occurring = int((statistics.token_ids > 0).sum())
    lines.append(_field("token ids", f"{occurring:,} of {meta.vocab_size:,} occur in the rows"))
    names, counts = corpora.identifiers, statistics.identifiers
    most = [f"{names[i]} ({counts[i]:,} rows)" for i in np.argsort(-counts, kind="stable")[:5]
            if counts[i]]  # fmt: skip
    dots = ", ..." if (counts > 0).sum() > len(most) else ""
    lines.append(_field("identifiers", f"{len(names):,}: {', '.join(most)}{dots}"))
    if list(corpora.set_rows()) != ["all"]:
        sets = {key: sum(map(len, ranges)) for key, ranges in corpora.set_rows().items()}
        lines.append(_field("sets", ", ".join(f"{key} {rows:,}" for key, rows in sets.items())))
    lines += ["", *_domains(statistics), "", *_lengths(statistics, meta)]
    if statistics.budgets:
        lines += [
            "",
            "  iteration budgets (ACT steps: rows)",
            *format_histogram(statistics.budgets),
        ]
    return lines


def _domains(statistics: SplitStatistics) -> list[str]:
    def cells(name: str, figures: Figures) -> list[str]:
        return [
            name if len(name) <= 24 else name[:23] + "…",
            f"{figures.rows:,}",
            _share(figures.rows / max(1, statistics.total.rows)),
            f"{figures.tokens:,}",
            f"{figures.documents:,}" if figures.documents else "-",
            f"{figures.bytes_per_token:.2f}" if figures.bytes_per_token else "-",
            _share(figures.padding),
        ]

    shown = list(statistics.domains.items())[:MOST_DOMAINS]
    head = ["domain", "rows", "share", "tokens", "documents", "bytes/token", "padding"]
    rows = [head, *(cells(name, figures) for name, figures in shown)]
    if len(statistics.domains) != 1:
        rows.append(cells("all", statistics.total))
    if (more := len(statistics.domains) - len(shown)) > 0:
        rows.insert(-1, [f"({more} more)", *[""] * 6])
    return _table(rows)


def _lengths(statistics: SplitStatistics, metadata: DatasetMetadata) -> list[str]:
    if metadata.eos_id is None:
        return ["  documents: this corpus has no eos; each row is a separate example"]
    lines = ["  documents (tokens, including eos)"]
    if statistics.lengths:
        mean = sum(n * count for n, count in statistics.lengths.items()) / (
            statistics.lengths.total()
        )
        names = ["shortest", "5 %", "25 %", "median", "75 %", "95 %", "longest", "mean"]
        values = [f"{value:,}" for value in [*quantiles(statistics.lengths), round(mean)]]
        widths = [max(map(len, pair)) for pair in zip(names, values, strict=True)]
        for cells in (names, values):
            lines.append("    " + "  ".join(map(str.rjust, cells, widths)))
    if statistics.unended:
        lines.append(
            f"    {statistics.unended:,} further runs of tokens are cut off at the end of a row; "
            "a continuation in another row counts as a separate run"
        )
    return lines


def describe_rows(
    corpus: Corpus, corpora: Corpora, count: int, generator: np.random.Generator
) -> list[str]:
    """Show some rows, drawn at random, in corpus order."""
    size = min(count, corpora.num_rows)
    chosen = np.sort(generator.choice(corpora.num_rows, size, replace=False))
    rows, meta = corpora.rows(chosen), corpora.metadata
    decode = corpus.decode if corpus.tokenizer else None
    lines = []
    for place, number in enumerate(chosen.tolist()):
        inputs, labels = rows["inputs"][place], rows["labels"][place]
        facts = [f"row {number:,}"]
        if corpora.domains:
            facts.append(corpora.domains[rows["domain_ids"][place]])
        if identifier := int(rows["puzzle_identifiers"][place]):
            facts.append(f"identifier {corpora.identifiers[identifier]}")
        if corpora.has_targets:
            facts.append(f"budget {rows['iteration_targets'][place]}")
        real = int(count_real_tokens(inputs[None], meta)[0])
        facts.append(f"{real:,} tokens, {int((labels >= 0).sum()):,} scored")
        lines += ["", textwrap.fill("; ".join(facts), WIDTH, initial_indent="  ")]
        lines += [f"    | {line}" for line in format_row(inputs, labels, meta, decode, WIDTH - 6)]
    if lines and decode:
        lines.insert(0, "\n  rows as text; ⟦ ⟧ encloses text that is not scored")
    return lines


def inspect(args: argparse.Namespace) -> None:
    """Print everything; raise SystemExit(1) if a file does not match its checksum."""
    if args.rows < 0:
        raise UserError(f"--rows is {args.rows}; it must be at least 0.")
    corpus = Corpus.open(args.path, args.split)
    if not args.no_verify and (faults := verify_files(corpus)):
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        print("use --no-verify to show the corpus anyway", file=sys.stderr)
        raise SystemExit(1)
    print("\n".join(describe(corpus, not args.no_verify)))
    lengths = corpus.byte_lengths
    if lengths is not None and len(lengths) != corpus.any_metadata.vocab_size:
        lengths = None
    generator = np.random.default_rng(args.seed)
    measured = {}
    for name, meta in corpus.metadata.items():
        if not meta.total_groups:
            print(f"\n{name}: no rows")
            continue
        corpora = Corpora([str(corpus.root)], name, verify=False)
        with tqdm(total=corpora.num_rows, desc=name, unit="row", disable=None, leave=False) as bar:
            measured[name] = measure(corpora, lengths, corpus.overlap, bar.update)
        print("\n".join(describe_split(name, corpora, measured[name])))
        print("\n".join(describe_rows(corpus, corpora, args.rows, generator)))
    if args.png:
        draw(measured, f"{corpus.root.name} ({', '.join(measured)})", args.png)
        print(f"\nwrote {args.png}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the module docstring."""
    parser = command_parser("python -m dataset.inspect_corpus", __doc__)
    add = parser.add_argument
    add("path", metavar="PATH", help="directory or URL of a corpus")
    add("--split", choices=(*SPLITS, "all"), default="all", help="(default: all)")
    add("--rows", type=int, default=3, metavar="N", help="rows to show per split (default: 3)")
    add("--seed", type=seed_number, default=0, help="selects which rows to show (default: 0)")
    add("--png", type=Path, metavar="FILE", help="also plot the statistics to this file")
    add("--no-verify", action="store_true", help="skip the verification of checksums")
    args = parser.parse_args(argv)
    run_cli(lambda: inspect(args), closed_status=0)


if __name__ == "__main__":
    main()
