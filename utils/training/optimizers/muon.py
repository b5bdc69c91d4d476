"""Muon (Jordan et al. 2024) on the matrices of the blocks, AdamW on embeddings and heads."""

import math
from ctypes import Structure, byref, c_float, c_int64, c_void_p
from typing import Any

import pydantic
import torch
from pydantic import Field
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from models.base import Architecture
from models.cpu_kernels import cpu_kernels, has_amx
from utils.training.optimizers.adamw import FusedAdamW

_STACK = 1 << 22
"""Number of elements from which a matrix is orthogonalized alone: it occupies a device by itself,
and a stack takes memory."""


class Muon:
    """Muon with updates scaled to AdamW's typical size (Liu et al. 2025, arXiv 2502.16982), so that
    both use the same learning rate.
    """

    class Config(pydantic.BaseModel, extra="forbid", strict=True):
        momentum: float = Field(0.95, ge=0, lt=1, description="decay of the gradients' mean")
        ns_steps: int = Field(5, ge=1, description="Newton-Schulz iterations per update")

    takes_shards = False  # orthogonalization needs whole matrices

    @staticmethod
    def build(
        model: Architecture,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        momentum: float,
        ns_steps: int,
    ) -> list[Optimizer]:
        blocks = model.blocks()
        matrices = {id(p) for block in blocks for p in block.parameters() if p.ndim == 2}
        inside: list[dict] = []
        outside: list[dict] = []
        for group in groups:
            for part, wanted in ((inside, True), (outside, False)):
                chosen = [p for p in group["params"] if (id(p) in matrices) is wanted]
                if chosen:
                    part.append(group | {"params": chosen})
        muon = StackedMuon(
            inside, lr=lr, momentum=momentum, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, FusedAdamW(outside, lr=lr, betas=betas)]


class StackedMuon(torch.optim.Muon):
    """torch's Muon with `match_rms_adamw`, which orthogonalizes matrices of one shape together."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.param_groups[0]["params"][0].device.type == "xla":  # where all is one program
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters: list[Tensor] = []
            grads: list[Tensor] = []
            means: list[Tensor] = []
            self._init_group(group, parameters, grads, means)
            if not parameters:
                continue
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            kinds: dict[Any, list[tuple[Tensor, Tensor, Tensor]]] = {}
            for p, grad, mean in zip(parameters, grads, means, strict=True):
                kinds.setdefault((p.shape, p.dtype), []).append((p, grad, mean))
            for (shape, _), alike in kinds.items():
                count = max(1, _STACK // shape.numel())
                for start in range(0, len(alike), count):
                    _update_stack(group, *zip(*alike[start : start + count], strict=True))
        return loss


def _update_stack(
    group: dict,
    parameters: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    means: tuple[Tensor, ...],
) -> None:
    """Move matrices of one shape by their orthogonalized momentum."""
    moved = torch._foreach_lerp(grads, means, group["momentum"]) if group["nesterov"] else means
    update = orthogonalize(
        torch.stack(moved), group["ns_coefficients"], group["ns_steps"], group["eps"]
    )
    updates = update.to(parameters[0].dtype).unbind()
    rate = group["lr"] * 0.2 * math.sqrt(max(parameters[0].shape))
    torch._foreach_add_(parameters, updates, alpha=-rate)


def orthogonalize(
    stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return the approximately nearest orthogonal matrix of each matrix of (count, rows, columns),
    in bfloat16, by Newton-Schulz iterations.
    """
    a, b, c = coefficients
    tall = stack.shape[1] > stack.shape[2]
    x = stack.bfloat16()
    x = x.mT.contiguous() if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    if not _iterate(x, coefficients, steps):
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> bool:
    """Do the iterations in place, by the C++ kernel, which computes half of each symmetric
    product. Return whether it can.

    x: (count, rows, columns), contiguous; rows <= columns.
    """
    rows, columns = x.shape[1:]
    alike = x.device.type == "cpu" and rows % 32 == 0 and columns % 32 == 0
    library = cpu_kernels() if alike and not has_amx() else None
    if library is None:
        return False
    scratch = x.new_empty(rows * (3 * rows + 2 * columns))
    iteration = _Iteration(rows, columns, *coefficients)
    for matrix in () if isinstance(x, FakeTensor) else x:  # a plan counts the memory
        pointers = c_void_p(matrix.data_ptr()), c_int64(steps), c_void_p(scratch.data_ptr())
        library.newton_schulz(byref(iteration), *pointers, torch.get_num_threads())
    return True


class _Iteration(Structure):
    _fields_ = [("rows", c_int64), ("columns", c_int64)] + [(n, c_float) for n in "abc"]
