"""What other code relies on of any architecture: depth, step options, gradients of all weights."""

import pytest
import torch
from seeds import draw_rng
from training_tools import ROOT, contents, metrics_of

from models.inference.loading import load_language_model
from models.losses import ACTLossHead
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import checkpoints_of
from utils.config.load import compose_config, load_config
from utils.core.errors import UserError
from utils.core.functions import load_class
from utils.training.state import TrainState

LOOPED = '''
"""A loop over the middle blocks, its depth drawn for each batch."""
from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from models.backbone import Backbone, BackboneConfig
from models.base import Architecture


class Config(BackboneConfig):
    most: int = Field(4, ge=1, description="most loops in training")


class Inner(Backbone):
    def __init__(self, config):
        super().__init__(config)
        self.first, self.core = self.make_block(), nn.ModuleList([self.make_block()])
        self.deep = nn.Linear(config.hidden_size, config.hidden_size, dtype=config.param_dtype)

    def answer(self, x, info, depth):
        x = h = self.first(x, info)
        for _ in range(depth):
            for block in self.core:
                h = block(h + x, info)
        return h + 0.1 * self.deep(h) if depth > 2 else h


class Looped(Architecture):
    Config = Config

    def __init__(self, config_dict):
        super().__init__()
        self.config = Config(**config_dict)
        self.inner = Inner(self.config).to(self.config.param_dtype)

    def step_options(self, progress, rng):
        return {"depth": int(rng.integers(1, self.config.most + 1))}

    def eval_depth(self, progress=1.0):
        return 1 + round(progress * (self.config.most - 1))

    def forward(self, carry, batch, depth):
        data = {name: batch[name] for name in carry.current_data}
        done = torch.ones_like(carry.halted)
        new = replace(carry, steps=done.to(torch.int32), halted=done, current_data=data)
        answer = self.inner.answer(self.inner.embed(data), self.inner.sequence_info(data), depth)
        return new, {"logits": self.inner.logits(answer)}
'''
OPTIONS = dict(hidden_size=16, num_heads=2, forward_dtype="float64")
PRESETS = sorted(path.stem for path in (ROOT / "config/arch").glob("*.yaml"))
SMALL = """arch.hidden_size=32 arch.num_heads=2 arch.puzzle_emb_ndim=0 arch.puzzle_emb_len=0
    arch.forward_dtype=float32 seq_len=9 vocab_size=30 dry_run=true""".split()
SIZES = dict(batch_size=4, seq_len=9, vocab_size=30, num_puzzle_identifiers=1)
RUN = [
    "arch=transformer", "arch.name=my_looped@Looped", "~arch.num_layers", "~arch.halt_max_steps",
    "~arch.force_min_steps", "~arch.halt_exploration_prob", "~arch.post_refinement_steps",
    "arch.hidden_size=16", "arch.num_heads=2", "arch.puzzle_emb_ndim=0",
    "arch.forward_dtype=float64", "epochs=20",
    "ema_rate=0.9", "optimizer=muon", "eval_depths=[1,7]", "log_interval=1",
]  # fmt: skip


def random_batch() -> dict[str, torch.Tensor]:
    rng = draw_rng()
    tokens = torch.from_numpy(rng.integers(0, 30, (4, 10)))
    return dict(
        inputs=tokens[:, :-1], labels=tokens[:, 1:],
        puzzle_identifiers=torch.zeros(4, dtype=torch.int32),
        document_starts=torch.zeros(4, 9, dtype=torch.int32),
    )  # fmt: skip


@pytest.fixture
def looped(write_plugin):
    write_plugin("models", "my_looped", LOOPED)
    return load_class("my_looped@Looped")


def test_the_sets_of_step_options_are_found(looped):
    sets = looped(SIZES | OPTIONS).option_sets()
    assert sorted(dict(options)["depth"] for options in sets) == [1, 2, 3, 4]
    assert sum(sets.values()) == pytest.approx(1)


def test_a_weight_that_a_step_does_not_use_has_gradient_0(looped):
    model = looped(SIZES | OPTIONS)
    head = ACTLossHead(model, "softmax_cross_entropy")
    batch = random_batch()
    for depth, used in ((2, False), (3, True), (2, False)):
        head.zero_grad()
        _, loss, *_ = head((), head.initial_carry(batch), batch, depth=depth)
        loss.backward()
        assert all(p.grad is not None for p in head.parameters())
        assert bool(model.inner.deep.weight.grad.any()) == used


