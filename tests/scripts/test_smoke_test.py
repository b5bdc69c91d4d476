"""The smoke test finds a text wherever it runs, and goes through the real commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import smoke_test

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "smoke_test.py"), *arguments],
        capture_output=True, encoding="utf-8", **options,
    )  # fmt: skip


def texts_in(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_help():
    done = command("--help")
    assert done.returncode == 0
    for option in ("--run-training", "--dataset-name", "--tokenizer-json", "--output-dir"):
        assert option in done.stdout


@pytest.mark.slow
def test_without_training_it_plans(tmp_path):
    """From any folder, with nothing but what is installed."""
    done = command("--output-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "FLOPs per token" in done.stdout and "not trained" in done.stdout
    assert (tmp_path / "here" / "corpus" / "train" / "all" / "inputs.npy").is_file()
    assert not (tmp_path / "here" / "run").exists()


@pytest.mark.canary
def test_it_trains_and_evaluates(tmp_path):
    """The whole path as a user has it: tokenizer, corpus, training, evaluation."""
    done = command("--run-training", "--output-dir", str(tmp_path / "smoke"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_falls_back_to_the_standard_library(tmp_path, monkeypatch, capsys):
    def no_plays():
        raise smoke_test.UserError("the package is not installed")

    monkeypatch.setattr(smoke_test, "find_plays", no_plays)
    path = smoke_test.write_text(tmp_path, None)
    assert sum(map(len, texts_in(path))) > 100_000
    assert "the next source" in capsys.readouterr().out


def test_a_data_set_that_cannot_be_had_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    smoke_test.write_text(tmp_path, "some/data")
    out = capsys.readouterr().out
    assert "some/data" in out and "the package datasets is not installed" in out


@pytest.mark.parametrize(
    "rows, texts",
    [
        (
            [{"id": "7", "text": "a b"}, {"id": "8", "text": None}, {"id": "9", "text": "c"}],
            "a b|c",
        ),
        ([{"n": 1, "story": "x y"}], "x y"),
    ],
)
def test_a_data_set_is_read_from_its_text_column(tmp_path, monkeypatch, rows, texts):
    (tmp_path / "datasets.py").write_text(
        "def load_dataset(path, name, split, streaming):\n"
        "    assert (path, name, split, streaming) == ('some/data', 'small', 'train', True)\n"
        f"    return {rows!r}\n",
        "utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    path = smoke_test.write_text(tmp_path, "some/data:small")
    assert texts_in(path) == texts.split("|")
    sys.modules.pop("datasets", None)


@pytest.mark.slow
def test_a_failing_step_is_named(tmp_path, capfd):
    broken = tmp_path / "tok.json"
    broken.write_text("{}", "utf-8")
    with pytest.raises(SystemExit) as end:
        smoke_test.main(["--tokenizer-json", str(broken), "--output-dir", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "build_corpus_dataset" in capfd.readouterr().err.splitlines()[-1]
