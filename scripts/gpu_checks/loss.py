"""Compare the token loss' rows with float64, and time the output head with its loss."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.linear_loss import linear_loss, triton_failure
from models.token_losses import LOSSES, LossType
from scripts.gpu_checks.session import Session
from scripts.gpu_checks.speed import median_seconds

# tokens, vocabulary, dtype
SHAPES = (
    (4096, 32000, torch.bfloat16),
    (1000, 50257, torch.float32),
    (64, 131072, torch.bfloat16),
    (60000, 11, torch.bfloat16),
    (500, 3000, torch.float64),
)
BARS = {torch.bfloat16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-11}
"""Largest relative error of the gradient. That of the loss is at most 1e-5 in float32."""
STABLEMAX = "stablemax_cross_entropy"


def rows_on(session: Session, loss_type: LossType) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the rows that a fused loss uses on this device: Triton's, or PyTorch's on a CPU."""
    assert loss_type.rows is not None
    if not session.on_cuda:
        return loss_type.rows
    from models import triton_rows

    return partial(triton_rows.compute_losses, loss_type)


def draw(
    session: Session, tokens: int, vocab: int, dtype: torch.dtype, size: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits with labels and scale."""
    torch.manual_seed(1)
    device = session.backend.device
    logits = (torch.rand(tokens, vocab, device=device) * 2 - 1).mul_(size).to(dtype)
    labels = torch.randint(vocab, (tokens,), device=device)
    scale = torch.rand(tokens, device=device).to(torch.promote_types(dtype, torch.float32))
    return logits, labels, scale


def check_rows(session: Session) -> None:
    """Compare loss, prediction and gradient with float64, and check that they are deterministic."""
    for name, loss_type in LOSSES.items():
        if session.on_cuda:
            with session.check(f"trial of the Triton kernel, {name}") as found:
                reason = triton_failure(loss_type, session.backend.device, torch.bfloat16)
                found.update(passed=reason is None, answer=reason or "works")
        for tokens, vocab, dtype in SHAPES:
            if session.tiny:
                tokens, vocab = tokens // 200 + 1, vocab // 100 + 3
            for size in (3.0, 1e4):
                with session.check(f"{name}, {tokens} x {vocab}, {dtype}, up to {size}") as found:
                    found.update(compare_rows(session, loss_type, tokens, vocab, dtype, size))
    with session.check("rows beyond 2^31 logits") as found:
        tokens, vocab = (70, 320) if session.tiny else (70_000, 32_000)
        found.update(compare_last_rows(session, tokens, vocab))


def compare_rows(
    session: Session, loss_type: LossType, tokens: int, vocab: int, dtype: torch.dtype, size: float
) -> dict[str, object]:
    logits, labels, scale = draw(session, tokens, vocab, dtype, size)
    x = logits.double().requires_grad_()
    exact = F.cross_entropy(loss_type.softmax_logits(x), labels, reduction="none")
    (slope,) = torch.autograd.grad((exact * scale).sum(), x)
    rows, results = rows_on(session, loss_type), []
    for _ in range(2):
        grad = logits.clone()
        results.append((*rows(grad, labels, scale, True), grad))
    nll, preds, grad = results[0]
    loss_error = ((nll - exact).abs() / exact.abs().clamp_min(1)).max().item()
    grad_error = ((grad.double() - slope).norm() / slope.norm()).item()
    right = torch.equal(preds, logits.argmax(-1))
    same = all(map(torch.equal, *results))
    passed = loss_error < 1e-5 and grad_error < BARS[dtype] and right and same
    return dict(
        passed=passed, loss_error=loss_error, gradient_error=grad_error, predictions=right,
        deterministic=same,
    )  # fmt: skip


def compare_last_rows(session: Session, tokens: int, vocab: int) -> dict[str, object]:
    """Compare the last rows of large logits with the same rows alone, bit by bit."""
    device, last = session.backend.device, slice(tokens - 8, tokens)
    logits = torch.randn(tokens, vocab, device=device, dtype=torch.bfloat16)
    labels, scale = (
        torch.randint(vocab, (tokens,), device=device),
        torch.rand(tokens, device=device),
    )
    rows, alone = rows_on(session, LOSSES[STABLEMAX]), logits[last].clone()
    few = rows(alone, labels[last], scale[last], True)
    many = rows(logits, labels, scale, True)
    same = all(torch.equal(a[last], b) for a, b in zip((*many, logits), (*few, alone), strict=True))
    return dict(passed=same, logits=logits.numel())


def time_loss(session: Session) -> None:
    """Time the output head with its loss, forward and backward, in every way; and its three matrix
    products alone.
    """
    tokens, width, vocab = (64, 32, 100) if session.tiny else (32768, 1024, 32000)
    device, loss_type = session.backend.device, LOSSES[STABLEMAX]
    hidden = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
    weight = torch.randn(vocab, width, device=device, requires_grad=True)
    labels, scale = (
        torch.randint(vocab, (tokens,), device=device),
        torch.ones(tokens, device=device),
    )

    def fused(**options: Any) -> None:
        found = linear_loss(hidden, weight, labels, scale, loss_type, **options)
        torch.autograd.grad(found.total, (hidden, weight))

    def plain() -> None:
        losses = loss_type.cross_entropy(F.linear(hidden, weight.bfloat16()), labels)
        torch.autograd.grad(losses.sum(), (hidden, weight))

    @torch.no_grad()
    def products() -> None:
        matrix = weight.bfloat16()
        logits = F.linear(hidden, matrix)
        logits @ matrix, logits.T @ hidden

    ways: dict[str, Callable[[], None]] = {"products alone": products, "fused": fused}
    if session.on_cuda:
        ways["fused, Triton"] = partial(fused, kernel="triton")
    if not session.tiny:
        ways["fused, compiled"] = partial(fused, compiled=True)
    ways["not fused"] = plain
    for name, way in ways.items():
        shape = f"{tokens} tokens, width {width}, vocabulary {vocab}"
        with session.check(f"loss of {shape}: {name}") as found:
            way()
            if session.on_cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            found["ms"] = 1e3 * median_seconds(session, way)
            if session.on_cuda:
                found["gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
