"""Benchmark building and streaming corpora, as ratios to references measured in the same run.

    python scripts/benchmarks/data.py --input-files novels.jsonl.zst --tokenizer-json gpt2.json

Needs real text, tens of MB in documents. Every build runs in its own process; builds and references
alternate, and medians are compared, because machines are noisy. The table printed at the end has
the target of each figure. Times include loading the tokenizer, for builds and for the reference.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import orjson

from dataset.build_corpus_dataset import main as build_corpus
from dataset.input.document_reader import DocumentReader, ReadOptions
from dataset.input.documents import BATCH_BYTES
from dataset.input.text_sources import find_sources
from dataset.tokens.tokenization import TextTokenizer
from sequence_dataset import TrainStream
from utils.core.console import command_parser, run_cli
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora
from utils.corpus.row_reader import RowReader

LIBRARIES = ("huggingface", "gigatoken")
LAYOUTS = ("npy", "stream")
BATCH_ROWS = 64
COLD_BATCHES = (
    4  # before the cache is emptied again, because the readahead of a map would serve later batches
)


class Row(NamedTuple):
    """One row of the table. holds: whether the figure meets the target."""

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

    def build(self, source: Path, out: str, *options: str) -> dict[str, float]:
        """Build in a separate process; return seconds and peak memory in MB."""
        shutil.rmtree(self.folder / out, ignore_errors=True)
        given = [
            "--tokenizer-json",
            str(self.tokenizer_json),
            "--output-dir",
            str(self.folder / out),
        ]
        return self.run("build", [*given, "--input-files", str(source), *options])

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
    """Call `work`; return its seconds, and this process' peak memory in MB."""
    started = time.perf_counter()
    work()
    return {
        "seconds": time.perf_counter() - started,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def tokenize_task(tokenizer_json: str, source: str, library: str, workers: str) -> dict[str, float]:
    """Load the tokenizer and tokenize, in a separate process."""
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

    def rate(name: str) -> float:
        size = bench.bytes / 1e6 * (5 if name.endswith("5 times the input") else 1)
        return size / statistics.median(run["seconds"] for run in runs[name])

    for library, threads, least in (
        ("huggingface", "2 threads", 0.90),
        ("gigatoken", "1 thread", 0.65),
        ("gigatoken, 5 times the input", "1 thread", 0.65),
    ):
        wall, pure = rate(library), rate(f"pure {library}")
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
    """Build a document of about 20 M tokens, and another of 5 M."""
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


def layout_rows(bench: Bench) -> Iterable[Row]:
    """Measure bytes per token of the layout `stream`, and padding of best-fit rows."""
    options = ("--tokenizer-library", "gigatoken")
    bench.build(bench.five, "stream", "--layout", "stream", *options)
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


def cold_rows(bench: Bench) -> Iterable[Row]:
    """Read random batches from a cold disk, and the same rows of a plain int32 memory map."""
    reference = []
    for name in ("inputs", "labels"):
        reference.append(bench.folder / f"plain_{name}.npy")
        array = np.load(bench.folder / "npy/train/all" / f"{name}.npy", mmap_mode="r")
        np.save(reference[-1], array.astype(np.int32))
    plain = [np.load(path, mmap_mode="r") for path in reference]
    readers: dict[str, Callable[[np.ndarray], object]] = {
        "plain": lambda rows: [np.array(array[rows]) for array in plain],
    }
    files = {"plain": reference}
    for name in LAYOUTS:
        corpora = Corpora([str(bench.folder / name)], verify=False)
        readers[name] = RowReader(corpora, None, None, with_starts=True).read
        files[name] = sorted((bench.folder / name / "train" / "all").glob("*.npy"))
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    read: dict[str, list[int]] = {name: [] for name in readers}
    generator = np.random.default_rng()
    for _ in range(bench.rounds):
        rows = generator.integers(0, len(plain[0]), (COLD_BATCHES, BATCH_ROWS))
        for name, reader in readers.items():
            for path in files[name]:
                drop_from_cache(path)
            before, started = bytes_read(), time.perf_counter()
            for batch in rows:
                reader(batch)
            seconds = time.perf_counter() - started
            speeds[name].append(rows.size * plain[0].shape[1] / seconds / 1e6)
            read[name].append((bytes_read() - before) // COLD_BATCHES)
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    size = {name: statistics.median(values) / 1e6 for name, values in read.items()}
    for name in LAYOUTS:
        faster, less = speed[name] / speed["plain"], size["plain"] / max(size[name], 1e-9)
        yield Row(
            f"cold random rows against a plain int32 memory map, {name}",
            f"{faster:.1f} x tokens/s ({speed[name]:.1f} / {speed['plain']:.1f} M), "
            f"{less:.0f} x less read ({size[name]:.2f} / {size['plain']:.1f} MB a batch)",
            ">= 3 x, >= 20 x",
            faster >= 3 and less >= 20,
        )


def drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def bytes_read() -> int:
    """Return the bytes that this process has read from disks."""
    lines = Path("/proc/self/io").read_text("utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def warm_rows(bench: Bench) -> Iterable[Row]:
    """Read whole batches in one process, with the files in memory."""
    for layout in LAYOUTS:
        corpora = Corpora([str(bench.folder / layout)], verify=False)
        speeds = []
        for seed in range(bench.rounds + 1):  # the first one warms up
            stream = TrainStream(
                corpora, global_batch_size=BATCH_ROWS, seed=seed, epochs=1, feed="present"
            )
            halted, step, started = np.ones(BATCH_ROWS, bool), 0, time.perf_counter()
            while stream.next(step, halted) is not None:
                step += 1
            seconds = time.perf_counter() - started
            speeds.append(step * BATCH_ROWS * corpora.metadata.seq_len / seconds / 1e6)
        speed = statistics.median(speeds[1:])
        yield Row(
            f"warm stream, one process, {layout}", f"{speed:.0f} M tokens/s", ">= 100 M tokens/s",
            speed >= 100,
        )  # fmt: skip


def streaming_rows(bench: Bench) -> Iterable[Row]:
    """Read the corpora, in both layouts."""
    for layout in LAYOUTS:
        options = ("--layout", layout, "--tokenizer-library", "gigatoken")
        bench.build(bench.five, layout, *options)
    yield from cold_rows(bench)
    yield from warm_rows(bench)


def benchmark(args: argparse.Namespace) -> None:
    """Run the requested parts, and print one table."""
    parts: dict[str, Callable[[Bench], Iterable[Row]]] = {
        "speed": speed_rows,
        "memory": memory_rows,
        "short": short_document_rows,
        "long": long_document_rows,
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
    print("\n| what | figure | asked | |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row.what} | {row.figure} | {row.asked} | {'' if row.holds else 'NO'} |")


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
    add("--input-files", nargs="+", required=True, help="as for the builder")
    add("--text-key", default="text", help="(default: text)")
    add("--tokenizer-json", required=True, type=Path, help="a tokenizer.json like GPT-2's")
    add("--rounds", type=int, default=3, help="number of alternating timed runs (default: 3)")
    add("--scratch", type=Path, help="directory for some GB of temporary files (default: /tmp)")
    add("--parts", nargs="+", help="speed memory short long layout stream (default: all)")
    run_cli(lambda: benchmark(parser.parse_args()))


if __name__ == "__main__":
    main()
