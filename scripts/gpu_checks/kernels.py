"""Compare kernels with float64, and time them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from models.base import Architecture
from models.flex import Kernel, attention_kernel
from models.layers import SequenceInfo, attend, visible
from scripts.gpu_checks.loss import check_rows, time_loss
from scripts.gpu_checks.session import Session
from scripts.gpu_checks.speed import median_seconds
from utils.config.schema import OptimizerConfig
from utils.training.optimizers import create_optimizers
from utils.training.optimizers.adam_atan2 import AdamATan2

BARS = {torch.bfloat16: 2e-2, torch.float32: 1e-4, torch.float64: 1e-9}
# tokens, prefix, query heads, key and value heads, head size, dtype
SHAPES = (
    (2048, 1, 16, 8, 64, torch.bfloat16),
    (96, 1, 4, 1, 32, torch.bfloat16),  # shorter than a block, with many query heads per key head
    (256, 0, 6, 2, 96, torch.bfloat16),
    (100, 0, 4, 4, 128, torch.float32),
    (64, 0, 4, 2, 8, torch.bfloat16),  # narrower than flex attention supports
    (256, 0, 4, 2, 64, torch.float64),
)


def check_kernels(session: Session) -> None:
    """Compare the kernels of loss, masked attention and optimizer with exact results; time them."""
    check_rows(session)
    for length, *shape, dtype in SHAPES:
        check_attention(session, length // 8 if session.tiny else length, *shape, dtype=dtype)
    check_optimizer(session)
    time_attention(session)
    time_loss(session)


def documents(rows: int, length: int, shortest: int = 8) -> Tensor:
    """Return document starts (rows, length) of rows that consist of several documents."""
    sizes = torch.arange(shortest, shortest + 6 * rows, 6)[:, None]
    return (torch.arange(length) // sizes * sizes).int()


def kernel_for(session: Session, dtype: torch.dtype, head_size: int) -> Kernel:
    backend, reason = session.backend, session.backend.cannot_compile()
    return attention_kernel(
        backend.name, dtype, head_size, capability=backend.capability, cannot_compile=reason
    ).kernel


def check_attention(
    session: Session, length: int, prefix: int, heads: int, key_heads: int, head_size: int,
    *, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Compare result and gradients with those under a dense mask in float64 on the CPU."""
    chosen, generator = kernel_for(session, dtype, head_size), torch.Generator().manual_seed(1)
    given = [
        torch.randn(2, n, prefix + length, head_size, generator=generator, dtype=torch.float64)
        for n in (heads, key_heads, key_heads, heads)  # the last is the gradient of the result
    ]

    def results(device: torch.device, dtype: torch.dtype, kernel: Kernel) -> list[Tensor]:
        *inputs, grad = (x.to(device, dtype, copy=True) for x in given)
        query, key, value = (x.requires_grad_() for x in inputs)
        mask = visible(documents(2, length, 1 + length // 5).to(device), prefix, True, kernel)
        out = attend(query, key, value, SequenceInfo(None, None, mask, True))
        grads = torch.autograd.grad(out, (query, key, value), grad)
        return [x.detach().double().cpu() for x in (out, *grads)]

    name = f"{length}+{prefix} tokens, heads {heads}/{key_heads} of {head_size}, {dtype}, {chosen}"
    with session.check(f"attention, {name}") as found:
        exact = results(torch.device("cpu"), torch.float64, "dense")
        near = results(session.backend.device, dtype, chosen)
        errors = [((a - b).norm() / a.norm()).item() for a, b in zip(exact, near, strict=True)]
        found.update(passed=max(errors) < BARS[dtype], relative_errors=errors)


def check_optimizer(session: Session) -> None:
    """Compare three updates by the package's kernel, if it is installed, with plain PyTorch's."""

    def updated(fused: bool | None) -> tuple[bool, list[Tensor]]:
        torch.manual_seed(0)
        net = Architecture()
        net.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 7))
        (optimizer,) = create_optimizers(
            OptimizerConfig.model_validate({"name": "adam_atan2", "fused": fused}),
            net.to(session.backend.device), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1,
            decay_all=False,
        )  # fmt: skip
        for _ in range(3):
            net.net(torch.randn(9, 64).to(session.backend.device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return isinstance(optimizer, AdamATan2), [p.detach() for p in net.parameters()]

    with session.check("adam-atan2") as found:
        (plain, one), (_, other) = updated(None), updated(False)
        apart = max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))
        found.update(passed=apart < 1e-6, installed=not plain, largest_difference=apart)


def time_attention(session: Session) -> None:
    """Time attention without a mask and with documents of two sizes."""
    rows, heads, length, size = (1, 2, 64, 16) if session.tiny else (16, 16, 2048, 64)
    query, key, value = (
        torch.randn(rows, n, length, size, device=session.backend.device, dtype=torch.bfloat16)
        for n in (heads, heads // 2, heads // 2)
    )
    inputs = [x.requires_grad_() for x in (query, key, value)]
    kernel = kernel_for(session, torch.bfloat16, size)
    masks = {"no mask": None}
    for count in (1, 10):
        cut = -(-length // count)
        starts = (torch.arange(length) // cut * cut).int().expand(rows, -1)
        mask = visible(starts.to(session.backend.device), 0, True, kernel)
        masks[f"{kernel}, documents of {cut} tokens"] = mask
    for name, mask in masks.items():
        with session.check(f"time of attention, {name}") as found:
            forward = partial(attend, query, key, value, SequenceInfo(None, None, mask, True))
            with torch.no_grad():
                found["forward_ms"] = 1e3 * median_seconds(session, forward)
            both = partial(_differentiate, forward, inputs, torch.randn_like(query))
            found["forward_backward_ms"] = 1e3 * median_seconds(session, both)


def _differentiate(fn: Callable[[], Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(fn(), inputs, grad)
