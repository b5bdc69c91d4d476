"""Benchmark building and streaming corpora, as ratios to references measured in the same run.

    python scripts/benchmarks/data.py --input-files novels.jsonl.zst --tokenizer-json gpt2.json

Real text is needed, some tens of MB of it in documents. Every build is a process of its own; builds
and references take turns, and medians are compared, because machines are noisy. The table that is
printed at the end says what is asked of each figure. Seconds are those from the loading of the
tokenizer to the end, for builds and for the reference.
"""

import argparse
import dataclasses
import filecmp
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import orjson

from dataset.build_corpus_dataset import main as build_corpus
from dataset.input.document_reader import DocumentReader, ReadOptions
from dataset.input.documents import BATCH_BYTES
from dataset.input.text_sources import find_sources
from dataset.tokens.tokenization import TextTokenizer
from scripts.benchmarks.stream import stream_lines
from utils.core.console import command_parser, run_cli
from utils.core.errors import UserError

LIBRARIES = ("huggingface", "gigatoken")


@dataclasses.dataclass
class Row:
    """One line of the table; `holds`: whether the figure meets the target."""

    what: str
    figure: str
    asked: str
    holds: bool


class Bench:
    """The inputs, a scratch folder, and the processes to measure."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.tokenizer_json: Path = args.tokenizer_json
        self.rounds: int = args.rounds
        self.texts = self._texts(args.input_files, args.text_key)
        self.bytes = sum(len(text.encode()) for text in self.texts)
        self.once = self._write("once", 1)
        self.five = self._write("five", 5)

    def _texts(self, files: list[str], key: str) -> list[str]:
        reader = DocumentReader(ReadOptions("file", key))
        sources = [source for group in find_sources(files) for source in group]
        return [text for source in sources for text in reader.texts(source)]

    def _write(self, name: str, times: int) -> Path:
        """Write the texts repeatedly, each copy with its number, as plain JSON lines."""
        path = self.folder / f"{name}.jsonl"
        with open(path, "wb") as file:
            for copy in range(times):
                for text in self.texts:
                    file.write(orjson.dumps({"text": f"{copy}. {text}"}) + b"\n")
        return path

    def build(self, source: Path | list[Path], out: str, *options: str) -> dict[str, float]:
        """Build in a process of its own; return seconds, CPU-seconds, and peak memory in MB."""
        shutil.rmtree(self.folder / out, ignore_errors=True)
        return self.run("build", self.build_options(source, out, *options))

    def build_options(self, source: Path | list[Path], out: str, *options: str) -> list[str]:
        sources = source if isinstance(source, list) else [source]
        return [
            *("--tokenizer-json", str(self.tokenizer_json), "--output-dir", str(self.folder / out)),
            *("--input-files", *map(str, sources), *options),
        ]

    def tokenize(self, source: Path, library: str, workers: int) -> dict[str, float]:
        """Tokenize the same text from memory, in the same batches; return the same figures."""
        return self.run("tokenize", [str(self.tokenizer_json), str(source), library, str(workers)])

    def run(self, task: str, arguments: list[str]) -> dict[str, float]:
        command = [sys.executable, __file__, "--task", task, *arguments]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout.splitlines()[-1])


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Return seconds and CPU-seconds of a call, and this process' peak memory in MB."""
    import resource

    started, cpu = time.perf_counter(), time.process_time()
    work()
    return {
        "seconds": time.perf_counter() - started,
        "cpu": time.process_time() - cpu,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def tokenize_task(tokenizer_json: str, source: str, library: str, workers: str) -> dict[str, float]:
    """Load the tokenizer and tokenize, as a process of its own."""
    lines = Path(source).read_bytes().split(b"\n")[:-1]
    texts = [orjson.loads(line)["text"].encode() for line in lines]
    batches: list[list[bytes]] = [[]]
    size = 0
    for text in texts:
        batches[-1].append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
    decoded = [[text.decode() for text in batch] for batch in batches]

    def work() -> None:
        tokenizer = TextTokenizer(Path(tokenizer_json), workers=int(workers), library=library)
        if library == "gigatoken":
            encoder = tokenizer.encoder._fast._tokenizer  # type: ignore[attr-defined]
            for batch in filter(None, batches):
                encoder.encode_batch(batch, parallel=int(workers) > 1)
            return
        for batch_texts in decoded:
            tokenizer.tokenizer.encode_batch_fast(batch_texts, add_special_tokens=False)

    return measured(work)


def speed_rows(bench: Bench) -> Iterable[Row]:
    """Compare builds with pure tokenization."""
    runs: dict[str, list[dict[str, float]]] = {}
    for _ in range(bench.rounds):
        alternating = {
            "pure huggingface": bench.tokenize(bench.once, "huggingface", 2),
            "huggingface": bench.build(bench.once, "speed", "--workers", "2"),
        }
        fast = ("--tokenizer-library", "gigatoken", "--workers", "1")
        alternating |= {
            "pure gigatoken": bench.tokenize(bench.once, "gigatoken", 1),
            "gigatoken": bench.build(bench.once, "speed", *fast),
            "pure gigatoken, 5 times the input": bench.tokenize(bench.five, "gigatoken", 1),
            "gigatoken, 5 times the input": bench.build(bench.five, "speed", *fast),
        }
        for name, run in alternating.items():
            runs.setdefault(name, []).append(run)

    def rate(name: str, unit: str) -> float:
        size = bench.bytes / 1e6 * (5 if name.endswith("5 times the input") else 1)
        return size / statistics.median(run[unit] for run in runs[name])

    for library, threads, least in (
        ("huggingface", "2 threads", 0.90),
        ("gigatoken", "1 thread", 0.65),
        ("gigatoken, 5 times the input", "1 thread", 0.65),
    ):
        wall, pure = rate(library, "seconds"), rate(f"pure {library}", "seconds")
        yield Row(
            f"whole build / pure tokenization, {library}, {threads}",
            f"{wall / pure:.2f} ({wall:.1f} / {pure:.1f} MB/s)",
            f">= {least:.2f}",
            wall / pure >= least,
        )


def memory_rows(bench: Bench) -> Iterable[Row]:
    """Measure the peak memory of a build, and of one with five times the input."""
    for library in LIBRARIES:
        options = ("--tokenizer-library", library, "--workers", "2")
        small = bench.build(bench.once, "memory", *options)["peak"]
        large = bench.build(bench.five, "memory", *options)["peak"]
        yield Row(
            f"peak memory, 5 times the input, {library}",
            f"{large / small:.2f} x ({small:.0f} and {large:.0f} MB)",
            "<= 1.1 x, < 400 MB",
            large <= 1.1 * small and large < 400,
        )


def short_document_rows(bench: Bench) -> Iterable[Row]:
    """Build half a million documents of twelve words, and three million."""
    chooser = random.Random(1)
    words = " ".join(bench.texts[:5]).split()
    runs = []
    for number in (500_000, 3_000_000):
        path = bench.folder / f"short{number}.txt"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(
                f"{n} {' '.join(chooser.choices(words, k=12))}\n" for n in range(number)
            )
        runs.append(bench.build(path, "short", "--tokenizer-library", "gigatoken"))
    few, many = (run["peak"] for run in runs)
    seconds = runs[1]["seconds"]
    yield Row(
        "peak memory, 3 M documents of a line against 0.5 M, gigatoken",
        f"{few:.0f} and {many:.0f} MB ({seconds:.0f} s for 3 M)", "< 400 MB", many < 400,
    )  # fmt: skip


def long_document_rows(bench: Bench) -> Iterable[Row]:
    """Build one document of about 20 M tokens, and one of 5 M."""
    everything = " ".join(bench.texts)
    while len(everything) < 84e6:
        everything += everything
    for library in LIBRARIES:
        seconds = {}
        for millions in (5, 20):
            path = bench.folder / f"long{millions}.txt"
            path.write_text(everything[: int(millions * 4.1e6)], "utf-8")
            options = ("--documents", "file", "--train-ratio", "1", "--tokenizer-library", library)
            runs = [bench.build(path, "long", *options) for _ in range(1 if millions > 5 else 2)]
            seconds[millions] = min(run["seconds"] for run in runs)
        ratio = seconds[20] / seconds[5]
        yield Row(
            f"one document of 20 M tokens against 5 M, {library}",
            f"{ratio:.1f} x the time ({seconds[5]:.1f} and {seconds[20]:.1f} s)",
            "<= 5 x",
            ratio <= 5,
        )


def same_files(one: Path, other: Path) -> bool:
    """Return whether two corpora hold the same bytes, apart from the report, which has times."""
    names = [
        {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        for root in (one, other)
    ]
    ignored = {Path("build_report.json")}
    return names[0] == names[1] and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names[0] - ignored
    )


def identity_rows(bench: Bench, kills: int) -> Iterable[Row]:
    """Check for the same bytes from either library, any number of workers, and after kills."""
    options = {
        "hf": ("--workers", "2"),
        "hf1": ("--workers", "1"),
        "fast": ("--tokenizer-library", "gigatoken", "--workers", "2"),
    }
    for name, more in options.items():
        bench.build(bench.once, name, *more)
    for other, what in (
        ("fast", "gigatoken's corpus against Hugging Face's"),
        ("hf1", "1 worker against 2"),
    ):
        same = same_files(bench.folder / "hf", bench.folder / other)
        yield Row(what, "the same bytes" if same else "they differ", "byte-identical", same)
    killed = killed_build(bench, kills)
    same = same_files(bench.folder / "hf", bench.folder / "killed")
    figure = f"{'the same bytes' if same else 'they differ'} after {killed} kills"
    yield Row("killed with SIGKILL and resumed", figure, "byte-identical", same)


def killed_build(bench: Bench, kills: int) -> int:
    """Kill a build this many times at random moments, then let it finish; return the kills."""
    chooser = random.Random()
    options = ("--tokenizer-library", "gigatoken", "--resume", "--save-every", "0.05")
    command = [sys.executable, __file__, "--task", "build"]
    command += bench.build_options(bench.once, "killed", *options)
    done = 0
    while True:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            process.wait(chooser.uniform(0.5, 4) if done < kills else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            continue
        if process.returncode:
            raise UserError(f"a resumed build failed after {time.monotonic() - started:.1f} s")
        if done >= kills:
            return done
        shutil.rmtree(bench.folder / "killed")


def layout_rows(bench: Bench) -> Iterable[Row]:
    """Measure bytes per token of the layout `stream`, and padding of best-fit rows."""
    options = ("--tokenizer-library", "gigatoken")
    bench.build(bench.five, "stream", "--layout", "stream", *options)
    bench.build(bench.five, "npy", *options)
    folder = bench.folder / "stream" / "train"
    report = json.loads((bench.folder / "stream" / "build_report.json").read_bytes())
    tokens = report["splits"]["train"]["total"]["tokens"]
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield Row(
        "bytes per token, layout stream", f"{stored / tokens:.3f}", "<= 2.05",
        stored <= 2.05 * tokens,
    )  # fmt: skip
    bench.build(bench.once, "bestfit", "--pack", "bestfit", *options)
    report = json.loads((bench.folder / "bestfit" / "build_report.json").read_bytes())
    total = report["splits"]["train"]["total"]
    padding = 1 - total["stored_tokens"] / (total["rows"] * 2048)
    yield Row("padding of best-fit rows", f"{padding:.3%}", "<= 0.1 %", padding <= 0.001)


def streaming_rows(bench: Bench) -> Iterable[Row]:
    """Read what was built, in both layouts and with several domains."""
    options = ("--tokenizer-library", "gigatoken")
    for layout in ("npy", "stream"):
        bench.build(bench.five, f"read_{layout}", "--layout", layout, *options)
    lines = bench.once.read_bytes().splitlines(keepends=True)
    parts = []
    for number, share in enumerate((lines[::2], lines[1::4], lines[3::4])):
        parts.append(bench.folder / f"part{number}.jsonl")
        parts[-1].write_bytes(b"".join(share))
    bench.build(parts, "read_domains", "--layout", "stream", *options)
    npy, stream, domains = (bench.folder / f"read_{name}" for name in ("npy", "stream", "domains"))
    for line in stream_lines(npy, stream, domains, bench.rounds):
        yield Row(*line)


def print_table(rows: list[Row]) -> None:
    heads = Row("what", "figure", "asked", True)
    widths = [max(len(getattr(r, n)) for r in [heads, *rows]) for n in ("what", "figure", "asked")]

    def line(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    print()
    print(line(*(c.ljust(w) for c, w in zip(("what", "figure", "asked"), widths, strict=True)), ""))
    print(line(*("-" * width for width in widths), "---"))
    for row in rows:
        cells = (row.what, row.figure, row.asked)
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        print(line(*padded, "   " if row.holds else "NO "))


def benchmark(args: argparse.Namespace) -> None:
    """Measure everything that was asked for, and print one table."""
    parts: dict[str, Callable[[Bench], Iterable[Row]]] = {
        "speed": speed_rows,
        "memory": memory_rows,
        "short": short_document_rows,
        "long": long_document_rows,
        "identity": lambda bench: identity_rows(bench, args.kills),
        "layout": layout_rows,
        "stream": streaming_rows,
    }
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        bench = Bench(args, Path(folder))
        print(f"{len(bench.texts):,} documents, {bench.bytes / 1e6:.1f} MB of text, "
              f"{len(os.sched_getaffinity(0))} cores", flush=True)  # fmt: skip
        for part in args.parts or parts:
            for row in parts[part](bench):
                rows.append(row)
                print(f"{row.what}: {row.figure}", flush=True)
    print_table(rows)


def main() -> None:
    """Run the command; see the top of this file."""
    if sys.argv[1:2] == ["--task"]:
        task: Any = {
            "build": lambda *options: measured(lambda: build_corpus(options)),
            "tokenize": tokenize_task,
        }[sys.argv[2]]
        print(json.dumps(task(*sys.argv[3:])))
        return
    parser = command_parser("python scripts/benchmarks/data.py", __doc__)
    add = parser.add_argument
    add("--input-files", nargs="+", required=True, help="as the builder takes them")
    add("--text-key", default="text", help="(default: text)")
    add("--tokenizer-json", required=True, type=Path, help="of GPT-2's kind")
    add("--rounds", type=int, default=3, help="of timed runs that take turns (default: 3)")
    add("--kills", type=int, default=20, help="(default: 20)")
    add("--scratch", type=Path, help="where some GB may be written for a while (default: /tmp)")
    add("--parts", nargs="+", help="speed memory short long identity layout stream (default: all)")
    run_cli(lambda: benchmark(parser.parse_args()))


if __name__ == "__main__":
    main()
