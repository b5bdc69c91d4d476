"""An optimizer of one's own: one file, named module@Class, with options that are checked."""

import re

import pytest
import yaml
from training_tools import IDENTIFIERS, contents, differing, make_config

from utils.checkpoint.format import Checkpoint
from utils.config.load import load_config
from utils.config.saved import changed_keys, dump_config
from utils.core.errors import UserError

PACKAGE = "utils.training.optimizers"
LION = """
import pydantic
import torch


class Lion(torch.optim.Optimizer):
    class Config(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid", strict=True)
        scale: float = 0.5

    @classmethod
    def build(cls, model, groups, lr, betas, scale):
        return [cls(groups, dict(lr=lr, betas=betas, scale=scale))]

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                sign = torch.sign(beta1 * mean + (1 - beta1) * p.grad)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(sign, alpha=group["lr"] * group["scale"])
                mean.lerp_(p.grad, 1 - beta2)
"""
BROKEN = """
import torch


def adamw(parameters):
    return torch.optim.AdamW([p for p in parameters])


class Forgets:
    @staticmethod
    def build(model, groups, lr, betas):
        return [adamw(list(model.parameters())[1:])]


class Repeats:
    @staticmethod
    def build(model, groups, lr, betas):
        return [adamw(model.parameters()), adamw(list(model.parameters())[:1])]


class Alone:
    @staticmethod
    def build(model, groups, lr, betas):
        return adamw(model.parameters())


class Closed:
    @staticmethod
    def build(model, groups, lr, betas):
        class NoClosure(torch.optim.AdamW):
            def step(self):
                pass

        return [NoClosure(model.parameters())]


class Unbuilt:
    def build(self, model, groups, lr, betas):
        return []


class Whole(Forgets):
    takes_shards = False
"""
RUN = [
    "max_steps=4", "epochs=20", "evaluators=[]", "eval_max_batches=1", "keep_checkpoints=null",
    "ema_rate=0.9",
]  # fmt: skip
OWN = "optimizer={name: lion@Lion, scale: 0.25}"


@pytest.fixture
def lion(write_plugin):
    write_plugin(PACKAGE, "lion", LION)


