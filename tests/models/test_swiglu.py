"""The feed-forward layer as one operator, against float64."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import allocated, assert_close, can_run_kernels
from torch.utils.flop_counter import FlopCounterMode

from models import cost
from models import swiglu as module
from models.layers import SwiGLU, cast_once
from models.swiglu import pack, swiglu

ROOT = Path(__file__).resolve().parents[2]


def plain(x, gate_up, down):
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def draw(size, inner, *shape):
    """Return x (*shape, size), gate_up and down in bfloat16; the gates are about 2 in size."""
    x, gate_up, down = (
        torch.randn(*shape, size),
        torch.randn(2 * inner, size),
        torch.randn(size, inner),
    )
    return x.bfloat16(), (2 * size**-0.5 * gate_up).bfloat16(), (inner**-0.5 * down).bfloat16()


@pytest.fixture(params=["C++", "PyTorch"])
def kernel(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr(module, "cpu_kernels", lambda: None)
    elif not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("size", "inner", "shape"),
    [
        (64, 256, (3, 37)),
        (96, 64, (1, 129)),
        (32, 128, (64,)),
        (160, 192, (2, 2, 50)),
        (128, 256, (4, 1)),
        (64, 64, (1,)),
        (256, 256, (129,)),  # large weights
        (40, 64, (70,)),  # no kernel
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_values_and_gradients(kernel, size, inner, shape, packed, threads, set_threads):
    set_threads(threads)
    own = [t.requires_grad_() for t in draw(size, inner, *shape)]
    exact = [t.detach().double().requires_grad_() for t in own]
    back = torch.randn(*shape, size).bfloat16()
    found, right = swiglu(*own, pack(*own[1:]) if packed else None), plain(*exact)
    found.backward(back)
    right.backward(back.double())
    assert found.dtype == torch.bfloat16 and found.shape == right.shape
    tokens = math.prod(shape)
    assert_close(found, right.detach(), tokens)
    for one, other in zip(own, exact, strict=True):
        assert_close(one.grad, other.grad, tokens)


@pytest.mark.parametrize(("size", "inner"), [(64, 128), (256, 256)])
@pytest.mark.parametrize("of_weights", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_its_scratch_memory_is_counted(size, inner, of_weights, packed):
    if not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")
    x, gate_up, down = draw(size, inner, 129)
    weights = (gate_up, down, pack(gate_up, down) if packed else None)
    forward = allocated(lambda: torch.ops.athena.swiglu(x, *weights, True))
    joint = torch.ops.athena.swiglu(x, *weights, True)[1]
    counted = module.forward_scratch_bytes(x, *weights, True)
    assert forward == x.nbytes + joint.nbytes + counted
    inputs = (x, x, joint, *weights, of_weights)
    backward = allocated(lambda: torch.ops.athena.swiglu_backward(*inputs))
    grads = x.nbytes + of_weights * (gate_up.nbytes + down.nbytes)
    assert backward == grads + module.backward_scratch_bytes(*inputs)


def test_one_token_without_other_axes(kernel):
    x, gate_up, down = (t.requires_grad_() for t in draw(64, 128))
    swiglu(x, gate_up, down).sum().backward()
    assert x.grad.shape == (64,) and gate_up.grad.any()


def test_gradients_of_a_result_without_kept_values_are_an_error(kernel):
    x, gate_up, down = draw(64, 128, 70)
    out = torch.ops.athena.swiglu(x.requires_grad_(), gate_up, down, None, False)[0]
    with pytest.raises(RuntimeError, match="keep=True"):
        out.sum().backward()


def test_weights_are_packed_once(monkeypatch):
    if not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")
    layer, x = SwiGLU(64, 4.0), torch.randn(2, 40, 64).bfloat16()
    layer.fused, calls = True, []
    monkeypatch.setattr(module, "_pack", lambda *weights: calls.append(weights))
    with cast_once([layer], torch.bfloat16):
        assert layer.packed is not None
        right = layer(x)
    assert not calls and layer.packed is None
    monkeypatch.undo()
    assert torch.equal(layer(x), right)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=true"])
def test_openmp_may_give_fewer_threads(limit):
    if not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")
    key, value = limit.split("=")
    program = """
import torch
from models.position_swiglu import position_swiglu
from models.swiglu import swiglu
torch.set_num_threads(4)
for layer, shape in ((swiglu, (300, 64)), (position_swiglu, (9, 64, 64))):
    tensors = [torch.randn(s).bfloat16() for s in (shape, (256, 64), (64, 128))]
    fill = [torch.full((1 << 22,), torch.nan) for _ in range(4)]  # what is freed is used again
    del fill
    wide = [t.double().requires_grad_() for t in tensors]
    x = wide[0] if layer is swiglu else wide[0].mT
    gate, up = (x @ wide[1].T).chunk(2, -1)
    ((torch.nn.functional.silu(gate) * up) @ wide[2].T).sum().backward()
    layer(*[t.requires_grad_() for t in tensors]).sum().backward()
    for t, w in zip(tensors, wide):
        assert (t.grad - w.grad).norm() <= 0.01 * w.grad.norm(), layer
