"""A base model that a run stays near: its answers beside those of the model that is trained.

The penalty is KL(model ‖ base) over the whole vocabulary, the direction of fine-tuning with a
reference policy: it costs to hold likely what the base does not, and not to drop some of the
base's answers for others, which is what fine-tuning is for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.backbone import Batch
from models.base import Carry

PREFIX = "anchor/"
"""Of the base's latents of a held row, in the carry's memory. Checkpoints leave them out: they
follow from the row."""

# Temporaries of the divergence: some five of this many elements (64 MB each in float32).
CHUNK_ELEMENTS = 1 << 24

SoftmaxLogits = Callable[[Tensor], Tensor]  # of `models.losses.LossType`


class Anchor:
    """The base, frozen, and in step with the model: row by row it has done as many ACT steps, or
    all of its own where those are fewer. So it costs one of its ACT steps, without gradient, for
    each of the model's, and an unchanged model has no divergence at any step.

    Not a module: no optimizer, average, rank or checkpoint is to find it.

    Args:
        model: an architecture below `models.`, on its device.
        softmax_logits: its loss' map from logits to what a softmax turns into probabilities.
    """

    def __init__(self, model: Any, softmax_logits: SoftmaxLogits):
        self.model = model.requires_grad_(False).eval()
        self.softmax_logits = softmax_logits
        self.steps: int = model.eval_steps

    @torch.no_grad()
    def catch_up(self, carry: Carry, steps: int | None = None) -> Carry:
        """Return `carry` with the base's latents of its rows, after as many steps as they had.

        steps: that no row has had more than; None: any number.
        """
        z = self.model.initial_carry(carry.current_data).latents
        for done in range(self.steps if steps is None else steps):
            new, _ = self._step(z, torch.full_like(carry.steps, done), carry.current_data)
            further = (carry.steps > done).view(-1, 1, 1)
            z = {name: torch.where(further, new[name], held) for name, held in z.items()}
        return _holding(carry, z)

    def step_with(self, model: Any, carry: Carry, batch: Batch) -> tuple[Carry, Batch, Tensor]:
        """Take one step of `model` in training, and the same step of the base.

        Returns the new carry, the model's outputs, and the base's logits (B, S, V).
        """
        held = carry.memory.items()
        z = {name.removeprefix(PREFIX): v for name, v in held if name.startswith(PREFIX)}
        carry, outputs = model(carry=carry, batch=batch)
        z, logits = self._step(z, carry.steps - 1, carry.current_data)
        return _holding(carry, z), outputs, logits

    @torch.no_grad()
    def _step(self, z: Batch, done: Tensor, data: Batch) -> tuple[Batch, Tensor]:
        """Take the step after the `done` (B,) that rows have behind them; rows without any start,
        rows that have taken all steps of the base keep what they had. The data are the rows' own.
        """
        waiting = (done == 0) | (done >= self.steps)
        carry, outputs = self.model(Carry(z, done, waiting, data), data)
        return carry.latents, outputs["logits"]


def _holding(carry: Carry, z: Batch) -> Carry:
    latents = {PREFIX + name: value for name, value in z.items()}
    return replace(carry, memory=carry.memory | latents)


def kl_divergence(
    logits: Tensor, base_logits: Tensor, own: SoftmaxLogits, of_base: SoftmaxLogits
) -> Tensor:
    """Σ p · log(p / q) over the vocabulary in nats, p the model's probabilities, q the base's.

    logits, base_logits (..., V); own, of_base: the maps of their losses. Returns (...), at least
    float32. Wide tables live for a part of the tokens at a time; the backward pass recomputes them.
    """

    def of_tokens(x: Tensor, y: Tensor) -> Tensor:
        log_p, log_q = own(x).log_softmax(-1), of_base(y).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    tokens = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    parts = [
        _Recomputed.apply(of_tokens, x, y)
        for x, y in zip(
            logits.flatten(0, -2).split(tokens),
            base_logits.flatten(0, -2).split(tokens),
            strict=True,
        )
    ]
    return torch.cat(parts).view(logits.shape[:-1])


class _Recomputed(torch.autograd.Function):
    """function(x, y), with a gradient for x; keeps its arguments alone. torch.utils.checkpoint does
    not know XLA devices."""

    @staticmethod
    def forward(ctx, function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor):
        ctx.function = function
        ctx.save_for_backward(x, y)
        return function(x, y)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, y = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.function(x, y), x, grads[0])
        return None, found, None
