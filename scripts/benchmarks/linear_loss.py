"""Compare the fused output head and token loss with their matrix products, and with full logits.

    python scripts/benchmarks/linear_loss.py
    python scripts/benchmarks/linear_loss.py device_type=cuda tokens=32768 compile=true rounds=20

The products are those of the forward and the backward pass alone: logits, gradient of the hidden
states, gradient of the weight. The reference for memory is the loss in float64 on the logits of all
tokens, as in TRM; its memory is a constant and a share of the tokens, so it is measured on few of
them. Measurements alternate, and medians are compared, because machines are noisy.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models.linear_loss import linear_loss
from models.token_losses import LOSSES
from scripts.benchmarks.efficiency import timed
from scripts.benchmarks.plain_trm import stablemax_loss
from scripts.training_step import measure_peak
from utils.backend import select_backend
from utils.config.key_values import CommandKeys, parse_key_values, run_command
from utils.config.schema import PositiveInt
from utils.core.errors import UserError


class Options(CommandKeys):
    """The arguments, each given as key=value."""

    rounds: PositiveInt = Field(5, description="measurements of each")
    tokens: PositiveInt = Field(4096, description="tokens of a batch")
    vocabulary: PositiveInt = Field(50257, description="tokens of the vocabulary")
    width: PositiveInt = Field(256, description="width of the hidden states, in bfloat16")
    compile: bool = Field(False, description="run the loss through torch.compile")
    device_type: Literal["auto", "cuda", "cpu"] = Field("auto", description="where to run")


class Case:
    """Random hidden states (T, D), weight (V, D) and labels (T,)."""

    def __init__(self, options: Options, tokens: int, device: torch.device):
        self.compile = options.compile
        hidden = torch.randn(tokens, options.width, dtype=torch.bfloat16, device=device)
        weight = torch.randn(options.vocabulary, options.width, device=device)
        self.hidden, self.weight = hidden.requires_grad_(), weight.requires_grad_()
        self.labels = torch.randint(options.vocabulary, (tokens,), device=device)
        self.scale = torch.full((tokens,), 1 / tokens, device=device)

    def fused(self) -> None:
        """Run the fused loss forward and backward."""
        loss_type = LOSSES["stablemax_cross_entropy"]
        data = self.hidden, self.weight, self.labels, self.scale
        linear_loss(*data, loss_type, compiled=self.compile).total.backward()
        self.hidden.grad = self.weight.grad = None

    def full_logits(self) -> None:
        """Run the loss in float64 on the logits of all tokens, forward and backward."""
        logits = F.linear(self.hidden, self.weight.to(self.hidden.dtype))
        (stablemax_loss(logits, self.labels) * self.scale).sum().backward()
        self.hidden.grad = self.weight.grad = None

    def products(self) -> Callable[[], Any]:
        """Return a function that computes the three products."""
        hidden, weight = self.hidden.detach(), self.weight.detach().to(self.hidden.dtype)
        grad = torch.randn(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)

        def run() -> tuple[Tensor, Tensor, Tensor]:
            return F.linear(hidden, weight), grad @ weight, grad.T @ hidden

        return run


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """Return the peak bytes that `work` allocates."""
    work()
    if device.type != "cuda":
        return measure_peak(work)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def run(arguments: Sequence[str]) -> None:
    options = parse_key_values(Options, arguments)
    backend, _ = select_backend(options.device_type)
    device, tokens = backend.device, options.tokens
    if options.compile and (reason := backend.cannot_compile()):
        raise UserError(f"compile=true: {reason}")
    few = max(1, tokens // 16)
    one, two = (peak(Case(options, n, device).full_logits, device) for n in (few, 2 * few))
    full = one + (two - one) * (tokens - few) / few
    case = Case(options, tokens, device)
    own = peak(case.fused, device)
    print(f"peak memory: {own / 1e6:,.0f} MB, with float64 and all logits {full / 1e6:,.0f} MB: "
          f"1/{full / own:.0f}", flush=True)  # fmt: skip
    work = {"fused": case.fused, "products": case.products()}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    work["products"]()
    for _ in range(options.rounds):
        for name, act in work.items():
            seconds[name].append(timed(act, device))
    fused, products = (statistics.median(values) for values in seconds.values())
    print(f"time: {fused * 1e3:,.0f} ms, its three products {products * 1e3:,.0f} ms: "
          f"{fused / products:.2f} x, medians of {options.rounds}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    main()