"""
    environment = {**os.environ, key: value}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "trained", [(True, False, False), (False, True, False), (True, True, True)]
)
def test_only_the_gradients_that_are_needed(kernel, trained):
    inputs = draw(64, 128, 5, 40)
    for tensor, needed in zip(inputs, trained, strict=True):
        tensor.requires_grad_(needed)
    swiglu(*inputs).square().sum().backward()
    assert [t.grad is not None for t in inputs] == list(trained)


def test_views_of_other_strides(kernel):
    x, gate_up, down = draw(64, 128, 80, 3)
    weights = (gate_up.T.contiguous().T, down.T.contiguous().T)
    assert_close(
        swiglu(x.transpose(0, 1), *weights),
        plain(*map(torch.Tensor.double, (x.transpose(0, 1), gate_up, down))),
    )
    own = x.transpose(0, 1).requires_grad_()
    (found,) = torch.autograd.grad(swiglu(own, *weights).sum(), own)  # an expanded gradient
    exact = x.transpose(0, 1).detach().double().requires_grad_()
    (right,) = torch.autograd.grad(plain(exact, gate_up.double(), down.double()).sum(), exact)
    assert_close(found, right)


def test_without_gradients_the_result_is_the_same(kernel):
    inputs = draw(64, 128, 2, 100)
    with torch.no_grad():
        found = swiglu(*inputs)
    inputs[0].requires_grad_()
    assert torch.equal(found, swiglu(*inputs).detach())


def test_shapes_that_do_not_fit_are_an_error(kernel):
    x, gate_up, down = draw(64, 128, 2, 70)
    for wrong in ((x[..., :32], gate_up, down), (x, gate_up[:128], down), (x, gate_up, down.T)):
        with pytest.raises(ValueError, match="do not fit together"):
            swiglu(*wrong)


def test_no_tokens(kernel):
    x, gate_up, down = (t.requires_grad_() for t in draw(64, 128, 0, 3))
    found = swiglu(x, gate_up, down, pack(gate_up, down))
    found.sum().backward()
    assert found.shape == x.grad.shape == (0, 3, 64) and not gate_up.grad.any()


def test_nan_and_infinity_are_kept(kernel):
    x, gate_up, down = draw(64, 128, 1, 70)
    x[0, 3, 5], x[0, 9, 5] = torch.nan, torch.inf
    found = swiglu(x, gate_up, down)[0]
    wrong = ~found.isfinite().all(-1)
    assert wrong.nonzero().flatten().tolist() == [3, 9] and found[3].isnan().all()


def test_large_gates(kernel):
    """exp(-gate) overflows, and 1 / (1 + exp(-gate)) is 0 or 1."""
    x, gate_up, down = draw(64, 128, 1, 70)
    gate_up[:128] *= 1000
    assert_close(swiglu(x, gate_up, down), plain(x.double(), gate_up.double(), down.double()))


def test_the_operator_keeps_torchs_rules():
    inputs = [t.requires_grad_() for t in draw(64, 128, 2, 40)]
    for keep in (True, False):
        checked = inputs if keep else [t.detach() for t in inputs]
        torch.library.opcheck(torch.ops.athena.swiglu.default, (*checked, None, keep))
    if can_run_kernels():
        weights = [t.detach() for t in inputs[1:]]
        torch.library.opcheck(torch.ops.athena.swiglu_pack.default, weights)


@pytest.mark.parametrize("trained", [True, False])
def test_its_flops_are_those_of_its_products(kernel, trained):
    assert cost  # which says how to count the operator
    inputs = draw(64, 128, 2, 40)
    inputs[0].requires_grad_()
    for weight in inputs[1:]:
        weight.requires_grad_(trained)
    counts = []
    for layer in (swiglu, plain):
        with FlopCounterMode(display=False) as counter:
            layer(*inputs).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_second_derivative_is_an_error():
    x, gate_up, down = draw(64, 128, 2, 40)
    (grad,) = torch.autograd.grad(
        swiglu(x.requires_grad_(), gate_up, down).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="fast=false"):
        grad.square().sum().backward()


@pytest.mark.parametrize("change", ["bias", "subclass", "size"])
def test_a_layer_with_other_parts_is_not_fused(change, monkeypatch):
    monkeypatch.setattr("models.layers.is_preferred", module._fits)
    layer = SwiGLU(100 if change == "size" else 64, 4.0)
    if change == "bias":
        layer.down_proj.bias = torch.nn.Parameter(torch.zeros(64))
    if change == "subclass":
        layer.gate_up_proj.__class__ = type("Adapted", (type(layer.gate_up_proj),), {})
    assert SwiGLU(64, 4.0).can_fuse() and not layer.can_fuse()
