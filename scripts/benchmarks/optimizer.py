"""Time an update of the weights and their averages, beside plain loops over the weights.

    python scripts/benchmarks/optimizer.py
    OMP_NUM_THREADS=2 python scripts/benchmarks/optimizer.py measured=adamw device_type=cpu

The weights are 50 million, as in a language model: an embedding, matrices and vectors. The loops
take one weight after the other by the textbook formula, then one average after the other. Variants
alternate, and medians are printed. Takes every key of pretrain.py; those of the optimizer and
`device_type` have an effect.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from models.base import Architecture
from utils.backend import Backend, select_backend
from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import PretrainConfig, compose_config, load_config
from utils.config.schema import OptimizerConfig, PositiveInt
from utils.training.ema import EMA
from utils.training.optimizers import NAMES, create_optimizers
from utils.training.optimizers.muon import orthogonalize
from utils.training.state import TrainState


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    rounds: PositiveInt = Field(7, description="measurements of each variant")
    width: PositiveInt = Field(1024, description="size of the vectors; 1024: 50 million weights")
    measured: Literal["all", "adam_atan2", "adamw", "muon"] = Field(
        "all", description="the optimizer to measure"
    )


class Weights(Architecture):
    """The weights of a language model, without its computations."""

    def __init__(self, width: int):
        super().__init__()
        shapes = [(width, width)] * 12 + [(4 * width, width)] * 3 + [(width, 4 * width)] * 2
        self.embedding = nn.Parameter(torch.randn(16 * width, width) / 50)
        self.inside = nn.ParameterList(torch.randn(shape) / 50 for shape in shapes)
        self.vectors = nn.ParameterList(torch.ones(width) for _ in range(40))

    def undecayed(self) -> set[str]:
        return {"embedding"}

    def blocks(self) -> list[nn.Module]:
        return [self.inside]


class Plain:
    """A weight, its moments and its average, updated by the textbook formulas."""

    def __init__(self, p: Tensor, config: PretrainConfig, name: str, decay: float):
        self.p, self.grad, self.name, self.decay = p.detach().clone(), p.grad, name, decay
        self.m, self.v = torch.zeros_like(p), torch.zeros_like(p)
        self.average, self.config, self.t = self.p.clone(), config, 0

    def update(self) -> None:
        lr, grad, p = self.config.lr, self.grad, self.p
        assert grad is not None
        self.t += 1
        p.mul_(1 - lr * self.decay)
        if self.name == "muon":
            self.m.mul_(0.95).add_(grad, alpha=0.05)
            moved = (grad * 0.05 + self.m * 0.95).unsqueeze(0)
            update = orthogonalize(moved, (3.4445, -4.7750, 2.0315), 5, 1e-7)[0]
            p.sub_(update * (lr * 0.2 * math.sqrt(max(p.shape))))
            return
        beta1, beta2 = self.config.beta1, self.config.beta2
        self.m.mul_(beta1).add_(grad, alpha=1 - beta1)
        self.v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = self.v.sqrt() / math.sqrt(1 - beta2**self.t)
        step = torch.atan2(self.m, root) if self.name == "adam_atan2" else self.m / (root + 1e-8)
        p.sub_(step * (lr / (1 - beta1**self.t)))

    def update_average(self, rate: float) -> None:
        self.average.mul_(rate).add_(self.p, alpha=1 - rate)


def build(
    name: str, width: int, config: PretrainConfig, backend: Backend
) -> tuple[TrainState, list[Plain]]:
    """Return the state of training with an optimizer, and the same weights for the loops."""
    model = Weights(width).to(backend.device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) / 100
    optimizers = create_optimizers(
        OptimizerConfig(name=name),
        model,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        decay_all=config.weight_decay_all,
    )
    loops = [
        Plain(p, config, "adamw" if name == "muon" and i else name, group["weight_decay"])
        for i, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    state = TrainState(
        model=model,  # type: ignore[arg-type]
        step_model=model,
        optimizers=optimizers,
        base_lrs=[config.lr] * len(optimizers),
        ema=EMA(model.named_parameters(), config.ema_rate, warmup=False),
        halted=np.ones(1, dtype=bool),
        parameters=list(model.parameters()),
    )
    return state, loops


def measure(name: str, width: int, rounds: int, config: PretrainConfig, backend: Backend) -> str:
    """Return a line of the table."""
    state, loops = build(name, width, config, backend)

    @torch.no_grad()
    def loop() -> None:
        for plain in loops:
            plain.update()
        for plain in loops:
            plain.update_average(config.ema_rate)

    def timed(update: Callable[[], None]) -> float:
        begun = time.perf_counter()
        update()
        backend.to_host(loops[0].p[:1] + state.parameters[0].detach()[:1])  # waits for the device
        return time.perf_counter() - begun

    seconds: list[tuple[float, float]] = []
    for _ in range(rounds + 1):  # the first allocates the moments
        seconds.append((timed(lambda: state.update(1.0)), timed(loop)))
    own, plain = (statistics.median(column) * 1e3 for column in zip(*seconds[1:], strict=True))
    assert state.ema is not None
    optimized = [p for o in state.optimizers for g in o.param_groups for p in g["params"]]
    averages = {p: state.ema.shadow[name] for name, p in state.ema.parameters.items()}
    apart = max(
        max((p - one.p).abs().max().item(), (averages[p] - one.average).abs().max().item())
        for p, one in zip(optimized, loops, strict=True)
    )
    return f"{name:<12}{own:>10.1f}{plain:>13.1f}{plain / own:>8.2f}{apart:>20.1e}"


def run(arguments: Sequence[str]) -> None:
    options, given = split_key_values(Options, arguments)
    config = load_config(compose_config(["device_type=auto", *given, "data_paths=[random]"]))
    backend, _ = select_backend(config.device_type)
    threads = f", {torch.get_num_threads()} threads" if backend.device.type == "cpu" else ""
    count = sum(p.numel() for p in Weights(options.width).parameters())
    print(f"{count / 1e6:.1f} million weights on {backend.describe()}{threads}; ms of an update")
    print(
        f"{'optimizer':<12}{'Athena':>10}{'plain loops':>13}{'ratio':>8}{'largest difference':>20}"
    )
    for name in NAMES if options.measured == "all" else [options.measured]:
        print(measure(name, options.width, options.rounds, config, backend), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    main()
