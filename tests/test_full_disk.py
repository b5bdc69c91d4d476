"""Commands on a disk that is full, or where nothing can be written: one sentence, nothing left."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training_tools import ROOT

from dataset import inspect_corpus, train_tokenizer
from evaluators import loop
from scripts import demo_corpus, export_hf, plot_run, report, smoke_test
from utils.config.schema import LRFindConfig
from utils.core.console import run_cli
from utils.core.errors import UserError
from utils.training import lr_finder

Command = Callable[[Path], object]


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of so many bytes."""
    mounted = []

    def mount(size: int) -> Path:
        disk = tmp_path / f"disk{len(mounted)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, stderr=-3).returncode:
            pytest.skip("mounting a file system is not permitted here")
        mounted.append(disk)
        return disk

    yield mount
    for disk in mounted:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def commands(text_corpus, text_run, tmp_path) -> dict[str, Command]:
    """Commands by name, each called with the path to write."""
    texts = sorted(map(str, text_corpus.parent.glob("*.txt")))
    return {
        "train_tokenizer": lambda out: train_tokenizer.main(
            ["--input-files", *texts, "--vocab-size", "300", "--output", str(out / "tok.json")]
        ),
        "demo_corpus": lambda out: demo_corpus.main(["--output-dir", str(out / "demo")]),
        "inspect_corpus": lambda out: inspect_corpus.main(
            [str(text_corpus), "--png", str(out / "corpus.png")]
        ),
        "plot_run": lambda out: plot_run.main([str(text_run), "--output", str(out / "run.png")]),
        "report": lambda out: report.main([str(text_run), "--output", str(out / "run.html")]),
        "export hf": lambda out: export_hf.main([f"checkpoint={text_run}", f"output={out / 'hf'}"]),
        "smoke_test": lambda out: run_cli(lambda: smoke_test.write_text(out / "smoke", None)),
    }


NAMES = [
    "train_tokenizer",
    "demo_corpus",
    "smoke_test",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("inspect_corpus", "plot_run", "report", "export hf")),
]  # fmt: skip


