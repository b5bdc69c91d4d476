r"""Build a corpus for language modelling from text files.

    python -m dataset.build_corpus_dataset --tokenizer-json tok.json \
        --input-files c4.jsonl.zst github.txt.gz --output-dir data/athena_base \
        --seq-len 2048 --stride 2048 --format jsonl --text-key text

Documents are tokenized, terminated with eos, and packed into windows that never mix domains or
splits. A document's split is a keyed hash of its text, so it depends only on the seed. A build that
was killed can be continued with --resume and produces the same bytes.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
from tqdm import tqdm

from dataset.common import FORMAT_VERSION, sha256_file
from dataset.corpus import (
    CorpusSplit,
    DocumentRouter,
    add_layout_option,
    check_iterations,
    finish_corpus,
    open_splits,
    print_summary,
)
from dataset.filters.quality import PRESETS, RULES, QualityFilter, select_rules
from dataset.input.document_reader import ReadOptions
from dataset.input.documents import Batch, DocumentFeed
from dataset.input.inputs import plan_inputs
from dataset.input.text_sources import add_input_options
from dataset.output.array_writer import write_json
from dataset.output.corpus_folder import (
    BuildWorkspace,
    add_output_options,
    check_output_dir,
    clear_leftovers,
    create_corpus,
    is_corpus,
    resolve_output,
)
from dataset.output.spool import DocumentSpool
from dataset.pipeline import PACKERS, PackedCorpus, Stopwatch, tokenize_all
from dataset.tokens.tokenization import TextTokenizer, add_tokenizer_options
from utils.core.console import command_parser, run_cli, seed_number
from utils.core.errors import UserError
from utils.core.plugins import plugin_modules, use_plugins

DEFAULT_TRAIN_RATIO = 0.995
MANY_DOMAINS, MANY_ROWS = 16, 8  # more domains with fewer rows each are probably a mistake
# Options that may change between a build and its --resume because the result does not depend on
# them.
FREE_OPTIONS = set(
    "workers tokenizer_library max_bad_lines overwrite resume plugins save_every".split()
)


class Build:
    """One run of the command, from its arguments to a finished corpus."""

    def __init__(self, args: argparse.Namespace, tokenizer: TextTokenizer) -> None:
        self.args = args
        self.tokenizer = tokenizer
        self.inputs, self.domains = plan_inputs(args)
        self.trained = {entry.domain for entry in self.inputs if not entry.held_out}
        self.quality = QualityFilter(args.quality)
        self.watch = Stopwatch()
        default = 1.0 if args.test_files else DEFAULT_TRAIN_RATIO
        self.train_ratio = default if args.train_ratio is None else args.train_ratio

    def identity(self) -> dict[str, Any]:
        """Return everything that must be unchanged for a build to be resumed."""
        pipes = [str(entry.source) for entry in self.inputs if entry.source.is_pipe]
        if pipes and self.args.resume:
            raise UserError(
                f"--resume: {pipes[0]} cannot be read again from the start; write it to a file "
                "first."
            )
        options = {n: str(v) for n, v in vars(self.args).items() if n not in FREE_OPTIONS}
        files = [
            (str(entry.source), entry.source.size, entry.source.version) for entry in self.inputs
        ]
        named = (self.args.format or "").partition("@")[0]
        if (file := plugin_modules().get(named)) is not None:
            options["format's source"] = sha256_file(file)
        # Only for these tokenizers, so that other builds begun by older versions can be resumed.
        if not self.tokenizer.lossless:
            options["scored bytes"] = "by row"
        if self.args.dedup == "near":
            options["keys of near duplicates"] = "without a header"
        return {
            **options,
            "tokenizer": sha256_file(self.args.tokenizer_json),
            "tokenizers version": tokenizers.__version__,
            "format version": FORMAT_VERSION,
            "input files (name, bytes, version)": str(files),
        }

    def run(self, workspace: BuildWorkspace) -> tuple[dict[str, CorpusSplit], dict[str, int]]:
        """Build in the given workspace; return the splits and the counts of skipped documents."""
        args, folder, state = self.args, workspace.folder, workspace.state or {}
        folder.mkdir(exist_ok=True)
        self.tokenizer.save(folder / "tokenizer.json")
        self.watch.seconds = state.get("seconds", {})
        states = state.get("packed", {}).get("splits")
        splits = open_splits(args, folder, self.tokenizer, args.seq_len, self.trained, states)
        packed = PackedCorpus(
            self.tokenizer,
            splits,
            pack=args.pack,
            seq_len=args.seq_len,
            stride=args.stride,
            iterations=(args.min_iterations, args.max_iterations),
        )
        if "packed" in state:
            packed.load_state_dict(state["packed"])
        spool = None
        if self.args.dedup == "near":
            spool_folder = folder.parent / "spool"
            dtype = self.tokenizer.token_dtype
            spool = DocumentSpool(spool_folder, dtype, args.seed, state.get("spool"))
        size = sum(entry.source.size for entry in self.inputs)
        with CorpusBar(size, **state.get("shown", {})) as bar:
            feed = DocumentFeed(
                self.inputs,
                ReadOptions(args.documents, args.text_key, args.max_bad_lines),
                (args.min_chars, args.max_chars),
                self.quality,
                DocumentRouter(
                    args.seed, self.train_ratio, args.dedup != "none", workspace.journal
                ),
                bar.update,
            )
            if "feed" in state:
                feed.load_state_dict(state["feed"])

            def add(batch: Batch, ids: np.ndarray, counts: np.ndarray) -> None:
                (spool or packed).add(batch, ids, counts)
                bar.show(batch, counts)

            def save() -> None:
                """Commit everything needed to resume the build."""
                workspace.journal.commit(
                    state={
                        "feed": feed.state_dict(),
                        "packed": packed.state_dict(),
                        "spool": spool and spool.state_dict(),
                        "seconds": self.watch.seconds,
                        "shown": bar.shown,
                    }
                )

            tokenize_all(feed, self.tokenizer.encoder, add, self.watch, save, args.save_every)
        skipped = feed.count_skipped()
        with self.watch("packing and writing"):
            if spool is not None:
                save()  # if packing is interrupted it restarts from here; it is the cheaper part
                for batch, ids, counts in spool.batches():
                    packed.add(batch, ids, counts)
                skipped["near_duplicates"] = spool.skipped
            packed.finish()
        skipped["documents_without_tokens"] = packed.empty_documents
        return splits, skipped

    def finish(
        self, workspace: BuildWorkspace, splits: dict[str, CorpusSplit], skipped: dict[str, int]
    ) -> None:
        """Close the files and write the metadata and the build report."""
        if not splits["train"].writer.rows and self.train_ratio > 0:
            raise UserError(
                "no documents remain for the training split; pass fewer --test-files, raise "
                f"--train-ratio (now {self.train_ratio}), or filter less."
            )
        report = {
            "train_ratio": self.train_ratio,
            "inputs": [
                {
                    "file": str(entry.source),
                    "bytes": entry.source.size,
                    "domain": self.domains[entry.domain],
                    "held_out": entry.held_out,
                }
                for entry in self.inputs
            ],
            "skipped": skipped,
            "quality_rules": {name: RULES[name] for name in self.quality.enabled},
            "tokenizer_library": self.args.tokenizer_library,
        }
        with self.watch("checksums"):
            report = finish_corpus(
                self.args, workspace.folder, splits, self.tokenizer, self.domains,
                self.args.seq_len, report,
            )  # fmt: skip
        report["seconds"] = {n: round(s, 3) for n, s in self.watch.seconds.items()}
        write_json(workspace.folder / "build_report.json", report)

    def print_notes(self, train: CorpusSplit) -> None:
        """Print notes about results that may be unintended."""
        args, places = self.args, train.total.rows * self.args.seq_len
        if missing := [self.domains[d] for d in sorted(self.trained) if not train.count(d).rows]:
            print(f"note: no training rows are of domain {', '.join(missing[:9])}: all of its "
                  "documents were skipped or are in the test split")  # fmt: skip
        rows = train.total.rows
        if len(self.trained) > MANY_DOMAINS and rows < MANY_ROWS * len(self.trained):
            print(f"note: {len(self.trained):,} domains, one per input file name, share {rows:,} "
                  "training rows; use --domain-labels to give all files of an input one "
                  "domain")  # fmt: skip
        elif train.total.stored_tokens < places / 2:
            print(f"note: {1 - train.total.stored_tokens / places:.0%} of the training data is "
                  f"padding; lower --seq-len (now {args.seq_len})")  # fmt: skip
        if args.documents == "line" and any(e.source.format == "text" for e in self.inputs):
            print("note: each line of the text files was treated as a separate document, and "
                  "repeated lines as duplicates; --documents file keeps files whole")  # fmt: skip


class CorpusBar(tqdm):
    """A progress bar over input bytes that also shows documents, tokens and throughput."""

    def __init__(self, total: int, documents: int = 0, tokens: int = 0) -> None:
        # tqdm's own rate would count bytes on disk, which may be compressed.
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        super().__init__(
            total=total or None, unit="B", unit_scale=True, disable=None, desc="building",
            dynamic_ncols=True, bar_format=layout if total else None,
        )  # fmt: skip
        self.shown = {"documents": documents, "tokens": tokens}
        self._begun, self._text_bytes = time.monotonic(), 0

    def show(self, batch: Batch, counts: np.ndarray) -> None:
        """Add a packed batch to the displayed counts."""
        self.shown["documents"] += len(batch)
        self.shown["tokens"] += int(counts.sum())
        self._text_bytes += batch.size
        rate = self._text_bytes / 1e6 / max(time.monotonic() - self._begun, 1e-9)
        self.set_postfix_str(
            f"{self.shown['documents']:,} documents, {self.shown['tokens'] / 1e6:,.1f}M tokens, "
            f"{rate:.1f} MB/s",
            refresh=False,
        )


def check_options(args: argparse.Namespace) -> None:
    """Check the numeric options, before any file is opened."""
    if args.seq_len < 1:
        raise UserError(f"--seq-len is {args.seq_len}; it must be at least 1.")
    args.stride = args.seq_len if args.stride is None else args.stride
    if not 1 <= args.stride <= args.seq_len:
        raise UserError(
            f"--stride is {args.stride}; it must be in 1..{args.seq_len} (--seq-len), because a "
            "larger stride would skip tokens."
        )
    if args.pack == "bestfit" and args.stride != args.seq_len:
        raise UserError(
            f"--stride {args.stride} cannot be combined with --pack bestfit, whose rows do not "
            "overlap; omit --stride."
        )
    if args.train_ratio is not None and not 0 <= args.train_ratio <= 1:
        raise UserError(f"--train-ratio is {args.train_ratio}; it must be between 0 and 1.")
    check_iterations(args)
    for name in ("min_chars", "save_every", "max_bad_lines"):
        if not (value := getattr(args, name)) >= 0:  # nan, too
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 0.")
    if args.max_chars is not None and args.max_chars < max(1, args.min_chars):
        raise UserError(
            f"--min-chars {args.min_chars} and --max-chars {args.max_chars} exclude every "
            "document; raise --max-chars."
        )
    select_rules(args.quality)


def build(args: argparse.Namespace) -> None:
    """Build the corpus that the command line describes, atomically."""
    started = time.perf_counter()
    check_options(args)
    use_plugins(args.plugins)
    target = resolve_output(args.output_dir)
    if args.resume and not args.overwrite and target.is_dir() and is_corpus(target):
        clear_leftovers(target)
        print(f"{args.output_dir} is already finished; nothing to resume")
        return
    check_output_dir(target, args.overwrite)
    tokenizer = TextTokenizer(
        args.tokenizer_json, args.eos_token, args.pad_token, args.workers, args.tokenizer_library
    )
    job = Build(args, tokenizer)
    with create_corpus(
        args.output_dir, args.overwrite, resume=args.resume, identity=job.identity()
    ) as workspace:
        if workspace.finished:
            print(f"{args.output_dir} was already built; moved it into place")
            return
        splits, skipped = job.run(workspace)
        job.finish(workspace, splits, skipped)
    print_summary(args.output_dir, splits, skipped, time.perf_counter() - started)
    job.print_notes(splits["train"])


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("python -m dataset.build_corpus_dataset", __doc__)
    add_output_options(parser)
    add_input_options(parser)
    add_tokenizer_options(parser)
    add_layout_option(parser)
    add = parser.add_argument
    add("--resume", action="store_true", help="resume a build that was killed or failed")
    add(
        "--save-every", type=float, default=10.0, metavar="SECONDS",
        help="interval between the points that --resume can start from (default: 10)",
    )  # fmt: skip
    add("--seq-len", type=int, default=2048, help="tokens per row (default: 2048)")
    add("--stride", type=int, help="tokens between window starts (default: --seq-len)")
    add(
        "--pack", choices=tuple(PACKERS), default="concat",
        help="concat: cut documents at row ends; bestfit: keep documents that fit into a row whole "
        "(default: concat)",
    )  # fmt: skip
    add("--train-ratio", type=float, help=f"(default: {DEFAULT_TRAIN_RATIO}; 1 with --test-files)")
    add(
        "--test-files", nargs="+", action="extend", metavar="FILE",
        help="inputs, or additional files, to hold out entirely for the test split",
    )  # fmt: skip
    add("--seed", type=seed_number, default=0, help="selects the test documents (default: 0)")
    add(
        "--min-iterations", type=int, default=4, metavar="N",
        help="ACT-step budget of a row that repeats a single token; budgets scale with the share "
        "of distinct tokens in a row (default: 4)",
    )  # fmt: skip
    add(
        "--max-iterations", type=int, default=48, metavar="N",
        help="ACT-step budget of a row without repeated tokens; training caps budgets at "
        "arch.halt_max_steps (default: 48)",
    )  # fmt: skip
    add(
        "--domain-labels", nargs="+", action="extend",
        help="domain names, one per --input-files argument or one per file (default: file names)",
    )  # fmt: skip
    add(
        "--identifiers", choices=("none", "domain", "sequence"), default="domain",
        help="what each learned identifier embedding represents (default: domain)",
    )  # fmt: skip
    add(
        "--dedup", choices=("exact", "near", "none"), default="exact",
        help="skip exact duplicates, or also near duplicates (MinHash over token 5-grams) "
        "(default: exact)",
    )  # fmt: skip
    add("--min-chars", type=int, default=0, help="skip shorter documents (default: 0)")
    add("--max-chars", type=int, help="skip longer documents (default: no limit)")
    add(
        "--quality", nargs="+", action="extend", default=[], metavar="RULE",
        help=f"skip documents that violate a Gopher rule: a preset ({', '.join(PRESETS)}), a rule "
        f"({', '.join(RULES)}), or no_<rule> to disable one (default: none)",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the module docstring."""
    run_cli(lambda: build(parse_args(argv)))


if __name__ == "__main__":
    main()
