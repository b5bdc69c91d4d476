"""Seconds of a training step, as ratios to a reference measured in the same run.

    python scripts/benchmarks/train.py experiment=quickstart
    python scripts/benchmarks/train.py experiment=quickstart device_type=cuda --rounds 20

Variants take turns, and medians are compared, because machines are noisy. Overrides are those of
pretrain.py; no corpus is read, the tokens are random.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.training_step import make_step
from utils.backend import select_backend
from utils.config.load import compose_config, load_config
from utils.core.console import run_cli

VARIANTS = {
    "eager": ("compile=false",),
    "compile": ("compile=true",),
    "float32": ("compile=false", "arch.forward_dtype=float32"),
    "all cycles with gradient": ("compile=false", "arch.H_grad_cycles=${arch.H_cycles}"),
}


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