def complaint(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        make_config("unused", *overrides)
    return str(error.value)


def test_one_of_one_s_own_trains_and_resumes_bit_for_bit(text_corpus, run_training, lion):
    options = [*RUN, *IDENTIFIERS, "weight_decay=0.1", OWN]
    whole = run_training(text_corpus, "whole", *options, "checkpoint_interval=2")
    parts = run_training(text_corpus, "parts", *options, f"resume={whole / 'step_2'}")
    assert differing(whole / "step_4", parts / "step_4") == []
    assert any(name.endswith("/mean") for name in contents(whole / "step_4"))
    saved = yaml.safe_load((whole / "step_4" / "config.yaml").read_text("utf-8"))
    assert saved["optimizer"] == {"name": "lion@Lion", "scale": 0.25}
    (state,) = Checkpoint(whole / "step_4").tensors("optimizer")
    assert state["param_groups"][0]["scale"] == 0.25


def test_an_option_that_changed_or_another_optimizer_is_refused(text_corpus, run_training, lion):
    step = run_training(text_corpus, "run", *RUN, OWN, "max_steps=1") / "step_1"
    resumed = [*RUN, "max_steps=1", f"resume={step}"]
    for change, key in (
        ("optimizer=adamw", "optimizer"),
        ("optimizer=lion@Lion", "optimizer.scale"),
    ):
        with pytest.raises(UserError) as error:
            run_training(text_corpus, "other", *resumed, change)
        assert re.findall(r"resume_allow=\[(.*?)\]", str(error.value)) == [key]
    allowed = "resume_allow=[max_steps,optimizer.scale]"
    run = run_training(text_corpus, "other", *resumed, change, "max_steps=2", allowed)
    (state,) = Checkpoint(run / "step_2").tensors("optimizer")
    assert state["param_groups"][0]["scale"] == 0.5


def test_moments_of_another_kind_start_from_zero(text_corpus, run_training, lion, capsys):
    """Lion would find AdamW's moments under names that it does not have."""
    step = run_training(text_corpus, "run", *RUN, "optimizer=adamw", "max_steps=1") / "step_1"
    options = [*RUN, OWN, "max_steps=2", "resume_allow=[max_steps,optimizer]"]
    run = run_training(text_corpus, "other", *options, f"resume={step}")
    assert "no moments for this optimizer" in capsys.readouterr().out
    (state,) = Checkpoint(run / "step_2").tensors("optimizer")
    assert {key for moments in state["state"].values() for key in moments} == {"mean"}


def test_a_name_stays_a_name_in_the_saved_config():
    for given in ("adamw", "muon@Muon"):
        assert dump_config(make_config("x", f"optimizer={given}"))["optimizer"] == given
    whole = make_config("x", "optimizer={name: muon, momentum: 0.9}")
    assert dump_config(whole)["optimizer"] == {"name": "muon", "momentum": 0.9}
    assert load_config(whole.model_dump()) == whole


def test_an_option_that_a_saved_run_did_not_give_counts_as_its_default():
    saved = dump_config(make_config("x", "optimizer=muon"))
    assert changed_keys(make_config("x", "optimizer={name: muon, momentum: 0.95}"), saved) == (
        {},
        [],
    )
    changed, _ = changed_keys(make_config("x", "optimizer={name: muon, momentum: 0.9}"), saved)
    assert changed == {"optimizer.momentum": (0.95, 0.9)}
    saved["optimizer"] = {"name": "muon", "warp": 1}
    assert changed_keys(make_config("x", "optimizer=muon"), saved) == ({}, ["optimizer.warp"])


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("adam", ["'adam'", "adam_atan2, adamw, muon", "did you mean 'adamw'?"]),
        ("Lion", ["'Lion'", "did you mean 'lion@Lion'?"]),
        ("lin@Lion", ["'lin@Lion'", "did you mean 'lion'?"]),
        ("lion@Loin", ["'lion@Loin'", "did you mean 'Lion'?"]),
        ("{name: lion@Lion, scal: 1.0}", ["'optimizer.scal'", "did you mean 'optimizer.scale'?"]),
        ("{name: lion@Lion, scale: much}", ["optimizer.scale", "a number", "'much'"]),
        ("{name: muon, ns_step: 3}", ["'optimizer.ns_step'", "did you mean 'optimizer.ns_steps'?"]),
        ("{name: muon, ns_steps: 0}", ["optimizer.ns_steps", "at least 1", "0"]),
        ("{name: adamw, lr: 1.0}", ["'optimizer.lr'", "did you mean 'lr'?"]),
        ("{scale: 1.0}", ["optimizer.name"]),
        ("5", ["optimizer", "adam_atan2, adamw, muon", "module@Class", "5"]),
    ],
)
def test_mistakes_are_answered_with_the_nearest(lion, given, needed):
    line = complaint(f"optimizer={given}")
    assert "\n" not in line and all(part in line for part in needed), line


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("Forgets", ["embed_tokens.embedding_weight", "0 optimizers"]),
        ("Repeats", ["embed_tokens.embedding_weight", "2 optimizers"]),
        ("Alone", ["list of torch.optim.Optimizer"]),
        ("Closed", ["NoClosure", "closure"]),
        ("Unbuilt", ["build(model, groups, lr, betas"]),
    ],
)
def test_one_that_breaks_the_contract_is_named(
    text_corpus, run_training, write_plugin, name, needed
):
    write_plugin(PACKAGE, "broken", BROKEN)
    with pytest.raises(UserError) as error:
        run_training(text_corpus, "run", *RUN, f"optimizer=broken@{name}")
    line = str(error.value)
    assert all(part in line for part in [f"broken@{name}", *needed]), line


def test_one_that_needs_whole_tensors_refuses_fsdp(write_plugin):
    write_plugin(PACKAGE, "broken", BROKEN)
    line = complaint("optimizer=broken@Whole", "parallel=fsdp")
    assert all(part in line for part in ("fsdp", "broken@Whole", "ddp"))
    make_config("x", "optimizer=broken@Whole", "parallel=ddp")
    make_config("x", "optimizer=broken@Forgets", "parallel=fsdp")
