"""Measure rounding in a recursion: float32 and bfloat16 against float64, by ACT step.

    python scripts/benchmarks/rounding.py arch=athena_trm_large arch.hidden_size=64 arch.num_heads=4

Runs the same weights and rows in three precisions. Prints the relative difference of z_H from
float64's, and the cosine between the gradient of the loss and float64's: 1 if rounding has no
effect, 0 if only rounding errors remain. Then trains the float32 model for `updates=`, with `lr`
and its warm-up, and measures again. Rows are bytes of the texts in docs/. Takes every key of
pretrain.py.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from pydantic import Field
from torch import Tensor

from models import cost
from models.build import create_model
from models.losses import ACTLossHead
from utils.backend import select_backend
from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import PretrainConfig, compose_config, load_config
from utils.config.schema import PositiveInt
from utils.core.errors import UserError
from utils.training.plan import build_untrained, plan_metadata
from utils.training.schedule import warmup
from utils.training.state import create_train_state

DOCS = Path(__file__).resolve().parents[2] / "docs"
DTYPES = ("float64", "float32", "bfloat16")
VOCAB, LENGTH, ROWS = 256, 64, 8


class Difference(NamedTuple):
    """The difference from float64 after an ACT step: relative for z_H, cosine for gradients."""

    latents: float
    cosine: float


def rows(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a batch of `count` rows from the texts in docs/."""
    text = b"\n".join(path.read_bytes() for path in sorted(DOCS.glob("*.md")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).int()
    starts = torch.randint(len(data) - LENGTH - 1, (count, 1), generator=generator)
    drawn = data[starts + torch.arange(LENGTH + 1)]
    return {
        "inputs": drawn[:, :-1].contiguous(),
        "labels": drawn[:, 1:].contiguous(),
        "puzzle_identifiers": torch.zeros(count, dtype=torch.int32),
    }


def build(overrides: Sequence[str], dtype: str) -> tuple[PretrainConfig, ACTLossHead]:
    """Build a config and its model in `dtype`; the initial weights do not depend on it."""
    given = [f"global_batch_size={ROWS}", *overrides, "device_type=cpu", "dry_run=true",
             f"arch.forward_dtype={dtype}", "arch.post_refinement_steps=0"]  # fmt: skip
    sizes = ["data_paths=[]", f"vocab_size={VOCAB}", f"seq_len={LENGTH}"]
    config = load_config(compose_config([*given, *sizes]))
    metadata, _ = plan_metadata(config)
    return config, create_model(config.arch, metadata, batch_size=ROWS, seed=config.seed)


def run(head: ACTLossHead, batch: dict[str, Tensor], steps: int) -> list[tuple[Tensor, Tensor]]:
    """Return z_H and the gradient after each of `steps` ACT steps, with halting disabled."""
    head.eval()
    carry, found = head.initial_carry(batch), []
    for _ in range(steps):
        head.zero_grad()
        carry, loss, *_ = head(return_keys=(), carry=carry, batch=batch)
        loss.backward()
        grads = [p.grad.double().flatten() for p in head.parameters() if p.grad is not None]
        found.append((carry.latents["z_H"].double(), torch.cat(grads)))
    head.zero_grad()
    return found


def differences(
    heads: dict[str, ACTLossHead], batch: dict[str, Tensor], steps: int
) -> dict[str, list[Difference]]:
    """Return the differences of each dtype from the first, by ACT step."""
    exact, *others = heads
    reference = run(heads[exact], batch, steps)
    return {
        name: [
            Difference(
                ((z - z_exact).norm() / z_exact.norm()).item(),
                torch.cosine_similarity(grad, grad_exact, 0).item(),
            )
            for (z, grad), (z_exact, grad_exact) in zip(
                run(heads[name], batch, steps), reference, strict=True
            )
        ]
        for name in others
    }


def measure(overrides: Sequence[str], updates: Sequence[int], steps: int) -> None:
    """Print the differences after each number of updates."""
    configs = {dtype: build(overrides, dtype) for dtype in DTYPES}
    heads = {dtype: head for dtype, (_, head) in configs.items()}
    config, trained = configs["float32"]
    arch = trained.model.config
    metadata, _ = plan_metadata(config)
    passes = cost.measure_mean(build_untrained(config.arch, metadata)).passes
    print(
        f"{passes} layer passes per ACT step, width {arch.hidden_size}, lr {config.lr:g} after "
        f"{config.lr_warmup_steps} updates of warm-up"
    )
    backend, _ = select_backend("cpu")
    state = create_train_state(config, trained, backend=backend)
    generator = torch.Generator().manual_seed(config.seed)
    batch = rows(ROWS, generator)
    carry = trained.initial_carry(batch)
    print("updates  loss   " + "".join(f"{d:>10}: z_H, cosine by ACT step" for d in DTYPES[1:]))
    done = 0
    for wanted in sorted(updates):
        for done in range(done + 1, wanted + 1):  # noqa: B020
            trained.train()
            carry, loss, *_ = trained(return_keys=(), carry=carry, batch=rows(ROWS, generator))
            (loss / ROWS).backward()
            state.clip_gradients(config.grad_clip_norm)
            state.update(warmup(done, config.lr_warmup_steps))
            for optimizer in state.optimizers:
                optimizer.zero_grad()
        for head in heads.values():
            head.load_state_dict(trained.state_dict())
        found = differences(heads, batch, steps)
        with torch.no_grad():
            _, loss, *_ = heads["float64"]((), heads["float64"].initial_carry(batch), batch)
        cells = [
            "  ".join(f"{d.latents:.0e} {d.cosine:5.2f}" for d in found[dtype])
            for dtype in DTYPES[1:]
        ]
        print(f"{wanted:7}  {loss.item() / ROWS:5.2f}   " + "   |   ".join(cells), flush=True)


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    updates: str = Field("0", description="numbers of updates after which to measure, e.g. 0,25,50")
    steps: PositiveInt = Field(3, description="ACT steps")


def run_options(arguments: Sequence[str]) -> None:
    options, given = split_key_values(Options, arguments)
    try:
        updates = [int(number) for number in options.updates.split(",")]
    except ValueError:
        raise UserError(f"updates={options.updates}: give whole numbers with commas") from None
    torch.set_num_threads(1)
    measure(given, updates, options.steps)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run_options, argv)


if __name__ == "__main__":
    main()
