r"""Benchmark a training step, as ratios to a reference measured in the same run.

    python scripts/benchmarks/train.py experiment=quickstart
    python scripts/benchmarks/train.py experiment=quickstart device_type=cuda rounds=20
    python scripts/benchmarks/train.py arch=athena_trm_small global_batch_size=4 seq_len=1024 \
        variants=unmasked document_tokens=200 rounds=3
    python scripts/benchmarks/train.py arch=athena_trm_small global_batch_size=4 seq_len=1024 \
        variants=checkpointing memory=true rounds=1

Variants alternate, and medians are compared, because machines are noisy. Takes every key of
pretrain.py; needs no corpus, because the tokens are random.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from pydantic import Field

from scripts.training_step import make_step, measure_step_peak
from utils.backend import select_backend
from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import compose_config, load_config
from utils.config.schema import PositiveInt
from utils.core.errors import UserError

REFERENCE = "eager"
VARIANTS = {
    REFERENCE: ("compile=false",),
    "compile": ("compile=true",),
    "float32": ("compile=false", "arch.forward_dtype=float32"),
    "all_cycles": ("compile=false", "arch.H_grad_cycles=${arch.H_cycles}"),
    "unmasked": ("compile=false", "arch.document_mask=false"),
    "checkpointing": ("compile=false", "arch.use_gradient_checkpointing=true"),
}


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    rounds: PositiveInt = Field(7, description="measurements of each variant")
    variants: str = Field(
        "compile,float32,all_cycles",
        description=f"what to compare with {REFERENCE}: {', '.join([*VARIANTS][1:])} "
        "(all_cycles: with gradient; unmasked: attention across documents)",
    )
    document_tokens: PositiveInt | None = Field(
        None, description="mean tokens of the documents packed into a row; null: one document a row"
    )
    memory: bool = Field(False, description="measure the peak memory of a step, too")


def chosen(variants: str) -> list[str]:
    """Return the names of the variants, the reference first."""
    names = variants.split(",")
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"variants={variants}: {unknown[0]} is not one of {', '.join(VARIANTS)}")
    return list(dict.fromkeys([REFERENCE, *names]))


def run(arguments: Sequence[str]) -> None:
    options, given = split_key_values(Options, arguments)
    base = ["device_type=auto", *given, "data_paths=[random]"]
    steps, configs, peaks = {}, {}, dict[str, int]()
    for name in chosen(options.variants):
        config = load_config(compose_config([*base, *VARIANTS[name]]))
        backend, _ = select_backend(config.device_type)
        if config.compile is True and (reason := backend.cannot_compile()):
            print(f"skipping {name}: {reason}")
            continue
        # of the variants before this one
        held = torch.cuda.memory_allocated() if backend.device.type == "cuda" else 0
        begun = time.perf_counter()
        step, state = make_step(config, backend, document_tokens=options.document_tokens)
        for _ in range(3):
            step()
        print(f"{name}: {time.perf_counter() - begun:.1f} s for the first three steps")
        if options.memory:
            peaks[name] = measure_step_peak(step, state, backend) - held
        configs[name], steps[name] = config, step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows, length = configs[REFERENCE].global_batch_size, configs[REFERENCE].seq_len or 256
    print(f"\n{'variant':<16}{'ratio to eager':>15}{'ms a step':>12}{'tokens/s':>12}", end="")
    print(f"{'peak MB':>12}{'ratio':>8}" if peaks else "")
    for name, median in medians.items():
        print(
            f"{name:<16}{median / medians[REFERENCE]:>15.2f}{median * 1e3:>12.0f}"
            f"{rows * length / median:>12,.0f}",
            end="",
        )
        ratio = peaks[name] / peaks[REFERENCE] if peaks else 0
        print(f"{peaks[name] / 1e6:>12,.0f}{ratio:>8.2f}" if peaks else "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    main()
