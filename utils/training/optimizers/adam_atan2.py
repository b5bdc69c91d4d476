"""Adam with an arctangent update."""

import importlib.util
import warnings
from collections.abc import Iterable, Sequence
from ctypes import CDLL, byref, c_float, c_int64, c_void_p
from typing import Any

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from models.cpu_kernels import cpu_kernels
from utils.backend.state import local_part
from utils.core.errors import UserError
from utils.training.ema import AverageUpdate

_PIECE = 1 << 19


class AdamATan2(Optimizer):
    """Adam with an arctangent update, without epsilon (Everett et al. 2024, arXiv 2407.05872).

    p ← p·(1 − lr·wd) − lr/(1 − β1^t) · atan2(m, √v / √(1 − β2^t))

    foreach: whether to update all weights together, which takes more memory; None: on CUDA.
    """

    class Config(pydantic.BaseModel, extra="forbid", strict=True):
        fused: bool | None = Field(
            None,
            description="use the kernel of the package adam-atan2; null: on CUDA, if it loads",
            json_schema_extra={"on_resume": "any"},
        )

    moments = "adam"

    @staticmethod
    def build(
        model: nn.Module,
        groups: list[dict],
        lr: float,
        betas: tuple[float, float],
        fused: bool | None = None,
    ) -> list[Optimizer]:
        options: dict[str, Any] = dict(lr=lr, betas=betas)
        on_cuda = groups[0]["params"][0].device.type == "cuda"
        if fused or (fused is None and on_cuda and importlib.util.find_spec("adam_atan2")):
            try:
                return [fused_adam_atan2()(groups, **options)]
            except (ImportError, OSError) as error:
                if fused:
                    raise UserError(
                        f"optimizer.fused=true needs the package adam-atan2, which does not load "
                        f"({error}): install it, or use null"
                    ) from error
                warnings.warn(
                    f"adam-atan2 is installed but does not load ({error}); using plain PyTorch",
                    stacklevel=2,
                )
        return [AdamATan2(groups, **options)]

    takes_averages = True

    def __init__(
        self,
        params,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        foreach: bool | None = None,
    ):
        options = dict(lr=lr, betas=betas, weight_decay=weight_decay, foreach=foreach)
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None, averages: AverageUpdate | None = None):
        loss = _call(closure)
        averages = averages or AverageUpdate({}, 0.0)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not (state := self.state[p]):
                    state |= dict(
                        step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )
                state["step"] += 1
            together = group.get("foreach")
            if together is None:
                together = bool(parameters) and parameters[0].device.type == "cuda"
            if together:
                self._update_together(parameters, group)
            else:
                for p in parameters:
                    self._update(p, p.grad, group, averages)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of any Adam, converting its step count from a tensor to a Python
        number.
        """
        super().load_state_dict(state_dict)
        for moments in self.state.values():
            moments["step"] = int(moments["step"])

    def _update(self, p: Tensor, grad: Tensor, group: dict, averages: AverageUpdate) -> None:
        state, (beta1, beta2), lr = self.state[p], group["betas"], group["lr"]
        decay, rate = lr * group["weight_decay"], lr / (1 - beta1 ** state["step"])
        correction: Any = (1 - beta2 ** state["step"]) ** 0.5
        tensors = [p, grad, state["exp_avg"], state["exp_avg_sq"]]
        if p.device.type == "xla":
            # after a few hundred steps it rounds to 1, and the constant 1 is another program on XLA
            correction = torch.full((1,), correction, dtype=p.dtype).to(p.device)
        elif (average := averages.take(p)) is not None:
            tensors.append(average)
        tensors = [local_part(x) for x in tensors]
        if (library := _kernels(tensors)) is not None:
            numbers = (1 - beta1, beta2, 1 / correction, 1 - decay, rate, averages.weight)
            pointers = [x.data_ptr() for x in tensors] + [None] * (5 - len(tensors))
            library.adam_atan2(
                *map(c_void_p, pointers), c_int64(tensors[0].numel()),
                byref((c_float * len(numbers))(*numbers)), torch.get_num_threads(),
            )  # fmt: skip
            return
        for part, slope, mean, square, *shadows in _pieces(tensors):
            mean.lerp_(slope, 1 - beta1)
            square.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
            root = square.sqrt().div_(correction)
            if group["weight_decay"]:
                part.mul_(1 - decay)
            part.sub_(torch.atan2(mean, root), alpha=rate)
            for shadow in shadows:
                shadow.lerp_(part.to(shadow.dtype), averages.weight)

    def _update_together(self, parameters: Sequence[Any], group: dict) -> None:
        """Update several weights with a few operations on all of them.

        There is no such operation for atan2. Its second argument is not negative, so it is
        atan(m / √v), and rsqrt limited to finite numbers gives 0 where both arguments are 0.
        """
        (beta1, beta2), lr = group["betas"], group["lr"]
        kinds: dict[tuple[torch.dtype, int], list[Any]] = {}
        for p in parameters:
            kinds.setdefault((p.dtype, self.state[p]["step"]), []).append(p)
        for (dtype, step), chosen in kinds.items():
            weights = [local_part(p) for p in chosen]
            slopes = [local_part(p.grad) for p in chosen]
            means, squares = (
                [local_part(self.state[p][name]) for p in chosen]
                for name in ("exp_avg", "exp_avg_sq")
            )
            torch._foreach_lerp_(means, slopes, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, slopes, slopes, 1 - beta2)
            angles = torch._foreach_rsqrt(squares)
            torch._foreach_clamp_max_(angles, torch.finfo(dtype).max)
            torch._foreach_mul_(angles, means)
            torch._foreach_mul_(angles, (1 - beta2**step) ** 0.5)
            torch._foreach_atan_(angles)
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_add_(weights, angles, alpha=-lr / (1 - beta1**step))


def _kernels(tensors: Sequence[Tensor]) -> CDLL | None:
    """Return the C++ kernels, if they support these tensors of one shape."""
    fits = all(
        x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() for x in tensors
    )
    return cpu_kernels() if fits and type(tensors[0]) is not FakeTensor else None


def _pieces(tensors: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
    """Cut tensors of one shape, on a CPU, into pieces that stay in its cache between operations."""
    if tensors[0].device.type != "cpu" or not all(x.is_contiguous() for x in tensors):
        return [tensors]
    return zip(*(x.view(-1).split(_PIECE) for x in tensors), strict=True)


@torch.enable_grad()
def _call(closure: Any) -> Any:
    return None if closure is None else closure()


def fused_adam_atan2() -> type[Optimizer]:
    """Return the fused CUDA version of `AdamATan2` from the package adam-atan2.

    Raises ImportError or OSError if the package or its kernel cannot be loaded.
    """
    from adam_atan2 import AdamATan2 as Kernel

    class FusedAdamATan2(Kernel):
        """Add support for a closure and for sharded parameters."""

        def _cuda_graph_capture_health_check(self) -> None:
            """Do nothing; some versions of torch lack the method that the package calls, others
            warn that it is deprecated. A step is never captured in a CUDA graph."""

        @torch.no_grad()
        def step(self, closure=None):
            loss = _call(closure)
            super().step()
            return loss

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Load the state of any Adam, with its step counts on the device, where the kernel
            reads them.
            """
            super().load_state_dict(state_dict)
            for parameter, moments in self.state.items():
                moments["step"] = torch.tensor(float(moments["step"]), device=parameter.device)

        def _init_group(self, group: dict, *lists: list[Tensor]) -> None:
            """Collect parameters, gradients and moments; of sharded ones only this rank's part,
            because the update is elementwise and the kernel reads plain memory.
            """
            super()._init_group(group, *lists)
            for tensors in lists:
                tensors[:] = map(local_part, tensors)

    return FusedAdamATan2
