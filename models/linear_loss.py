"""The output head fused with the token loss, computed in parts of the tokens.

The logits (T, V) of a batch are its largest tensor, and here they never exist as a whole: each part
of them yields its losses, its predictions and, while it is in the cache, its share of the gradients
of hidden states and weight. The backward pass only scales these gradients.

Shape letters: T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models import cpu_rows
from models.flex import describe_failure
from models.token_losses import LossType, RowSums

_PART_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 27}
"""Number of logits that exist at once, by device type, where the loss takes no further memory."""
_OTHER_ELEMENTS = 1 << 24
"""Number of logits that exist at once elsewhere: the loss takes five times their memory."""
_CACHED_ELEMENTS = 1 << 18
"""Number of logits per part for an uncompiled loss on a CPU, so that they fit in a core's cache."""


LossKernel = Literal["cpu", "triton"]


class WeightedTerm(NamedTuple):
    """An additional loss per token, with its factor in the total.

    of_tokens: (logits (T, V), labels (T,)) -> (T,). of_sums: the same from the sums of the tokens'
    scores, if it depends on nothing else.
    """

    factor: float
    of_tokens: Callable[[Tensor, Tensor], Tensor]
    of_sums: Callable[[RowSums], Tensor] | None = None


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
    terms: Sequence[WeightedTerm] = (),
    compiled: bool = False,
    kernel: LossKernel | None = None,
    device_type: str | None = None,
) -> LinearLoss:
    """Compute the losses of the logits hidden @ weight.T.

    The products run in the dtype of `hidden`, the loss in at least float32.

    Args:
        hidden: (T, D). weight: (V, D), any floating dtype.
        labels: (T,) integers from 0 to V - 1, also for tokens without a label, whose scale is 0.
        scale: (T,), factor of each token's loss in the total; has no gradient.
        compiled: run the loss of a part through torch.compile; does not apply to additional terms.
        kernel: compute the loss by `models.triton_rows`, unless a term needs the logits, or by
            `models.cpu_rows`, unless there are terms.
        device_type: the device whose memory decides the size of a part; None: that of `hidden`.
    """
    graded = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    device_type = device_type or hidden.device.type
    how = _How(loss_type, tuple(terms), compiled, kernel, device_type, graded)
    total, nll, preds, *values = _LinearLoss.apply(hidden, weight, labels, scale, how)
    return LinearLoss(total, nll, preds, tuple(values))


def triton_failure(loss_type: LossType, device: torch.device, dtype: torch.dtype) -> str | None:
    """Try `models.triton_rows` on a device, whose results must be those of `LossType.rows`; return
    the reason if it fails, else None.
    """
    assert loss_type.rows is not None
    logits = torch.linspace(-9, 9, 999, device=device, dtype=dtype).view(3, 333)
    labels = torch.tensor([0, 332, 5], device=device)
    scale = torch.ones(3, device=device, dtype=torch.promote_types(dtype, torch.float32))
    try:
        from models import triton_rows

        expected, overwritten = logits.clone(), logits.clone()
        right = loss_type.rows(expected, labels, scale, True)
        found = triton_rows.compute_losses(loss_type, overwritten, labels, scale, True)
        for one, other in zip((*found, overwritten), (*right, expected), strict=True):
            torch.testing.assert_close(one, other)
    except Exception as error:  # compilers raise any type of exception
        return describe_failure(error)
    return None


class _How(NamedTuple):
    """See `linear_loss`. graded: whether gradients are needed."""

    loss_type: LossType
    terms: tuple[WeightedTerm, ...]
    compiled: bool
    kernel: LossKernel | None
    device_type: str
    graded: bool

    @property
    def in_triton(self) -> bool:
        """Whether `models.triton_rows` computes the loss."""
        fits = all(term.of_sums is not None for term in self.terms)
        return self.kernel == "triton" and fits and self.loss_type.kernel is not None

    @property
    def in_cpp(self) -> bool:
        """Whether `models.cpu_rows` computes the loss."""
        return self.kernel == "cpu" and not self.terms and self.loss_type.kernel is not None

    @property
    def part_elements(self) -> int | None:
        """The number of logits that may exist at once; None: all."""
        if self.device_type == "xla":  # where each part would repeat the program
            return None
        plain = self.loss_type.rows is not None and not self.terms
        if self.in_triton or (plain and (self.compiled or self.device_type == "cpu")):
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
                product = logits.T @ part
                if grad_weight is None:
                    grad_weight = product.to(wide)
                else:
                    grad_weight.add_(product)
        nll, preds, *values = (torch.cat(each) for each in zip(*found, strict=True))
        total = (nll * scale).sum()
        total = _add_terms(total, values, scale, how)
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
    if how.in_triton:
        return _losses_in_triton(logits, labels, scale, how)
    if how.in_cpp:
        if isinstance(logits, FakeTensor):
            return scale.new_empty(len(logits)), labels.new_empty(len(logits))
        return cpu_rows.compute_losses(how.loss_type, logits, labels, scale, how.graded)
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
        values = [term.of_tokens(x, labels) for term in how.terms]
        total = _add_terms((nll * scale).sum(), values, scale, how)
    if how.graded:
        logits.copy_(torch.autograd.grad(total, x)[0])
    return nll.detach(), preds, *(value.detach() for value in values)


def _losses_in_triton(
    logits: Tensor, labels: Tensor, scale: Tensor, how: _How
) -> tuple[Tensor, ...]:
    """Do the same as `_losses`; autograd differentiates the terms with respect to the sums."""
    from models import triton_rows  # Triton is optional

    loss_type = how.loss_type
    if not how.terms:
        return triton_rows.compute_losses(
            loss_type, logits, labels.contiguous(), scale.contiguous(), how.graded
        )
    labels = labels.contiguous()
    nll, preds, found, kept = triton_rows.compute_sums(loss_type, logits, labels)
    with torch.set_grad_enabled(how.graded):
        sums = RowSums(*(x.requires_grad_(how.graded) for x in found))
        values = [term.of_sums(sums) for term in how.terms if term.of_sums is not None]
        total = _add_terms(((sums.log_z - sums.label) * scale).sum(), values, scale, how)
    if how.graded:
        grads = torch.autograd.grad(total, sums, materialize_grads=True)
        triton_rows.overwrite_logits(loss_type, logits, labels, kept, RowSums(*grads))
    return nll, preds, *(value.detach() for value in values)


def _add_terms(total: Tensor, values: Sequence[Tensor], scale: Tensor, how: _How) -> Tensor:
    """Return the total with the terms, whose values per token are given."""
    for term, value in zip(how.terms, values, strict=True):
        total = total + term.factor * (value * scale).sum()
    return total
