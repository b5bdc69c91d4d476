"""Training as a whole: resume, ranks, feeds, and what the loop promises."""

import json
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_tools import finish, make_config, metrics_of, start

from dataset.common import UserError
from pretrain import train
from sequence_dataset import EvalStream
from utils.backend.cpu import CPUBackend
from utils.checkpoint import Checkpoint, checkpoints_of
from utils.schedule import Schedule


def leaves(value, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors inside nested dicts and lists, by path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()  # fmt: skip
    return {k: v for key, item in items for k, v in leaves(item, f"{name}/{key}").items()}


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    opened = Checkpoint(checkpoint)
    opened.verify()
    stems = [name.removesuffix(".pt") for name in opened.files if name.endswith(".pt")]
    return {k: v for stem in stems for k, v in leaves(opened.tensors(stem), stem).items()}


# --- resume ----------------------------------------------------------------------------------

IDENTIFIERS = ("arch.puzzle_emb_ndim=32", "puzzle_emb_lr=1e-2")


@pytest.mark.parametrize("optimizer", ["adam_atan2", "adamw", "muon"])
@pytest.mark.parametrize("feed", ["consume", "present"])
def test_n_plus_n_steps_equal_2n_steps_bit_for_bit(text_corpus, run_training, optimizer, feed):
    options = [f"optimizer={optimizer}", f"feed={feed}", "max_steps=14", "epochs=20", *IDENTIFIERS]
    options += ["keep_checkpoints=null", "evaluators=[]", "ema_rate=0.9"]
    whole = run_training(text_corpus, "whole", *options, "checkpoint_interval=7")
    parts = run_training(text_corpus, "parts", *options, f"resume={whole / 'step_7'}")
    one, other = contents(whole / "step_14"), contents(parts / "step_14")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert any(name.startswith("ema") for name in one)
    saved = [Checkpoint(run / "step_14").json("state.json")["stream"] for run in (whole, parts)]
    assert saved[0] == saved[1]
    middle = contents(whole / "step_7")
    assert not middle["carry_0/carry/halted"].all(), "no carry is in flight"
    assert not torch.equal(middle["carry_0/carry/z_H"], one["carry_0/carry/z_H"])


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
    run_training(text_corpus, "run", "max_steps=2", "evaluators=[]", "lr=2e-3", "resume_allow=[lr]")


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
    (run / "step_4" / "manifest.json").write_text("{")
    capsys.readouterr()
    run_training(text_corpus, "run", *options, "max_steps=6")
    out = capsys.readouterr().out
    assert "step_6 is damaged: model.pt" in out and "step_4 is damaged: manifest.json" in out
    assert "resuming from" in out and "step_2" in out
    one, other = contents(whole / "step_6"), contents(run / "step_6")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert len(list(run.glob("damaged_step_*"))) == 2


def test_damage_everywhere_never_starts_a_run_from_scratch(text_corpus, run_training):
    run = run_training(text_corpus, "run", "max_steps=2", "evaluators=[]")
    damage(run / "step_2" / "optimizer.pt")
    with pytest.raises(UserError, match="all 1 checkpoints"):
        run_training(text_corpus, "run", "max_steps=2", "evaluators=[]")


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
    text_corpus, run_training
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


def test_held_rows_restart_without_a_saved_carry(text_corpus, run_training):
    options = ["epochs=20", "evaluators=[]", "checkpoint_carry=false", "keep_checkpoints=null"]
    options += ["max_steps=6", "checkpoint_interval=3"]
    run = run_training(text_corpus, "run", *options)
    assert not list((run / "step_3").glob("carry_*"))
    run_training(text_corpus, "again", *options, f"resume={run / 'step_3'}")


# --- ranks and micro-batches -----------------------------------------------------------------


def many_ways(tmp_path: Path, corpus: Path, options: list[str], script: str) -> dict[str, Path]:
    """The same run on one rank, on one rank in two micro-batches, and on two ranks."""
    ways = {"one": (1, ""), "micro": (1, "grad_accum_steps=2"), "two": (2, "")}
    processes = {}
    for name, (ranks, extra) in ways.items():
        overrides = [
            f"data_paths=[{corpus}]", f"checkpoint_path={tmp_path / name}", "run_name=ranks",
            "device_type=cpu", "arch.forward_dtype=float64", "max_steps=20", "lr=1e-3",
            "lr_warmup_steps=0", "evaluators=[]", "log_interval=1", "global_batch_size=8",
            "ema_rate=0.9", "epochs=40", *options,
        ]  # fmt: skip
        used = "pretrain.py" if name == "one" else script
        processes[name] = start(*overrides, *([extra] if extra else []), ranks=ranks, script=used)
    for process in processes.values():
        code, out, err = finish(process)
        assert code == 0, out + err
    return {name: tmp_path / name for name in ways}


def differences(runs: dict[str, Path]) -> dict[str, float]:
    """How far each way is from one rank: in losses, gradient norms and weights."""
    found = {}
    for name in ("micro", "two"):
        for metric in ("train/lm_loss", "train/grad_norm", "train/steps", "train/examples"):
            one, other = (metrics_of(runs[way], metric) for way in ("one", name))
            assert len(one) == len(other)
            worst = max(abs(a - b) for a, b in zip(one, other, strict=True))
            found[f"{name} {metric}"] = worst
        one, other = (contents(runs[way] / "step_20") for way in ("one", name))
        for key in one:
            if key.startswith(("model/", "ema/")):
                found[f"{name} {key}"] = (one[key] - other[key]).abs().max().item()
    return found


TEXT = [
    "arch=athena_trm_tiny", "arch.hidden_size=32", "arch.puzzle_emb_ndim=32",
    "arch.halt_max_steps=5", "arch.force_min_steps=1", "arch.halt_exploration_prob=0.3",
    "arch.post_refinement_steps=0", "puzzle_emb_lr=1e-2", "optimizer=adamw", "grad_clip_norm=0.5",
]  # fmt: skip
PUZZLES = [
    "arch=trm", "arch.hidden_size=32", "arch.num_heads=2", "arch.H_cycles=2", "arch.L_cycles=2",
    "arch.puzzle_emb_len=1", "arch.halt_max_steps=4", "arch.halt_exploration_prob=0.3",
    "feed=consume", "puzzle_emb_lr=1e-2", "grad_clip_norm=0.5",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["text", "puzzles"])
def test_ranks_and_micro_batches_leave_the_curve_alone(kind, text_corpus, puzzle_corpus, tmp_path):
    corpus, options = (text_corpus, TEXT) if kind == "text" else (puzzle_corpus, PUZZLES)
    runs = many_ways(tmp_path, corpus, options, "pretrain.py")
    off = {name: value for name, value in differences(runs).items() if not value <= 1e-7}
    assert off == {}
    states = [Checkpoint(run / "step_20").json("state.json")["stream"] for run in runs.values()]
    assert states[0] == states[1] == states[2]
    steps = metrics_of(runs["one"], "train/steps")
    assert len(set(steps)) > 2, "rows should halt at different steps"
    table = contents(runs["one"] / "step_20")["model/model.inner.puzzle_emb.weights"]
    assert table.any(), "the identifier embedding was never trained"


@pytest.mark.parametrize("fault", ["mean_for_sum", "own_identifiers_only"])
def test_the_comparison_of_ranks_sees_faults(fault, text_corpus, tmp_path):
    """The faults are put in on purpose; the test above must be able to go red."""
    script = tmp_path / "faulty.py"
    patches = {
        "mean_for_sum": "base.Backend.backward = lambda self, loss: loss.backward()",
        "own_identifiers_only": "sparse.SparseEmbeddingSignSGD.__init__.__defaults__\n"
        "old = sparse.SparseEmbeddingSignSGD.__init__\n"
        "def init(self, embedding, lr, weight_decay, all_gather=None):\n"
        "    old(self, embedding, lr, weight_decay)\n"
        "sparse.SparseEmbeddingSignSGD.__init__ = init",
    }
    script.write_text(
        "import models.sparse_embedding as sparse\nimport utils.backend.base as base\n"
        f"import pretrain\n{patches[fault]}\npretrain.main()\n"
    )
    runs = many_ways(tmp_path, text_corpus, TEXT, str(script))
    assert max(v for name, v in differences(runs).items() if name.startswith("two")) > 1e-6


# --- the loop --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_the_same_command_goes_on(text_corpus, tmp_path, ranks):
    run = tmp_path / "run"
    overrides = [
        f"data_paths=[{text_corpus}]", f"checkpoint_path={run}", "run_name=x", *TEXT,
        "device_type=cpu", "global_batch_size=8", "epochs=1000", "evaluators=[]", "log_interval=1",
        "lr_warmup_steps=0", "max_steps=100000",
    ]  # fmt: skip
    process = start(*overrides, ranks=ranks)
    deadline = time.monotonic() + 120
    log = run / "metrics.jsonl"
    while not (log.is_file() and log.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None, finish(process)
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code != 0
    assert ranks > 1 or code == 128 + signal.SIGTERM
    (saved,) = checkpoints_of(run)
    Checkpoint(saved).verify()
    assert f"after saving {saved.name.replace('_', ' ')}" in out + err


def test_a_non_finite_loss_skips_the_update_and_at_last_stops(
    text_corpus, run_training, monkeypatch
):
    from models import train_state

    real = train_state.create_model

    def poisoned(*args, **kwargs):
        model = real(*args, **kwargs)
        with torch.no_grad():
            model.model.inner.lm_head.weight[0, 0] = torch.nan
        return model

    monkeypatch.setattr("pretrain.create_model", poisoned)
    with pytest.raises(UserError, match="max_nonfinite=3"):
        run_training(text_corpus, "run", "max_steps=9", "evaluators=[]", "max_nonfinite=3")


def test_freeze_weights_trains_identifiers_only(text_corpus, run_training):
    run = run_training(
        text_corpus, "run", "max_steps=3", "evaluators=[]", "freeze_weights=true", *IDENTIFIERS,
        "checkpoint_interval=1", "keep_checkpoints=null",
    )  # fmt: skip
    one, three = contents(run / "step_1"), contents(run / "step_3")
    changed = [k for k in one if k.startswith("model/") and not torch.equal(one[k], three[k])]
    assert changed == ["model/model.inner.puzzle_emb.weights"]


def test_an_epoch_of_the_real_loop_enters_every_example_once(text_corpus, tmp_path, monkeypatch):
    """Counted inside the model, whatever halts."""
    from models.recursive_reasoning.athena_trm import AthenaTRM

    entered = []
    real = AthenaTRM.admit

    def admit(self, carry, batch):
        if self.training:
            free = carry.halted & (batch["labels"] >= 0).any(1)
            entered.extend(tuple(row) for row in batch["inputs"][free].tolist())
        return real(self, carry, batch)

    monkeypatch.setattr(AthenaTRM, "admit", admit)
    config = make_config(
        text_corpus, f"checkpoint_path={tmp_path}", "run_name=x", "evaluators=[]", "epochs=1"
    )
    train(CPUBackend(), config)
    from sequence_dataset import Corpora

    corpora = Corpora([str(text_corpus)], "train")
    rows = corpora.rows(torch.arange(corpora.num_rows).numpy())["inputs"]
    assert sorted(entered) == sorted(tuple(row) for row in rows.tolist())


def test_evaluation_saves_named_outputs_and_reports_by_step(text_corpus, run_training):
    run = run_training(text_corpus, "run", "max_steps=2", "eval_save_outputs=[preds,steps]")
    saved = torch.load(run / "evaluation_step_2" / "predictions_rank0.pt", weights_only=True)
    assert saved["preds"].shape[1] == 24 and saved["steps"].eq(4).all()
    by_step = [metrics_of(run, f"eval/text/step_{k}/nats_per_token")[-1] for k in range(1, 5)]
    assert len(set(by_step)) == 4
    assert metrics_of(run, "eval/text/nats_per_token")[-1] == pytest.approx(by_step[-1])
    assert metrics_of(run, "eval/text/domain_poems/perplexity")
    assert (
        sum(metrics_of(run, "eval/all/hist/accuracy")[-1]) == metrics_of(run, "eval/all/rows")[-1]
    )


def test_early_stopping_ends_a_run_that_no_longer_improves(text_corpus, run_training):
    run = run_training(
        text_corpus, "run", "lr=0", "puzzle_emb_lr=0", "epochs=50", "max_steps=200",
        "eval_interval=0.2",
        "early_stopping={metric: text/perplexity, patience: 2}",
    )  # fmt: skip
    assert len(metrics_of(run, "eval/text/perplexity")) == 3


def test_all_loggers_write(text_corpus, run_training, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_training(text_corpus, "run", "max_steps=2", "logger=[jsonl,tensorboard,wandb]")
    assert list((run / "tensorboard").glob("events*"))
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert metrics_of(run, "train/lm_loss")


def test_ranks_stop_together_when_the_time_is_up(text_corpus, tmp_path):
    """The learning rate follows the clock; two clocks would train two models."""
    run, script = tmp_path / "run", tmp_path / "clocks.py"
    script.write_text(
        "import os\nfrom utils.reporting import Clock\nimport pretrain\n"
        "real, ahead = Clock.seconds.fget, 100 * int(os.environ['RANK'])\n"
        "Clock.seconds = property(lambda self: real(self) + ahead)\npretrain.main()\n"
    )
    process = start(
        f"data_paths=[{text_corpus}]", f"checkpoint_path={run}", "run_name=x", *TEXT,
        "device_type=cpu", "global_batch_size=8", "epochs=null", "max_seconds=1.5",
        "evaluators=[]", "lr_warmup_steps=0", ranks=2, script=str(script),
    )  # fmt: skip
    code, out, err = finish(process, timeout=120)
    assert code == 0, out + err
    (saved,) = checkpoints_of(run)
    assert 1.5 <= Checkpoint(saved).json("state.json")["counters"]["seconds"] < 100


def test_starting_again_from_an_older_checkpoint_sets_later_ones_aside(text_corpus, run_training):
    options = ["epochs=20", "evaluators=[]", "keep_checkpoints=1", "resume_allow=[max_steps]"]
    run = run_training(text_corpus, "run", *options, "max_steps=4", "keep_checkpoints=null",
                       "checkpoint_interval=2")  # fmt: skip
    run_training(text_corpus, "run", *options, "max_steps=3", f"resume={run / 'step_2'}")
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


def test_a_run_that_was_stopped_early_stays_so(text_corpus, run_training):
    options = ["lr=0", "puzzle_emb_lr=0", "epochs=50", "max_steps=200", "eval_interval=0.2"]
    options += ["early_stopping={metric: text/perplexity, patience: 1}"]
    run = run_training(text_corpus, "run", *options)
    steps = [p.name for p in checkpoints_of(run)]
    run_training(text_corpus, "run", *options)
    assert [p.name for p in checkpoints_of(run)] == steps


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


def test_the_reasoning_stream_is_decoded_per_step(text_corpus, run_training):
    run = run_training(
        text_corpus, "run", "max_steps=1", "arch.enable_reasoning_stream=true",
        "arch.reasoning_vocab_size=11", "arch.reasoning_seq_len=5",
        "eval_save_outputs=[reasoning_preds]",
    )  # fmt: skip
    saved = torch.load(run / "evaluation_step_1" / "predictions_rank0.pt", weights_only=True)
    assert saved["reasoning_preds"].shape[1:] == (4, 5)


def test_a_reasoning_loss_needs_its_labels(text_corpus, run_training):
    with pytest.raises(UserError, match=r"reasoning_labels\.npy"):
        run_training(text_corpus, "run", "max_steps=1", "arch.loss.reasoning_loss_weight=0.5")


def test_reasoning_labels_train_their_head(text_corpus, tmp_path, run_training):
    corpus = Path(shutil.copytree(text_corpus, tmp_path / "corpus"))
    for split in ("train", "test"):
        rows = len(np.load(corpus / split / "all" / "labels.npy"))
        labels = np.random.default_rng().integers(0, 10, (rows, 3)).astype(np.int32)
        np.save(corpus / split / "all" / "reasoning_labels.npy", labels)
    labels[-1, -1] = 10
    np.save(corpus / "test" / "all" / "reasoning_labels.npy", labels)
    options = ["max_steps=2", "evaluators=[]", "arch.loss.reasoning_loss_weight=0.5"]
    with pytest.raises(UserError, match=r"label 10, but arch\.reasoning_vocab_size is 10"):
        run_training(corpus, "run", *options, "arch.reasoning_vocab_size=10")
    run = run_training(corpus, "run", *options, "arch.reasoning_vocab_size=11")
    assert 0 < metrics_of(run, "train/reasoning_loss")[0] < 6
    assert "model/model.inner.reasoning_head.weight" in contents(run / "step_2")


def test_the_weights_that_a_corpus_was_built_with_are_the_default(
    text_corpus, tmp_path, run_training
):
    corpus = Path(shutil.copytree(text_corpus, tmp_path / "corpus"))
    path = corpus / "train" / "all" / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"domain_weights": {"poems": 3}}))
    own, given = {"poems": 0.75, "lists": 0.25}, {"poems": 0.5, "lists": 0.5}
    by_option = {"null": own, "{}": None, "{poems: 1, lists: 1}": given}
    for i, (option, weights) in enumerate(by_option.items()):
        run = run_training(
            corpus, str(i), "max_steps=1", "evaluators=[]", f"domain_weights={option}"
        )
        stream = Checkpoint(run / "step_1").json("state.json")["stream"]
        assert stream["domain_weights"] == weights


def test_the_cosine_of_trm_ends_when_the_time_does():
    config = make_config(
        "unused", "feed=present", "max_seconds=100", "lr_warmup_steps=0", "lr_min_ratio=0.1"
    )
    schedule = Schedule(config, SimpleNamespace(total_steps=10**9))
    for seconds, factor in ((0.0, 1.0), (50.0, 0.55), (100.0, 0.1)):
        state = SimpleNamespace(step=7 if seconds else 0, seconds=seconds)
        assert schedule.learning_rate_factor(state) == pytest.approx(factor)


def test_a_small_test_split_is_not_padded_to_the_training_batch(text_corpus, run_training, capsys):
    """Evaluating a handful of rows must not cost what hundreds do."""
    seen = []

    class Watched(EvalStream):
        def __init__(self, *args, **options):
            seen.append((options["global_batch_size"], args[0].num_rows))
            super().__init__(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.EvalStream", Watched)
        run_training(text_corpus, "run", "max_steps=1", "global_batch_size=96", "lr_warmup_steps=5")
    (batch, rows), *_ = seen
    assert batch == min(rows, 96)
    assert "ended at step 1 of 5 in its warm-up" in capsys.readouterr().out
