"""The rows of `models.token_losses` as Triton kernels, for CUDA: one program per token.

For logits x (V,) with the label y, both losses are softmax cross-entropy of the scores u, where
u = x (softmax) or u = log s(x) (stablemax, see `log_stable_s`). With Z = log Σ exp(u) and
p = exp(u - Z)

    loss = Z - u_y        dZ/dx_v = u'_v p_v        du_y/dx_y = u'_y

where u' = 1 (softmax) or u' = 1 / (1 + |x|) (stablemax). A term that is a function of `RowSums`
adds multiples of the gradients of Z, u_y and the mean of u, and nothing else.

The first pass over a row finds the largest logit and Σ exp(u) without the label, each lane of the
block for its own columns, so that only the end combines lanes. The second pass overwrites the
logits with their gradient. p_y - 1 is minus that sum over the whole one, with no subtraction that
loses digits. The order of every sum depends on V alone, so results are deterministic.

Shape letters: T tokens, V vocabulary.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.token_losses import LossType, RowSums

_WIDEST = 2048
"""Largest number of columns that a program loads at once."""
_LOWEST = tl.constexpr(-3e38)


@triton.jit
def _first_pass(
    row, label, width, STABLEMAX: tl.constexpr, MEAN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the largest logit, its first position, the label's logit, Σ exp(u - c) without the
    label and with it, and the mean of u (0 unless MEAN). c: the largest logit; 0 for stablemax.
    """
    places = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), _LOWEST, WIDE)
    at = places
    rest = tl.zeros((BLOCK,), WIDE)
    scores = tl.zeros((BLOCK,), WIDE)
    for start in range(0, width, BLOCK):
        columns = start + places
        inside = columns < width
        others = inside & (columns != label)
        x = tl.load(row + columns, mask=inside, other=-float("inf")).to(WIDE)
        larger = x > most
        if STABLEMAX:
            grown = 1 + tl.abs(x)
            rest += tl.where(others, tl.where(x < 0, 1 / grown, grown), 0)
            if MEAN:
                log = tl.log(grown)
                scores += tl.where(inside, tl.where(x < 0, -log, log), 0)
        else:
            change = tl.exp(-tl.abs(x - most))
            rest = tl.where(larger, rest * change, rest)
            rest += tl.where(others, tl.where(larger, 1, change), 0)
            if MEAN:
                scores += tl.where(inside, x, 0)
        at = tl.where(larger, columns, at)
        most = tl.where(larger, x, most)
    largest = tl.max(most, 0)
    first = tl.min(tl.where(most == largest, at, width), 0)
    known = (label >= 0) & (label < width)
    picked = tl.load(row + label, mask=known, other=0).to(WIDE)
    if STABLEMAX:
        grown = 1 + tl.abs(picked)
        own = tl.where(picked < 0, 1 / grown, grown)
    else:
        rest *= tl.exp(most - largest)
        own = tl.exp(picked - largest)
    without = tl.sum(rest, 0)
    return largest, first, picked, without, without + own, tl.sum(scores, 0) / width


@triton.jit
def _log_sums(largest, picked, total, STABLEMAX: tl.constexpr):
    """Return Z, u_y and the loss."""
    log = tl.log(total)
    if STABLEMAX:
        grown = tl.log(1 + tl.abs(picked))
        score = tl.where(picked < 0, -grown, grown)
        return log, score, log - score
    return log + largest, picked, log + (largest - picked)  # large logits cancel first


