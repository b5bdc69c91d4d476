"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), as in PyTorch."""

import pydantic
import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer


class AdamW:
    class Config(pydantic.BaseModel, extra="forbid", strict=True):
        eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")

    moments = "adam"

    @staticmethod
    def build(
        model: nn.Module, groups: list[dict], lr: float, betas: tuple[float, float], eps: float
    ) -> list[Optimizer]:
        return [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)]
