"""The output head fused with the token loss, computed in parts of the tokens.

The logits (T, V) of a batch are its largest tensor, and here they never exist as a whole: each part
of them yields its losses, its predictions and, while it is in the cache, its share of the gradients
of hidden states and weight. The backward pass only scales these gradients.

Shape letters: T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.token_losses import LossType

_PART_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}
"""Number of logits that exist at once, by device type, where the loss takes no further memory."""
_OTHER_ELEMENTS = 1 << 24
"""Number of logits that exist at once elsewhere: the loss takes five times their memory."""
_CACHED_ELEMENTS = 1 << 18
"""Number of logits per part for an uncompiled loss on a CPU, so that they fit in a core's cache."""

TokenTerm = Callable[[Tensor, Tensor], Tensor]
"""An additional loss per token: (logits (T, V), labels (T,)) -> (T,)."""


class LinearLoss(NamedTuple):
    """The result of `linear_loss`. total: Σ scale · loss over tokens, with a gradient for hidden
    states and weight. The others, (T,) each, have no gradient: nll in nats, preds, and the values
    of each additional term.
    """

    total: Tensor
    nll: Tensor
    preds: Tensor
    terms: tuple[Tensor, ...] = ()


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    loss_type: LossType,
    *,
    terms: Sequence[tuple[float, TokenTerm]] = (),
    compiled: bool = False,
    device_type: str | None = None,
) -> LinearLoss:
    """Compute the losses of the logits hidden @ weight.T.

    The products run in the dtype of `hidden`, the loss in at least float32.

    Args:
        hidden: (T, D). weight: (V, D), any floating dtype.
        labels: (T,) integers below V; arbitrary for tokens without a label, whose scale is 0.
        scale: (T,), factor of each token's loss in the total; has no gradient.
        terms: additional losses with their factors, the same for all tokens.
        compiled: run the loss of a part through torch.compile; does not apply to additional terms.
        device_type: the device whose memory decides the size of a part; None: that of `hidden`.
    """
    graded = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    how = _How(loss_type, tuple(terms), compiled, device_type or hidden.device.type, graded)
    total, nll, preds, *values = _LinearLoss.apply(hidden, weight, labels, scale, how)
    return LinearLoss(total, nll, preds, tuple(values))


class _How(NamedTuple):
    """See `linear_loss`. graded: whether gradients are needed."""

    loss_type: LossType
    terms: tuple[tuple[float, TokenTerm], ...]
    compiled: bool
    device_type: str
    graded: bool

    @property
    def part_elements(self) -> int | None:
        """The number of logits that may exist at once; None: all."""
        if self.device_type == "xla":  # where each part would repeat the program
            return None
        plain = self.loss_type.rows is not None and not self.terms
        if plain and (self.compiled or self.device_type == "cpu"):
            return _PART_ELEMENTS.get(self.device_type, _OTHER_ELEMENTS)
        return _OTHER_ELEMENTS


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, scale: Tensor, how: _How):
        cast = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        ctx.set_materialize_grads(False)
        needs_hidden, needs_weight = (how.graded and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        found: list[tuple[Tensor, ...]] = []
        for places in _parts(len(hidden), len(weight), how.part_elements):
            part = hidden[places]
            logits = F.linear(part, cast)
            found.append(_losses(logits, labels[places], scale[places], how))
            # from here on `logits` contains the gradient
            if grad_hidden is not None:
                grad_hidden[places] = logits @ cast
            if needs_weight:
                product = (logits.T @ part).to(wide)
                grad_weight = product if grad_weight is None else grad_weight.add_(product)
        nll, preds, *values = (torch.cat(each) for each in zip(*found, strict=True))
        total = (nll * scale).sum()
        for (factor, _), value in zip(how.terms, values, strict=True):
            total = total + factor * (value * scale).sum()
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(nll, preds, *values)
        return total, nll, preds, *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        factor, kept = grads[0], ctx.saved_tensors
        own = [
            None if one is None or factor is None else one * factor.to(one.dtype) for one in kept
        ]
        return *own, None, None, None


def _parts(tokens: int, width: int, elements: int | None) -> list[slice]:
    """Split tokens into equal parts of at most `elements` logits; None: one part."""
    most = tokens if elements is None else max(1, elements // width)
    count = max(1, -(-tokens // most))
    size = max(1, -(-tokens // count))
    return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]


def _losses(logits: Tensor, labels: Tensor, scale: Tensor, how: _How) -> tuple[Tensor, ...]:
    """Return (nll, preds, values of the terms), (T,) each; if gradients are needed, that of the
    total overwrites the logits.
    """
    rows = how.loss_type.rows
    if rows is None or how.terms:
        return _differentiate(logits, labels, scale, how)
    if how.compiled:
        return _compiled(rows)(logits, labels, scale, how.graded)
    limit = _CACHED_ELEMENTS if how.device_type == "cpu" else None
    pieces = _parts(len(logits), logits.shape[1], limit)
    if isinstance(logits, FakeTensor):  # traced: one piece takes as much memory as any other
        nll, preds = rows(logits[pieces[0]], labels[pieces[0]], scale[pieces[0]], how.graded)
        return nll.new_empty(len(logits)), preds.new_empty(len(logits))
    found = [rows(logits[places], labels[places], scale[places], how.graded) for places in pieces]
    return found[0] if len(found) == 1 else tuple(map(torch.cat, zip(*found, strict=True)))


@cache
def _compiled(rows: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(rows, dynamic=False)


def _differentiate(logits: Tensor, labels: Tensor, scale: Tensor, how: _How) -> tuple[Tensor, ...]:
    """Do the same as `_losses` for any function, by autograd."""
    preds = logits.argmax(-1)
    with torch.set_grad_enabled(how.graded):
        x = logits.detach().requires_grad_(how.graded)
        every = torch.ones_like(labels, dtype=torch.bool)
        nll = how.loss_type.cross_entropy(x, labels, valid_mask=every)
        values = [term(x, labels) for _, term in how.terms]
        total = (nll * scale).sum()
        for (factor, _), value in zip(how.terms, values, strict=True):
            total = total + factor * (value * scale).sum()
    if how.graded:
        logits.copy_(torch.autograd.grad(total, x)[0])
    return nll.detach(), preds, *(value.detach() for value in values)
