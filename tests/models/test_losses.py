"""Losses against float64 formulas, and the head's halting targets and sums."""

import math

import pytest
import torch
from loss_tools import reference_probabilities
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.common import IGNORE_LABEL_ID
from models import token_losses
from models.backbone import BackboneConfig
from models.base import Architecture, Carry
from models.losses import ACTLossHead
from models.token_losses import LOSSES
from utils.core.errors import UserError

NAMES = list(LOSSES)
SIZES = dict(batch_size=3, seq_len=4, vocab_size=6, hidden_size=4, num_heads=2)


@pytest.mark.parametrize("name", NAMES)
def test_loss_equals_its_formula(name):
    logits = torch.randn(4, 5, 11) * 10
    labels = torch.randint(11, (4, 5))
    labels[0, 2] = labels[3, 4] = IGNORE_LABEL_ID
    loss = LOSSES[name].cross_entropy(logits, labels)
    log_p = reference_probabilities(name, logits).log()
    expected = -log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    expected[labels == IGNORE_LABEL_ID] = 0
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences(name):
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, IGNORE_LABEL_ID, 6])
    assert torch.autograd.gradcheck(lambda x: LOSSES[name].cross_entropy(x, labels), logits)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_at_zero_one_and_far_out(name):
    logits = torch.tensor([[0.0, 1.0, -1.0, 1e4, -1e4, 0.0]], requires_grad=True)
    LOSSES[name].cross_entropy(logits, torch.tensor([0])).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] < 0


def test_stablemax_gradient_at_zero_is_one_sided_right():
    """s'(0) = 1 and (log s)'(0) = 1; autograd through a careless `where` gives 0 or 2."""
    logits = torch.zeros(1, 4, requires_grad=True)
    LOSSES["stablemax_cross_entropy"].cross_entropy(logits, torch.tensor([1])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25, -0.75, 0.25, 0.25]]))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing(name, monkeypatch):
    logits, labels = torch.randn(6, 5, 9), torch.randint(9, (6, 5))
    whole = LOSSES[name].cross_entropy(logits, labels)
    monkeypatch.setattr(token_losses, "_CHUNK_ELEMENTS", 40)
    assert torch.equal(whole, LOSSES[name].cross_entropy(logits, labels))


