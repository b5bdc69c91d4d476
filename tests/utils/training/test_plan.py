"""Memory plans against steps that were measured, and trials of micro-batches."""

import json

import pytest
import torch
import yaml
from training_tools import IDENTIFIERS, TINY, finish, make_config, metrics_of, start

from models.build import create_model
from models.inference.loading import base_loader
from models.recursive_reasoning.athena_trm import AthenaTRM
from pretrain import train
from scripts.training_step import measure_step
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.config.load import PretrainConfig, compose_config, load_config
from utils.core.errors import UserError
from utils.training.plan import FILLED, MemoryPlan, plan_metadata

WIDE = "arch.hidden_size=192 arch.num_heads=6 arch.puzzle_emb_ndim=192 vocab_size=1000 seq_len=96"
NEAR = "arch.loss.kl_to=base arch.loss.kl_weight=0.1"
STEPS = {
    "athena, bfloat16": ("", "arch.forward_dtype=bfloat16"),
    "plain, bfloat16": ("fast=false", "arch.forward_dtype=bfloat16 vocab_size=9000"),
    "long rows, bfloat16": ("seq_len=384 vocab_size=300", "arch.forward_dtype=bfloat16"),
    "a further term": ("+arch.loss.terms.z_loss.weight=0.1", "vocab_size=9000"),
    "athena, at once": ("micro_batch_size=4",),
    "long rows": ("seq_len=384", "vocab_size=300", "global_batch_size=2 micro_batch_size=1"),
    "many tokens": ("vocab_size=9000", "arch.forward_dtype=bfloat16"),
    "softmax": ("vocab_size=9000", "arch.loss.loss_type=softmax_cross_entropy"),
    "recomputed, bfloat16": (
        "arch.use_gradient_checkpointing=true arch.forward_dtype=bfloat16", "arch.norm_type=pre",
    ),
    "tied, recomputed": ("arch.use_gradient_checkpointing=true arch.tie_embeddings=true",),
    "refinement trained": ("arch.post_refinement_train=true arch.H_grad_cycles=2",),
    "mixed by an MLP": ("arch.mlp_t=true arch.causal=false arch.document_mask=false",),
    "trm": ("arch=trm", "arch.L_cycles=2"),
    "decoder": ("arch=transformer arch.num_layers=6", "optimizer=adamw"),
    "decoder, at once": ("arch=transformer arch.num_layers=6 micro_batch_size=4", "ema=false"),
    "update": ("seq_len=4 vocab_size=9000", "optimizer=adamw global_batch_size=1"),
    "muon": ("optimizer=muon seq_len=32",),
    "near a base": (NEAR, "arch.loss.loss_type=softmax_cross_entropy micro_batch_size=4"),
    "near a base, many tokens": (NEAR, "vocab_size=9000", "arch.forward_dtype=bfloat16"),
    "near a base, a decoder": (NEAR, "arch=transformer arch.num_layers=6 vocab_size=3000"),
}  # fmt: skip


QUICK = ("athena, bfloat16", "muon", "near a base")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STEPS],
)
def test_memory_is_what_a_step_allocates(name):
    """Part by part; what is too small to matter may be further off."""
    config = planned_config(*STEPS[name])
    micro_rows = config.micro_rows(1)
    found, _ = measure_step(config, micro_rows, CPUBackend())
    parts = MemoryPlan(config, plan_metadata(config)[0], device="cpu").parts(micro_rows)
    total = sum(found.values())
    assert sum(parts.values()) == pytest.approx(total, rel=0.02)
    for part, real in found.items():
        assert parts[part] == pytest.approx(real, rel=0.05, abs=0.005 * total), part


def planned_config(*overrides: str) -> PretrainConfig:
    given = {"arch": "athena_trm_tiny", "global_batch_size": "4", "micro_batch_size": "2"}
    for override in " ".join((WIDE, *overrides)).split():
        key, _, value = override.partition("=")
        given[key] = value
    if given["micro_batch_size"] != "auto":
        given["micro_batch_size"] = min(given["micro_batch_size"], given["global_batch_size"])
    settings = [f"{key}={value}" for key, value in given.items()]
    return load_config(compose_config([*settings, "dry_run=true", "device_type=cpu"]))


