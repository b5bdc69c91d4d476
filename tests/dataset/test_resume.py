"""Builds that are killed, and go on: the same bytes as if they had never stopped."""

import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataset import build_corpus_dataset
from tests.dataset.conftest import file_bytes, random_text, write_jsonl

KILLS = 20
# Batches of a few documents, saved after each: many moments at which something is half done.
RUN = """if True:
    import sys
    from dataset import build_corpus_dataset
    from dataset.input import documents
    from dataset.packing import windows
    documents.BATCH_BYTES = 3000
    windows.BLOCK_TOKENS = 500
    build_corpus_dataset.main(sys.argv[1:])
"""


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments, "--save-every", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        cwd=Path(build_corpus_dataset.__file__).parents[1],
    )


@pytest.fixture
def arguments(tmp_path: Path, tokenizer_json: Path, rng: random.Random):
    """Options of a build of two domains, one of them compressed, with copies and bad lines."""
    texts = [random_text(rng, rng.randrange(1, 400)) for _ in range(150)]
    write_jsonl(tmp_path / "a.jsonl", texts + texts[:20])
    with open(tmp_path / "a.jsonl", "a", encoding="utf-8") as file:
        file.write("no json\n")
    paragraphs = "\n\n".join(random_text(rng, 60) for _ in range(400))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(paragraphs.encode()))

    def options(out: str, *more: str) -> list[str]:
        return [
            *("--tokenizer-json", str(tokenizer_json), "--output-dir", str(tmp_path / out)),
            *("--input-files", str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt.gz")),
            *("--documents paragraph --max-bad-lines 1 --seq-len 64 --train-ratio 0.9".split()),
            *more,
        ]

    return options


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", ["", "--pack bestfit --layout stream", "--dedup near --stride 32"], ids=str
)
def test_killed_and_resumed_equals_never_stopped(arguments, tmp_path, rng, more):
    began = time.monotonic()
    whole = start(arguments("whole", *more.split()))
    assert whole.wait() == 0, whole.stderr.read()
    seconds = time.monotonic() - began
    kills = KILLS if not more else 5
    while kills:
        while True:
            build = start(arguments("cut", *more.split(), "--resume"))
            try:
                code = build.wait(rng.uniform(0.3, 1.05) * seconds if kills else None)
                assert code == 0, build.stderr.read()
                break
            except subprocess.TimeoutExpired:
                build.send_signal(signal.SIGKILL)
                build.wait()
                kills -= 1
                finished = tmp_path / "cut" / "build_report.json"
                assert not finished.exists() or file_bytes(tmp_path / "cut")
        assert file_bytes(tmp_path / "cut") == file_bytes(tmp_path / "whole")
        assert not list(tmp_path.glob(".cut*"))
        shutil.rmtree(tmp_path / "cut")


def stopped_build(arguments, tmp_path: Path) -> None:
    """Kills a build once it has saved something."""
    build = start(arguments("corpus"))
    while not (tmp_path / ".corpus.building/corpus/train/all/inputs.npy").exists():
        time.sleep(0.01)
    time.sleep(0.2)
    build.send_signal(signal.SIGKILL)
    assert build.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_what_must_not_change_before_resuming(arguments, tmp_path, fails):
    stopped_build(arguments, tmp_path)
    run = build_corpus_dataset.main
    line = fails(lambda: run(arguments("corpus")))
    assert "unfinished build" in line and "--resume" in line and "--overwrite" in line
    line = fails(lambda: run(arguments("corpus", "--resume", "--seed", "3")))
    assert "seed was 0, now 3" in line
    (tmp_path / "a.jsonl").touch()
    line = fails(lambda: run(arguments("corpus", "--resume")))
    assert "input files" in line and "a.jsonl" in line
    run(arguments("corpus", "--overwrite"))  # anew
    run(arguments("whole"))
    assert file_bytes(tmp_path / "corpus") == file_bytes(tmp_path / "whole")
    run(arguments("corpus", "--resume"))  # nothing to do is no error


def test_an_error_keeps_what_was_built(arguments, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("dataset.input.documents.BATCH_BYTES", 3000)
    good = (tmp_path / "b.txt.gz").read_bytes()
    (tmp_path / "b.txt.gz").write_bytes(good[:-50])
    damaged = arguments("corpus", "--save-every", "0")
    line = fails(lambda: build_corpus_dataset.main(damaged))
    assert "b.txt.gz is truncated" in line and "--resume" in line
    assert not (tmp_path / "corpus").exists()
    line = fails(lambda: build_corpus_dataset.main([*damaged, "--resume"]))
    assert "b.txt.gz is truncated" in line


def test_counts_of_skipped_documents_continue(arguments, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("dataset.input.documents.BATCH_BYTES", 3000)
    options = "--save-every 0 --quality word_count --min-chars 30".split()
    build_corpus_dataset.main(arguments("whole", *options))
    strict = arguments("cut", *options, "--max-bad-lines", "0")
    assert "continue with --resume" in fails(lambda: build_corpus_dataset.main(strict))
    build_corpus_dataset.main(arguments("cut", *options, "--resume"))
    skipped = [
        json.loads((tmp_path / name / "build_report.json").read_bytes())["skipped"]
        for name in ("whole", "cut")
    ]
    assert skipped[0] == skipped[1]
    kinds = ("duplicates", "documents_by_length", "bad_lines", "quality_word_count")
    assert all(skipped[0][kind] > 0 for kind in kinds)


@pytest.mark.slow
def test_two_builds_of_one_folder(arguments, tmp_path, fails):
    first = start(arguments("corpus"))
    while not (tmp_path / ".corpus.building/corpus/tokenizer.json").exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    try:
        line = fails(lambda: build_corpus_dataset.main(arguments("corpus", "--resume")))
        assert "another build is running" in line
    finally:
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0, first.stderr.read()
