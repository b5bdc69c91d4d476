"""The feed-forward layer SwiGLU as one operation on a CPU, in bfloat16.

Its inner values stay in the cache of a core. See `models/cpu_kernels.cpp`.

Shape letters: B rows, L positions, D hidden, I inner size.
"""

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import at_least_float32
from models.cpu_kernels import cpu_kernels, has_amx

_PANEL = 64
_MOST_WEIGHTS = 1 << 17
_FEW_TOKENS = 64
"""Least number of tokens for which a call packs the weights itself."""


def is_preferred(size: int, inner: int) -> bool:
    """Return whether to use the kernel for these sizes on this CPU."""
    return _fits(size, inner) and not has_amx() and cpu_kernels() is not None


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor, packed: Tensor | None = None) -> Tensor:
    """Return (silu(gate) * up) · downᵀ, (..., D), where gate and up are the halves of x · gate_upᵀ.

    The gate is computed in float32. x: (..., D). gate_up: (2 I, D). down: (D, I). packed: the
    result of `pack` for these weights, if they have several uses.
    """
    keep = torch.is_grad_enabled()
    out: Tensor = torch.ops.athena.swiglu(x, gate_up, down, packed, keep)[0]
    return out


def pack(gate_up: Tensor, down: Tensor) -> Tensor | None:
    """Return the weights, (2 I, D) and (D, I), in the order that the kernel reads, (3 · I · D,)
    int32; None if it does not support them. Has no gradient.
    """
    if _library(gate_up, down) is None:
        return None
    packed: Tensor = torch.ops.athena.swiglu_pack(gate_up.detach(), down.detach())
    return packed


def _pack(gate_up: Tensor, down: Tensor) -> Tensor:
    library = _library(gate_up, down)
    assert library is not None
    weights, packed = (gate_up.contiguous(), down.contiguous()), _empty_pack(gate_up, down)
    pointers = map(pointer, (*weights, packed))
    library.swiglu_pack(_layer(0, down), *pointers, torch.get_num_threads())
    return packed


def _empty_pack(gate_up: Tensor, down: Tensor) -> Tensor:
    return down.new_empty(3 * down.numel(), dtype=torch.int32)


def _library(gate_up: Tensor, down: Tensor) -> ctypes.CDLL | None:
    """Return the C++ kernels, if they support these weights."""
    alike = gate_up.dtype == down.dtype == torch.bfloat16
    return cpu_kernels() if alike and _fits(*down.shape) else None


def _fits(size: int, inner: int) -> bool:
    return size % 32 == 0 and inner % _PANEL == 0


def _forward(
    x: Tensor, gate_up: Tensor, down: Tensor, packed: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor]:
    """Return the result, and (..., 2 I) x · gate_upᵀ if `keep`, otherwise an empty tensor."""
    size, inner = down.shape
    if x.shape[-1] != size or gate_up.shape != (2 * inner, size):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, gate_up, down))
        raise ValueError(f"x, gate_up and down do not fit together: {shapes}")
    tokens = x.numel() // size
    library = _library(gate_up, down) if x.dtype == gate_up.dtype else None
    if library is None or _too_few(tokens, packed):
        out, joint = compute(x, gate_up, down)
        return out, joint if keep else x.new_empty(0)
    packed = _pack(gate_up, down) if packed is None else packed
    x = x.contiguous()
    out = torch.empty_like(x)
    joint = _empty_joint(x, gate_up, keep)
    scratch = x.new_empty(_forward_scratch(down))
    pointers = map(pointer, (x, packed, joint if keep else None, out, scratch))
    library.swiglu(_layer(tokens, down), *pointers, torch.get_num_threads())
    return out, joint


