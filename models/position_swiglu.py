"""SwiGLU over positions as one operation on a CPU, in bfloat16.

Its inner values stay in the cache of a core, forward and backward: nothing but the input is kept
for the gradients. See `models/cpu_kernels.cpp`.

Shape letters: B rows, L positions, D hidden, I inner size.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from models.cpu_kernels import cpu_kernels, has_amx
from models.swiglu import compute, differentiate, empty_grads, pointer, refuse

_PANEL = 64
_LANES = 16
_MOST_WEIGHTS = 1 << 18
"""Each thread sums the gradients of the weights on its own, which must not leave its cache."""


def is_preferred(hidden_size: int, length: int, inner: int) -> bool:
    """Return whether to use the kernel for these sizes on this CPU."""
    return _fits(hidden_size, length, inner) and not has_amx() and cpu_kernels() is not None


def position_swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return down · (silu(gate) * up) for each row of x, (B, L, D), where gate and up are the
    halves of gate_up · x.

    The gate is computed in float32. gate_up: (2 I, L). down: (L, I).
    """
    out: Tensor = torch.ops.athena.position_swiglu(x, gate_up, down)
    return out


def _fits(hidden_size: int, length: int, inner: int) -> bool:
    divisible = hidden_size % 32 == 0 and inner % _PANEL == 0
    return divisible and 3 * length * inner <= _MOST_WEIGHTS


def _library(x: Tensor, gate_up: Tensor, down: Tensor) -> ctypes.CDLL | None:
    """Return the C++ kernels, if they support this layer."""
    alike = x.dtype == gate_up.dtype == down.dtype == torch.bfloat16
    fits = _fits(x.shape[-1], *down.shape)
    return cpu_kernels() if alike and fits and x.numel() else None


def _forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    length, inner = down.shape
    if x.dim() != 3 or x.shape[1] != length or gate_up.shape != (2 * inner, length):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, gate_up, down))
        raise ValueError(f"x, gate_up and down do not fit together: {shapes}")
    library = _library(x, gate_up, down)
    if library is None:
        return compute(x.mT, gate_up, down)[0].mT.contiguous()
    x, gate_up, down = x.contiguous(), gate_up.contiguous(), down.contiguous()
    out = torch.empty_like(x)
    shared, own = _forward_scratch(down)
    threads = torch.get_num_threads()
    scratch = _new_scratch(x, shared, own)
    pointers = map(pointer, (x, gate_up, down, out, scratch))
    library.position_swiglu(_layer(x, down), *pointers, ctypes.c_int64(own), threads)
    return out


def _backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, of_weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate_up and down; unless `of_weights`, the last two are empty."""
    library = _library(x, gate_up, down) if grad.dtype == x.dtype else None
    if library is None:
        _, joint = compute(x.mT, gate_up, down)
        grads = differentiate(grad.mT, x.mT, joint, gate_up, down, of_weights)
        return grads[0].mT.contiguous(), *grads[1:]
    grad, x, gate_up, down = (t.contiguous() for t in (grad, x, gate_up, down))
    of_x, of_gate_up, of_down = empty_grads(x, gate_up, down, of_weights)
    found = (of_x, of_gate_up, of_down) if of_weights else (of_x, None, None)
    shared, own = _backward_scratch(down)
    scratch = _new_scratch(x, shared, own)
    pointers = map(pointer, (grad, x, gate_up, down, *found, scratch))
    threads = torch.get_num_threads()
    library.position_swiglu_backward(_layer(x, down), *pointers, ctypes.c_int64(own), threads)
    return of_x, of_gate_up, of_down


def _forward_scratch(down: Tensor) -> tuple[int, int]:
    """Return the numbers of 32-bit values that the kernel needs: for all, and for each thread."""
    length, inner = down.shape
    pairs = -(length // -2)
    return 2 * inner * pairs, _PANEL * (pairs + inner // 2)


def _backward_scratch(down: Tensor) -> tuple[int, int]:
    length, inner = down.shape
    pairs, lanes = -(length // -2), -(length // -_LANES) * _LANES
    panels = _PANEL * (2 * pairs + lanes + length + 11 * _PANEL // 4)
    return inner * (3 * pairs + length), 3 * inner * lanes + panels


def _new_scratch(x: Tensor, shared: int, own: int) -> Tensor:
    return x.new_empty(shared + torch.get_num_threads() * own, dtype=torch.int32)


def forward_scratch_bytes(x, gate_up, down) -> int:
    """Return the bytes that the operator needs while it runs, from its arguments."""
    return _count_bytes(x, *_forward_scratch(down))


def backward_scratch_bytes(grad, x, gate_up, down, of_weights) -> int:
    """Do the same for the operator of the gradients."""
    return _count_bytes(x, *_backward_scratch(down))


def _count_bytes(x: Tensor, shared: int, own: int) -> int:
    return 4 * (shared + torch.get_num_threads() * own) if x.numel() else 0


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "length", "size", "inner")]


def _layer(x: Tensor, down: Tensor) -> Any:
    return ctypes.byref(_Layer(len(x), down.shape[0], x.shape[-1], down.shape[1]))


# --- the operators


def _fake_forward(x, gate_up, down):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_backward(grad, x, gate_up, down, of_weights):
    return empty_grads(x, gate_up, down, of_weights)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _of_output(ctx, grad: Tensor):
    of_weights = any(ctx.needs_input_grad[1:])
    grads = torch.ops.athena.position_swiglu_backward(grad, *ctx.saved_tensors, of_weights)
    return grads[0], *(grads[1:] if of_weights else (None, None))


def _register() -> torch.library.Library:
    """Make the functions operators, which torch.compile takes as they are."""
    library = torch.library.Library("athena", "FRAGMENT")
    inputs, name = "Tensor x, Tensor gate_up, Tensor down", "position_swiglu"
    library.define(f"{name}({inputs}) -> Tensor")
    library.define(
        f"{name}_backward(Tensor grad, {inputs}, bool of_weights) -> (Tensor, Tensor, Tensor)"
    )
    library.impl(name, _forward, "CPU")
    library.impl(f"{name}_backward", _backward, "CPU")
    name = f"athena::{name}"
    torch.library.register_fake(name, _fake_forward, lib=library)
    torch.library.register_fake(f"{name}_backward", _fake_backward, lib=library)
    torch.library.register_autograd(name, _of_output, setup_context=_save, lib=library)
    torch.library.register_autograd(f"{name}_backward", refuse, lib=library)
    return library


if not hasattr(torch.ops.athena, "position_swiglu"):  # as in swiglu.py
    _LIBRARY = _register()
