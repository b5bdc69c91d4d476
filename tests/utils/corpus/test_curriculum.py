"""Budgets that grow over a run: how, and that neither ranks nor a resume change what a row gets."""

import json

import numpy as np
import pytest
import torch
from seeds import draw_rng
from training_tools import contents, make_config, metrics_of

from models.recursive_reasoning.athena_trm import AthenaTRM
from tests.stream_tools import assert_same, halting, real_rows, run, stream_of, write_corpus
from utils.config.schema import IterationCurriculumConfig
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora

RULE = IterationCurriculumConfig(start=0.25, until=0.5)


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "c", 97, seed=int(draw_rng().integers(1 << 31)))
    return Corpora([str(tmp_path / "c")])


@pytest.mark.parametrize("feed", ["consume", "present"])
@pytest.mark.parametrize("max_steps", [None, 20])
def test_budgets_are_those_of_the_progress_at_entry(corpus, feed, max_steps):
    """Against the definition in exact numbers; nothing else of a batch changes."""
    options = dict(feed=feed, epochs=8, min_iterations=5)
    plain, growing = stream_of(corpus, **options), stream_of(
        corpus, **options, curriculum=RULE, least_iterations=2, num_workers=2
    )  # fmt: skip
    flags, lowered = halting(3, 8), 0
    for step in range(1, 400):
        limit = (step - 1) / max_steps if max_steps else 0.0
        done = max(growing.progress, limit)
        one, other = (stream.next(step, flags(step - 1), limit) for stream in (plain, growing))
        if one is None:
            break
        whole, given = (batch[0].pop("iteration_targets") for batch in (one, other))
        assert_same(one, other)
        share = 1.0 if done >= 0.5 else 0.25 + 0.75 * done / 0.5
        scored = real_rows(one[0])
        wanted = np.maximum(whole * share, 5)[scored]
        assert (abs(given[scored] - np.minimum(wanted, whole[scored])) <= 0.5 + 1e-9).all()
        lowered += (given < whole).sum()
    assert lowered > 10 and share == 1 and (given == whole).all()
    growing.close()


def test_ranks_and_resume_leave_budgets_alone(corpus):
    options = dict(curriculum=RULE, epochs=2)
    whole = run([stream_of(corpus, **options)], halting(4, 8))
    ranks = [stream_of(corpus, **options, rank=rank, world_size=2) for rank in range(2)]
    assert_same(whole, run(ranks, halting(4, 8)))
    half = stream_of(corpus, **options)
    first = run([half], halting(4, 8), steps=9)
    state = json.loads(json.dumps(half.state_dict()))
    again = stream_of(corpus, **options)
    again.load_state_dict(state)
    assert_same(whole, first + run([again], halting(4, 8), first=9))


def test_the_model_gets_growing_budgets_and_goes_on_bit_for_bit(
    text_corpus, run_training, monkeypatch
):
    entered: list[tuple[int, int]] = []
    real = AthenaTRM.admit

    def admit(self, carry, batch):
        new = real(self, carry, batch)
        if self.training:
            fresh = carry.halted & (batch["labels"] >= 0).any(1)
            entered.extend((len(entered), b) for b in new.current_data["iteration_targets"][fresh])
        return new

    monkeypatch.setattr(AthenaTRM, "admit", admit)
    options = [
        "iteration_curriculum={start: 0.1, until: 0.8}", "arch.halt_exploration_prob=0",
        "max_steps=24", "epochs=20", "evaluators=[]", "log_interval=1",
        "keep_checkpoints=null", "eval_max_batches=1",
    ]  # fmt: skip
    whole = run_training(text_corpus, "whole", *options, "checkpoint_interval=7")
    budgets = [int(b) for _, b in entered]
    assert max(budgets[:8]) == 1 and max(budgets[-8:]) == 4
    steps = metrics_of(whole, "train/steps")
    assert steps[0] == 1 and np.mean(steps[-5:]) > 1.5
    parts = run_training(text_corpus, "parts", *options, f"resume={whole / 'step_7'}")
    one, other = contents(whole / "step_24"), contents(parts / "step_24")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    changed = ["iteration_curriculum={start: 0.2, until: 0.8}", *options[1:]]
    with pytest.raises(UserError, match=r"iteration_curriculum\.start \(was 0\.1, is 0\.2\)"):
        run_training(text_corpus, "parts", *changed)


def test_a_curriculum_without_effect_is_refused(text_corpus, tmp_path, run_training):
    rule = "iteration_curriculum={}"
    with pytest.raises(UserError, match=r"unknown key 'iteration_curriculum\.begin'"):
        make_config(text_corpus, "iteration_curriculum={begin: 1}")
    with pytest.raises(UserError, match="epochs or max_steps, but both are null"):
        make_config(text_corpus, rule, "epochs=null", "max_seconds=9")
    with pytest.raises(UserError, match="does not follow max_seconds"):
        make_config(text_corpus, rule, "max_seconds=9")
    write_corpus(tmp_path / "c", 20, arrays={"iteration_targets": None})
    with pytest.raises(UserError, match=r"iteration_targets\.npy"):
        run_training(tmp_path / "c", "run", rule, "max_steps=1")
