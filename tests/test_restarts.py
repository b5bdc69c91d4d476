"""Restarts: continuing equals never having stopped, whatever ended the run before."""

import json
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_tools import IDENTIFIERS, TEXT, contents, differing, finish, metrics_of, start

import pretrain
from dataset.build_corpus_dataset import main as build_corpus
from utils.checkpoint import writer
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora


@pytest.mark.parametrize("optimizer", ["adam_atan2", "adamw", "muon"])
@pytest.mark.parametrize("feed", ["consume", "present"])
def test_n_plus_n_steps_equal_2n_steps_bit_for_bit(text_corpus, run_training, optimizer, feed):
    options = [f"optimizer={optimizer}", f"feed={feed}", "max_steps=14", "epochs=20", *IDENTIFIERS]
    options += ["keep_checkpoints=null", "evaluators=[]", "ema_rate=0.9"]
    whole = run_training(text_corpus, "whole", *options, "checkpoint_interval=7")
    parts = run_training(text_corpus, "parts", *options, f"resume={whole / 'step_7'}")
    assert differing(whole / "step_14", parts / "step_14") == []
    one = contents(whole / "step_14")
    assert any(name.startswith("ema") for name in one)
    saved = [Checkpoint(run / "step_14").json("state.json")["stream"] for run in (whole, parts)]
    assert saved[0] == saved[1]
    middle = contents(whole / "step_7")
    assert not middle["carry_0/carry/halted"].all(), "no carry is in flight"
    assert not torch.equal(middle["carry_0/carry/latents/z_H"], one["carry_0/carry/latents/z_H"])


def second_corpus(first: Path, folder: Path) -> Path:
    """Another corpus of the same tokenizer."""
    lines = [f"{i} beads {'ab' * (i % 7)} and {i * i} more" for i in range(200)]
    (folder / "beads.txt").write_text("\n".join(lines), "utf-8")
    build_corpus(
        ["--tokenizer-json", str(first / "tokenizer.json"), "--input-files",
         str(folder / "beads.txt"), "--output-dir", str(folder / "beads")]
        + "--seq-len 24 --train-ratio 0.8 --min-iterations 1 --max-iterations 6".split()
    )  # fmt: skip
    return folder / "beads"


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "ranks"), [("ddp", 4), ("fsdp", 2)])
def test_ranks_with_mixed_corpora_and_workers_go_on_bit_for_bit(
    text_corpus, tmp_path, parallel, ranks
):
    """From three ranks on, the order in which they are summed shows in the last bits."""
    other = second_corpus(text_corpus, tmp_path)
    options = [
        f"data_paths=[{text_corpus},{other}]", *TEXT, "run_name=x", "device_type=cpu",
        "domain_weights={poems: 2, lists: 1, beads: 1}", "num_workers=3", f"parallel={parallel}",
        "global_batch_size=8", "lr=1e-3", "lr_warmup_steps=0", "log_interval=1", "ema_rate=0.9",
        "max_steps=14", "epochs=20", "evaluators=[]", "keep_checkpoints=null",
        "checkpoint_interval=7", "grad_accum_steps=2", "eval_max_batches=1",
    ]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, more in ((whole, "resume=auto"), (parts, f"resume={whole / 'step_7'}")):
        code, out, err = finish(start(*options, f"checkpoint_path={run}", more, ranks=ranks))
        assert code == 0, out + err
    assert differing(whole / "step_14", parts / "step_14") == []
    assert any(name.startswith("carry_1") for name in contents(whole / "step_14"))


def test_auto_resume_goes_on_in_the_same_folder(text_corpus, run_training):
    options = ["epochs=20", "evaluators=[]", "resume_allow=[max_steps]"]
    run = run_training(text_corpus, "run", *options, "max_steps=3")
    run_training(text_corpus, "run", *options, "max_steps=5")
    assert [p.name for p in checkpoints_of(run)] == ["step_3", "step_5"]
    assert len(metrics_of(run, "train/lm_loss")) == 5