def test_a_drawn_depth_trains_resumes_and_evaluates(looped, text_corpus, run_training):
    whole = run_training(text_corpus, "whole", *RUN, "max_steps=10", "checkpoint_interval=5",
                         "keep_checkpoints=null")  # fmt: skip
    parts = run_training(text_corpus, "parts", *RUN, "max_steps=10", f"resume={whole / 'step_5'}")
    one, other = contents(whole / "step_10"), contents(parts / "step_10")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    depths = metrics_of(whole, "train/depth")
    assert depths[5:] == metrics_of(parts, "train/depth") and len(set(depths)) > 1
    micro = run_training(text_corpus, "micro", *RUN, "max_steps=10", "grad_accum_steps=2")
    assert metrics_of(micro, "train/lm_loss") == pytest.approx(metrics_of(whole, "train/lm_loss"))
    (loss,) = metrics_of(whole, "eval/all/lm_loss")
    (shallow,), (deep,) = (metrics_of(whole, f"eval/all/depth_{d}/lm_loss") for d in (1, 7))
    assert len({loss, shallow, deep}) == 3
    model = load_language_model(checkpoints_of(whole)[-1])
    assert model.steps == 4
    pair = [(model.encode("ab c"), model.encode(" de f"))]
    three = load_language_model(checkpoints_of(whole)[-1], steps=3)
    assert model.score(pair)[0].nats != three.score(pair)[0].nats


@pytest.mark.parametrize("preset", PRESETS)
def test_the_answer_at_the_evaluation_s_depth_is_the_evaluation(preset):
    config = load_config(compose_config([f"arch={preset}", *SMALL]))
    options = config.arch.options | SIZES
    if "halt_max_steps" in options:  # two steps tell as much as 48
        options |= {"halt_max_steps": 2, "force_min_steps": 0, "H_cycles": 2}
    model = load_class(config.arch.name)(options).eval()
    batch = random_batch()
    carry = model.initial_carry(batch)
    with torch.no_grad():
        for _ in range(model.eval_depth()):
            carry, outputs = model(carry, batch)
        info = model.inner.sequence_info(batch)
        answer = model.inner.answer(model.inner.embed(batch), info, model.eval_depth())
    torch.testing.assert_close(model.inner.logits(answer), outputs["logits"], rtol=0, atol=1e-5)


def test_budgets_that_an_architecture_cannot_have_are_refused(text_corpus, run_training):
    with pytest.raises(UserError, match=r"min_iterations=50 .* 4 steps"):
        run_training(text_corpus, "run", "max_steps=1", "min_iterations=50")
    with pytest.raises(UserError, match=r"iteration_curriculum .* one step"):
        run_training(text_corpus, "run", "max_steps=1", "arch.halt_max_steps=1",
                     "iteration_curriculum={start: 0.5}")  # fmt: skip


@pytest.mark.slow
def test_every_set_of_options_is_compiled_before_the_first_step(
    looped, text_corpus, run_training, monkeypatch
):
    """Its gradients are dropped: the losses are those of a run that is not compiled."""
    if CPUBackend().cannot_compile():
        pytest.skip("there is no C++ compiler")
    seen: list[dict[str, int]] = []
    real = TrainState.rehearse

    def rehearse(self, batch, options, backward):
        seen.append(options)
        real(self, batch, options, backward)

    monkeypatch.setattr(TrainState, "rehearse", rehearse)
    plain = run_training(text_corpus, "plain", *RUN, "max_steps=4")
    assert seen == []
    compiled = run_training(text_corpus, "compiled", *RUN, "max_steps=4", "compile=true")
    assert sorted(options["depth"] for options in seen) == [1, 2, 3, 4]
    losses = metrics_of(plain, "train/lm_loss")
    assert metrics_of(compiled, "train/lm_loss") == pytest.approx(losses, rel=1e-9)


def test_a_model_that_cannot_be_traced_trains_all_the_same(looped, text_corpus, run_training):
    real = looped.forward

    def forward(self, carry, batch, depth):
        assert torch.equal(carry.halted, carry.halted.clone())  # asks for values
        return real(self, carry, batch, depth)

    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="FLOPs"):
        patch.setattr(looped, "forward", forward)
        sizes = ["arch.hidden_size=24"]  # FLOPs of the others may be known already
        run = run_training(text_corpus, "run", *RUN, *sizes, "max_steps=1", "eval_depths=[]")
    assert metrics_of(run, "train/flops_per_s") == [0]