@pytest.mark.parametrize("name", NAMES)
def test_a_softmax_over_exported_logits_gives_the_models_probabilities(name):
    logits = torch.randn(3, 13) * 5
    shown = LOSSES[name].softmax_logits(logits).softmax(-1)
    torch.testing.assert_close(
        shown.double(), reference_probabilities(name, logits), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_never_become_float64(name):
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                seen.add(out.dtype)
            return out

    logits = torch.randn(4, 9, dtype=torch.bfloat16, requires_grad=True)
    with Watch():
        LOSSES[name].cross_entropy(logits, torch.randint(9, (4,))).sum().backward()
    assert torch.float32 in seen and torch.float64 not in seen


class Replay(Architecture):
    """A model that returns given outputs, so that the head alone is tested."""

    def __init__(self, steps, halted, outputs, last_loss=None):
        super().__init__()
        self.config, self.inner = BackboneConfig(**SIZES), torch.nn.Module()
        self.steps, self.halted, self.outputs = steps, halted, outputs
        self.memory = {} if last_loss is None else {"halting/last_loss": last_loss}

    def forward(self, carry, batch):
        carry = Carry({}, self.steps, self.halted, batch, self.memory)
        return carry, dict(self.outputs)


def replay(halting=None, last_loss=None, training=True, loss_type="softmax_cross_entropy", **terms):
    """Row 0 right, row 1 half right, row 2 without labels; all but row 1 have halted."""
    labels = torch.tensor([[1, 2], [1, 2], [IGNORE_LABEL_ID] * 2])
    preds = torch.tensor([[1, 2], [1, 0], [0, 0]])
    logits = 4.0 * torch.nn.functional.one_hot(preds, 4).float()
    outputs = dict(logits=logits, q_halt_logits=torch.tensor([3.0, -2.0, 7.0]))
    outputs["q_continue_logits"] = torch.zeros(3)
    data = dict(labels=labels, iteration_targets=torch.tensor([5, 2, 1]))
    model = Replay(torch.tensor([2, 3, 4]), torch.tensor([True, False, True]), outputs, last_loss)
    head = ACTLossHead(model, loss_type, terms={"halting": halting or {}} | terms)
    return head.train(training)(return_keys=("token_nll",), carry=None, batch=data)


def bce(logit: float, target: bool) -> float:
    return math.log1p(math.exp(-logit if target else logit))


def test_rows_without_labels_enter_no_loss_and_no_metric():
    _, loss, metrics, outputs, all_halted = replay()
    log_z = math.log(math.exp(4) + 3)
    lm = (log_z - 4) + ((log_z - 4) + log_z) / 2
    halting = bce(3.0, True) + bce(-2.0, False)
    assert loss.item() == pytest.approx(lm + 0.5 * halting, rel=1e-6)
    found = {name: (total.item(), count.item()) for name, (total, count) in metrics.items()}
    assert found["exact_accuracy"] == found["q_halt_accuracy"] == found["accuracy"] == (1, 1)
    assert found["steps"] == (2, 1)
    assert found["lm_loss"] == (pytest.approx(lm), 2)
    assert found["q_halt_loss"] == (pytest.approx(halting), 2)
    assert outputs["token_nll"][2].eq(0).all() and not all_halted


def test_a_term_adds_its_weight_times_its_loss():
    plain = replay()[1].item()
    for name, term in (("label_smoothing", "label_smoothing_loss"), ("z_loss", "z_loss")):
        _, loss, metrics, _, _ = replay(**{name: {"weight": 0.2}})
        total, count = metrics[term]
        assert count == 2 and total > 0
        assert loss.item() == pytest.approx(plain + 0.2 * total.item(), rel=1e-6)
        assert term not in replay(training=False, **{name: {"weight": 0.2}})[2]
    none = replay(halting=None)[1] - replay()[1]
    assert none == 0


@pytest.mark.parametrize("name", NAMES)
def test_smoothed_labels_are_a_mixture_with_the_uniform(name):
    """Against the cross-entropy of (1 - e) one-hot + e uniform, in float64."""
    _, loss, _, _, _ = replay(loss_type=name, label_smoothing={"weight": 0.3})
    _, plain, _, _, _ = replay(loss_type=name)
    preds = torch.tensor([[1, 2], [1, 0]])
    logits = 4.0 * torch.nn.functional.one_hot(preds, 4).double()
    log_p = reference_probabilities(name, logits).log()
    labels = torch.tensor([[1, 2], [1, 2]])
    picked = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    expected = (0.3 * (picked - log_p.mean(-1))).mean(-1).sum().item()
    assert (loss - plain).item() == pytest.approx(expected, rel=1e-5)


def test_the_z_loss_is_the_squared_normalizer():
    _, _, metrics, _, _ = replay(z_loss={})
    expected = 2 * math.log(math.exp(4) + 3) ** 2  # two rows, each position alike
    assert metrics["z_loss"][0].item() == pytest.approx(expected, rel=1e-5)


def test_a_term_may_be_left_out_and_one_that_reads_too_much_is_refused():
    model = Replay(torch.tensor([1]), torch.tensor([True]), {"logits": torch.zeros(1, 1, 4)})
    batch = dict(labels=torch.tensor([[1]]))
    head = ACTLossHead(model, "softmax_cross_entropy", terms={"halting": None})
    assert head.terms == []
    assert head((), None, batch)[1].item() == pytest.approx(math.log(4))
    head = ACTLossHead(model, "softmax_cross_entropy", terms={"reasoning": {}})
    with pytest.raises(UserError, match=r"terms\.reasoning reads reasoning_logits"):
        head((), None, batch)


@pytest.mark.parametrize(
    ("halt_target", "targets"),
    [
        ("exact", (True, False)),
        ("budget", (False, True)),  # steps 2 of 5, 3 of 2
        ("exact_or_budget", (True, True)),
        ("plateau", (False, True)),  # gained 10 nats, 0.001 nats
    ],
)
def test_halt_targets(halt_target, targets):
    row_losses = replay({"target": "plateau"}, torch.zeros(3))[0].memory["halting/last_loss"]
    last = row_losses + torch.tensor([10.0, 0.001, 0.0])
    _, _, metrics, _, _ = replay({"target": halt_target, "plateau_threshold": 0.01}, last)
    expected = bce(3.0, targets[0]) + bce(-2.0, targets[1])
    assert metrics["q_halt_loss"][0].item() == pytest.approx(expected, rel=1e-6)


def test_terms_that_lack_something_are_left_out_of_an_evaluation():
    """A base is loaded for training alone, and scored texts bring no reasoning labels."""
    terms = {"kl": {"base": "nowhere", "weight": 1.0}, "reasoning": {}}
    plain, loss = (replay(training=False, **given)[1] for given in ({}, terms))
    assert plain == loss


def test_a_term_that_is_there_twice_has_two_metrics():
    _, _, metrics, _, _ = replay(z_loss={}, more={"name": "z_loss", "weight": 0.5})
    assert metrics["z_loss"][0] == metrics["more_z_loss"][0]
