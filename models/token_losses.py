"""Losses per token, and their maps from logits to probabilities.

The loss that a model was trained with defines its probabilities: for each `loss_type`, `LOSSES`
holds the loss and a map from logits to values whose softmax gives the probabilities. Perplexity,
sampling and export all use that map.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.common import IGNORE_LABEL_ID
from models.layers import at_least_float32

# Temporaries of the loss stay below this many elements (256 MB in float32).
_CHUNK_ELEMENTS = 1 << 26
# The same for `by_tokens`, whose functions allocate about five (64 MB each in float32).
_FUNCTION_ELEMENTS = 1 << 24

SoftmaxLogits = Callable[[Tensor], Tensor]
"""A map from logits (..., V) to values whose softmax gives the probabilities."""


def log_stable_s(x: Tensor) -> Tensor:
    """Return log s(x) for s(x) = x + 1 (x ≥ 0), 1 / (1 − x) (x < 0); its softmax is stablemax.

    Prieto et al. 2025, arXiv 2501.04697. At least float32; any shape.
    """
    x = at_least_float32(x)
    # the unused branch must stay finite, or its gradient would be 0 · inf
    return torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))


class _StablemaxNLL(torch.autograd.Function):
    """Stablemax cross-entropy of (T, V) logits at (T,) labels, all of them valid.

    With r = 1 / (1 + |x|): s = 1 + |x| or r, s' = 1 or r², (log s)' = r on both sides of 0.
    Saves the logits and one sum per token for the backward pass, not the probabilities.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor) -> Tensor:
        x = at_least_float32(logits)
        grown = x.abs().add_(1)
        total = torch.where(x >= 0, grown, 1 / grown).sum(-1)
        ctx.save_for_backward(logits, labels, total)
        return total.log() - log_stable_s(_pick(x, labels))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        logits, labels, total = ctx.saved_tensors
        x = at_least_float32(logits)
        slope = x.abs().add_(1).reciprocal_()
        grad = torch.where(x >= 0, 1, slope.square()).div_(total.unsqueeze(-1))
        at = labels.unsqueeze(-1)
        gained = slope.gather(-1, at).neg_().add_(grad.gather(-1, at))
        grad.scatter_(-1, at, gained)  # scatter_add_ is not deterministic on every device
        return grad.mul_(grads[0].unsqueeze(-1)).to(logits.dtype), None


