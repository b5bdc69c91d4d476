"""Compare a training step with the machine's matrix-product rate, and with TRM's formulas.

    python scripts/benchmarks/efficiency.py
    python scripts/benchmarks/efficiency.py shape=wide rounds=9

The efficiency of a step is the time that its matrix products would take at the rate of the same
products alone, measured in the same run, divided by the time of the step. Its FLOPs are counted
here, by formula: 2 for a multiplication and its addition, a backward pass twice the forward pass,
attention for the pairs of positions that a causal mask allows. Variants alternate, and medians are
printed. On a CPU plain TRM runs with glibc's own limits for keeping freed memory.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from pydantic import Field
from torch import Tensor

from models.layers import SwiGLU
from scripts.benchmarks.plain_trm import PlainTRM
from scripts.training_step import make_step
from utils.backend import select_backend
from utils.backend.cpu import keep_freed_memory
from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import compose_config, load_config
from utils.config.schema import PositiveInt
from utils.training.optimizers.adam_atan2 import AdamATan2


class Shape(NamedTuple):
    """Sizes of a step: B rows of S tokens, width D, N query heads, M key heads, V tokens."""

    B: int
    S: int
    D: int
    N: int
    M: int
    V: int
    layers: int
    H: int
    L: int

    @property
    def inner(self) -> int:
        return SwiGLU.inner_size(self.D, 4.0)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Return (outputs, inputs) of the weights of a block."""
        head_size = self.D // self.N
        return [
            ((self.N + 2 * self.M) * head_size, self.D),
            (self.D, self.D),
            (2 * self.inner, self.D),
            (self.D, self.inner),
        ]

    @property
    def plain(self) -> int:
        """Return the number of block passes without gradient."""
        return self.layers * (self.H - 1) * (self.L + 1)

    @property
    def graded(self) -> int:
        """Return the number of block passes with gradient."""
        return self.layers * (self.L + 1)

    @property
    def flops(self) -> float:
        """Return the FLOPs of a step."""
        tokens, size = self.B * self.S, self.D // self.N
        block = sum(2.0 * tokens * o * i for o, i in self.matrices)
        block += 2 * 2 * self.B * self.N * size * self.S * (self.S + 1) / 2
        return block * (self.plain + 3 * self.graded) + 3 * 2.0 * tokens * self.D * self.V


SHAPES = {
    "narrow": Shape(B=4, S=256, D=256, N=4, M=2, V=4096, layers=2, H=3, L=4),
    "wide": Shape(B=2, S=256, D=512, N=8, M=4, V=4096, layers=2, H=3, L=6),
    "gpu": Shape(B=16, S=1024, D=1024, N=16, M=8, V=32000, layers=2, H=3, L=4),
}


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    rounds: PositiveInt = Field(7, description="measurements of each variant")
    shape: Literal["narrow", "wide", "gpu"] = Field("narrow", description="sizes of the step")


def overrides(shape: Shape) -> list[str]:
    """Return the keys of pretrain.py for a step of this shape."""
    sizes = {
        "hidden_size": shape.D, "num_heads": shape.N, "num_key_value_heads": shape.M,
        "expansion": 4, "L_layers": shape.layers, "H_cycles": shape.H, "L_cycles": shape.L,
        "H_grad_cycles": 1, "puzzle_emb_ndim": 0, "post_refinement_steps": 0,
        "document_mask": "false",
    }  # fmt: skip
    return [
        "arch=athena_trm_small", "data_paths=[random]", f"vocab_size={shape.V}",
        f"seq_len={shape.S}", f"global_batch_size={shape.B}", "ema=false",
        "optimizer=adam_atan2", *(f"arch.{k}={v}" for k, v in sizes.items()),
    ]  # fmt: skip


