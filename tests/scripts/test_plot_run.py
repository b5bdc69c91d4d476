"""Curves: what a run logged, each step once, as a picture and as figures."""

from pathlib import Path

import pytest
from training_tools import write_run

from scripts import plot_run


def training(step: int, loss: float | None = 1.0) -> dict:
    return {
        "step": step,
        "train/lm_loss": loss,
        "train/tokens": 100 * step,
        "train/lr": 1e-3,
        "train/tokens_per_s": 1000.0,
    }


def evaluation(step: int, bits: float, *by_step: float) -> dict:
    curve = {f"eval/text/step_{k}/bits_per_byte": v for k, v in enumerate(by_step, 1)}
    return {
        "step": step,
        "eval/all/lm_loss": 5.0,
        "eval/text/bits_per_byte": bits,
    } | curve


def size_of(png: Path) -> tuple[int, int]:
    header = png.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


def test_picture_and_figures(tmp_path, capsys):
    one = write_run(tmp_path / "one", training(10), training(20), evaluation(20, 2.5, 2.75, 2.5))
    two = write_run(
        tmp_path / "two", training(10, None), training(20)
    )  # a loss that was not finite
    plot_run.main([str(one), str(two)])
    text = capsys.readouterr().out
    assert "2.5000" in text and "1: 2.7500  2: 2.5000" in text and "no evaluation yet" in text
    width, height = size_of(one / "curves.png")
    assert width > 1000 and height > 500


def test_a_run_of_puzzles_is_judged_by_exact_solutions(tmp_path):
    record = {"step": 5, "eval/all/exact_accuracy": 0.25, "eval/all/lm_loss": 1.0}
    run = plot_run.RunMetrics(write_run(tmp_path / "run", training(5), record))
    assert run.headline is not None
    assert (run.headline.key, run.headline.better) == ("eval/all/exact_accuracy", "higher")
    plot_run.draw([run], tmp_path / "puzzles.png")
    size_of(tmp_path / "puzzles.png")


@pytest.mark.parametrize("content", [None, ""])
def test_nothing_to_plot_is_told(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content, "utf-8")
    with pytest.raises(SystemExit) as end:
        plot_run.main([str(tmp_path)])
    assert end.value.code == 2
    assert "metrics.jsonl" in capsys.readouterr().err