def test_resuming_with_changed_keys_lists_them(text_corpus, run_training):
    run_training(text_corpus, "run", "max_steps=2", "evaluators=[]")
    with pytest.raises(UserError, match=r"lr \(was 0.001, is 0.002\)"):
        run_training(text_corpus, "run", "max_steps=2", "evaluators=[]", "lr=2e-3")
    allowed = ["max_steps=3", "lr=2e-3", "evaluators=[]"]
    with pytest.raises(UserError, match=r"resume_allow=\[lr,max_steps\]"):  # both, not one in turn
        run_training(text_corpus, "run", *allowed, "resume_allow=[lr]")
    run_training(text_corpus, "run", *allowed, "resume_allow=[lr,max_steps]")


def damage(path: Path) -> None:
    """One flipped bit."""
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(
    text_corpus, run_training, capsys
):
    options = ["evaluators=[]", "epochs=20", "keep_checkpoints=null", "checkpoint_interval=2"]
    whole = run_training(text_corpus, "whole", *options, "max_steps=6")
    run = run_training(text_corpus, "run", *options, "max_steps=6")
    damage(run / "step_6" / "model.pt")
    (run / "step_4" / "manifest.json").write_text("{", "utf-8")
    capsys.readouterr()
    run_training(text_corpus, "run", *options, "max_steps=6")
    out = capsys.readouterr().out
    assert "step_6 is damaged: model.pt" in out and "step_4 is damaged: manifest.json" in out
    assert "resuming from" in out and "step_2" in out
    assert differing(whole / "step_6", run / "step_6") == []
    assert len(list(run.glob("damaged_step_*"))) == 2


