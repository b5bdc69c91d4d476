"""A run that stays near a base model: the divergence against its formula, and whole runs."""

import os

import pytest
import torch
import yaml
from loss_tools import reference_probabilities
from training_tools import (
    IDENTIFIERS,
    TINY,
    contents,
    finish,
    make_config,
    metrics_of,
    sealed,
    start,
)

from dataset.common import IGNORE_LABEL_ID
from models import token_losses
from models.losses import ACTLossHead
from models.recursive_reasoning.athena_trm import AthenaTRM
from models.recursive_reasoning.transformer import Transformer
from models.terms.kl_to_base import kl_divergence
from models.token_losses import LOSSES
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.core.errors import UserError

NAMES = list(LOSSES)
SIZES = dict(
    batch_size=6, seq_len=7, vocab_size=13, hidden_size=16, num_heads=2, forward_dtype="float64"
)  # fmt: skip


@pytest.mark.parametrize("own", NAMES)
@pytest.mark.parametrize("of_base", NAMES)
def test_the_divergence_and_its_gradient_are_those_of_the_probabilities(own, of_base, monkeypatch):
    """The two models may have been trained with different losses; chunks change nothing."""
    x, y = (5 * torch.randn(4, 5, 11, dtype=torch.float64) for _ in range(2))
    given, free = x.clone().requires_grad_(), x.clone().requires_grad_()
    monkeypatch.setattr(token_losses, "_FUNCTION_ELEMENTS", 40)
    maps = [LOSSES[name].softmax_logits for name in (own, of_base)]
    found = kl_divergence(given, y, *maps)
    p, q = reference_probabilities(own, free), reference_probabilities(of_base, y)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(4, 5, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(given.grad, free.grad)


def random_batch() -> dict[str, torch.Tensor]:
    labels = torch.randint(13, (6, 7), dtype=torch.int32)
    labels[torch.rand(6, 7) < 0.3] = IGNORE_LABEL_ID
    return {
        "inputs": torch.randint(13, (6, 7), dtype=torch.int32),
        "labels": labels,
        "puzzle_identifiers": torch.zeros(6, dtype=torch.int32),
        "iteration_targets": (torch.randperm(6) % 5 + 1).int(),  # each number of steps
    }


def base_logits(model, data: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """Of one row after so many ACT steps from the start."""
    batch = {name: value.unsqueeze(0) for name, value in data.items()}
    inner = model.inner
    answer = inner.answer(inner.embed(batch), inner.sequence_info(batch), steps)
    return inner.logits(answer)[0]


@pytest.mark.parametrize("kind", ["recursion", "transformer"])
def test_each_row_is_held_to_the_base_after_as_many_steps(kind):
    """Rows halt at different steps, and the base has fewer steps than the model: checked against a
    base that computes every row from its start."""
    recursion = dict(H_cycles=2, L_cycles=2, L_layers=1, halt_exploration_prob=0.0)
    model = AthenaTRM(SIZES | recursion | dict(halt_max_steps=5))
    base = (
        AthenaTRM(SIZES | recursion | dict(halt_max_steps=3))
        if kind == "recursion"
        else Transformer(SIZES | dict(num_layers=2))
    )
    terms = {"kl": {"base": "base", "weight": 0.5}}
    head = ACTLossHead(model, "stablemax_cross_entropy", terms=terms)
    kl = next(term for term in head.terms if term.name == "kl")
    plain = ACTLossHead(model, "stablemax_cross_entropy")
    softmax = LOSSES["softmax_cross_entropy"].softmax_logits
    kl.use(base, softmax)
    batch = random_batch()
    carry, other = head.initial_carry(batch), plain.initial_carry(batch)
    seen = set()
    for _ in range(9):
        batch = random_batch()
        carry, loss, metrics, _, _ = head((), carry, batch)
        other, plain_loss, _, kept, _ = plain(("logits",), other, batch)
        expected = 0.0
        for i, steps in enumerate(carry.steps.tolist()):
            data = {name: value[i] for name, value in other.current_data.items()}
            scored = data["labels"] != IGNORE_LABEL_ID
            if not scored.any():
                continue
            p = reference_probabilities("stablemax_cross_entropy", kept["logits"][i])
            q = base_logits(base, data, min(steps, kl.steps)).softmax(-1)
            expected += (p * (p / q).log()).sum(-1)[scored].mean().item()
        assert metrics["kl_loss"][0].item() == pytest.approx(expected, rel=1e-9)
        assert loss.item() == pytest.approx(plain_loss.item() + 0.5 * expected, rel=1e-9)
        seen.add(tuple(carry.steps.tolist()))
    assert len({steps for row in seen for steps in row}) == 5, "rows should be at all steps"
    assert not any(p.requires_grad for p in base.parameters())


# --- whole runs --------------------------------------------------------------------------------

# `explore` is drawn anew for each step; document starts, identifiers and budgets are a row's own.
RUN = ("evaluators=[]", "epochs=20", "ema_rate=0.9", *IDENTIFIERS)


def near(base, weight: float = 0.3) -> list[str]:
    return [f"loss.kl_to={base}", f"loss.kl_weight={weight}"]


def test_a_run_stays_near_the_checkpoint_that_it_began_near(text_corpus, run_training):
    """However its path is written, and whatever the base's run has saved since."""
    further = "resume_allow=[max_steps,epochs]"
    base = run_training(text_corpus, "base", *RUN, "max_steps=2")
    near_it = [f"load_checkpoint={base / 'step_2'}", *near(base)]
    run_training(text_corpus, "tuned", *RUN, "max_steps=2", *near_it)
    run_training(text_corpus, "base", *RUN, "max_steps=4", further)
    tuned = run_training(text_corpus, "tuned", *RUN, "max_steps=4", further, *near_it)
    relative = os.path.relpath(base / "step_2")
    run_training(text_corpus, "tuned", *RUN, "max_steps=6", further, *near(relative))
    for step in (2, 4, 6):
        config = yaml.safe_load((tuned / f"step_{step}" / "config.yaml").read_text("utf-8"))
        assert config["arch"]["loss"]["terms"]["kl"]["base"] == str(base / "step_2")
    with pytest.raises(UserError, match=r"terms.kl.base .*step_2, is .*step_4"):
        run_training(text_corpus, "tuned", *RUN, "max_steps=8", further, *near(base / "step_4"))


@pytest.mark.slow
def test_a_run_begins_at_its_base_and_the_weight_keeps_it_near(text_corpus, run_training):
    base = run_training(text_corpus, "base", *RUN, "max_steps=20", "arch.eval_halting=fixed",
                        "arch.eval_steps=1")  # fmt: skip
    same = run_training(
        text_corpus, "same", *RUN, "max_steps=9", "lr=0", "puzzle_emb_lr=0",
        f"load_checkpoint={base}", *near(base, 1),
    )  # fmt: skip
    assert max(metrics_of(same, "train/kl_loss")) < 1e-6, "an unchanged model is at its base"
    far, close = (
        run_training(
            text_corpus, name, *RUN, "max_steps=24", "lr=3e-3", f"load_checkpoint={base}",
            *near(base, weight),
        )
        for name, weight in (("far", 1e-6), ("close", 100))
    )  # fmt: skip
    divergence = [metrics_of(run, "train/kl_loss") for run in (far, close)]
    assert divergence[0][0] == divergence[1][0] == pytest.approx(0, abs=1e-6)
    assert divergence[0][-1] > 5 * divergence[1][-1] > 0
    saved = Checkpoint(close / "step_24")
    assert not any("/kl/" in name for name in contents(saved.folder))
    plain = Checkpoint(base / "step_20")
    assert contents(saved.folder).keys() == contents(plain.folder).keys()
    more = {n for n in saved.files if "source" in n} - {n for n in plain.files if "source" in n}
    assert {name.rpartition("/")[2] for name in more} <= {"kl_to_base.py"}
    assert f"base: {base / 'step_20'}\n" in saved.text("config.yaml")


def test_a_run_near_a_base_goes_on_bit_for_bit(text_corpus, run_training):
    base = run_training(text_corpus, "base", *RUN, "max_steps=5")
    options = [*RUN, *near(base), "max_steps=14", "keep_checkpoints=null", "seed=1"]
    whole = run_training(text_corpus, "whole", *options, "checkpoint_interval=7")
    parts = run_training(text_corpus, "parts", *options, f"resume={whole / 'step_7'}")
    assert not contents(whole / "step_7")["carry_0/carry/halted"].all(), "no row is held"
    one, other = contents(whole / "step_14"), contents(parts / "step_14")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert metrics_of(whole, "train/kl_loss")[7:] == metrics_of(parts, "train/kl_loss")


@pytest.mark.slow
def test_another_base_may_be_allowed_on_the_way(text_corpus, run_training):
    base = run_training(text_corpus, "base", *RUN, "max_steps=2", "keep_checkpoints=null",
                        "checkpoint_interval=1")  # fmt: skip
    options = [*RUN, *near(base), "max_steps=4", "seed=1"]
    run_training(text_corpus, "run", *options)
    options += ["max_steps=6", *near(base / "step_1")]
    with pytest.raises(UserError, match=r"terms\.kl\.base \(was \S+step_2, is \S+step_1\)"):
        run_training(text_corpus, "run", *options, "resume_allow=[max_steps]")
    allowed = "resume_allow=[max_steps,arch.loss.terms.kl.base]"
    run = run_training(text_corpus, "run", *options, allowed)
    assert [path.name for path in checkpoints_of(run)][-1] == "step_6"


@pytest.mark.slow
def test_ranks_and_micro_batches_are_held_alike(text_corpus, tmp_path, run_training):
    """The base is another architecture here, on a corpus whose identifiers it knows by name."""
    base = run_training(text_corpus, "base", *RUN, "max_steps=3", "arch.halt_max_steps=2",
                        "arch.forward_dtype=float64")  # fmt: skip
    options = [*RUN, *near(base), "max_steps=8", "seed=1", "arch.forward_dtype=float64"]
    runs = {
        "one": run_training(text_corpus, "one", *options),
        "micro": run_training(text_corpus, "micro", *options, "grad_accum_steps=2"),
    }
    for parallel in ("ddp", "fsdp"):
        runs[parallel] = tmp_path / parallel
        overrides = [
            *TINY, *options, f"data_paths=[{text_corpus}]", f"checkpoint_path={runs[parallel]}",
            "run_name=test", f"parallel={parallel}",
        ]  # fmt: skip
        code, out, err = finish(start(*overrides, ranks=2))
        assert code == 0, out + err
    one = contents(runs["one"] / "step_8")
    for name in ("micro", "ddp", "fsdp"):
        for metric in ("train/kl_loss", "train/grad_norm"):
            assert metrics_of(runs[name], metric) == pytest.approx(
                metrics_of(runs["one"], metric), abs=1e-8
            ), name
        other = contents(runs[name] / "step_8")
        weights = [key for key in one if key.startswith("model/")]
        assert max((one[key] - other[key]).abs().max() for key in weights) < 1e-7, name


def test_a_base_that_cannot_serve_is_refused(text_corpus, run_training, tmp_path):
    with pytest.raises(UserError, match=r"terms\.kl\.weight is missing"):
        make_config(text_corpus, "loss.kl_to=x")
    with pytest.raises(UserError, match=r"terms\.kl\.weight"):
        make_config(text_corpus, *near("x", float("inf")))
    with pytest.raises(UserError, match=r"terms\.kl\.base is missing"):
        make_config(text_corpus, "arch.loss.kl_weight=0.5")
    with pytest.raises(UserError, match=r"unknown key 'arch\.loss\.kl_two'"):
        make_config(text_corpus, "loss.kl_two=x")
    with pytest.raises(UserError, match=r"terms\.kl\.base=nowhere is not a folder"):
        run_training(text_corpus, "run", "max_steps=1", *near("nowhere"))
    base = run_training(text_corpus, "base", "max_steps=1", "evaluators=[]")
    with pytest.raises(UserError, match="compares answers before refinement"):
        run_training(text_corpus, "refined", "max_steps=1", *near(base),
                     "arch.post_refinement_steps=1", "arch.post_refinement_train=true")  # fmt: skip
    (base / "step_1" / "tokenizer.json").write_text("{}", "utf-8")
    sealed(base / "step_1")
    with pytest.raises(
        UserError, match=r"arch\.loss\.terms\.kl\.base=\S+ was trained with another tokenizer"
    ):
        run_training(text_corpus, "run", "max_steps=1", *near(base))
