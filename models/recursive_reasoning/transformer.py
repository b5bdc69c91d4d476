"""The plain decoder: each block once, no recursion, no halting.

The baseline of equal parameters or equal FLOPs, with AthenaTRM's interface: it halts after its
one step, so that the same loop, stream, loss head and evaluators serve both.
"""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.backbone import Backbone, BackboneConfig, Batch
from models.layers import SequenceInfo, rms_norm
from models.recursive_reasoning.athena_trm import Carry, InnerCarry


class TransformerConfig(BackboneConfig):
    """Options of `Transformer`."""

    num_layers: int = Field(4, ge=1, description="blocks, each with its own weights")

    def answer_passes(self, steps: int) -> tuple[int, int, int]:
        """As `AthenaTRMConfig.answer_passes`."""
        return self.num_layers, self.num_layers, 0


class TransformerInner(Backbone):
    config: TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(self.make_block() for _ in range(config.num_layers))

    def answer(self, x: Tensor, info: SequenceInfo, steps: int = 1) -> Tensor:
        """x: embedded positions (B, L, D). Returns (B, L, D); there is only one step."""
        h = x
        if self.config.norm_type == "post":
            h = rms_norm(h, self.config.rms_norm_eps)
        for layer in self.layers:
            if self.config.use_gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, info, use_reentrant=False)
            else:
                h = layer(h, info)
        if self.config.norm_type == "pre":
            h = rms_norm(h, self.config.rms_norm_eps)
        return h


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
        inner = self.inner
        answer = inner.answer(inner.embed(batch), inner.sequence_info(batch))
        return new, {"logits": inner.logits(answer)}