def test_damage_everywhere_never_starts_a_run_from_scratch(text_corpus, run_training):
    run = run_training(text_corpus, "run", "max_steps=2", "evaluators=[]")
    damage(run / "step_2" / "optimizer.pt")
    for _ in range(2):  # a launcher that restarts its ranks tries again
        with pytest.raises(UserError, match=r"all checkpoints .* damaged_step_2_"):
            run_training(text_corpus, "run", "max_steps=2", "evaluators=[]")
    run_training(text_corpus, "run", "max_steps=3", "evaluators=[]", "resume=none")
    (run / "step_3" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"all checkpoints .* damaged_step_2_.*, damaged_step_3"):
        run_training(text_corpus, "run", "max_steps=3", "evaluators=[]")


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(text_corpus, run_training):
    run = run_training(text_corpus, "run", "max_steps=2", "evaluators=[]")
    damage(run / "step_2" / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt"):
        run_training(text_corpus, "other", "max_steps=2", f"resume={run / 'step_2'}")


def test_a_checkpoint_of_another_architecture_is_refused(text_corpus, run_training):
    run = run_training(text_corpus, "run", "max_steps=1", "evaluators=[]")
    with pytest.raises(UserError, match="another architecture"):
        run_training(
            text_corpus, "other", "max_steps=1", "arch.hidden_size=64", f"load_checkpoint={run}"
        )


def test_load_checkpoint_starts_from_the_averages_and_matches_identifiers(
    text_corpus, run_training, capsys
):
    options = ["max_steps=3", "evaluators=[]", *IDENTIFIERS]
    run = run_training(text_corpus, "run", *options)
    new = run_training(
        text_corpus, "new", *options[1:], "max_steps=1", "lr=0", "puzzle_emb_lr=0", "ema=false",
        f"load_checkpoint={run}",
    )  # fmt: skip
    old, loaded = contents(run / "step_3"), contents(new / "step_1")
    name = "model.inner.lm_head.weight"
    assert torch.equal(loaded[f"model/{name}"], old[f"ema/shadow/{name}"])
    assert not torch.equal(old[f"model/{name}"], old[f"ema/shadow/{name}"])
    table = "model/model.inner.puzzle_emb.weights"
    assert torch.equal(loaded[table], old[table]) and old[table].any()
    seen = run_training(
        text_corpus, "seen", *options[1:], "eval_only=true", f"load_checkpoint={run}"
    )
    assert f"starting from the averaged weights of {run / 'step_3'}" in capsys.readouterr().out
    (line,) = (seen / "metrics.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["step"] == 3, "an evaluation belongs to the step of its weights"
    loss = "eval/all/lm_loss"
    assert metrics_of(seen, loss) == metrics_of(run, loss)


def test_held_rows_restart_without_a_saved_carry(text_corpus, run_training):
    options = ["epochs=20", "evaluators=[]", "checkpoint_carry=false", "keep_checkpoints=null"]
    options += ["max_steps=6", "checkpoint_interval=3"]
    run = run_training(text_corpus, "run", *options)
    assert not list((run / "step_3").glob("carry_*"))
    run_training(text_corpus, "again", *options, f"resume={run / 'step_3'}")


def test_starting_again_from_an_older_checkpoint_sets_later_ones_aside(text_corpus, run_training):
    options = ["epochs=20", "evaluators=[]", "keep_checkpoints=1", "resume_allow=[max_steps]"]
    run = run_training(text_corpus, "run", *options, "max_steps=4", "keep_checkpoints=null",
                       "checkpoint_interval=2")  # fmt: skip
    older = "resume=step_2"
    with pytest.raises(UserError, match=r"resume=step_3 is .* which holds step_2, step_4"):
        run_training(text_corpus, "run", *options, "max_steps=3", "resume=step_3")
    with pytest.raises(UserError, match="lr"):  # a command that is refused changes nothing
        run_training(text_corpus, "run", *options, "max_steps=3", older, "lr=7e-3")
    assert [p.name for p in checkpoints_of(run)] == ["step_2", "step_4"]
    run_training(text_corpus, "run", *options, "max_steps=3", older)
    assert [p.name for p in checkpoints_of(run)] == ["step_3"]
    (aside,) = run.glob("abandoned_step_4_*")
    Checkpoint(aside).verify()


def test_a_rate_that_may_change_on_resume_does_change(text_corpus, run_training):
    options = ["epochs=20", "evaluators=[]", "optimizer=adamw", "keep_checkpoints=null"]
    run_training(text_corpus, "run", *options, "max_steps=2", "weight_decay=0.5")
    run = run_training(
        text_corpus, "run", *options, "max_steps=3", "weight_decay=0.25",
        "resume_allow=[max_steps,weight_decay]",
    )  # fmt: skip
    groups = Checkpoint(run / "step_3").tensors("optimizer")[0]["param_groups"]
    assert groups[0]["weight_decay"] == 0.25


def test_a_run_that_was_stopped_early_stays_so(text_corpus, run_training, capsys):
    options = ["lr=0", "puzzle_emb_lr=0", "epochs=50", "max_steps=200", "eval_interval=0.2"]
    options += ["early_stopping={metric: text/perplexity, patience: 1}"]
    run = run_training(text_corpus, "run", *options)
    steps = [p.name for p in checkpoints_of(run)]
    figures = metrics_of(run, "eval/all/lm_loss")
    run_training(text_corpus, "run", *options)
    assert [p.name for p in checkpoints_of(run)] == steps
    assert metrics_of(run, "eval/all/lm_loss") == figures, "evaluated once more"
    assert "stopped early at step" in capsys.readouterr().out
    more = int(steps[-1].removeprefix("step_")) + 3
    run_training(text_corpus, "run", *options[:-1], f"max_steps={more}", "resume_allow=[max_steps]")
    assert (run / f"step_{more}").is_dir()


def test_an_evaluation_that_is_done_is_not_repeated(text_corpus, run_training, capsys):
    """A queue that starts finished runs again must not cost an evaluation each time."""
    options = ["epochs=50", "eval_interval=0.1", "keep_checkpoints=null", "checkpoint_interval=3"]
    options += ["eval_max_batches=1"]
    run = run_training(text_corpus, "run", *options, "max_steps=20")
    lines = (run / "metrics.jsonl").read_text("utf-8")
    assert "finished at step 20" in capsys.readouterr().out
    run_training(text_corpus, "run", *options, "max_steps=20")
    assert (run / "metrics.jsonl").read_text("utf-8") == lines
    assert "already finished at step 20" in capsys.readouterr().out
    evaluated = [json.loads(line)["step"] for line in lines.splitlines() if "eval/" in line]
    assert len(evaluated) == len(set(evaluated)) > 2
    # going back before it, the same evaluations come again
    run_training(text_corpus, "run", *options, "max_steps=20", f"resume=step_{evaluated[-3]}")
    again = (run / "metrics.jsonl").read_text("utf-8")
    assert [json.loads(line)["step"] for line in again.splitlines() if "eval/" in line][-2:] == (
        evaluated[-2:]
    )
    run_training(text_corpus, "run", *options, "max_steps=20", "eval_only=true")
    assert (
        len((run / "metrics.jsonl").read_text("utf-8").splitlines()) == len(again.splitlines()) + 1
    )


def test_a_run_that_is_over_names_the_limit_that_ended_it(text_corpus, run_training, capsys):
    options = ["epochs=50", "evaluators=[]", "max_steps=1000", "max_seconds=0.2"]
    for _ in range(2):
        run_training(text_corpus, "run", *options)
    out = capsys.readouterr().out
    assert "raise max_seconds (now 0.2" in out and "resume_allow=[max_seconds]" in out
    run_training(text_corpus, "run", *options[:3], "max_seconds=0.4", "resume_allow=[max_seconds]")
    assert "finished at step" in capsys.readouterr().out


def test_two_micro_batches_are_chosen_again_on_resume(text_corpus, run_training):
    options = ["epochs=20", "evaluators=[]", "micro_batch_size=4", "resume_allow=[max_steps]"]
    run_training(text_corpus, "run", *options, "max_steps=2")
    run = run_training(text_corpus, "run", *options, "max_steps=3", "micro_batch_size=auto")
    assert Checkpoint(run / "step_3").json("state.json")["micro_rows"] == 4


def test_a_finished_example_is_not_trained_again_without_a_saved_carry(text_corpus, run_training):
    options = ["epochs=20", "evaluators=[]", "checkpoint_carry=false", "arch.halt_max_steps=1"]
    run = run_training(text_corpus, "run", *options, "max_steps=2")
    places = Checkpoint(run / "step_2").json("state.json")["stream"]["held_places"]
    assert places == [-1] * 8


def stop_after(run: Path, steps: int, overrides: list[str], ranks: int = 1) -> tuple[int, str]:
    """Train, send SIGTERM once `steps` lines are logged; exit status and output."""
    process, log = start(*overrides, ranks=ranks), run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text("utf-8").count("\n") >= steps):
        assert time.monotonic() < deadline and process.poll() is None, finish(process)
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    return code, out + err


def endless(corpus: Path, run: Path) -> list[str]:
    return [
        f"data_paths=[{corpus}]", f"checkpoint_path={run}", "run_name=x", *TEXT,
        "device_type=cpu", "global_batch_size=8", "epochs=1000", "evaluators=[]", "log_interval=1",
        "lr_warmup_steps=0", "max_steps=100000",
    ]  # fmt: skip


@pytest.mark.canary
def test_sigterm_saves_and_the_same_command_resumes(text_corpus, tmp_path):
    run = tmp_path / "run"
    saved: list[Path] = []
    for start_number in range(2):
        lines = 3 + (run / "metrics.jsonl").read_text("utf-8").count("\n") if start_number else 3
        code, out = stop_after(run, lines, endless(text_corpus, run))
        assert code == 128 + signal.SIGTERM, out
        assert (f"resuming from {saved[-1]}" in out) if saved else ("resuming" not in out)
        saved.append(checkpoints_of(run)[-1])
        Checkpoint(saved[-1]).verify()
        assert f"after saving {saved[-1].name.replace('_', ' ')}" in out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert steps == list(range(1, len(steps) + 1)), "every step is logged once"
    assert saved[0] != saved[1]


@pytest.mark.slow
def test_sigterm_to_two_ranks_saves(text_corpus, tmp_path):
    run = tmp_path / "run"
    code, out = stop_after(run, 3, endless(text_corpus, run), ranks=2)
    assert code != 0
    (saved,) = checkpoints_of(run)
    Checkpoint(saved).verify()
    assert f"after saving {saved.name.replace('_', ' ')}" in out


RECORDING = """
import json, os, signal, sys
import numpy as np
import pretrain
from models.recursive_reasoning.athena_trm import AthenaTRM

stop, path = int(sys.argv.pop(1)), sys.argv.pop(1)
real_admit, real_batch = AthenaTRM.admit, pretrain.train_batch

def admit(self, carry, batch):
    if self.training:
        free = carry.halted & (batch["labels"] >= 0).any(1)
        with open(f"{path}.{os.environ.get('RANK', 0)}", "a") as file:
            file.writelines(json.dumps(row) + "\\n" for row in batch["inputs"][free].tolist())
    return real_admit(self, carry, batch)

def train_batch(run, *args):
    if run.state.step + 1 == stop and run.backend.is_main:
        os.kill(os.getpid(), signal.SIGUSR1)
    return real_batch(run, *args)

AthenaTRM.admit, pretrain.train_batch = admit, train_batch
pretrain.main()
"""


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_examples(text_corpus, tmp_path):
    """1 rank, then 2, then 4 that share the weights, then 1, in the middle of an epoch.

    In float64: the recursion magnifies float32's rounding up to tenfold an ACT step, which on some
    texts adds up to more than 1e-5 in the loss, and would hide a small mistake on all.
    """
    script = tmp_path / "recording.py"
    script.write_text(RECORDING, "utf-8")
    options = [
        f"data_paths=[{text_corpus}]", *TEXT, "run_name=x", "device_type=cpu", "epochs=1",
        "global_batch_size=8", "lr=1e-3", "lr_warmup_steps=0", "log_interval=1", "ema_rate=0.9",
        "arch.forward_dtype=float64",
    ]  # fmt: skip
    code, out, err = finish(start(*options, f"checkpoint_path={tmp_path / 'whole'}"))
    assert code == 0, out + err
    run = tmp_path / "run"
    for ranks, stop, parallel in ((1, 10, "ddp"), (2, 21, "ddp"), (4, 33, "fsdp"), (1, 0, "ddp")):
        process = start(
            str(stop), str(tmp_path / "entered"), *options, f"checkpoint_path={run}",
            f"parallel={parallel}", ranks=ranks, script=str(script),
        )  # fmt: skip
        code, out, err = finish(process)
        if not stop:
            assert code == 0, out + err
            continue
        assert f"stopped by SIGUSR1 after saving step {stop}" in out, out + err
        assert ranks > 1 or code == 128 + signal.SIGUSR1
    entered = [
        tuple(json.loads(line))
        for file in tmp_path.glob("entered.*")
        for line in file.read_text("utf-8").splitlines()
    ]
    corpora = Corpora([str(text_corpus)], "train")
    rows = corpora.rows(np.arange(corpora.num_rows))["inputs"]
    assert sorted(entered) == sorted(map(tuple, rows.tolist()))
    for metric in ("train/lm_loss", "train/examples", "eval/all/lm_loss"):
        one, other = metrics_of(tmp_path / "whole", metric), metrics_of(run, metric)
        assert len(one) == len(other)
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-9


def test_the_best_checkpoint_is_kept_besides_the_newest(text_corpus, run_training):
    """With a learning rate of 0 nothing improves on the first evaluation."""
    options = ["lr=0", "puzzle_emb_lr=0", "epochs=50", "eval_interval=0.1", "keep_checkpoints=1"]
    run = run_training(text_corpus, "run", *options, "max_steps=30", "checkpoint_interval=5")
    state = Checkpoint(run / "step_30").json("state.json")["counters"]
    best = state["best_step"]
    assert 0 < best < 20 and [p.name for p in checkpoints_of(run)] == [f"step_{best}", "step_30"]
    assert (run / "best").resolve() == run / f"step_{best}"
    contents(run / "best")
    run_training(text_corpus, "run", *options, "max_steps=40", "checkpoint_interval=5",
                 "resume_allow=[max_steps]")  # fmt: skip
    assert [p.name for p in checkpoints_of(run)] == [f"step_{best}", "step_40"]
    new = run_training(text_corpus, "new", "max_steps=1", f"load_checkpoint={run / 'best'}")
    assert checkpoints_of(new)
    lines = (run / "metrics.jsonl").read_text("utf-8")
    run_training(text_corpus, "run", *options, "eval_only=true", f"resume={run / 'best'}",
                 "resume_allow=[max_steps]")  # fmt: skip
    assert (run / "metrics.jsonl").read_text("utf-8").startswith(lines), "an evaluation adds, only"
    run_training(text_corpus, "run", *options, "max_steps=40", f"resume={run / 'best'}",
                 "resume_allow=[max_steps]")  # fmt: skip
    assert list(run.glob("abandoned_step_40_*"))


def test_more_can_be_better(text_corpus, run_training, capsys):
    options = ["epochs=50", "eval_interval=0.1", "keep_checkpoints=1", "max_steps=30", "lr=3e-3"]
    worst = run_training(text_corpus, "worst", *options, "best_mode=max")
    losses = metrics_of(worst, "eval/all/lm_loss")
    assert losses[0] == max(losses), "training should help"
    assert Checkpoint(worst / "best").json("state.json")["counters"]["step"] < 15
    run_training(text_corpus, "typo", *options, "best_metric=eval/text/perplexety")
    out = capsys.readouterr().out
    assert "best_metric=text/perplexety was not evaluated" in out and "text/perplexity'" in out


def test_a_crash_between_two_renames_loses_nothing(text_corpus, run_training, capsys):
    options = ["evaluators=[]", "epochs=20", "keep_checkpoints=null", "checkpoint_interval=2"]
    run = run_training(text_corpus, "run", *options, "max_steps=4")
    before = Path(shutil.copytree(run / "step_4", run.with_name("before")))
    shutil.copytree(run / "step_4", run / ".step_4.tmp")  # about to take the place of ...
    (run / "step_4").rename(run / ".step_4.old")  # ... the one that stood there
    shutil.copytree(run / "step_2", run / ".step_1.pruned")
    (run / ".step_6.tmp").mkdir()
    (run / ".step_6.tmp" / "model.pt").write_bytes(b"half")
    run_training(text_corpus, "run", *options, "max_steps=4")
    assert f"resuming from {run / 'step_4'}" in capsys.readouterr().out
    assert differing(before, run / "step_4") == []
    assert not list(run.glob(".step_*"))


def test_training_goes_on_while_a_checkpoint_is_written(text_corpus, run_training, monkeypatch):
    """The file of step 2 is finished only when step 3 has been trained; what it holds is step 2."""
    options = ["evaluators=[]", "epochs=20", "max_steps=8", "checkpoint_interval=2", *IDENTIFIERS]
    options += ["keep_checkpoints=null", "ema_rate=0.9"]
    whole = run_training(text_corpus, "whole", *options)
    trained, real_batch, real_save = threading.Event(), pretrain.train_batch, writer.save_tensors

    def train_batch(run, *args):
        if run.state.step == 3:
            trained.set()
        return real_batch(run, *args)

    def save(value, path):
        if ".step_2." in str(path):
            assert trained.wait(60), "training waits for the disk"
        real_save(value, path)

    monkeypatch.setattr(pretrain, "train_batch", train_batch)
    monkeypatch.setattr(writer, "save_tensors", save)
    run = run_training(text_corpus, "run", *options)
    for step in ("step_2", "step_8"):
        assert differing(whole / step, run / step) == []


def test_lines_of_steps_that_are_trained_again_stand_there_once(text_corpus, run_training):
    options = ["epochs=20", "evaluators=[]", "keep_checkpoints=null", "checkpoint_interval=2"]
    run = run_training(text_corpus, "run", *options, "max_steps=5")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "train/lm_l')  # as a kill leaves it
    run_training(text_corpus, "run", *options, "max_steps=5", f"resume={run / 'step_2'}")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    assert [step for step in steps if step <= 5][:5] == [1, 2, 3, 4, 5]
    aside = (run / "metrics_abandoned.jsonl").read_text("utf-8")
    assert '{"step": 3' in aside and '{"step": 6, "train/lm_l' in aside


def test_a_last_evaluation_that_was_the_best_is_remembered(text_corpus, run_training):
    options = ["epochs=50", "keep_checkpoints=1", "best_mode=max", "lr=3e-3"]
    run = run_training(text_corpus, "run", *options, "max_steps=4")
    run_training(text_corpus, "run", *options, "max_steps=12", "resume_allow=[max_steps]")
    assert (run / "best").resolve() == run / "step_4"
    assert [folder.name for folder in checkpoints_of(run)] == ["step_4", "step_12"]
