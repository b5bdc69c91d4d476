"""Benchmark reading a corpus for training, and check that it resumes anywhere.

Part of data.py: each function measures one thing on corpora that were built before, and
yields lines of its table as (what, figure, asked, whether it holds).
"""

import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sequence_dataset import TrainStream
from utils.corpus.corpora import Corpora
from utils.corpus.row_reader import Batch, RowReader

Line = tuple[str, str, str, bool]

BATCH_ROWS = 64
COLD_BATCHES = (
    4  # before the cache is emptied again, because a map's readahead would serve later batches
)
DRAWS = 10_000


def stream_lines(npy: Path, stream: Path, domains: Path, rounds: int) -> Iterator[Line]:
    """Yield all lines, for a corpus in both layouts and one of several domains."""
    yield from cold_lines(npy, stream, rounds)
    for layout, folder in (("npy", npy), ("stream", stream)):
        yield from warm_lines(layout, folder, rounds)
    yield from resume_lines(stream)
    yield from epoch_lines(domains)


def cold_lines(npy: Path, stream: Path, rounds: int) -> Iterator[Line]:
    """Read random batches from a cold disk, and the same rows of a plain int32 memory map."""
    reference = _int32_copy(npy)
    plain = [np.load(path, mmap_mode="r") for path in reference]
    readers: dict[str, Callable[[np.ndarray], object]] = {
        "plain": lambda rows: [np.array(array[rows]) for array in plain],
    }
    files = {"plain": reference}
    for name, folder in (("npy", npy), ("stream", stream)):
        corpora = Corpora([str(folder)], verify=False)
        readers[name] = RowReader(corpora, None, None, with_starts=True).read
        files[name] = sorted((folder / "train" / "all").glob("*.npy"))
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    read: dict[str, list[int]] = {name: [] for name in readers}
    generator = np.random.default_rng()
    for _ in range(rounds):
        rows = generator.integers(0, len(plain[0]), (COLD_BATCHES, BATCH_ROWS))
        for name, reader in readers.items():
            for path in files[name]:
                _drop_from_cache(path)
            before, started = _bytes_read(), time.perf_counter()
            for batch in rows:
                reader(batch)
            seconds = time.perf_counter() - started
            speeds[name].append(rows.size * plain[0].shape[1] / seconds / 1e6)
            read[name].append((_bytes_read() - before) // COLD_BATCHES)
    speed = {name: statistics.median(values) for name, values in speeds.items()}
    size = {name: statistics.median(values) / 1e6 for name, values in read.items()}
    for name in ("npy", "stream"):
        faster, less = speed[name] / speed["plain"], size["plain"] / max(size[name], 1e-9)
        yield (
            f"cold random rows against a plain int32 memory map, {name}",
            f"{faster:.1f} x tokens/s ({speed[name]:.1f} / {speed['plain']:.1f} M), "
            f"{less:.0f} x less read ({size[name]:.2f} / {size['plain']:.1f} MB a batch)",
            ">= 3 x, >= 20 x",
            faster >= 3 and less >= 20,
        )


def _int32_copy(npy: Path) -> list[Path]:
    """Write the corpus' inputs and labels as plain int32 arrays; return their paths."""
    paths = []
    for name in ("inputs", "labels"):
        path = npy.parent / f"plain_{name}.npy"
        np.save(path, np.load(npy / "train/all" / f"{name}.npy", mmap_mode="r").astype(np.int32))
        paths.append(path)
    return paths


def _drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _bytes_read() -> int:
    """Return the bytes that this process has read from disks."""
    fields = dict(
        line.split(": ") for line in Path("/proc/self/io").read_text("utf-8").splitlines()
    )
    return int(fields["read_bytes"])


def warm_lines(layout: str, folder: Path, rounds: int) -> Iterator[Line]:
    """Read whole batches in one process, with the files in memory."""
    corpora = Corpora([str(folder)], verify=False)
    size = BATCH_ROWS
    speeds = []
    for _ in range(rounds + 1):  # the first one warms up
        seed = random.randrange(1 << 30)
        stream = TrainStream(corpora, global_batch_size=size, seed=seed, epochs=1, feed="present")
        halted, step, started = np.ones(size, bool), 0, time.perf_counter()
        while stream.next(step, halted) is not None:
            step += 1
        seconds = time.perf_counter() - started
        speeds.append(step * size * corpora.metadata.seq_len / seconds / 1e6)
    speed = statistics.median(speeds[1:])
    what = f"warm stream, one process, {layout}"
    yield what, f"{speed:.0f} M tokens/s", ">= 100 M tokens/s", speed >= 100


def _halting(step: int, size: int) -> np.ndarray:
    """Return flags of a model that halts slots at random; a pure function of the step."""
    return np.random.default_rng([7, step]).random(size) < (1.0 if step == 0 else 0.3)


def _global_batch(streams: list[TrainStream], step: int, size: int) -> Batch:
    """Return the parts of all ranks, joined."""
    parts = [(stream.next(step, _halting(step, size)) or [{}])[0] for stream in streams]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def resume_lines(folder: Path) -> Iterator[Line]:
    """Resume at random positions, with every world size and number of workers."""
    corpora, size, steps = Corpora([str(folder)], verify=False), 64, 120

    def streams(world: int, workers: int) -> list[TrainStream]:
        return [
            TrainStream(
                corpora, global_batch_size=size, seed=3, epochs=2, rank=rank, world_size=world,
                num_workers=workers,
            )
            for rank in range(world)
        ]  # fmt: skip

    cuts = sorted(random.sample(range(1, steps), 4))
    whole, states, batches = streams(1, 0), {}, {}
    for step in range(steps + 1):
        if step in cuts:
            states[step] = whole[0].state_dict()
        batch = _global_batch(whole, step, size)
        if step in cuts or step - 1 in cuts:
            batches[step] = batch
    same, seconds = True, []
    for world in (1, 2, 4, 8):
        for workers in (0, 1, 4):
            for cut in cuts:
                group = streams(world, workers)
                for stream in group:
                    started = time.perf_counter()
                    stream.load_state_dict(states[cut])
                    if workers == 0 and stream is group[0]:
                        first = stream.next(cut, _halting(cut, size))
                        seconds.append(time.perf_counter() - started)
                        assert first is not None
                        stream.load_state_dict(states[cut])
                for step in (cut, cut + 1):
                    found = _global_batch(group, step, size)
                    same &= all((found[k] == v).all() for k, v in batches[step].items())
                for stream in group:
                    stream.close()
    slowest = max(seconds) * 1e3
    yield (
        "resumed at random positions, worlds 1 2 4 8, workers 0 1 4",
        f"{'the same' if same else 'other'} global batches, {slowest:.1f} ms at most",
        "the same, < 50 ms",
        same and slowest < 50,
    )


def epoch_lines(folder: Path) -> Iterator[Line]:
    """Check an epoch of all rows, and the shares of weighted domains."""
    corpora, size = Corpora([str(folder)], verify=False), 64
    found: Counter[bytes] = Counter()
    stream = TrainStream(corpora, global_batch_size=size, seed=5, epochs=1)
    step, halted = 0, np.ones(size, bool)
    while (batches := stream.next(step, halted)) is not None:
        real = (batches[0]["labels"] >= 0).any(axis=1)
        found.update(row.tobytes() for row in batches[0]["inputs"][real])
        step += 1
    every: Counter[bytes] = Counter()
    for first in range(0, corpora.num_rows, 512):
        rows = corpora.rows(np.arange(first, min(first + 512, corpora.num_rows)))
        every.update(row.tobytes() for row in rows["inputs"])
    yield (
        "an epoch", f"{sum(found.values()):,} of {corpora.num_rows:,} rows, each once",
        "every row once", found == every,
    )  # fmt: skip

    weights = {name: random.random() + 0.05 for name in corpora.domains}
    stream = TrainStream(
        corpora, global_batch_size=100, seed=5, epochs=1 + 2 * DRAWS / corpora.num_groups,
        feed="present", domain_weights=weights,
    )  # fmt: skip
    counts = np.zeros(len(weights))
    for step in range(DRAWS // 100):
        (batch,) = stream.next(step, np.ones(100, bool)) or [{}]
        counts += np.bincount(batch["domain_ids"], minlength=len(weights))
    wanted = np.array(list(weights.values())) / sum(weights.values())
    worst = float(abs(counts / DRAWS - wanted).max())
    yield (
        f"share of {len(weights)} domains over {DRAWS:,} draws", f"off by {worst:.3%} at most",
        "<= 0.1 %", worst <= 0.001,
    )  # fmt: skip
