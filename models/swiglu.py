"""The gate of SwiGLU in one pass on a CPU, in bfloat16.

Inductor's loop for it takes nearly twice as long. See `models/cpu_kernels.cpp`.
"""

from ctypes import c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import at_least_float32
from models.cpu_kernels import cpu_kernels

_LANES = 16


def swiglu(joint: Tensor) -> Tensor:
    """Return silu(gate) * up, (..., I), computed in float32. joint: (..., 2 I), gate and up."""
    out: Tensor = torch.ops.athena.swiglu(joint)
    return out


def _supports(inner: int, *tensors: Tensor) -> bool:
    alike = all(x.dtype == torch.bfloat16 for x in tensors)
    return alike and inner % _LANES == 0 and cpu_kernels() is not None


def _forward(joint: Tensor) -> Tensor:
    inner = joint.shape[-1] // 2
    if not _supports(inner, joint):
        gate, up = joint.chunk(2, dim=-1)
        return F.silu(gate) * up
    joint, out = joint.contiguous(), joint.new_empty(*joint.shape[:-1], inner)
    _call("swiglu", joint, out, inner=inner)
    return out


def _backward(grad: Tensor, joint: Tensor) -> Tensor:
    inner = joint.shape[-1] // 2
    if not _supports(inner, grad, joint):
        gate, up = at_least_float32(joint).chunk(2, dim=-1)
        share = torch.sigmoid(gate)
        silu = gate * share
        slope = share + silu * (1 - share)
        return torch.cat((grad * up * slope, grad * silu), dim=-1).to(joint.dtype)
    grad, joint = grad.contiguous(), joint.contiguous()
    out = torch.empty_like(joint)
    _call("swiglu_backward", grad, joint, out, inner=inner)
    return out


def _call(name: str, *tensors: Tensor, inner: int) -> None:
    """Run a kernel on contiguous tensors with rows of `inner` or twice as many numbers."""
    library = cpu_kernels()
    assert library is not None
    rows = tensors[0].numel() // tensors[0].shape[-1]
    pointers = (c_void_p(x.data_ptr()) for x in tensors)
    library[name](*pointers, c_int64(rows), c_int64(inner), torch.get_num_threads())


def _fake_forward(joint):
    return joint.new_empty(*joint.shape[:-1], joint.shape[-1] // 2)


def _fake_backward(grad, joint):
    return torch.empty_like(joint, memory_format=torch.contiguous_format)


def _refuse(ctx, *grads: Tensor):
    raise RuntimeError("the gate in one pass has no second derivative; set fast=false")


def _register() -> torch.library.Library:
    """Make the functions operators, which torch.compile takes as they are."""
    library = torch.library.Library("athena", "FRAGMENT")
    library.define("swiglu(Tensor joint) -> Tensor")
    library.define("swiglu_backward(Tensor grad, Tensor joint) -> Tensor")
    library.impl("swiglu", _forward, "CPU")
    library.impl("swiglu_backward", _backward, "CPU")
    torch.library.register_fake("athena::swiglu", _fake_forward, lib=library)
    torch.library.register_fake("athena::swiglu_backward", _fake_backward, lib=library)
    torch.library.register_autograd(
        "athena::swiglu",
        lambda ctx, grad: torch.ops.athena.swiglu_backward(grad, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        lib=library,
    )
    torch.library.register_autograd("athena::swiglu_backward", _refuse, lib=library)
    return library


if not hasattr(torch.ops.athena, "swiglu"):  # an exported model holds a copy of this file
    _LIBRARY = _register()  # its operators end with it