def fails(command: Command, output: Path, capsys) -> str:
    """The sentence in which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(output)
    said = capsys.readouterr()
    assert end.value.code == 2 and "wrote" not in said.out
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said.err
    return lines[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_ends_in_one_sentence_and_leaves_nothing(name, commands, small_disk, capsys):
    disk = small_disk(4096)
    output = disk / "made" / "for it"
    message = fails(commands[name], output, capsys)
    assert str(output) in message and "No space left" in message
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_where_nothing_can_be_written_one_sentence_says_so(name, commands, tmp_path, capsys):
    (tmp_path / "file").write_text("kept", "utf-8")
    message = fails(commands[name], tmp_path / "file" / "below", capsys)
    assert str(tmp_path / "file" / "below") in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text("utf-8") == "kept"


@pytest.mark.parametrize(
    "name", ["train_tokenizer", pytest.param("plot_run", marks=pytest.mark.slow)]
)
def test_a_result_of_before_survives_a_full_disk(name, commands, small_disk, tmp_path, capsys):
    commands[name](tmp_path)
    (whole,) = [path for path in tmp_path.iterdir() if path.is_file()]
    disk = small_disk((whole.stat().st_size // 4096 + 2) * 4096)
    before = whole.read_bytes()
    (disk / whole.name).write_bytes(before)
    fails(commands[name], disk, capsys)
    assert [path.name for path in disk.iterdir()] == [whole.name]
    assert (disk / whole.name).read_bytes() == before


@pytest.mark.slow
def test_an_export_that_lacks_its_last_bytes_leaves_nothing(
    commands, small_disk, text_run, tmp_path, capsys
):
    """The weights come last, and other libraries write them."""
    commands["export hf"](tmp_path)
    files = list((tmp_path / "hf").iterdir())
    weights = tmp_path / "hf" / "model.safetensors"
    others = sum(path.stat().st_size // 4096 + 1 for path in files if path != weights) * 4096
    disk = small_disk(others + weights.stat().st_size // 2)
    message = fails(commands["export hf"], disk, capsys)
    assert str(disk / "hf") in message and "No space left" in message
    assert list(disk.iterdir()) == []


@pytest.mark.slow
def test_trm_s_file_is_whole_or_absent(puzzle_corpus, run_training, small_disk, capsys):
    options = "arch=trm arch.hidden_size=32 arch.num_heads=2 arch.puzzle_emb_len=2 max_steps=1"
    run = run_training(puzzle_corpus, "trained", *options.split(), "arch.halt_max_steps=1")
    disk = small_disk(8192)
    arguments = [f"checkpoint={run}", f"output={disk / 'new' / 'step_1'}", "format=trm"]
    message = fails(lambda _: export_hf.main(arguments), disk, capsys)
    assert str(disk / "new" / "step_1") in message
    assert list(disk.iterdir()) == []


def test_a_search_on_a_full_disk_ends_in_one_sentence(text_corpus, small_disk, capsys):
    pytest.importorskip("optuna")  # the script cannot be imported without it
    from scripts import sweep_optuna

    disk = small_disk(65536)
    arguments = [f"folder={disk / 's'}", f"data_paths=[{text_corpus}]", "lr=interval(0.1, 2)"]
    message = fails(lambda _: sweep_optuna.main(arguments), disk, capsys)
    assert f"folder={disk / 's'}" in message and "full" in message


def test_training_on_a_full_disk_ends_before_it_begins(text_corpus, run_training, small_disk):
    disk = small_disk(4096)
    with pytest.raises(UserError, match=r"checkpoint_path=.*config\.yaml.*No space left"):
        run_training(text_corpus, "unused", f"checkpoint_path={disk / 'run'}")
    assert not list(disk.rglob("*config.yaml*"))


# --- what training writes besides checkpoints: a warning, and the run continues -------------------


def test_a_learning_rate_is_found_though_its_picture_cannot_be_drawn(small_disk):
    rule = LRFindConfig()
    rates = [lr_finder.rate_at(step, rule) for step in range(1, rule.steps + 1)]
    losses = 3 - np.exp(-((np.linspace(-3, 3, len(rates)) - 1) ** 2))
    disk = small_disk(16384)
    log = "".join(
        f'{{"step": {i}, "train/lr": {rate}, "train/lm_loss": {loss}}}\n'
        for i, (rate, loss) in enumerate(zip(rates, losses, strict=True), 1)
    )
    (disk / "metrics.jsonl").write_text(log, "utf-8")
    said = lr_finder.conclude(disk, rule)
    assert "try lr=" in said and "lr_find.png" in said and "No space left" in said
    assert [path.name for path in disk.iterdir()] == ["metrics.jsonl"]


def test_predictions_are_whole_or_absent(small_disk, capsys):
    disk = small_disk(8192)
    loop.save_predictions({"logits": [torch.zeros(100_000)]}, disk / "step_1", rank=0)
    assert "predictions_rank0.pt" in capsys.readouterr().out
    assert list(disk.iterdir()) == []


# --- standard output ------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", [True, False])
def test_a_full_disk_behind_standard_output_ends_in_one_sentence(monkeypatch, capsys, flush):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as end:
            run_cli(lambda: print("text", flush=flush))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_reader_that_has_gone_ends_a_command_silently(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as end:
            run_cli(lambda: print("text", flush=True))
    assert end.value.code == 141 and capsys.readouterr().err == ""


def test_a_closed_standard_output_does_not_end_a_command(monkeypatch, capsys):
    def command() -> None:
        warnings.warn_explicit("a note", UserWarning, str(ROOT / "dataset" / "common.py"), 1)
        print("text")

    monkeypatch.setattr(sys, "stdout", None)
    run_cli(command)
    assert capsys.readouterr().err == ""
