"""Builds that meet a full disk, damage, a crash between two renames, or another build."""

import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dataset import build_corpus_dataset
from tests.dataset.conftest import file_bytes, random_text, write_jsonl

# Kills itself right after the rename that is named by how many there were before it.
KILLED_AFTER_RENAME = """if True:
    import os, signal, sys
    from dataset import build_corpus_dataset
    renames, rename = int(sys.argv.pop(1)), os.rename
    def killed(*paths):
        global renames
        rename(*paths)
        renames -= 1
        if renames < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    os.rename = killed
    build_corpus_dataset.main(sys.argv[1:])
"""
BUILD = """if True:
    import sys
    from dataset import build_corpus_dataset
    from dataset.input import documents
    documents.BATCH_BYTES = 3000
    build_corpus_dataset.main(sys.argv[1:])
"""


def run(code: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    root = Path(build_corpus_dataset.__file__).parents[1]
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=root, **options)


@pytest.fixture
def arguments(tmp_path: Path, tokenizer_json: Path, rng: random.Random):
    source = write_jsonl(
        tmp_path / "a.jsonl", [random_text(rng, rng.randrange(1, 400)) for _ in range(150)]
    )

    def options(out: str, *more: str) -> list[str]:
        return [
            *("--tokenizer-json", str(tokenizer_json), "--output-dir", str(tmp_path / out)),
            *("--input-files", str(source), *"--seq-len 64 --save-every 0".split(), *more),
        ]

    return options


@pytest.fixture
def whole(arguments, tmp_path) -> dict[str, bytes]:
    build_corpus_dataset.main(arguments("whole"))
    return file_bytes(tmp_path / "whole")


def left_beside(corpus: Path) -> list[Path]:
    return list(corpus.parent.glob(f".{corpus.name}*"))


@pytest.mark.slow
@pytest.mark.parametrize("then", ["--resume", "", "--overwrite", "--resume --overwrite"])
@pytest.mark.parametrize("deleted", [False, True])
def test_killed_after_the_last_rename(arguments, tmp_path, whole, fails, then, deleted):
    corpus = tmp_path / "corpus"
    assert run(KILLED_AFTER_RENAME, "0", *arguments("corpus")).returncode == -signal.SIGKILL
    assert file_bytes(corpus) == whole and left_beside(corpus)
    if deleted:
        shutil.rmtree(corpus)
    if not then and not deleted:
        assert "finished corpus" in fails(lambda: build_corpus_dataset.main(arguments("corpus")))
        return
    build_corpus_dataset.main(arguments("corpus", *then.split()))
    assert file_bytes(corpus) == whole and not left_beside(corpus)


@pytest.mark.slow
@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_replacing_a_corpus(arguments, tmp_path, whole, renames):
    corpus = tmp_path / "corpus"
    build_corpus_dataset.main(arguments("corpus", "--seed", "5"))
    killed = run(KILLED_AFTER_RENAME, str(renames), *arguments("corpus", "--overwrite"))
    assert killed.returncode == -signal.SIGKILL and left_beside(corpus)
    build_corpus_dataset.main(arguments("corpus", "--overwrite", "--resume"))
    assert file_bytes(corpus) == whole and not left_beside(corpus)


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "--layout stream --pack bestfit", "--dedup near"])
def test_a_full_disk_ends_in_a_sentence_and_loses_nothing(arguments, tmp_path, more):
    build_corpus_dataset.main(arguments("whole", *more.split()))
    wanted = file_bytes(tmp_path / "whole")
    sizes = sorted(map(len, wanted.values()))
    options, kept = more.split(), 0
    for limit in (sizes[-1] // 4, sizes[-1] // 2, sizes[-1] - 1):

        def full(limit=limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        done = run(BUILD, *arguments("cut", *options, "--resume"), preexec_fn=full)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert f"cannot write to {tmp_path}" in lines[0] or "cannot write /" in lines[0]
        kept += "continue with --resume" in lines[0]
    assert kept
    build_corpus_dataset.main(arguments("cut", *options, "--resume"))
    assert file_bytes(tmp_path / "cut") == wanted


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["shorter", "missing", "no database"])
def test_a_damaged_unfinished_build_is_named(arguments, tmp_path, whole, fails, damage):
    code = BUILD.replace("3000", "3000; build_corpus_dataset.Build.finish = lambda *a: 1 / 0")
    assert "ZeroDivisionError" in run(code, *arguments("corpus")).stderr
    building = tmp_path / ".corpus.building"
    path = building / (
        "journal.sqlite" if damage == "no database" else "corpus/train/all/inputs.npy"
    )
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"nothing" * 10)
    line = fails(lambda: build_corpus_dataset.main(arguments("corpus", "--resume")))
    assert str(path) in line and "with --overwrite" in line
    assert "continue with --resume" not in line
    build_corpus_dataset.main(arguments("corpus", "--overwrite"))
    assert file_bytes(tmp_path / "corpus") == whole


@pytest.mark.slow
def test_builds_that_begin_at_once(arguments, tmp_path, whole):
    root = Path(build_corpus_dataset.__file__).parents[1]
    builds = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, *arguments("corpus")],
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=root,
        )
        for _ in range(4)
    ]
    errors = [build.communicate()[1].strip() for build in builds]
    assert [build.returncode for build in builds].count(0) == 1, errors
    for build, error in zip(builds, errors, strict=True):
        known = ("another build is running", "an unfinished build", "contains a finished corpus")
        assert build.returncode == 0 or any(words in error for words in known), error
    assert file_bytes(tmp_path / "corpus") == whole


@pytest.mark.slow
def test_a_remote_input_that_changed_is_not_gone_on_with(arguments, tmp_path, fails, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setenv("ATHENA_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "a.jsonl"
    options = [f"file://{o}" if o == str(source) else o for o in arguments("corpus")]
    code = BUILD.replace("3000", "3000; build_corpus_dataset.Build.finish = lambda *a: 1 / 0")
    assert "ZeroDivisionError" in run(code, *options).stderr
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join(reversed(lines)))  # of the same size
    line = fails(lambda: build_corpus_dataset.main([*options, "--resume"]))
    assert "--overwrite" in line and "input files" in line


@pytest.mark.slow
def test_a_cleaning_up_that_was_killed_is_finished(arguments, tmp_path):
    """The corpus is there; of the folder that it was built in, some of the journal's files are."""
    assert run(BUILD, *arguments("corpus")).returncode == 0
    left = tmp_path / ".corpus.building"
    left.mkdir()
    (left / "journal.sqlite-wal").touch()
    done = run(BUILD, *arguments("corpus", "--resume"))
    assert done.returncode == 0, done.stderr
    assert not left.exists()