def _pick(x: Tensor, labels: Tensor) -> Tensor:
    return x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _softmax_nll(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


def _cross_entropy(
    nll: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    valid_mask: Tensor | None,
) -> Tensor:
    if valid_mask is None:
        valid_mask = labels != ignore_index
    safe = torch.where(valid_mask, labels, 0).long().flatten()
    flat = logits.flatten(0, -2)
    rows = max(1, _CHUNK_ELEMENTS // flat.shape[-1])
    parts = [nll(x, y) for x, y in zip(flat.split(rows), safe.split(rows), strict=True)]
    loss = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(labels.shape)
    return torch.where(valid_mask, loss, 0)


def stablemax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_LABEL_ID,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """Return −log(s(x_y) / Σ s(x)) per token in nats; 0 where the label is ignored.

    logits (..., V), labels (...) integers, valid_mask (...) bool (default: labels that are not
    `ignore_index`). Returns (...), at least float32.
    """
    return _cross_entropy(_StablemaxNLL.apply, logits, labels, ignore_index, valid_mask)


def softmax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_LABEL_ID,
    valid_mask: Tensor | None = None,
) -> Tensor:
    """Return −log softmax(x)_y per token in nats; otherwise like `stablemax_cross_entropy`."""
    return _cross_entropy(_softmax_nll, logits, labels, ignore_index, valid_mask)


Rows = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""(logits (T, V), labels (T,), scale (T,), graded) -> loss and argmax, (T,) each. If `graded`, the
gradient of Σ scale · loss overwrites the logits.
"""


def _stablemax_rows(
    logits: Tensor, labels: Tensor, scale: Tensor, graded: bool
) -> tuple[Tensor, Tensor]:
    """See `Rows`; computed as in `_StablemaxNLL`."""
    preds, at = logits.argmax(-1), labels.unsqueeze(-1)
    x = at_least_float32(logits)
    positive, grown = x >= 0, x.abs() + 1
    slope = grown.reciprocal()
    total = torch.where(positive, grown, slope).sum(-1)
    label_logit = _pick(x, labels)
    if graded:
        factor, label_slope = scale / total, _pick(slope, labels)
        label_grad = factor * torch.where(label_logit < 0, label_slope.square(), 1)
        logits.copy_(torch.where(positive, 1, slope.square()) * factor.unsqueeze(-1))
        label_grad = (label_grad - scale * label_slope).to(logits.dtype)
        logits.scatter_(-1, at, label_grad.unsqueeze(-1))
    return total.log() - log_stable_s(label_logit), preds


def _softmax_rows(
    logits: Tensor, labels: Tensor, scale: Tensor, graded: bool
) -> tuple[Tensor, Tensor]:
    """See `Rows`."""
    preds, at = logits.argmax(-1), labels.unsqueeze(-1)
    x = at_least_float32(logits)
    label_logit, most = _pick(x, labels), x.amax(-1)
    grown = (x - most.unsqueeze(-1)).exp()
    total = grown.sum(-1)
    nll = total.log() + (most - label_logit)  # subtract first, so that large logits cancel
    if graded:
        logits.copy_(grown * (scale / total).unsqueeze(-1))
        label_grad = (scale * torch.expm1(-nll)).to(logits.dtype)
        logits.scatter_(-1, at, label_grad.unsqueeze(-1))
    return nll, preds


class LossType(NamedTuple):
    """cross_entropy: the loss per token. softmax_logits: the map from logits to values whose
    softmax gives the probabilities. rows: computes loss and gradient together; None: by autograd.
    kernel: the same in `models.triton_rows` and `models.cpu_rows`; None: not there.
    """

    cross_entropy: Callable[..., Tensor]
    softmax_logits: SoftmaxLogits
    rows: Rows | None = None
    kernel: Literal["softmax", "stablemax"] | None = None


LOSSES = {
    "stablemax_cross_entropy": LossType(
        stablemax_cross_entropy, log_stable_s, _stablemax_rows, "stablemax"
    ),
    "softmax_cross_entropy": LossType(
        softmax_cross_entropy, at_least_float32, _softmax_rows, "softmax"
    ),
}


class RowSums(NamedTuple):
    """Of the scores u of each token, `softmax_logits` of its logits, (T,) each: log Σ exp(u), the
    score of the label, and the mean of u.
    """

    log_z: Tensor
    label: Tensor
    mean: Tensor


def sum_rows(scores: Tensor, labels: Tensor) -> RowSums:
    """Return the sums of scores (T, V) for labels (T,)."""
    return RowSums(scores.logsumexp(-1), _pick(scores, labels), scores.mean(-1))


def by_tokens(function: Callable[..., Tensor], logits: Tensor, *others: Tensor) -> Tensor:
    """Compute function(logits, *others), with a gradient for `logits`, in parts of the tokens, so
    that temporaries stay small; the backward pass recomputes them.

    logits (..., V); others (...) or (..., V), without gradient. function: from (T, V) and (T,) or
    (T, V) to (T,). Returns (...).
    """
    leading, width = logits.shape[:-1], logits.shape[-1]
    tokens = max(1, _FUNCTION_ELEMENTS // width)
    flat = [logits.flatten(0, -2)]
    flat += [x.flatten() if x.shape == leading else x.flatten(0, -2) for x in others]
    parts = zip(*(x.split(tokens) for x in flat), strict=True)
    return torch.cat([_Recomputed.apply(function, *part) for part in parts]).view(leading)


class _Recomputed(torch.autograd.Function):
    """function(x, ...) with a gradient for x, saving only its arguments. torch.utils.checkpoint
    does not support XLA devices.
    """

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], x: Tensor, *others: Tensor):
        ctx.function = function
        ctx.save_for_backward(x, *others)
        return function(x, *others)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *others = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(ctx.function(x, *others), x, grads[0])
        return None, found, *(None for _ in others)
