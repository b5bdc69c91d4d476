"""The plain decoder: each block runs once, without recursion or halting.

The baseline with equal parameters or equal FLOPs. It has AthenaTRM's interface and halts after its
only step, so that both use the same loop, stream, loss head and evaluators.
"""

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.backbone import Backbone, BackboneConfig, Batch
from models.base import Architecture, Carry, Outputs
from models.layers import SequenceInfo, rms_norm


class TransformerConfig(BackboneConfig):
    """Options of `Transformer`."""

    num_layers: int = Field(4, ge=1, description="blocks, each with its own weights")


class TransformerInner(Backbone):
    config: TransformerConfig

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(self.make_block() for _ in range(config.num_layers))

    def answer(self, x: Tensor, info: SequenceInfo, steps: int = 1) -> Tensor:
        """Return the last hidden states (B, L, D); there is only one step. x: (B, L, D)."""
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


class Transformer(Architecture):
    """See the module."""

    Config: type[TransformerConfig] = TransformerConfig
    Inner: type[TransformerInner] = TransformerInner
    inner: TransformerInner
    repeats_blocks = False

    def __init__(self, config_dict: dict):
        super().__init__()
        self.config = self.Config(**config_dict)
        self.inner = self.Inner(self.config).to(self.config.param_dtype)

    def forward(self, carry: Carry, batch: Batch) -> tuple[Carry, Batch]:
        """Run one forward pass, after which every row halts. Outputs: readout (B, S, D)."""
        done = torch.ones_like(carry.halted)
        data = {name: batch[name] for name in carry.current_data}
        new = replace(carry, steps=done.to(torch.int32), halted=done, current_data=data)
        answer = self.inner.answer(self.inner.embed(data), self.inner.sequence_info(data))
        readout = answer[:, self.config.prefix_len :]
        return new, Outputs(self.inner.predict, readout=readout)
