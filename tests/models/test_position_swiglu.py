"""SwiGLU over positions as one operator, against float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import allocated, assert_close, can_run_kernels
from torch.utils.flop_counter import FlopCounterMode

from models import cost
from models import position_swiglu as module
from models.layers import Block, PositionSwiGLU
from models.position_swiglu import position_swiglu


def plain(x, gate_up, down):
    gate, up = F.linear(x.mT, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down).mT


def draw(rows, length, size, inner):
    """Return x, gate_up and down in bfloat16; the gates are about 2 in size."""
    x, gate_up, down = (
        torch.randn(rows, length, size),
        torch.randn(2 * inner, length),
        torch.randn(length, inner),
    )
    return x.bfloat16(), (2 * length**-0.5 * gate_up).bfloat16(), (inner**-0.5 * down).bfloat16()


@pytest.fixture(params=["C++", "PyTorch"])
def kernel(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(module, "cpu_kernels", lambda: None)
    elif not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("rows", "length", "size", "inner"),
    [
        (3, 36, 128, 256),
        (2, 37, 96, 64),
        (1, 16, 32, 128),
        (7, 5, 64, 64),
        (2, 3, 160, 64),
        (1, 97, 64, 512),
        (3, 20, 40, 64),  # no kernel
        (2, 20, 64, 48),  # no kernel
    ],
)
def test_values_and_gradients(kernel, rows, length, size, inner, threads, set_threads):
    set_threads(threads)
    own = [t.requires_grad_() for t in draw(rows, length, size, inner)]
    exact = [t.detach().double().requires_grad_() for t in own]
    back = torch.randn(rows, length, size).bfloat16()
    found, right = position_swiglu(*own), plain(*exact)
    found.backward(back)
    right.backward(back.double())
    assert found.dtype == torch.bfloat16 and found.shape == right.shape
    assert_close(found, right.detach())
    for one, other in zip(own, exact, strict=True):
        assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    "trained", [(True, False, False), (False, True, False), (True, True, True)]
)
def test_only_the_gradients_that_are_needed(kernel, trained):
    inputs = draw(5, 36, 64, 128)
    for tensor, needed in zip(inputs, trained, strict=True):
        tensor.requires_grad_(needed)
    position_swiglu(*inputs).square().sum().backward()
    assert [t.grad is not None for t in inputs] == list(trained)


def test_views_of_other_strides(kernel):
    x, gate_up, down = draw(4, 36, 64, 128)
    x, gate_up, down = x.mT.contiguous().mT, gate_up.T.contiguous().T, down.T.contiguous().T
    exact = [t.double().requires_grad_() for t in (x, gate_up, down)]
    own = x.requires_grad_()
    found, right = position_swiglu(own, gate_up, down), plain(*exact)
    assert_close(found, right.detach())
    (found,) = torch.autograd.grad(found.sum(), own)  # an expanded gradient
    assert_close(found, torch.autograd.grad(right.sum(), exact[0])[0])


def test_the_result_does_not_depend_on_other_rows(kernel):
    x, gate_up, down = draw(6, 36, 96, 128)
    assert torch.equal(position_swiglu(x, gate_up, down)[2:3],
                       position_swiglu(x[2:3], gate_up, down))  # fmt: skip


def test_shapes_that_do_not_fit_are_an_error(kernel):
    x, gate_up, down = draw(2, 36, 64, 128)
    for wrong in (
        (x[:, :32], gate_up, down),
        (x[0], gate_up, down),
        (x, gate_up[:128], down),
        (x, gate_up, down.T),
    ):
        with pytest.raises(ValueError, match="do not fit together"):
            position_swiglu(*wrong)


def test_no_rows(kernel):
    x, gate_up, down = (t.requires_grad_() for t in draw(0, 36, 64, 128))
    found = position_swiglu(x, gate_up, down)
    found.sum().backward()
    assert found.shape == x.grad.shape == (0, 36, 64) and not gate_up.grad.any()


def test_nan_and_infinity_are_kept(kernel):
    x, gate_up, down = draw(1, 36, 64, 128)
    x[0, 5, 3], x[0, 5, 9] = torch.nan, torch.inf
    found = position_swiglu(x, gate_up, down)[0].mT
    wrong = ~found.isfinite().all(-1)
    assert wrong.nonzero().flatten().tolist() == [3, 9] and found[3].isnan().all()


def test_large_gates(kernel):
    """exp(-gate) overflows, and 1 / (1 + exp(-gate)) is 0 or 1."""
    x, gate_up, down = draw(2, 36, 64, 128)
    gate_up[:128] *= 1000
    right = plain(x.double(), gate_up.double(), down.double())
    assert_close(position_swiglu(x, gate_up, down), right)


def test_the_operator_keeps_torchs_rules():
    inputs = draw(2, 36, 64, 128)
    torch.library.opcheck(torch.ops.athena.position_swiglu.default, inputs)
    for tensor in inputs:
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.athena.position_swiglu.default, inputs)


@pytest.mark.parametrize("trained", [True, False])
def test_its_flops_are_those_of_its_products(kernel, trained):
    """What the gradients compute again is not counted."""
    assert cost  # which says how to count the operator
    inputs = draw(2, 36, 64, 128)
    inputs[0].requires_grad_()
    for weight in inputs[1:]:
        weight.requires_grad_(trained)
    counts = []
    for layer in (position_swiglu, plain):
        with FlopCounterMode(display=False) as counter:
            layer(*inputs).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_second_derivative_is_an_error():
    x, gate_up, down = draw(2, 36, 64, 128)
    (grad,) = torch.autograd.grad(
        position_swiglu(x.requires_grad_(), gate_up, down).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="fast=false"):
        grad.square().sum().backward()


@pytest.mark.parametrize("norm_type", ["post", "pre"])
def test_a_block_with_the_operator_agrees_with_one_without(norm_type):
    block = Block(64, 2, 2, 4.0, norm_type, 1e-5, mixer_size=36).bfloat16()
    x = torch.randn(3, 36, 64).bfloat16()
    right = block(x, None)
    block.mlp_t.fused = True
    assert_close(block(x, None), right.double())


@pytest.mark.parametrize(
    ("length", "hidden_size", "fused"), [(81, 512, True), (900, 512, False), (81, 80, False)]
)
def test_only_layers_that_the_kernel_supports_are_fused(length, hidden_size, fused, monkeypatch):
    monkeypatch.setattr(module, "has_amx", lambda: False)
    monkeypatch.setattr(module, "cpu_kernels", lambda: True)
    assert PositionSwiGLU(length, hidden_size, 4.0).can_fuse() is fused


def test_a_block_normalizes_over_positions_as_trm_does():
    """After the MLP over positions: (x + mlp)ᵀ is normalized along its last axis."""
    block = Block(64, 2, 2, 4.0, "post", 1e-5, mixer_size=36)
    block.mlp = torch.nn.Identity()
    x = torch.randn(3, 36, 64)
    found = block(x, None)
    mixed = (x + block.mlp_t(x)).mT
    mixed = F.rms_norm(mixed, (36,), eps=1e-5).mT
    torch.testing.assert_close(found, F.rms_norm(2 * mixed, (64,), eps=1e-5))


@pytest.mark.parametrize("of_weights", [True, False])
def test_its_scratch_memory_is_counted(of_weights):
    if not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")
    x, gate_up, down = draw(2, 37, 64, 128)
    forward = allocated(lambda: position_swiglu(x, gate_up, down))
    assert forward == x.nbytes + module.forward_scratch_bytes(x, gate_up, down)
    inputs = (x, x, gate_up, down, of_weights)
    backward = allocated(lambda: torch.ops.athena.position_swiglu_backward(*inputs))
    grads = x.nbytes + of_weights * (gate_up.nbytes + down.nbytes)
    assert backward == grads + module.backward_scratch_bytes(*inputs)
