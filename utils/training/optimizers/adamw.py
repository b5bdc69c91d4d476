"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), as in PyTorch."""

from typing import Any

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer


class AdamW:
    class Config(pydantic.BaseModel, extra="forbid", strict=True):
        eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")

    moments = "adam"

    @staticmethod
    def build(
        model: nn.Module, groups: list[dict], lr: float, betas: tuple[float, float], eps: float
    ) -> list[Optimizer]:
        return [FusedAdamW(groups, lr=lr, betas=betas, eps=eps)]


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW, updated in one pass over memory on CPUs and CUDA.

    torch's fused update reads memory in order, so it is wrong where strides differ.
    """

    def __init__(self, groups: list[dict], **options: Any):
        parameters = [p for group in groups for p in group["params"]]
        fused = all(p.device.type in ("cpu", "cuda") and p.is_contiguous() for p in parameters)
        super().__init__(groups, fused=fused or None, **options)

    def _init_group(self, group: dict, parameters: list[Tensor], grads: list[Tensor], *rest: Any):
        """Collect parameters, gradients and moments, with gradients in the order of memory."""
        result = super()._init_group(group, parameters, grads, *rest)
        grads[:] = [grad.contiguous() for grad in grads] if group["fused"] else grads
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of any Adam, with its step counts on the device of the weights, where the
        fused update reads them.
        """
        super().load_state_dict(state_dict)
        if self.defaults["fused"]:
            for parameter, moments in self.state.items():
                moments["step"] = moments["step"].to(parameter.device)
