"""Fixtures of the builders' tests: a small tokenizer, random texts, a way to run a command."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dataset import build_corpus_dataset
from dataset.common import load_metadata
from dataset.train_tokenizer import train_tokenizer

ARRAY_NAMES = (
    "inputs labels puzzle_identifiers puzzle_indices group_indices iteration_targets domain_ids"
).split()
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "über",
    "naïve",
    "jumps",
    "42",
    "1984",
    "over",
    "lazy",
    "犬",
    "dogs,",
    "and",
    "then;",
    "again!",
    "🙂",
]


def iteration_target(unique_ratio: float, min_iterations: int, max_iterations: int) -> int:
    return math.floor(min_iterations + unique_ratio * (max_iterations - min_iterations))


def random_text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


@pytest.fixture
def rng() -> random.Random:
    """Fresh every run; the seed is in the output of a test that fails."""
    seed = random.randrange(1 << 32)
    print(f"random seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = random.Random(1)
    tokenizer = train_tokenizer((random_text(texts, 50) for _ in range(100)), 300)
    path = tmp_path_factory.mktemp("tokenizer") / "tok.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def build(tokenizer_json: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run the corpus builder on files with more options; gives the corpus' folder."""

    def run(*files: Path | str, options: str = "", out: str = "corpus") -> Path:
        folder = tmp_path / out
        build_corpus_dataset.main(
            [
                *("--tokenizer-json", str(tokenizer_json), "--output-dir", str(folder)),
                *("--input-files", *map(str, files)),
                *options.split(),
            ]
        )
        return folder

    return run


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with exit code 2; gives its one line on stderr."""

    def run(command: Callable[[], object]) -> str:
        with pytest.raises(SystemExit) as stop:
            command()
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run


def read_split(corpus: Path, split: str) -> SimpleNamespace:
    """Arrays of a split by name, and `metadata`."""
    folder = corpus / split / "all"
    arrays = {name: np.load(folder / f"{name}.npy") for name in ARRAY_NAMES}
    return SimpleNamespace(metadata=load_metadata(folder), **arrays)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder except the report, which names the paths it was given."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "build_report.json"
    }
