"""Output head and token loss as one: against the formulas in float64, in parts of any size."""

import pytest
import torch
import torch.nn.functional as F
from loss_tools import formula

from dataset.common import IGNORE_LABEL_ID
from models import linear_loss as module
from models.base import Outputs
from models.linear_loss import WeightedTerm, linear_loss
from models.losses import ACTLossHead
from models.recursive_reasoning.transformer import Transformer
from models.token_losses import LOSSES

NAMES = list(LOSSES)


def draw(dtype=torch.float32, tokens=37, width=8, vocabulary=50, spread=3.0):
    hidden = torch.randn(tokens, width, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, dtype=torch.float64) * spread
    labels = torch.randint(vocabulary, (tokens,))
    scale = torch.rand(tokens, dtype=torch.float64)
    scale[::5] = 0  # without a label
    return (x.to(dtype).requires_grad_() for x in (hidden, weight)), labels, scale


def smoothing(logits, labels):
    return logits.gather(-1, labels[:, None])[:, 0] - logits.mean(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("elements", [1 << 25, 200, 1], ids=["one part", "parts", "tokens"])
@pytest.mark.parametrize("terms", [(), (WeightedTerm(0.3, smoothing),)], ids=["alone", "term"])
def test_losses_and_gradients_are_the_formulas(name, elements, terms, monkeypatch):
    monkeypatch.setattr(module, "_PART_ELEMENTS", {"cpu": elements})
    monkeypatch.setattr(module, "_CACHED_ELEMENTS", max(1, elements // 3))
    (hidden, weight), labels, scale = draw(torch.float64)
    found = linear_loss(hidden, weight, labels, scale, LOSSES[name], terms=terms)
    grads = torch.autograd.grad(2 * found.total, (hidden, weight))
    logits = hidden @ weight.T
    nll = formula(name, logits, labels)
    wanted = (nll * scale).sum()
    for factor, term, _ in terms:
        wanted = wanted + factor * (term(logits, labels) * scale).sum()
        torch.testing.assert_close(found.terms[0], term(logits, labels), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.total, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.nll, nll.detach(), rtol=1e-10, atol=1e-10)
    assert torch.equal(found.preds, logits.argmax(-1))
    for mine, right in zip(grads, torch.autograd.grad(2 * wanted, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_float32_agrees_with_float64_up_to_logits_of_ten_thousand(name, size):
    vocabulary = 300
    logits = (torch.rand(64, vocabulary, dtype=torch.float64) * 2 - 1) * size
    logits = logits.float().double()
    labels, scale = torch.randint(vocabulary, (64,)), torch.rand(64, dtype=torch.float64)
    x = logits.clone().requires_grad_()
    wanted = formula(name, x, labels)
    (slope,) = torch.autograd.grad((wanted * scale).sum(), x)
    narrow = logits.float()
    nll, preds = LOSSES[name].rows(narrow, labels, scale.float(), True)
    torch.testing.assert_close(nll.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(narrow.double(), slope, rtol=1e-5, atol=1e-5)
    assert torch.equal(preds, logits.argmax(-1))


def test_nothing_is_differentiated_without_a_gradient():
    (hidden, weight), labels, scale = draw()
    with torch.no_grad():
        found = linear_loss(hidden, weight, labels, scale, LOSSES["softmax_cross_entropy"])
    assert not found.total.requires_grad
    plain = F.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(found.nll, plain.detach())
    frozen = linear_loss(
        hidden, weight.detach(), labels, scale.float(), LOSSES["softmax_cross_entropy"]
    )
    (grad,) = torch.autograd.grad(frozen.total, hidden)
    (right,) = torch.autograd.grad(
        (F.cross_entropy(hidden @ weight.T, labels, reduction="none") * scale).sum(), hidden
    )
    torch.testing.assert_close(grad, right)


TERMS = {"label_smoothing": {"weight": 0.1}, "z_loss": {"weight": 1e-3}}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("terms", [{}, TERMS], ids=["alone", "terms"])
def test_a_step_is_the_same_with_and_without(name, tied, terms):
    """Rows without a label, ignored labels and terms: loss, metrics and every gradient."""
    sizes = dict(batch_size=4, seq_len=9, vocab_size=17, hidden_size=16, num_heads=2, num_layers=1)
    options = dict(forward_dtype="float64", tie_embeddings=tied)
    model = Transformer(sizes | options)
    batch = {name: torch.randint(17, (4, 9), dtype=torch.int32) for name in ("inputs", "labels")}
    batch["puzzle_identifiers"] = torch.zeros(4, dtype=torch.int32)
    batch["labels"][:, ::4] = IGNORE_LABEL_ID
    batch["labels"][2] = IGNORE_LABEL_ID
    head = ACTLossHead(model, name, terms=terms)
    seen = {}
    for fused in (True, False):
        head.fused = fused
        head.zero_grad()
        _, loss, metrics, kept, _ = head(("preds", "token_nll"), head.initial_carry(batch), batch)
        loss.backward()
        grads = {k: p.grad.clone() for k, p in head.named_parameters() if p.grad is not None}
        seen[fused] = {"loss": loss.detach()} | grads | kept
        seen[fused] |= {f"{k} {i}": m[i] for k, m in metrics.items() for i in (0, 1)}
    assert seen[True].keys() == seen[False].keys() and "z_loss" not in seen[True]
    for key, value in seen[True].items():
        torch.testing.assert_close(value, seen[False][key], rtol=1e-9, atol=1e-11, msg=key)


def test_the_logits_of_a_batch_are_made_only_where_they_are_read():
    """By an evaluation that asks for them, by a term, or for a head that is no plain product."""
    sizes = dict(batch_size=2, seq_len=5, vocab_size=11, hidden_size=16, num_heads=2, num_layers=1)
    model = Transformer(sizes | dict(forward_dtype="float32"))
    batch = {name: torch.randint(11, (2, 5), dtype=torch.int32) for name in ("inputs", "labels")}
    head, calls = ACTLossHead(model, "softmax_cross_entropy"), []
    model.inner.lm_head.register_forward_hook(lambda *_: calls.append(1))

    def step(*keys):
        calls.clear()
        *_, kept, _ = head(keys, head.initial_carry(batch), batch)
        return len(calls), kept

    assert step()[0] == 0
    assert step("preds", "token_nll")[0] == 0
    count, kept = step("logits")
    assert count == 1 and kept["logits"].shape == (2, 5, 11)
    model.inner.lm_head.bias = torch.nn.Parameter(torch.zeros(11))
    assert step()[0] == 1


def tiny_decoder():
    sizes = dict(batch_size=2, seq_len=5, vocab_size=11, hidden_size=16, num_heads=2, num_layers=1)
    return Transformer(sizes | dict(forward_dtype="float32"))


class Capped(Transformer):
    """Its outputs predict in a way of their own."""

    def forward(self, carry, batch):
        carry, outputs = super().forward(carry, batch)
        cap = lambda z: 0.1 * torch.tanh(self.inner.predict(z))  # noqa: E731
        return carry, Outputs(cap, readout=outputs["readout"])


class Doubled(ACTLossHead):
    """A loss head with a score of its own."""

    def score(self, logits, labels):
        scored = super().score(logits, labels)
        return scored | {"row_loss": 2 * scored["row_loss"]}


@pytest.mark.parametrize("kind", [Capped, Doubled])
def test_what_an_idea_overrides_is_not_bypassed(kind):
    model = tiny_decoder()
    if kind is Capped:
        model.__class__ = Capped
    head = (Doubled if kind is Doubled else ACTLossHead)(model, "softmax_cross_entropy")
    batch = {name: torch.randint(11, (2, 5), dtype=torch.int32) for name in ("inputs", "labels")}
    losses = []
    for fused in (True, False):
        head.fused = fused
        losses.append(head((), head.initial_carry(batch), batch)[1].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
