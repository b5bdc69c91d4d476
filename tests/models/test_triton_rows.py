"""The Triton kernels of the token loss, interpreted on the CPU and compiled without a card.

`make test-triton` runs them: Triton must know before it is imported that it is to interpret.
"""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_tools import LENGTH, ROWS, VOCAB, config_of
from test_fast import Card, head_of, packed_batch, step
from test_linear_loss import draw, formula

from dataset.common import IGNORE_LABEL_ID
from models import linear_loss as module
from models.linear_loss import WeightedTerm, linear_loss
from models.terms.base import TermConfig, TokenTerm
from models.terms.label_smoothing import LabelSmoothing
from models.terms.z_loss import ZLoss
from models.token_losses import LOSSES, sum_rows
from utils.training.state import choose_kernels

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton is not installed or not interpreted: make test-triton", True)

from models import triton_rows

NAMES = list(LOSSES)
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}
HERE = Path(__file__).parent


def random_logits(width: int, size: float, dtype=torch.float32, tokens=6):
    """Logits that are exact in `dtype`, labels and scale."""
    logits = (torch.rand(tokens, width, dtype=torch.float64) * 2 - 1) * size
    labels = torch.randint(width, (tokens,))
    return (
        logits.to(dtype),
        labels,
        torch.rand(tokens, dtype=torch.promote_types(dtype, torch.float32)),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("width", [1, 11, 300, 4500], ids="{} logits".format)
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_losses_and_gradients_are_the_formulas(name, size, width, dtype):
    logits, labels, scale = random_logits(width, size, dtype)
    x = logits.double().requires_grad_()
    wanted = formula(name, x, labels)
    (slope,) = torch.autograd.grad((wanted * scale.double()).sum(), x)
    before = logits.clone()
    nll, preds = triton_rows.compute_losses(LOSSES[name], logits, labels, scale, True)
    close = partial(torch.testing.assert_close, rtol=EXACT[dtype], atol=EXACT[dtype])
    close(nll.double(), wanted.detach())
    close(logits.double(), slope)
    assert torch.equal(preds, before.argmax(-1))
    again = before.clone()
    only, _ = triton_rows.compute_losses(LOSSES[name], again, labels, scale, False)
    assert torch.equal(only, nll) and torch.equal(again, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_confident_prediction_keeps_its_small_gradient(name):
    """p - 1 of the label would be 0 in float32."""
    logits = torch.full((1, 100), -4.0)
    logits[0, 7] = 20.0 if name == "softmax_cross_entropy" else 1e9
    x = logits.double().requires_grad_()
    label, one = torch.tensor([7]), torch.ones(1)
    (slope,) = torch.autograd.grad(formula(name, x, label).sum(), x)
    triton_rows.compute_losses(LOSSES[name], logits, label, one, True)
    torch.testing.assert_close(logits[0, 7].double(), slope[0, 7], rtol=1e-5, atol=0)


def test_large_logits_cancel_before_digits_are_lost():
    logits, labels, scale = random_logits(300, 2)
    logits += 1e4
    wanted = formula("softmax_cross_entropy", logits.double(), labels)
    softmax = LOSSES["softmax_cross_entropy"]
    nll, _ = triton_rows.compute_losses(softmax, logits, labels, scale, True)
    torch.testing.assert_close(nll.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_first_of_equal_logits_is_predicted(name, dtype):
    logits, labels, scale = random_logits(5000, 2, dtype, tokens=4)
    logits[0] = 0
    logits[1, [3, 2051, 4999]] = 3  # in several blocks
    logits[2, [2048, 2049]] = 3
    expected = logits.argmax(-1)
    assert expected[:3].tolist() == [0, 3, 2048]
    plain = logits.clone()
    nll, preds = triton_rows.compute_losses(LOSSES[name], logits, labels, scale, True)
    right, _ = LOSSES[name].rows(plain, labels, scale, True)
    assert torch.equal(preds, expected)
    torch.testing.assert_close(nll, right)
    # the interpreter truncates to bfloat16, a card rounds
    torch.testing.assert_close(logits, plain, rtol=2**-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_without_a_label_gets_no_gradient(name):
    logits, labels, scale = random_logits(50, 3, tokens=3)
    labels[1], scale[1] = IGNORE_LABEL_ID, 0
    nll, preds = triton_rows.compute_losses(LOSSES[name], logits, labels, scale, True)
    assert nll.isfinite().all() and not logits[1].any()
    assert logits[[0, 2]].all() and preds.max() < 50


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_row_is_not_finite_and_predicts_a_token(name):
    """So that the step is recognised as not finite; other rows are unharmed."""
    logits, labels, scale = random_logits(40, 3, tokens=5)
    logits[0], logits[1, 7], logits[2, 3], logits[3, 5:] = (
        torch.nan,
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    labels[:] = 4
    nll, preds = triton_rows.compute_losses(LOSSES[name], logits, labels, scale, True)
    assert not nll[:3].isfinite().any() and nll[4].isfinite()
    assert preds.min() >= 0 and preds.max() < 40
    assert not logits[:3].isfinite().all(1).any() and logits[4].isfinite().all()


def test_a_row_does_not_depend_on_the_others():
    logits, labels, scale = random_logits(300, 5, tokens=9)
    whole, alone = logits.clone(), logits[4:5].clone()
    for name in NAMES:
        nll, _ = triton_rows.compute_losses(LOSSES[name], whole, labels, scale, True)
        one, _ = triton_rows.compute_losses(LOSSES[name], alone, labels[4:5], scale[4:5], True)
        assert torch.equal(nll[4:5], one) and torch.equal(whole[4:5], alone)


def test_no_tokens_are_no_error():
    empty = torch.empty(0, 30)
    labels, scale = torch.empty(0, dtype=torch.int64), torch.empty(0)
    found = triton_rows.compute_losses(LOSSES[NAMES[0]], empty, labels, scale, True)
    assert [len(x) for x in found] == [0, 0]


class Margin(TokenTerm):
    """A function of the sums of somebody's own, with all of them in it."""

    metric = "margin"

    def of_sums(self, sums):
        return (sums.log_z - sums.label).tanh() * sums.mean


class OwnSmoothing(LabelSmoothing):
    """What it overrides must not be bypassed."""

    def of_tokens(self, logits, labels, loss_type):
        return logits.float().square().mean(-1).to(logits.dtype)


TERMS = {
    "z_loss": ZLoss, "smoothing": LabelSmoothing, "own sums": Margin, "own logits": OwnSmoothing,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [1 << 25, 400], ids=["one part", "parts"])
@pytest.mark.parametrize("terms", [[], *([t] for t in TERMS), list(TERMS)[:3]], ids=" ".join)
def test_the_fused_loss_is_the_same_with_and_without(name, parts, terms, monkeypatch):
    monkeypatch.setattr(module, "_PART_ELEMENTS", {"cpu": parts})
    (hidden, weight), labels, scale = draw(torch.float64)
    weighted = []
    for i, term in enumerate(terms):
        made = TERMS[term](TermConfig(weight=0.1))
        assert made.needs_only_sums == (term != "own logits")
        weighted.append(WeightedTerm(
            0.3 + i, partial(made.of_tokens, loss_type=LOSSES[name]),
            made.of_sums if made.needs_only_sums else None,
        ))  # fmt: skip
    results = []
    for kernel in ("triton", None):
        found = linear_loss(
            hidden, weight, labels, scale, LOSSES[name], terms=weighted, kernel=kernel
        )
        grads = torch.autograd.grad(found.total, (hidden, weight))
        results.append((found.total.detach(), found.nll, found.preds, *found.terms, *grads))
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)


def test_sums_are_those_of_the_scores():
    for name in NAMES:
        logits, labels, _ = random_logits(70, 20)
        _, _, sums, _ = triton_rows.compute_sums(LOSSES[name], logits.clone(), labels)
        right = sum_rows(LOSSES[name].softmax_logits(logits.double()), labels)
        for one, other in zip(sums, right, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("terms", ["", "{z_loss: {weight: 0.01}, label_smoothing: {weight: 0.1}}"])
def test_a_training_step_is_the_same_with_and_without(dtype, terms):
    options = [f"arch.forward_dtype={dtype}"] + [f"arch.loss.terms={terms}"] * bool(terms)
    batch, found = packed_batch(), []
    batch["labels"][:, ::5] = IGNORE_LABEL_ID
    assert batch["labels"].shape == (ROWS, LENGTH) and batch["labels"].max() < VOCAB
    for kernel in ("triton", None):
        head = head_of("[loss]", *options)
        head.kernel = kernel
        found.append(step(head, batch))
    (loss, mine), (right, plain) = found
    assert loss == pytest.approx(right, rel=1e-6)
    cosine = torch.dot(mine, plain) / (mine.norm() * plain.norm())
    assert cosine >= 1 - {"float32": 1e-6, "bfloat16": 1e-3}[dtype]


@pytest.mark.parametrize("fast", ["true", "[loss]", "[weights]"])
@pytest.mark.parametrize("loss_type", NAMES)
def test_a_card_that_runs_it_takes_it_in_the_fast_path_of_the_loss(fast, loss_type, capsys):
    """Here the interpreter stands in for a card."""
    config = config_of("athena_trm_tiny", f"fast={fast}", f"arch.loss.loss_type={loss_type}")
    head = head_of(fast, f"arch.loss.loss_type={loss_type}")
    choose_kernels(config, head, Card())
    assert (head.kernel == "triton") == (fast != "[weights]")
    assert capsys.readouterr().out == ""


def test_a_card_on_which_it_computes_something_else_does_not_take_it(monkeypatch, capsys):
    monkeypatch.setattr(triton_rows, "compute_losses", lambda *_: (torch.zeros(3), torch.zeros(3)))
    config, head = config_of("athena_trm_tiny"), head_of("true")
    choose_kernels(config, head, Card())
    assert head.kernel is None and "loss" in capsys.readouterr().out


@pytest.mark.slow
def test_every_kernel_compiles_for_cards_that_are_not_here(tmp_path):
    """For compute capability 8.0 and 9.0, up to machine code that spills no registers."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), env.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "compile_triton_rows.py")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 24 and all(" ok " in line for line in lines), done.stdout