@triton.jit
def _second_pass(
    row, label, width, largest, without, total, by_log_z, by_label, by_mean,
    STABLEMAX: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite the logits with by_log_z · dZ/dx + by_label · du_y/dx + by_mean · d(mean u)/dx."""
    tl.debug_barrier()  # until all warps have read the label's logit
    each = by_mean / width
    of_label = by_log_z * (-without / total) + (by_log_z + by_label) + each
    by_exp = by_log_z / total
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(row + columns, mask=inside, other=0).to(WIDE)
        if STABLEMAX:
            grown = 1 + tl.abs(x)
            slope = 1 / grown
            grad = tl.where(x < 0, slope, grown) * by_exp + each
            grad = tl.where(columns == label, of_label, grad) * slope
        else:
            grad = tl.exp(x - largest) * by_exp + each
            grad = tl.where(columns == label, of_label, grad)
        tl.store(row + columns, grad.to(row.dtype.element_ty), mask=inside)


@triton.jit
def _losses_kernel(
    logits, width, labels, scale, nll, preds,
    GRADED: tl.constexpr, STABLEMAX: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * width
    label = tl.load(labels + token).to(tl.int32)
    largest, first, picked, without, total, _ = _first_pass(
        row, label, width, STABLEMAX, False, WIDE, BLOCK
    )
    _, _, loss = _log_sums(largest, picked, total, STABLEMAX)
    tl.store(nll + token, loss)
    tl.store(preds + token, first.to(tl.int64))
    if GRADED:
        factor = tl.load(scale + token).to(WIDE)
        _second_pass(
            row, label, width, largest, without, total, factor, -factor, factor * 0,
            STABLEMAX, WIDE, BLOCK,
        )  # fmt: skip


@triton.jit
def _sums_kernel(
    logits, width, labels, nll, preds, log_z, scores, means, largests, withouts, totals,
    STABLEMAX: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token).to(tl.int32)
    largest, first, picked, without, total, mean = _first_pass(
        logits + token * width, label, width, STABLEMAX, True, WIDE, BLOCK
    )
    z, score, loss = _log_sums(largest, picked, total, STABLEMAX)
    tl.store(nll + token, loss)
    tl.store(preds + token, first.to(tl.int64))
    tl.store(log_z + token, z)
    tl.store(scores + token, score)
    tl.store(means + token, mean)
    tl.store(largests + token, largest)
    tl.store(withouts + token, without)
    tl.store(totals + token, total)


@triton.jit
def _gradient_kernel(
    logits, width, labels, largests, withouts, totals, by_log_z, by_label, by_mean,
    STABLEMAX: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token).to(tl.int32)
    _second_pass(
        logits + token * width, label, width,
        tl.load(largests + token), tl.load(withouts + token), tl.load(totals + token),
        tl.load(by_log_z + token), tl.load(by_label + token), tl.load(by_mean + token),
        STABLEMAX, WIDE, BLOCK,
    )  # fmt: skip


def launch_options(width: int) -> dict[str, int]:
    """Return the columns of a block and the number of warps for rows of `width` logits."""
    block = min(triton.next_power_of_2(width), _WIDEST)
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def _launch(kernel: Any, loss_type: LossType, logits: Tensor, *others: Tensor, **flags: Any):
    assert logits.is_contiguous() and all(x.is_contiguous() for x in others)
    kernel[(len(logits),)](
        logits,
        logits.shape[1],
        *others,
        STABLEMAX=loss_type.kernel == "stablemax",
        WIDE=tl.float64 if logits.dtype == torch.float64 else tl.float32,
        **flags,
        **launch_options(logits.shape[1]),
    )


def _allocate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return tensors (T,) for the loss and the argmax."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    shape = logits.shape[:1]
    return logits.new_empty(shape, dtype=wide), logits.new_empty(shape, dtype=torch.int64)


def compute_losses(
    loss_type: LossType, logits: Tensor, labels: Tensor, scale: Tensor, graded: bool
) -> tuple[Tensor, Tensor]:
    """Compute loss and argmax, (T,) each; see `models.token_losses.Rows`."""
    nll, preds = _allocate(logits)
    _launch(_losses_kernel, loss_type, logits, labels, scale, nll, preds, GRADED=graded)
    return nll, preds


def compute_sums(
    loss_type: LossType, logits: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, RowSums, tuple[Tensor, ...]]:
    """Compute loss, argmax, sums, and what `overwrite_logits` needs."""
    nll, preds = _allocate(logits)
    sums = RowSums(*(torch.empty_like(nll) for _ in RowSums._fields))
    kept = tuple(torch.empty_like(nll) for _ in range(3))
    _launch(_sums_kernel, loss_type, logits, labels, nll, preds, *sums, *kept)
    return nll, preds, sums, kept


def overwrite_logits(
    loss_type: LossType, logits: Tensor, labels: Tensor, kept: tuple[Tensor, ...], grads: RowSums
) -> None:
    """Overwrite the logits with the gradient of a function whose gradients with respect to the sums
    are `grads`.
    """
    _launch(_gradient_kernel, loss_type, logits, labels, *kept, *(x.contiguous() for x in grads))