def products(shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """Return a function that measures the rate of the step's matrix products, in FLOP/s."""
    tokens = shape.B * shape.S
    kinds: list[tuple[tuple[int, int], int, int]] = [
        (matrix, shape.plain + shape.graded, shape.graded) for matrix in shape.matrices
    ]
    kinds.append(((shape.V, shape.D), 1, 1))

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, device=device)

    tensors = [(draw(tokens, i), draw(o, i), draw(tokens, o)) for (o, i), _, _ in kinds]

    def measure() -> float:
        flops = seconds = 0.0
        for ((o, i), forward, backward), (x, weight, grad) in zip(kinds, tensors, strict=True):
            for product, count in (
                (lambda: x @ weight.T, forward),  # noqa: B023
                (lambda: grad @ weight, backward),  # noqa: B023
                (lambda: grad.T @ x, backward),  # noqa: B023
            ):
                product()
                flops += 2.0 * tokens * o * i * count
                seconds += count * timed(product, device, 3)
        return flops / seconds

    return measure


def timed(function: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Return the seconds of a call."""
    begun = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / repeats


def plain_step(
    shape: Shape, dtype: torch.dtype, device: torch.device, compiled: bool
) -> Callable[[], Any]:
    """Return a training step of `PlainTRM`."""
    sizes = (shape.V, shape.D, shape.N, shape.M, shape.inner, shape.layers, shape.H, shape.L)
    model = PlainTRM(*sizes, shape.S, dtype).to(device)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
        model.score = torch.compile(model.score, dynamic=False)  # type: ignore[method-assign]
    optimizer = AdamATan2(list(model.parameters()), 1e-4, (0.9, 0.95), 0.1)
    tokens = torch.randint(shape.V, (shape.B, shape.S), device=device)
    latents = [torch.randn(shape.B, shape.S, shape.D, dtype=dtype, device=device)] * 2

    def step() -> None:
        *latents[:], loss, right = model(*latents, tokens, tokens)
        (loss / shape.B).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item(), right.item()

    return step


def run(arguments: Sequence[str]) -> None:
    options, given = split_key_values(Options, arguments)
    shape, base = SHAPES[options.shape], ["device_type=auto", *overrides(SHAPES[options.shape])]
    steps: dict[str, Callable[[], Any]] = {}
    dtypes: dict[str, torch.dtype] = {}
    device = torch.device("cpu")
    for name in ("bfloat16", "float32"):
        for compiled in (False, True):
            keys = [*base, f"arch.forward_dtype={name}", f"compile={str(compiled).lower()}", *given]
            config = load_config(compose_config(keys))
            backend, _ = select_backend(config.device_type)
            device, suffix = backend.device, f"{name}{', compiled' if compiled else ''}"
            steps[f"Athena {suffix}"], _ = make_step(config, backend, documents=False)
            dtype = getattr(torch, name)
            steps[f"plain TRM {suffix}"] = plain_step(shape, dtype, device, compiled)
            dtypes |= {f"Athena {suffix}": dtype, f"plain TRM {suffix}": dtype}
    rates = {d: products(shape, d, device) for d in set(dtypes.values())}
    for step in steps.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    found: dict[torch.dtype, list[float]] = {d: [] for d in rates}
    for _ in range(options.rounds):
        for name, step in steps.items():
            # plain TRM with the allocator of a process without Athena, at its best
            keep_freed_memory(1 << 30 if name.startswith("Athena") else 32 << 20)
            step()
            seconds[name].append(timed(step, device))
        for d, measure in rates.items():
            found[d].append(measure())
    rate = {d: statistics.median(values) for d, values in found.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best = min(value for name, value in medians.items() if name.startswith("plain"))
    print(f"{options.shape}: {shape}, {shape.flops / 1e9:.1f} GFLOP a step")
    for d, value in rate.items():
        print(f"its products alone in {str(d).removeprefix('torch.')}: {value / 1e9:.0f} GFLOP/s")
    print(f"\n{'step':<32}{'ms':>8}{'efficiency':>12}{'times the best plain TRM':>26}")
    for name, median in medians.items():
        efficiency = shape.flops / rate[dtypes[name]] / median
        print(f"{name:<32}{median * 1e3:>8.0f}{efficiency:>12.2f}{best / median:>26.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    main()
