"""Optimizers by name, and which weights they decay."""

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.backend.state import local_part


class AdamATan2(Optimizer):
    """Adam whose update is an arc tangent, free of epsilon (Everett et al. 2024, 2407.05872).

    p ← p·(1 − lr·wd) − lr/(1 − β1^t) · atan2(m, √v / √(1 − β2^t))
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict) -> None:
        state, (beta1, beta2), lr = self.state[p], group["betas"], group["lr"]
        if not state:
            state |= dict(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction: Any = (1 - beta2 ** state["step"]) ** 0.5
        if p.device.type == "xla":
            # some hundred steps on it rounds to 1, and a number that is 1 is another program there
            correction = torch.full((1,), correction, dtype=p.dtype).to(p.device)
        root = square.sqrt().div_(correction)
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(torch.atan2(mean, root), alpha=lr / (1 - beta1 ** state["step"]))


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict]:
    """Weights that are matrices of linear maps decay; embeddings and vectors only if asked."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith("embedding_weight")
        (decayed if matrix or decay_all else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_optimizers(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    decay_all: bool,
    device_type: str,
) -> list[Optimizer]:
    """The optimizers of all parameters: one, or two where Muon leaves some weights to AdamW."""
    if name == "muon":
        return _muon(model, lr, betas, weight_decay, decay_all)
    groups = parameter_groups(model, weight_decay, decay_all)
    options: dict[str, Any] = dict(lr=lr, betas=betas, weight_decay=weight_decay)
    if name == "adamw":
        return [torch.optim.AdamW(groups, **options)]
    if device_type == "cuda" and importlib.util.find_spec("adam_atan2"):
        try:
            return [fused_adam_atan2()(groups, **options)]
        except (ImportError, OSError) as error:
            warnings.warn(
                f"adam-atan2 is installed but does not load ({error}); plain PyTorch is used",
                stacklevel=2,
            )
    return [AdamATan2(groups, **options)]


def fused_adam_atan2() -> type[Optimizer]:
    """Return `AdamATan2` as one CUDA kernel, from the package adam-atan2.

    Raises ImportError or OSError where the package or its kernel cannot be loaded.
    """
    from adam_atan2 import AdamATan2 as Kernel

    class FusedAdamATan2(Kernel):
        """Add what torch expects of an optimizer: a closure, and parameters that are sharded."""

        def _cuda_graph_capture_health_check(self) -> None:
            """Do nothing; some versions of torch lack the method that the package calls, others
            warn that it is deprecated. A step is never captured in a CUDA graph."""

        @torch.no_grad()
        def step(self, closure=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            super().step()
            return loss

        def _init_group(self, group: dict, *lists: list[Tensor]) -> None:
            """Collect parameters, gradients and moments, of sharded ones this rank's part: the
            update is elementwise, and the kernel reads plain memory."""
            super()._init_group(group, *lists)
            for tensors in lists:
                tensors[:] = map(local_part, tensors)

    return FusedAdamATan2


def _muon(model, lr, betas, weight_decay, decay_all) -> list[Optimizer]:
    """Muon (Jordan et al. 2024) on the blocks' matrices, AdamW on embeddings and heads.

    Updates are scaled to AdamW's typical size (Liu et al. 2025, arXiv 2502.16982), so that one
    learning rate serves both.
    """
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = parameter_groups(model, weight_decay, decay_all)
    for group in rest:
        group["params"] = [p for p in group["params"] if id(p) not in inside]
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    others = [group for group in rest if group["params"]]
    return [muon, torch.optim.AdamW(others, lr=lr, betas=betas)]
