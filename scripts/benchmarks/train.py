"""Benchmark a training step, as ratios to a reference measured in the same run.

    python scripts/benchmarks/train.py experiment=quickstart
    python scripts/benchmarks/train.py experiment=quickstart device_type=cuda rounds=20

Variants alternate, and medians are compared, because machines are noisy. Takes every key of
pretrain.py; needs no corpus, because the tokens are random.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pydantic import Field

from scripts.training_step import make_step
from utils.backend import select_backend
from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import compose_config, load_config
from utils.config.schema import PositiveInt

VARIANTS = {
    "eager": ("compile=false",),
    "compile": ("compile=true",),
    "float32": ("compile=false", "arch.forward_dtype=float32"),
    "all cycles with gradient": ("compile=false", "arch.H_grad_cycles=${arch.H_cycles}"),
}


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    rounds: PositiveInt = Field(7, description="measurements of each variant")


def run(arguments: Sequence[str]) -> None:
    options, given = split_key_values(Options, arguments)
    base = ["device_type=auto", *given, "data_paths=[random]"]
    steps, configs = {}, {}
    for name, overrides in VARIANTS.items():
        config = load_config(compose_config([*base, *overrides]))
        backend, _ = select_backend(config.device_type)
        if config.compile is True and (reason := backend.cannot_compile()):
            print(f"skipping {name}: {reason}")
            continue
        configs[name], (steps[name], _) = config, make_step(config, backend)
        begun = time.perf_counter()
        for _ in range(3):
            steps[name]()
        print(f"{name}: {time.perf_counter() - begun:.1f} s for the first three steps")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    main()