@pytest.mark.parametrize(("optimizer", "at_once"), [("adam_atan2", True), ("adamw", False)])
def test_on_cuda_adam_atan2_updates_all_weights_at_once(optimizer, at_once):
    """Roots of all weights need room together there; a CPU takes one weight after the other, and
    AdamW's fused update needs none.
    """
    config = planned_config(f"arch=transformer arch.num_layers=6 seq_len=4 optimizer={optimizer}")
    metadata, _ = plan_metadata(config)
    own, cuda = (
        MemoryPlan(config, metadata, device=device).parts(1)["activations"]
        for device in ("cpu", "cuda")
    )
    assert (cuda > 1.5 * own) is at_once


def test_the_most_rows_that_fit_are_found():
    """As if every size were traced."""
    config = planned_config("arch=transformer global_batch_size=12 micro_batch_size=auto")
    found = MemoryPlan(config, plan_metadata(config)[0], device="cpu")
    for rows in (1, 2, 3, 4, 6, 12):
        assert found.fitting_rows(int(found.total(rows) / FILLED) + 1) == rows
    assert found.fitting_rows(int(found.total(1) / FILLED) - 1) == 1


def test_what_lasts_is_divided_by_the_ranks_of_fsdp():
    config = planned_config("optimizer=adamw")
    metadata, _ = plan_metadata(config)
    whole = MemoryPlan(config, metadata, ranks=2, device="cuda")
    sharded = config.model_copy(update={"parallel": "fsdp"})
    half = MemoryPlan(sharded, metadata, ranks=2, device="cuda")
    one, other = whole.parts(2), half.parts(2)
    assert other["optimizer"] == one["optimizer"] // 2 and other["ema"] == one["ema"] // 2
    assert half.checkpoint_bytes() == pytest.approx(whole.checkpoint_bytes(), rel=0.001)


@pytest.mark.slow
def test_the_base_is_that_of_its_checkpoint(text_run, text_corpus):
    """The base of kl_to may be of another kind than the run's model."""
    near = [f"arch.loss.kl_to={text_run}", "arch.loss.kl_weight=0.5", "global_batch_size=8"]
    given = ["arch=transformer", f"data_paths=[{text_corpus}]", "device_type=cpu", *near]
    config = load_config(compose_config(given))
    metadata, data = plan_metadata(config)
    found = MemoryPlan(config, metadata, device="cpu")
    head = create_model(config.arch, metadata, batch_size=1)
    head.prepare(base_loader(data, CPUBackend()))
    (base,) = head.frozen_models()
    there = sum(t.nbytes for t in (*base.parameters(), *base.buffers()))
    positions = base.config.prefix_len + metadata.seq_len
    latents = 2 * 8 * positions * base.config.hidden_size * base.config.dtype.itemsize
    assert found.parts(8)["base"] == there + latents


def test_a_checkpoint_takes_what_was_told(text_run):
    saved = Checkpoint(checkpoints_of(text_run)[-1])
    config = load_config(yaml.safe_load(saved.text("config.yaml")))
    tensors = sum(t.nbytes for t in saved.all_tensors().values())
    found = MemoryPlan(config, plan_metadata(config)[0], device="cpu")
    assert found.checkpoint_bytes() == pytest.approx(tensors, rel=0.15)


# --- trials ------------------------------------------------------------------------------------


class Small(CPUBackend):
    """A device that has memory for so many rows of a batch."""

    tries_sizes = True
    rows = 8
    trials = 0

    def release_memory(self):
        self.trials += 1

    def to_device(self, batch):
        if len(batch.get("inputs", ())) > self.rows:
            raise torch.OutOfMemoryError(f"a batch of {len(batch['inputs'])} rows")
        return super().to_device(batch)


