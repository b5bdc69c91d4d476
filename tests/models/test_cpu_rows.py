"""The C++ kernel of the token loss: against the formulas in float64."""

import pytest
import torch
from kernel_tools import can_run_kernels
from loss_tools import formula

from models.cpu_rows import compute_losses
from models.linear_loss import linear_loss
from models.token_losses import LOSSES

pytestmark = pytest.mark.skipif(
    not can_run_kernels(), reason="this CPU has no AVX-512 BF16, or there is no C++ compiler"
)
NAMES = list(LOSSES)


def expected(name, logits, labels, scale):
    """Losses and gradient in float64."""
    exact = logits.double().requires_grad_()
    nll = formula(name, exact, labels)
    (grad,) = torch.autograd.grad((nll * scale.double()).sum(), exact)
    return nll.detach(), grad


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [1, 15, 16, 33, 1000, 2100])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_losses_and_gradients_are_the_formulas(name, dtype, width, size):
    logits = (size * (2 * torch.rand(23, width) - 1)).to(dtype)
    labels, scale = torch.randint(width, (23,)), torch.rand(23)
    scale[::5] = 0  # without a label
    right, grad = expected(name, logits, labels, scale)
    preds = logits.argmax(-1)
    untouched = logits.clone()
    nll, found = compute_losses(LOSSES[name], untouched, labels, scale, False)
    assert torch.equal(untouched, logits) and torch.equal(found, preds)
    graded, again = compute_losses(LOSSES[name], logits, labels, scale, True)
    assert torch.equal(nll, graded) and torch.equal(found, again)
    torch.testing.assert_close(nll.double(), right, rtol=1e-5, atol=1e-5)
    exact = {torch.float32: 1e-5, torch.bfloat16: 1 / 250}[dtype]
    torch.testing.assert_close(logits.double(), grad, rtol=exact, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_first_of_equal_logits_is_predicted(dtype):
    logits = torch.randint(3, (200, 70)).to(dtype)
    labels, scale = torch.zeros(200).long(), torch.ones(200)
    _, preds = compute_losses(LOSSES[NAMES[0]], logits.clone(), labels, scale, False)
    assert torch.equal(preds, (logits == logits.amax(-1, keepdim=True)).int().argmax(-1))


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_stays_in_its_row(name):
    logits, labels = torch.randn(3, 40).bfloat16(), torch.tensor([0, 1, 2])
    logits[1, 30] = torch.nan
    nll, preds = compute_losses(LOSSES[name], logits, labels, torch.ones(3), True)
    assert nll.isnan().tolist() == [False, True, False] and 0 <= preds.min() <= preds.max() < 40
    assert logits[1, 30].isnan() and logits[::2].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_fused_loss_is_the_same_with_and_without(name, dtype):
    hidden, weight = torch.randn(37, 8, dtype=dtype), 3 * torch.randn(50, 8, dtype=dtype)
    labels, scale = torch.randint(50, (37,)), torch.rand(37, dtype=torch.float64).to(dtype)
    found = []
    for kernel in ("cpu", None):
        tensors = [x.detach().requires_grad_() for x in (hidden, weight)]
        loss = linear_loss(*tensors, labels, scale, LOSSES[name], kernel=kernel)
        found.append((loss.total.detach(), *torch.autograd.grad(loss.total, tensors)))
    for mine, right in zip(*found, strict=True):
        assert (mine - right).norm() <= {torch.bfloat16: 1e-2}.get(dtype, 1e-5) * right.norm()


@pytest.mark.parametrize("name", NAMES)
def test_minus_infinity_has_no_probability(name):
    logits, labels, scale = torch.randn(3, 40), torch.tensor([0, 1, 2]), torch.ones(3)
    logits[1, 30] = -torch.inf
    exact = logits.clone()
    right, _ = LOSSES[name].rows(exact, labels, scale, True)
    nll, _ = compute_losses(LOSSES[name], logits, labels, scale, True)
    torch.testing.assert_close(nll, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("label", [-100, 40, 10**12])
def test_a_label_outside_the_vocabulary_is_an_error(label):
    logits, labels = torch.randn(3, 40).bfloat16(), torch.tensor([0, label, 2])
    with pytest.raises(IndexError, match=f"{label}.*40|40.*{label}"):
        compute_losses(LOSSES[NAMES[0]], logits, labels, torch.ones(3), True)