def _backward(
    grad: Tensor,
    x: Tensor,
    joint: Tensor,
    gate_up: Tensor,
    down: Tensor,
    packed: Tensor | None,
    of_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate_up and down; unless `of_weights`, the last two are empty."""
    tokens = x.numel() // len(down)
    if joint.numel() != tokens * len(gate_up):
        raise RuntimeError("the layer was computed without keep=True, so it has no gradient")
    library = _library(gate_up, down) if x.dtype == grad.dtype == gate_up.dtype else None
    if library is None or _too_few(tokens, packed):
        return differentiate(grad, x, joint, gate_up, down, of_weights)
    packed = _pack(gate_up, down) if packed is None else packed
    grad, x, joint = grad.contiguous(), x.contiguous(), joint.contiguous()
    of_x, of_gate_up, of_down = empty_grads(x, gate_up, down, of_weights)
    scratch = x.new_empty(_backward_scratch(tokens, down))
    found = (of_x, of_gate_up, of_down) if of_weights else (of_x, None, None)
    pointers = map(pointer, (grad, x, joint, packed, *found, scratch))
    library.swiglu_backward(_layer(tokens, down), *pointers, torch.get_num_threads())
    return of_x, of_gate_up, of_down


def _forward_scratch(down: Tensor) -> int:
    """Return the number of bfloat16 values that the kernel needs while it runs."""
    return torch.get_num_threads() * _PANEL * down.shape[1]


def _backward_scratch(tokens: int, down: Tensor) -> int:
    size, inner = down.shape
    sums = 2 * 3 * size * inner  # in float32
    columns = 3 * inner + 2 * size
    if _by_thread(down):
        pairs = torch.get_num_threads() * (sums + _PANEL * columns)
    else:
        pairs = (tokens + tokens % 2) * columns
    return 2 * _forward_scratch(down) + pairs


def _by_thread(down: Tensor) -> bool:
    """Return whether each thread sums the gradients of the weights for its tokens, which is faster
    if these sums stay in its cache.
    """
    return 3 * down.numel() <= _MOST_WEIGHTS


def _too_few(tokens: int, packed: Tensor | None) -> bool:
    return not tokens or (packed is None and tokens < _FEW_TOKENS)


def forward_scratch_bytes(x, gate_up, down, packed, keep) -> int:
    """Return the bytes that the operator needs while it runs, from its arguments."""
    return _count_bytes(_forward_scratch(down), x, down, packed)


def backward_scratch_bytes(grad, x, joint, gate_up, down, packed, of_weights) -> int:
    """Do the same for the operator of the gradients."""
    return _count_bytes(_backward_scratch(x.numel() // len(down), down), x, down, packed)


def _count_bytes(scratch: int, x: Tensor, down: Tensor, packed: Tensor | None) -> int:
    if _too_few(x.numel() // len(down), packed):
        return 0
    return 2 * scratch + (0 if packed is not None else 4 * 3 * down.numel())


def _empty_joint(x: Tensor, gate_up: Tensor, keep: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate_up.shape[0]) if keep else x.new_empty(0)


def empty_grads(
    x: Tensor, gate_up: Tensor, down: Tensor, of_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors for the gradients; unless `of_weights`, the last two are empty."""
    sizes = (gate_up.shape, down.shape) if of_weights else ((0,), (0,))
    return x.new_empty(x.shape), x.new_empty(sizes[0]), x.new_empty(sizes[1])


def compute(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return the result, and x · gate_upᵀ, in PyTorch."""
    joint = F.linear(x, gate_up)
    gate, up = joint.chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down), joint


def differentiate(
    grad: Tensor, x: Tensor, joint: Tensor, gate_up: Tensor, down: Tensor, of_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the same as `_backward` in PyTorch."""
    gate, up = at_least_float32(joint).chunk(2, dim=-1)
    share = torch.sigmoid(gate)
    silu = gate * share
    of_hidden = at_least_float32(grad @ down)
    of_gate = of_hidden * up * (share + silu * (1 - share))
    of_joint = torch.cat((of_gate, of_hidden * silu), dim=-1).to(x.dtype)
    of_x = of_joint @ gate_up
    if not of_weights:
        return of_x, *empty_grads(x, gate_up, down, False)[1:]
    hidden = (silu * up).to(x.dtype)
    rows = (t.reshape(-1, t.shape[-1]) for t in (grad, x, of_joint, hidden))
    flat_grad, flat_x, of_joint, hidden = rows
    return of_x, of_joint.T @ flat_x, flat_grad.T @ hidden


# --- C++


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("tokens", "size", "inner", "by_thread")]


def _layer(tokens: int, down: Tensor) -> Any:
    return ctypes.byref(_Layer(tokens, *down.shape, _by_thread(down)))


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


# --- the operators


def _fake_forward(x, gate_up, down, packed, keep):
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, _empty_joint(x, gate_up, keep)


def _fake_backward(grad, x, joint, gate_up, down, packed, of_weights):
    return empty_grads(x, gate_up, down, of_weights)


def _save(ctx, inputs, output) -> None:
    x, gate_up, down, packed, _ = inputs
    ctx.save_for_backward(x, output[1], gate_up, down, packed)
    ctx.set_materialize_grads(False)


def _of_output(ctx, grad: Tensor | None, _: Tensor | None):
    if grad is None:
        return (None,) * 5
    of_weights = any(ctx.needs_input_grad[1:3])
    grads = torch.ops.athena.swiglu_backward(grad, *ctx.saved_tensors, of_weights)
    return grads[0], *(grads[1:] if of_weights else (None, None)), None, None


def refuse(ctx, *grads: Tensor):
    raise RuntimeError("the layer as one operation has no second derivative; set fast=false")


def _register() -> torch.library.Library:
    """Make the functions operators, which torch.compile takes as they are."""
    library = torch.library.Library("athena", "FRAGMENT")
    weights = "Tensor gate_up, Tensor down, Tensor? packed"
    library.define(f"swiglu(Tensor x, {weights}, bool keep) -> (Tensor, Tensor)")
    library.define(
        f"swiglu_backward(Tensor grad, Tensor x, Tensor joint, {weights}, bool of_weights)"
        " -> (Tensor, Tensor, Tensor)"
    )
    library.define("swiglu_pack(Tensor gate_up, Tensor down) -> Tensor")
    library.impl("swiglu", _forward, "CPU")
    library.impl("swiglu_backward", _backward, "CPU")
    library.impl("swiglu_pack", _pack, "CPU")
    name = "athena::swiglu"
    torch.library.register_fake(name, _fake_forward, lib=library)
    torch.library.register_fake(f"{name}_backward", _fake_backward, lib=library)
    torch.library.register_fake(f"{name}_pack", _empty_pack, lib=library)
    torch.library.register_autograd(name, _of_output, setup_context=_save, lib=library)
    torch.library.register_autograd(f"{name}_backward", refuse, lib=library)
    return library


if not hasattr(torch.ops.athena, "swiglu"):  # an exported model holds a copy of this file
    _LIBRARY = _register()  # its operators end with it
