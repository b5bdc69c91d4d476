"""Muon (Jordan et al. 2024) on the matrices of the blocks, AdamW on embeddings and heads."""

import pydantic
import torch
from pydantic import Field
from torch.optim import Optimizer

from models.base import Architecture


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
        muon = torch.optim.Muon(
            inside, lr=lr, momentum=momentum, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"
        )
        return [muon, torch.optim.AdamW(outside, lr=lr, betas=betas)]
