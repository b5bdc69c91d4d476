"""The gate of SwiGLU as one operator, against float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import can_run_kernels

from models import swiglu as module
from models.swiglu import swiglu


def plain(joint):
    gate, up = joint.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.fixture(params=["C++", "PyTorch"])
def kernel(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(module, "cpu_kernels", lambda: None)
    elif not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")


@pytest.mark.parametrize("inner", [256, 24])
@pytest.mark.parametrize("contiguous", [True, False])
def test_values_and_gradients(kernel, inner, contiguous):
    joint = 6 * torch.randn(3, 37, 2 * inner)
    joint[0, 0, :8] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 3e30, -3e38])
    joint = joint.bfloat16() if contiguous else joint.bfloat16().transpose(0, 1)
    back = torch.randn(*joint.shape[:-1], inner).bfloat16()
    own, exact = joint.detach().requires_grad_(), joint.detach().double().requires_grad_()
    found, right = swiglu(own), plain(exact)
    found.backward(back)
    right.backward(back.double())
    digits = {"rtol": 1 / 64, "atol": 1e-4}  # eager PyTorch rounds each step
    torch.testing.assert_close(found.double(), right.detach(), **digits)
    torch.testing.assert_close(own.grad.double(), exact.grad, **digits)


def test_the_kernel_rounds_once():
    """Its error is that of the result's last bit."""
    if not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")
    joint = (4 * torch.randn(64, 512)).bfloat16()
    found, right = swiglu(joint).double(), plain(joint.double())
    assert (found - right).abs().le(right.abs() / 256 * 1.001 + 1e-38).all()


def test_nan_and_infinity_are_kept(kernel):
    joint = torch.zeros(1, 64).bfloat16()
    joint[0, 3], joint[0, 5], joint[0, 32 + 5] = torch.nan, torch.inf, 1.0
    found = swiglu(joint)[0]
    assert found[3].isnan() and found[5] == torch.inf
    assert (found[torch.arange(32) % 8 == 0] == 0).all()


def test_the_operator_keeps_torchs_rules():
    joint = torch.randn(2, 5, 64, requires_grad=True)
    torch.library.opcheck(torch.ops.athena.swiglu.default, (joint,))


def test_a_second_derivative_is_an_error():
    joint = torch.randn(2, 64).requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(joint).square().sum(), joint, create_graph=True)
    with pytest.raises(RuntimeError, match="fast=false"):
        grad.square().sum().backward()
