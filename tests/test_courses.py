"""Which checkpoints are of the course that a run is on, when it starts from elsewhere or again."""

import json
import shutil

import pytest
from test_faults import run_with
from test_restarts import damage
from training_tools import contents, finish, metrics_of, start

from utils.checkpoint.format import Checkpoint, checkpoints_of


def names(run):
    return [folder.name for folder in checkpoints_of(run)]


def test_a_run_that_starts_from_another_run_again_keeps_what_it_saves(text_corpus, run_training):
    """Its own later checkpoints are of another course: taken for the newest, they would have the
    new ones pruned."""
    options = ["epochs=20", "evaluators=[]", "checkpoint_interval=2", "resume_allow=[max_steps]"]
    source = run_training(text_corpus, "source", *options, "max_steps=4")
    command = [*options, "keep_checkpoints=2", f"resume={source / 'step_2'}"]
    run = run_training(text_corpus, "run", *command, "max_steps=10")
    assert names(run) == ["step_8", "step_10"]
    run_training(text_corpus, "run", *command, "max_steps=5")
    assert names(run) == ["step_4", "step_5"]
    assert len(list(run.glob("abandoned_step_*"))) == 2
    (aside,) = run.glob("abandoned_step_10_*")
    run_training(text_corpus, "run", *options, f"resume={aside}", "max_steps=12")
    assert "step_12" in names(run) and "step_4" in names(run)
    assert names(source) == ["step_2", "step_4"], "another run's checkpoints are only read"


def test_damage_in_another_run_is_reported_and_left_as_it_is(text_corpus, run_training, capsys):
    options = ["epochs=20", "evaluators=[]", "checkpoint_interval=2", "resume_allow=[max_steps]"]
    source = run_training(text_corpus, "source", *options, "max_steps=4")
    damage(source / "step_4" / "model.pt")
    run_training(text_corpus, "run", *options, "max_steps=3", f"resume={source}")
    out = capsys.readouterr().out
    assert "step_4 is damaged" in out and f"resuming from {source / 'step_2'}" in out
    assert names(source) == ["step_2", "step_4"] and not list(source.glob("damaged_*"))


def test_a_checkpoint_that_cannot_be_read_is_passed_over(
    text_corpus, run_training, monkeypatch, capsys
):
    options = ["epochs=20", "evaluators=[]", "checkpoint_interval=2"]
    run = run_training(text_corpus, "run", *options, "max_steps=4")
    real = Checkpoint.verify

    def verify(self):
        if self.folder.name == "step_4":
            raise OSError(5, "Input/output error")
        real(self)

    monkeypatch.setattr(Checkpoint, "verify", verify)
    run_training(text_corpus, "run", *options, "max_steps=4")
    out = capsys.readouterr().out
    assert "step_4 cannot be read (Input/output error)" in out and "resuming from" in out
    assert list(run.glob("abandoned_step_4_*")) and names(run) == ["step_2", "step_4"]


@pytest.mark.slow
def test_a_restart_by_the_launcher_goes_on_and_does_not_begin_again(text_corpus, tmp_path):
    """It repeats `resume=step_8`; what came after that in the same launch is not abandoned."""
    run = tmp_path / "run"
    code, out = run_with("", run, text_corpus, tmp_path)
    assert code == 0, out
    fault = """
def die(run, state):
    if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(1)
at[35] = die
"""
    code, out = run_with(
        fault, run, text_corpus, tmp_path, "resume=step_36", ranks=2, max_restarts=1
    )
    assert code == 0 and out.count("resuming from") == 1, "nothing was left to do"
    shutil.copytree(run / "step_36", tmp_path / "copy")
    fault = fault.replace("at[35]", "at[39]")
    code, out = run_with(
        fault, run, text_corpus, tmp_path, "resume=step_36", "checkpoint_interval=1", ranks=2,
        max_restarts=1,
    )  # fmt: skip
    assert code == 0, out
    starts = [line.rpartition("/")[2] for line in out.splitlines() if "resuming from" in line]
    assert starts == ["step_36", "step_38"] or starts == ["step_36", "step_37"], out


def test_another_metric_begins_its_own_comparison(text_corpus, run_training):
    options = ["epochs=50", "eval_interval=0.1", "lr=3e-3", "resume_allow=[max_steps]"]
    by_accuracy = ["best_metric=all/accuracy", "best_mode=max"]
    rule = "early_stopping={{metric: {}, patience: 2, mode: {}}}"
    run = run_training(
        text_corpus, "run", *options, *by_accuracy, "max_steps=20",
        rule.format("all/accuracy", "max"),
    )  # fmt: skip
    run_training(text_corpus, "run", *options, "max_steps=60", rule.format("all/lm_loss", "min"))
    losses = metrics_of(run, "eval/all/lm_loss")
    steps = [
        json.loads(line)["step"]
        for line in (run / "metrics.jsonl").open(encoding="utf-8")
        if "eval/" in line
    ]
    assert losses[-1] == min(losses), "training should help"
    assert (run / "best").resolve().name == f"step_{steps[-1]}"


@pytest.mark.slow
def test_what_a_checkpoint_keeps_of_other_files_may_go_meanwhile(text_corpus, tmp_path):
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(text_corpus, corpus)
    fault = f"at[10] = lambda *_: os.unlink({str(corpus / 'tokenizer.json')!r})\n"
    code, out = run_with(fault, run, corpus, tmp_path)
    assert code == 0, out
    assert (run / "step_40" / "tokenizer.json").read_text("utf-8") == (
        text_corpus / "tokenizer.json"
    ).read_text("utf-8")


@pytest.mark.slow
def test_a_sweep_under_torchrun_makes_a_run_of_each_job(text_corpus, tmp_path):
    code, out, err = finish(
        start(
            "-m", f"data_paths=[{text_corpus}]", "lr=1e-3,2e-3", "device_type=cpu", "max_steps=3",
            "arch=athena_trm_tiny", "arch.H_cycles=1", "arch.L_cycles=1", "arch.L_layers=1",
            "global_batch_size=8", "eval_max_batches=1", "project_name=sweep",
            f"hydra.sweep.dir={tmp_path / 'sweep'}",
            f"checkpoint_path={tmp_path}/${{lr}}", ranks=2,
        )
    )  # fmt: skip
    assert code == 0, out + err
    for rate in ("0.001", "0.002"):
        contents(tmp_path / rate / "step_3")


@pytest.mark.slow
def test_a_watchdog_that_nobody_listens_to_still_ends_the_run(text_corpus, tmp_path):
    """Standard output is a pipe that is full: whatever is printed waits for ever."""
    script = tmp_path / "full.py"
    script.write_text(
        "import os, pretrain, utils.monitoring.watchdog\n"
        "utils.monitoring.watchdog._SPEAK = 2.0\n"
        "real = pretrain.train_batch\n"
        "def train_batch(run, *args):\n"
        "    while run.state.step == 5:\n"
        "        os.write(1, bytes(65536))\n"
        "    return real(run, *args)\n"
        "pretrain.train_batch = train_batch\npretrain.main()\n",
        "utf-8",
    )
    process = start(
        f"data_paths=[{text_corpus}]", f"checkpoint_path={tmp_path / 'run'}", "device_type=cpu",
        "arch=athena_trm_tiny", "max_steps=20", "lr_warmup_steps=0", "global_batch_size=8",
        "step_timeout=4", script=str(script),
    )  # fmt: skip
    assert process.wait(timeout=120) == 4
    process.communicate()
