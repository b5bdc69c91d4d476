"""Training as a whole: resume, ranks, feeds, and what the loop promises."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from seeds import draw_rng
from torch._subclasses.fake_tensor import FakeTensor
from training_tools import IDENTIFIERS, TEXT, contents, finish, make_config, metrics_of, start

from models.losses import ACTLossHead
from models.sparse_embedding import CastedSparseEmbedding
from pretrain import train
from sequence_dataset import EvalStream
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.core.errors import UserError
from utils.training.schedule import Schedule

# --- the loop --------------------------------------------------------------------------------


def test_a_non_finite_loss_skips_the_update_and_at_last_stops(
    text_corpus, run_training, monkeypatch
):
    real, calls = ACTLossHead.forward, []

    def diverging(self, *args, **options):
        carry, loss, *others = real(self, *args, **options)
        if not isinstance(loss, FakeTensor):  # of a trace, which counts FLOPs
            calls.append(loss)
        return carry, loss * (torch.nan if len(calls) > 1 else 1), *others

    monkeypatch.setattr(ACTLossHead, "forward", diverging)
    options = ["evaluators=[]", "max_nonfinite=3", "lr_warmup_steps=7"]
    with pytest.raises(UserError, match="max_nonfinite=3") as error:
        run_training(text_corpus, "run", "max_steps=9", *options)
    advice = str(error.value)
    assert "resume" not in advice, "there is nothing to resume"
    assert "lr (now 0.001)" in advice and "lr_warmup_steps (now 7)" in advice
    calls.clear()
    with pytest.raises(UserError, match=r"step_2.*lr.*resume_allow=\[lr\]"):
        run_training(text_corpus, "run", "max_steps=9", *options, "checkpoint_interval=2")


@pytest.mark.parametrize("limit", ["max_steps=9", "max_steps=2"])
def test_a_loss_that_is_never_finite_is_the_model_s(
    text_corpus, run_training, monkeypatch, capsys, limit
):
    """Also where the run ends before `max_nonfinite`: it trained nothing, so it is not finished."""
    real = ACTLossHead.__init__

    def init_with_nan(self, model, **options):
        real(self, model, **options)
        with torch.no_grad():
            model.inner.lm_head.weight[0, 0] = torch.nan

    monkeypatch.setattr(ACTLossHead, "__init__", init_with_nan)
    with pytest.raises(UserError) as error:
        run_training(text_corpus, "run", limit, "evaluators=[]", "max_nonfinite=3")
    assert "arch.name=recursive_reasoning.athena_trm@AthenaTRM" in str(error.value)
    assert "lower lr" not in str(error.value) and "warmup" not in str(error.value)
    printed = capsys.readouterr().out
    assert "finished" not in printed and "step 1: " in printed


def test_freeze_weights_trains_identifiers_only(text_corpus, run_training):
    run = run_training(
        text_corpus, "run", "max_steps=3", "evaluators=[]", "freeze_weights=true", *IDENTIFIERS,
        "checkpoint_interval=1", "keep_checkpoints=null",
    )  # fmt: skip
    one, three = contents(run / "step_1"), contents(run / "step_3")
    changed = [k for k in one if k.startswith("model/") and not torch.equal(one[k], three[k])]
    assert changed == ["model/model.inner.puzzle_emb.weights"]


def test_an_infinite_gradient_of_one_identifier_changes_none(
    text_corpus, run_training, monkeypatch
):
    """There is no norm of other gradients that would be infinite, too."""
    real, calls = CastedSparseEmbedding.forward, []

    def overflowing(self, ids):
        rows = real(self, ids)
        if not isinstance(rows, FakeTensor):  # of a trace, which counts FLOPs
            calls.append(rows)
        if len(calls) == 2:
            rows.register_hook(
                lambda gradient: gradient.index_fill(0, torch.tensor([0]), torch.inf)
            )
        return rows

    monkeypatch.setattr(CastedSparseEmbedding, "forward", overflowing)
    run = run_training(
        text_corpus, "run", "max_steps=3", "evaluators=[]", "freeze_weights=true", *IDENTIFIERS
    )
    table = contents(run / "step_3")["model/model.inner.puzzle_emb.weights"]
    assert table.isfinite().all()
    assert metrics_of(run, "train/nonfinite")[-1] == 1


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
    from utils.corpus.corpora import Corpora

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


def test_a_batch_larger_than_the_test_split_costs_no_more_than_the_split(
    text_corpus, run_training, monkeypatch
):
    shapes = set()
    real = EvalStream.from_config

    def from_config(corpora, config, arch, rows, **ranks):
        shapes.add((rows, corpora.num_rows))
        return real(corpora, config, arch, rows, **ranks)

    monkeypatch.setattr(EvalStream, "from_config", from_config)
    run_training(text_corpus, "run", "max_steps=1", "eval_batch_size=1024")
    assert all(rows == test_rows for rows, test_rows in shapes) and shapes


def test_a_test_split_without_labels_has_no_loss(text_corpus, run_training, tmp_path, capsys):
    """Documents of one token have none; a loss of 0 would be the best checkpoint's for good."""
    corpus = Path(shutil.copytree(text_corpus, tmp_path / "corpus"))
    split = corpus / "test" / "all"
    labels = np.load(split / "labels.npy")
    np.save(split / "labels.npy", np.full_like(labels, np.iinfo(labels.dtype).max))
    metadata = json.loads((split / "dataset.json").read_text("utf-8"))
    (split / "dataset.json").write_text(json.dumps(metadata | {"checksums": {}}), "utf-8")
    run = run_training(corpus, "run", "max_steps=1")
    assert metrics_of(run, "eval/all/rows") == [0]
    assert not metrics_of(run, "eval/all/lm_loss")
    assert "best_metric=lm_loss" in capsys.readouterr().out


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


