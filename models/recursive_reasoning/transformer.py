"""The plain decoder: each block once, no recursion, no halting.

The baseline of equal parameters or equal FLOPs, with AthenaTRM's interface: it halts after its
one step, so that the same loop, stream, loss head and evaluators serve both.
"""

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.backbone import Backbone, BackboneConfig, Batch
from models.layers import rms_norm
from models.recursive_reasoning.athena_trm import Carry, InnerCarry


class TransformerConfig(BackboneConfig):
    """Options of `Transformer`."""

    num_layers: int = Field(4, ge=1, description="blocks, each with its own weights")


class TransformerInner(Backbone):
    config: TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(self.make_block() for _ in range(config.num_layers))

    def forward(self, data: Batch):
        """Returns logits (B, S, V)."""
        info, h = self.sequence_info(data), self.embed(data)
        if self.config.norm_type == "post":
            h = rms_norm(h, self.config.rms_norm_eps)
        for layer in self.layers:
            if self.config.use_gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, info, use_reentrant=False)
            else:
                h = layer(h, info)
        if self.config.norm_type == "pre":
            h = rms_norm(h, self.config.rms_norm_eps)
        return self.logits(h)


class Transformer(nn.Module):
    """See the module. `config_dict` holds the options of `TransformerConfig`."""

    Config = TransformerConfig

    def __init__(self, config_dict: dict):
        super().__init__()
        self.config = TransformerConfig(**config_dict)
        self.inner = TransformerInner(self.config).to(self.config.param_dtype)

    def initial_carry(self, batch: Batch) -> Carry:
        rows, device = batch["inputs"].shape[0], batch["inputs"].device
        nothing = torch.zeros(rows, 0, 0, dtype=self.config.dtype, device=device)
        return Carry(
            InnerCarry(nothing, nothing),
            steps=torch.zeros(rows, dtype=torch.int32, device=device),
            halted=torch.ones(rows, dtype=torch.bool, device=device),
            current_data=dict(batch),
            last_loss=torch.full((rows,), torch.inf, device=device),
        )

    def forward(self, carry: Carry, batch: Batch) -> tuple[Carry, Batch]:
        """One pass; every row halts. Outputs: logits (B, S, V)."""
        done = torch.ones_like(carry.halted)
        new = Carry(carry.inner_carry, done.to(torch.int32), done, dict(batch), carry.last_loss)
        return new, {"logits": self.inner(batch)}
