r"""Check that everything works on this machine, from text to a trained and evaluated tiny model.

    python scripts/smoke_test.py --run-training
    python scripts/smoke_test.py --run-training --dataset-name roneneldan/TinyStories

Takes about a minute on a CPU. Without --run-training the cost of the model is printed, but it is
not trained.
"""

import argparse
import ast
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.demo_corpus import find_plays
from scripts.plot_run import summary
from utils.config.values import assignment
from utils.core.atomic import write_result
from utils.core.console import command_parser, run_cli
from utils.core.errors import UserError
from utils.monitoring.run_log import RunMetrics

ROOT = Path(__file__).resolve().parents[1]
TEXT_BYTES = 300_000
"""Amount of text; more would only take longer."""
TRAINING = """
    arch=athena_trm_tiny global_batch_size=16 epochs=null max_steps=30 lr=2e-3 lr_warmup_steps=8
    log_interval=5 eval_max_batches=3 checkpoint_interval=null resume=none run_name=smoke
""".split()


def write_text(output_dir: Path, dataset_name: str | None) -> Path:
    """Write a JSON lines file of about TEXT_BYTES bytes, from the first available source."""
    sources = {
        "the demo corpus": plays,
        "the documentation of the Python standard library": standard_library,
    }
    if dataset_name is not None:
        sources = {f"the data set {dataset_name}": lambda: download(dataset_name)} | sources
    path = output_dir / "text.jsonl"
    for name, texts in sources.items():
        try:
            size = _write_lines(path, texts())
        except Unavailable as reason:
            print(f"{name} is not available ({reason}); trying the next source")
            continue
        print(f"text: {size:,} bytes of {name}, in {path}")
        return path
    raise UserError("this Python has no documentation in its standard library; use --dataset-name")


class Unavailable(Exception):
    """A source of text is not available; the message is the reason in a few words."""


def _write_lines(path: Path, texts: Iterator[str]) -> int:
    size = 0
    with (
        write_result(path, f"--output-dir {path.parent}") as part,
        part.open("w", encoding="utf-8") as file,
    ):
        for text in texts:
            if not text.strip():
                continue
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= TEXT_BYTES:
                break
        if not size:
            raise Unavailable("it contains no text")
    return size


def download(name: str) -> Iterator[str]:
    """Yield texts of a data set, NAME or NAME:CONFIGURATION, through the `datasets` library."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise Unavailable("the package datasets is not installed") from None
    path, _, configuration = name.partition(":")
    try:
        rows = iter(load_dataset(path, configuration or None, split="train", streaming=True))
        first = next(rows)
    except Exception as error:  # the library, the network or the data set may raise anything
        lines = str(error).strip().splitlines() or [""]
        raise Unavailable(f"{type(error).__name__}: {lines[0][:100]}") from None
    texts = [key for key, value in first.items() if isinstance(value, str)]
    if not texts:
        raise Unavailable("it has no text column")
    column = "text" if "text" in texts else texts[0]
    yield first[column]
    for row in rows:
        yield row[column] or ""


def plays() -> Iterator[str]:
    """Yield the paragraphs of the demo corpus."""
    try:
        files = find_plays()
    except UserError as error:
        raise Unavailable(str(error)) from None
    for path in files.values():
        yield from path.read_text(encoding="utf-8").split("\n\n")


def standard_library() -> Iterator[str]:
    """Yield docstrings of the standard library: English text that comes with Python."""
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def call(*command: str | Path) -> None:
    """Run one of the project's own commands in the project's folder, and print it."""
    words = [str(word) for word in command]
    print("+ python " + shlex.join(words), flush=True)
    status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if status:
        raise UserError(f"`python {shlex.join(words)}` ended with status {status}")


def run(args: argparse.Namespace) -> None:
    output: Path = args.output_dir.expanduser().resolve()
    text = write_text(output, args.dataset_name)
    tokenizer = args.tokenizer_json and args.tokenizer_json.expanduser().resolve()
    if tokenizer is None:
        tokenizer = output / "tokenizer.json"
        call("-m", "dataset.train_tokenizer", "--input-files", text, "--vocab-size", "512",
             "--output", tokenizer)  # fmt: skip
    corpus, folder = output / "corpus", output / "run"
    call("-m", "dataset.build_corpus_dataset", "--tokenizer-json", tokenizer, "--input-files", text,
         "--seq-len", "64", "--train-ratio", "0.9", "--min-iterations", "2", "--max-iterations",
         "8", "--output-dir", corpus, "--overwrite")  # fmt: skip
    places = assignment("data_paths", [corpus]), assignment("checkpoint_path", folder)
    options = [*places, *TRAINING]
    if not args.run_training:
        call("pretrain.py", *options, "dry_run=true")
        print(f"\nnot trained, because --run-training is not set; the corpus is in {corpus}")
        return
    shutil.rmtree(folder, ignore_errors=True)
    call("pretrain.py", *options)
    metrics = RunMetrics(folder)
    losses = metrics.series("train/lm_loss")[1]
    if metrics.headline is None or not losses or not all(map(math.isfinite, losses)):
        raise UserError(f"the run ended without a finite loss and an evaluation; see {folder}")
    if losses[-1] >= losses[0]:
        raise UserError(
            f"the loss did not fall ({losses[0]:.3f} to {losses[-1]:.3f}); see {folder}"
        )
    print(f"\neverything works: the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} nats")
    print(summary(metrics))
    print(f"corpus in {corpus}, checkpoints and metrics in {folder}; continue with\n"
          f"  python scripts/generate.py checkpoint={folder} prompt='The '\n"
          f"  python scripts/plot_run.py {folder}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    parser = command_parser("python scripts/smoke_test.py", __doc__)
    add = parser.add_argument
    add(
        "--run-training",
        action="store_true",
        help="train and evaluate the model, which takes seconds",
    )
    add("--dataset-name", metavar="NAME[:CONFIG]", help="data set to download (default: none)")
    add("--tokenizer-json", type=Path, metavar="FILE", help="(default: train a new one)")
    add("--output-dir", type=Path, default=Path("data/smoke"), help="(default: data/smoke)")
    args = parser.parse_args(argv)
    run_cli(lambda: run(args))


if __name__ == "__main__":
    main()
