"""Seconds of a training step, as ratios to a reference measured in the same run.

    python scripts/benchmark_train.py experiment=quickstart
    python scripts/benchmark_train.py experiment=quickstart device_type=cuda --rounds 20

Variants take turns, and medians are compared, because machines are noisy. Overrides are those of
pretrain.py; no corpus is read, the tokens are random.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dataset.common import DatasetMetadata
from models.build import create_model
from models.inference.loading import cast_weights
from models.losses import ACTLossHead
from utils.backend import Backend, select_backend
from utils.config.load import PretrainConfig, compose_config, load_config
from utils.core.console import run_cli
from utils.training.state import TrainState, choose_kernels, create_train_state

VARIANTS = {
    "eager": ("compile=false",),
    "compile": ("compile=true",),
    "float32": ("compile=false", "arch.forward_dtype=float32"),
    "all cycles with gradient": ("compile=false", "arch.H_grad_cycles=${arch.H_cycles}"),
}


def make_step(
    config: PretrainConfig, backend: Backend, micro_rows: int | None = None
) -> tuple[Callable[[], None], TrainState]:
    """A function that does one optimizer step on random tokens, and what it changes."""
    vocab, length, rows = config.vocab_size or 1024, config.seq_len or 256, config.global_batch_size
    metadata = DatasetMetadata(
        pad_id=0, ignore_label_id=None, vocab_size=vocab, seq_len=length, total_groups=1,
        num_puzzle_identifiers=1, mean_puzzle_examples=1, total_puzzles=1,
    )  # fmt: skip
    model = (
        create_model(config.arch, metadata, batch_size=rows, seed=config.seed)
        .to(backend.device)
        .train()
    )

    def load_base(*_: str) -> ACTLossHead:  # random too, and of the same kind
        base = create_model(config.arch, metadata, batch_size=rows, seed=config.seed)
        cast_weights(base)
        return base.to(backend.device)

    model.prepare(load_base)
    choose_kernels(config, model, backend)
    state = create_train_state(config, model, backend=backend)
    micro_rows = micro_rows or rows
    tokens = torch.randint(vocab, (rows, length), dtype=torch.int32, device=backend.device)
    batches = [
        dict(
            inputs=part,
            labels=part.clone(),
            puzzle_identifiers=torch.zeros(micro_rows, dtype=torch.int32, device=backend.device),
            document_starts=torch.zeros_like(part),
        )
        for part in tokens.split(micro_rows)
    ]
    state.carries = [model.initial_carry(batch) for batch in batches]

    def step() -> None:
        moved = [{key: value.clone() for key, value in batch.items()} for batch in batches]
        for i, batch in enumerate(moved):  # new tensors, as a stream brings them
            carry, loss, *_ = model(return_keys=(), carry=state.carries[i], batch=batch)
            state.carries[i] = carry
            (loss / rows).backward()
        state.clip_gradients(config.grad_clip_norm)
        for optimizer in state.optimizers:
            optimizer.step()
        if state.ema is not None:
            state.ema.update()
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        loss.item()  # waits for the device

    return step, state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as for pretrain.py")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each variant")
    arguments = parser.parse_args()
    base = ["device_type=auto", *arguments.overrides, "data_paths=[random]"]
    steps, configs = {}, {}
    for name, overrides in VARIANTS.items():
        config = load_config(compose_config([*base, *overrides]))
        backend, _ = select_backend(config.device_type)
        if config.compile is True and (reason := backend.cannot_compile()):
            print(f"{name} is left out: {reason}")
            continue
        configs[name], (steps[name], _) = config, make_step(config, backend)
        begun = time.perf_counter()
        for _ in range(3):
            steps[name]()
        print(f"{name}: {time.perf_counter() - begun:.1f} s for the first three steps")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows, length = configs["eager"].global_batch_size, configs["eager"].seq_len or 256
    print(f"\n{'variant':<28}{'ratio to eager':>15}{'ms a step':>12}{'tokens/s':>12}")
    for name, median in medians.items():
        print(
            f"{name:<28}{median / medians['eager']:>15.2f}{median * 1e3:>12.0f}"
            f"{rows * length / median:>12,.0f}"
        )


if __name__ == "__main__":
    run_cli(main)
