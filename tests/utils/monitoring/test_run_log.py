"""The log of a run: each step once, and labels for figures of any latent."""

from training_tools import write_run

from utils.monitoring.run_log import RunMetrics, better, label_of, rank


def training(step: int, loss: float) -> dict:
    return {"step": step, "train/lm_loss": loss}


def test_steps_that_were_trained_again_count_once(tmp_path):
    """A killed run resumes from its last checkpoint: its curve must not jump back."""
    folder = write_run(
        tmp_path / "run",
        *(training(10, 4.0), training(20, 3.0), training(30, 9.0)),
        *(training(20, 3.5), training(30, 2.5)),
    )
    run = RunMetrics(folder)
    steps, losses = run.series("train/lm_loss")
    assert steps == sorted(steps)
    assert losses[-1] == 2.5 and 9.0 not in losses


def test_a_line_cut_off_by_a_crash_is_skipped(tmp_path):
    folder = write_run(tmp_path / "run", training(10, 1.0), tail='{"step": 20, "train/lm')
    assert RunMetrics(folder).series("train/lm_loss") == ([10], [1.0])


def test_figures_have_labels_and_an_order():
    assert "z_L3" in label_of("z_L3_change") and "z_slow" in label_of("z_slow_norm")
    assert label_of("grad_norm") == "gradient norm" and label_of("my_figure") == "my figure"
    assert (better("bits_per_byte"), better("accuracy"), better("my_figure")) == (
        "lower", "higher", "",
    )  # fmt: skip
    keys = ["eval/all/my_figure", "eval/all/lm_loss", "eval/text/bits_per_byte"]
    assert sorted(keys, key=rank) == keys[::-1]