@pytest.mark.slow
def test_ranks_stop_together_when_the_time_is_up(text_corpus, tmp_path):
    """The learning rate follows the clock; two clocks would train two models."""
    run, script = tmp_path / "run", tmp_path / "clocks.py"
    script.write_text(
        "import os\nfrom utils.core.clock import Clock\nimport pretrain\n"
        "real, ahead = Clock.seconds.fget, 100 * int(os.environ['RANK'])\n"
        "Clock.seconds = property(lambda self: real(self) + ahead)\npretrain.main()\n",
        "utf-8",
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
        run_training(text_corpus, "run", "max_steps=1", "arch.loss.terms.reasoning.weight=0.5")


def test_reasoning_labels_train_their_head(text_corpus, tmp_path, run_training):
    corpus = Path(shutil.copytree(text_corpus, tmp_path / "corpus"))
    for split in ("train", "test"):
        rows = len(np.load(corpus / split / "all" / "labels.npy"))
        labels = draw_rng().integers(0, 10, (rows, 3)).astype(np.int32)
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
    path.write_text(
        json.dumps(json.loads(path.read_text("utf-8")) | {"domain_weights": {"poems": 3}}), "utf-8"
    )
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
    seen, real = [], EvalStream.__init__

    def record(self, corpora, **options):
        seen.append((options["global_batch_size"], corpora.num_rows))
        real(self, corpora, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EvalStream, "__init__", record)
        run_training(text_corpus, "run", "max_steps=1", "global_batch_size=96", "lr_warmup_steps=5")
    (batch, rows), *_ = seen
    assert batch == min(rows, 96)
    assert "ended at step 1 of 5 in its warm-up" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_blocks_leave_names_and_numbers_alone(text_corpus, run_training):
    """Checkpoints of compiled and plain runs are the same files, and go on as one another."""
    if CPUBackend().cannot_compile():
        pytest.skip("there is no C++ compiler")
    options = ["max_steps=4", "epochs=20", "evaluators=[]", "arch.forward_dtype=float64"]
    plain = run_training(text_corpus, "plain", *options)
    compiled = run_training(text_corpus, "compiled", *options, "compile=true")
    one, other = contents(plain / "step_4"), contents(compiled / "step_4")
    assert one.keys() == other.keys()
    for name in one:
        if name.startswith("model/"):
            assert (one[name] - other[name]).abs().max() < 1e-9, name
    options[0] = "max_steps=6"
    run_training(text_corpus, "compiled", *options, "resume_allow=[max_steps]")