def train_on(backend: CPUBackend, tmp_path, corpus, *overrides: str) -> list[float]:
    folder = tmp_path / f"{backend.tries_sizes}"
    given = [f"checkpoint_path={folder}", "max_steps=3", *IDENTIFIERS]
    assert train(backend, make_config(corpus, *given, *overrides)) == 0
    return metrics_of(folder, "train/lm_loss")


def test_a_trial_changes_nothing(tmp_path, puzzle_corpus, capsys):
    """Weights, identifiers, held rows, the stream and random draws are as without it."""
    halved = Small()
    halved.rows = 4
    lines = train_on(halved, tmp_path, puzzle_corpus, "micro_batch_size=auto")
    printed = capsys.readouterr()
    assert (
        "8 rows" in printed.out + printed.err and "micro_batch_size=4" in printed.out + printed.err
    )
    assert lines == train_on(CPUBackend(), tmp_path, puzzle_corpus, "micro_batch_size=4")


def test_where_not_one_row_fits_the_message_says_what_to_change(tmp_path, puzzle_corpus):
    full = Small()
    full.rows = 0
    with pytest.raises(UserError, match=r"out of memory .* arch\.hidden_size"):
        train_on(full, tmp_path, puzzle_corpus)


def test_a_given_size_and_that_of_a_resumed_run_are_not_tried(tmp_path, puzzle_corpus):
    given, first, resumed = Small(), Small(), Small()
    train_on(given, tmp_path / "given", puzzle_corpus, "micro_batch_size=4")
    first.rows = 2
    train_on(first, tmp_path, puzzle_corpus)
    train_on(resumed, tmp_path, puzzle_corpus)
    assert (given.trials, first.trials, resumed.trials) == (0, 3, 0)
    folder = checkpoints_of(tmp_path / "True")[-1]
    assert json.loads((folder / "state.json").read_text("utf-8"))["micro_rows"] == 2


def test_a_model_that_cannot_be_traced_trains(tmp_path, puzzle_corpus, monkeypatch, capsys):
    """Its shapes depend on values, which is right on a CPU and a GPU."""
    real = AthenaTRM.admit

    def admit(self, carry, batch):
        carry.halted[carry.halted.nonzero()] = True
        return real(self, carry, batch)

    monkeypatch.setattr(AthenaTRM, "admit", admit)
    with pytest.warns(UserWarning, match="FLOPs"):
        assert len(train_on(CPUBackend(), tmp_path, puzzle_corpus, "arch.H_cycles=1")) == 3
    printed = "".join(capsys.readouterr())
    assert "nonzero" in printed and "micro_batch_size=" in printed


TRIAL = """
import sys
import torch
from pretrain import train
from scripts.training_step import measure_step
from utils.backend.cpu import CPUBackend
from utils.config.load import compose_config, load_config

class Small(CPUBackend):
    tries_sizes = True

    def to_device(self, batch):
        if len(batch.get("inputs", ())) > 4 // (self.rank + 1):
            raise torch.OutOfMemoryError("too many rows")
        return super().to_device(batch)

config = load_config(compose_config(sys.argv[1:]), world_size=2)
sys.exit(Small().launch(train, config))
"""


@pytest.mark.slow
def test_the_rank_with_the_least_room_decides(tmp_path, puzzle_corpus):
    script = tmp_path / "trial.py"
    script.write_text(TRIAL, "utf-8")
    given = [*TINY, f"data_paths=[{puzzle_corpus}]", f"checkpoint_path={tmp_path / 'run'}"]
    process = start(*given, "max_steps=1", "ema=false", ranks=2, script=str(script))
    status, out, err = finish(process)
    assert status == 0, err
    state = checkpoints_of(tmp_path / "run")[-1] / "state.json"
    assert json.loads(state.read_text("utf-8"))["micro_rows"] == 2
    assert "rank 1" in out + err and "micro_batch_size=2" in out + err
    assert "rank 0" not in out + err
