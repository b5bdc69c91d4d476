"""Variants of the recursion, each one file: their formulas, and a whole course of each."""

import json

import pytest
import torch
from training_tools import TINY, contents, finish, metrics_of, start

from models.inference.loading import load_language_model
from models.recursive_reasoning.hier6 import Hier6
from models.recursive_reasoning.single_z import SingleZ
from scripts import estimate
from utils.checkpoint.format import checkpoints_of
from utils.core.functions import load_class

SIZES = dict(
    batch_size=2, seq_len=9, vocab_size=30, num_puzzle_identifiers=2, hidden_size=16, num_heads=2,
    H_cycles=3, L_cycles=6, L_layers=1, halt_max_steps=2, halt_exploration_prob=0.0,
    puzzle_emb_ndim=16, forward_dtype="float64",
)  # fmt: skip
NAMES = ("single_z@SingleZ", "hier6@Hier6")


def naive_single_z(net, z, x):
    (z_L,) = z
    for _ in range(3):
        for _ in range(6):
            z_L = net(z_L + x)
        z_L = net(z_L)
    return [z_L]


def naive_hier6(net, z, x):
    z_H, *z_L = z
    for _ in range(3):
        for k in range(6):
            z_L[k] = net(sum(z_L) + z_H + x)
        z_H = net(z_H + sum(z_L))
    return [z_H, *z_L]


@pytest.mark.parametrize(("cls", "naive"), [(SingleZ, naive_single_z), (Hier6, naive_hier6)])
def test_two_steps_are_those_of_the_formulas(cls, naive):
    model = cls(SIZES).eval()
    tokens = torch.randint(30, (2, 9))
    batch = dict(
        inputs=tokens, labels=tokens, puzzle_identifiers=torch.tensor([0, 1]),
        document_starts=torch.zeros_like(tokens),
    )  # fmt: skip
    inner = model.inner
    x, info = inner.embed(batch), inner.sequence_info(batch)
    (block,) = inner.L_level.layers
    z = [start.expand_as(x) for start in inner.starts().values()]
    carry = model.initial_carry(batch)
    for _ in range(2):
        with torch.no_grad():
            carry, outputs = model(carry, batch)
            z = naive(lambda h: block(h, info), z, x)
        for name, expected in zip(inner.streams, z, strict=True):
            torch.testing.assert_close(carry.latents[name], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(outputs["logits"], inner.logits(z[0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(inner.answer(x, info, 2), z[0], rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_variant_trains_restarts_and_continues_texts(name, text_corpus, run_training):
    """Through the preset of the tiny model, with nothing but the name changed."""
    options = [f"arch.name=recursive_reasoning.{name}", "arch.L_cycles=6", "max_steps=10",
               "epochs=20", "keep_checkpoints=null", "ema_rate=0.9"]  # fmt: skip
    whole = run_training(text_corpus, "whole", *options, "checkpoint_interval=5")
    parts = run_training(text_corpus, "parts", *options, f"resume={whole / 'step_5'}")
    one, other = contents(whole / "step_10"), contents(parts / "step_10")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    streams = load_class(f"recursive_reasoning.{name}").Inner.streams
    carried = {f"carry_0/carry/latents/{stream}" for stream in streams}
    assert {key for key in one if "/latents/" in key} == carried
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = {key for line in lines for key in line}
    assert {f"train/{stream}_norm" for stream in streams} <= found
    assert "eval/all/step_2/lm_loss" in found
    model = load_language_model(checkpoints_of(whole)[-1])
    (score,) = model.score([(model.encode("ab c"), model.encode(" de f"))])
    assert score.nats > 0
    planned, overrides = estimate.parse(["hardware=cpu", *TINY, *options, "vocab_size=300"])
    assert estimate.plan(planned, [*overrides, f"data_paths=[{text_corpus}]"]).seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_a_variant_as_one_does(name, text_corpus, tmp_path, run_training):
    options = [f"arch.name=recursive_reasoning.{name}", "arch.L_cycles=6", "max_steps=6",
               "epochs=20", "arch.forward_dtype=float64", "evaluators=[]"]  # fmt: skip
    one, two = run_training(text_corpus, "one", *options), tmp_path / "two"
    code, out, err = finish(start(
        *TINY, *options, f"data_paths=[{text_corpus}]", f"checkpoint_path={two}", "run_name=test",
        ranks=2,
    ))  # fmt: skip
    assert code == 0, out + err
    losses = metrics_of(one, "train/lm_loss")
    assert metrics_of(two, "train/lm_loss") == pytest.approx(losses, abs=1e-8)
