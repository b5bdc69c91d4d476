r"""Estimate a run before it starts: parameters, FLOPs, memory, time and money.

    python scripts/estimate.py arch=athena_trm_small hardware=h200
    python scripts/estimate.py arch=athena_trm_large hardware=a100 devices=8 tokens=1e10
    python scripts/estimate.py arch=athena_trm_small,athena_trm_medium,transformer hardware=4060
    python scripts/estimate.py data_paths="[data/mine]" experiment=quickstart measure=true

Takes every key of pretrain.py and its --config-dir, several presets as arch=a,b, and the keys
below. Without a corpus it assumes vocab_size=32000, seq_len=2048 and 20 tokens per parameter.
measure=true runs real training steps on this machine and prints their cost next to the estimate.
"""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # for measure=true; must be set before torch is imported

import numpy as np
import torch
from pydantic import Field

from models.base import Architecture
from models.cost import Cost, evaluation_flops
from scripts.training_step import measure_step
from utils.backend import select_backend
from utils.backend.cuda import BF16_PEAK
from utils.backend.memory import free_host_memory
from utils.checkpoint.run_config import apply_trained_config
from utils.config.hydra_entry import split_config_dirs
from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import PretrainConfig, compose_config, load_config
from utils.config.schema import PositiveFloat, PositiveInt
from utils.core.errors import UserError
from utils.core.functions import nearest
from utils.corpus.curriculum import scale_budgets
from utils.corpus.data import Data
from utils.training.dry_run import format_bytes, format_count, format_flops
from utils.training.plan import FILLED, MemoryPlan, plan_metadata

LONG = 30 * 86400
"""Warn above this training time in seconds."""
EXPENSIVE = 5000
"""Warn above this price in US dollars."""
DEEP = 1000
"""Warn above this number of layer passes per trained token."""
SHOWN = 3
"""Maximum number of settings suggested in a warning."""
_SHORT = ["arch.halt_max_steps=8", "arch.H_cycles=3"]
CHEAPER = (
    ["arch.halt_max_steps=8"],
    _SHORT,
    ["arch=athena_trm_medium", *_SHORT],
    ["arch=athena_trm_small", *_SHORT],
    ["arch.hidden_size=512", "arch.num_heads=8", "arch.puzzle_emb_ndim=0"],
)
_AGAIN = "arch.use_gradient_checkpointing=true"
SMALLER = (
    ["micro_batch_size=1"],
    [_AGAIN],
    ["parallel=fsdp"],
    ["global_batch_size=64"],
    ["global_batch_size=64", _AGAIN],
    ["arch=athena_trm_medium", "global_batch_size=64"],
    ["arch=athena_trm_small", "global_batch_size=64"],
    ["arch=athena_trm_small", "global_batch_size=8", _AGAIN],
    ["arch=athena_trm_tiny"],
    ["arch.hidden_size=1024", "arch.num_heads=16"],
    ["arch.hidden_size=512", "arch.num_heads=8", "arch.puzzle_emb_ndim=0", "global_batch_size=64"],
)


class Hardware(NamedTuple):
    """A type of device. memory: bytes per device. rates: dense matrix FLOP/s per device, by dtype.
    price: US dollars per device and hour. utilisation: assumed share of that rate in training.
    """

    title: str
    device: str
    devices: int
    memory: float
    rates: dict[str, float]
    price: float
    utilisation: float


# Rates and memory: data sheets. Prices: typical on demand, early 2026; use price= for the current
# one. Utilisation: assumed on GPUs and TPUs to be half of that of plain decoders with tuned
# kernels, because the recursion runs many small operations. Measured on two busy CPU cores: 0.05
# and 0.13. measure=true measures this machine's.
HARDWARE = {
    "h200": Hardware("NVIDIA H200", "cuda", 1, 141e9,
                     {"bfloat16": BF16_PEAK["H200"], "float32": 67e12}, 3.5, 0.25),
    "h100": Hardware("NVIDIA H100", "cuda", 1, 80e9,
                     {"bfloat16": BF16_PEAK["H100"], "float32": 67e12}, 2.7, 0.25),
    "a100": Hardware("NVIDIA A100 80 GB", "cuda", 1, 80e9,
                     {"bfloat16": BF16_PEAK["A100"], "float32": 19.5e12}, 1.5, 0.25),
    "4060": Hardware("NVIDIA RTX 4060, its electricity", "cuda", 1, 8e9,
                     {"bfloat16": BF16_PEAK["4060"], "float32": 15e12}, 0.05, 0.25),
    "v4-8": Hardware("TPU v4-8, 4 chips", "xla", 4, 32 * 2**30,
                     {"bfloat16": 275e12, "float32": 275e12}, 3.22, 0.25),
    "cpu": Hardware("this machine's CPU", "cpu", 1, 0, {}, 0.0, 0.1),
}  # fmt: skip


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    hardware: str = Field("h200", description="one of " + ", ".join(HARDWARE))
    config_dir: Path | None = Field(
        None, description="directory of your own presets, in addition to config/"
    )
    devices: PositiveInt | None = Field(
        None, description="number of devices; null: 1, on v4-8: 4 chips"
    )
    tokens: PositiveFloat | None = Field(
        None, description="tokens to train on; null: epochs of the corpus, or 20 per parameter"
    )
    utilisation: float | None = Field(
        None, gt=0, le=1, description="share of the peak rate reached; null: 0.25, cpu: 0.1"
    )
    price: float | None = Field(
        None, ge=0, description="US dollars per device and hour; null: typical on demand"
    )
    measure: bool = Field(False, description="run training steps on this machine and compare")


@dataclass
class Plan:
    """A run on given hardware. seconds, money: for all tokens of the run."""

    options: Options
    overrides: list[str]
    config: PretrainConfig
    memory_plan: MemoryPlan
    hardware: Hardware
    devices: int
    counted: Cost
    micro_rows: int
    memory: float
    act_steps: float
    assumed: str
    tokens: float
    utilisation: float
    price: float
    seconds: float

    @property
    def name(self) -> str:
        return arch_of(self.overrides) or "the default"

    @property
    def model(self) -> Any:
        """The architecture on the meta device."""
        return self.memory_plan.head.model

    @property
    def parts(self) -> dict[str, int]:
        return self.memory_plan.parts(self.micro_rows)

    @property
    def total(self) -> int:
        return self.memory_plan.total(self.micro_rows)

    @property
    def fits(self) -> bool:
        return self.total < FILLED * self.memory

    @property
    def passes(self) -> float:
        """Layer passes per trained token."""
        return self.counted.passes * self.act_steps

    @property
    def parameters(self) -> int:
        return self.counted.parameters.total

    @property
    def money(self) -> float:
        return self.seconds / 3600 * self.devices * self.price


def arch_of(overrides: Sequence[str]) -> str | None:
    return next((o.partition("=")[2] for o in overrides if o.startswith("arch=")), None)


def configure(overrides: Sequence[str], ranks: int) -> PretrainConfig:
    """Return the checked config, with default sizes if there is no corpus."""
    keys, _ = split_config_dirs([*overrides])
    composed = apply_trained_config(compose_config([*overrides, "dry_run=true"]), keys)
    if not composed.data_paths:
        for key, usual in (("vocab_size", 32000), ("seq_len", 2048)):
            composed[key] = usual if composed[key] is None else composed[key]
    return load_config(composed, world_size=ranks)


def plan(options: Options, overrides: Sequence[str], tokens: float | None = None) -> Plan:
    """Plan one run; `tokens` overrides the options."""
    hardware = HARDWARE[options.hardware]
    devices = options.devices or hardware.devices
    config = configure(overrides, devices)
    metadata, data = plan_metadata(config)
    memory_plan = MemoryPlan(config, metadata, ranks=devices, device=hardware.device)
    model = memory_plan.head.model
    memory = hardware.memory or host_memory()
    micro_rows = config.micro_rows(devices)
    if micro_rows is None:
        micro_rows = memory_plan.fitting_rows(int(memory))
    counted = memory_plan.cost
    act_steps, assumed = steps_of_an_example(config, model, data)
    tokens = tokens or options.tokens or budget(config, counted, act_steps, data)
    dtype = model.config.forward_dtype
    rate = cpu_rate(dtype) if hardware.device == "cpu" else hardware.rates.get(dtype)
    if rate is None:
        raise UserError(
            f"arch.forward_dtype={dtype} has no known rate on {options.hardware}; "
            "give bfloat16, or hardware=cpu"
        )
    utilisation = options.utilisation or hardware.utilisation
    return Plan(
        options, [*overrides], config, memory_plan, hardware, devices, counted, micro_rows, memory,
        act_steps, assumed, tokens, utilisation,
        price=hardware.price if options.price is None else options.price,
        seconds=tokens * act_steps * counted.train_flops / (devices * rate * utilisation),
    )  # fmt: skip


def steps_of_an_example(
    config: PretrainConfig, model: Architecture, data: Data | None
) -> tuple[float, str]:
    """Return the mean number of ACT steps of a training example, and the assumption behind it."""
    most = model.max_steps
    if most == 1:
        return 1.0, "the model takes one step"
    if config.feed == "present":
        return (
            1.0,
            "feed=present draws new rows for every step and ignores those for occupied slots",
        )
    least = config.min_iterations or 4
    if data is None:
        budgets = [*range(min(least, most), most + 1)]
        why = f"budgets uniform between {budgets[0]} and {most} steps"
    elif data.train.has_targets:
        rows = np.linspace(0, data.train.num_rows - 1, min(data.train.num_rows, 4096)).astype(int)
        found = data.train.rows(rows)["iteration_targets"]
        budgets = [max(b, config.min_iterations or 0) if b else 0 for b in found.tolist()]
        why = f"the corpus' iteration_targets, up to {most} steps"
    else:
        return float(most), "the corpus has no budgets, and halting is not predicted"
    if (rule := config.iteration_curriculum) is not None:
        whole = np.array([min(b or most, most) for b in budgets])
        lowest = max(1, model.min_steps, config.min_iterations or 1)
        moments = [(i + 0.5) / 20 for i in range(20)]
        budgets = np.concatenate(
            [scale_budgets(whole, rule, at, lowest) for at in moments]
        ).tolist()
        why += ", growing by iteration_curriculum"
    steps = {budget: model.expected_steps(budget) for budget in set(budgets)}
    return sum(steps[b] for b in budgets) / len(budgets), why + ", and exploration"


def budget(config: PretrainConfig, counted: Cost, act_steps: float, data: Data | None) -> float:
    """Return the number of tokens in the run if the options do not set it."""
    if config.max_steps is not None:
        return config.max_steps * config.global_batch_size * counted.seq_len / act_steps
    if data is not None:
        return data.train.num_rows * counted.seq_len * (config.epochs or 1)
    return 20.0 * counted.parameters.total


@cache
def host_memory() -> float:
    """Return the free bytes on this machine, measured once so that plans are comparable."""
    return free_host_memory()


@cache
def cpu_rate(dtype: str) -> float:
    """Return the best of several measurements of the FLOP/s of a matrix product on this CPU, cached
    so that plans are comparable.
    """
    side = 1024
    a = torch.randn(side, side).to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begun)
    return 2 * side**3 / best


# --- printed output --------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the keys of this command, and the arguments for pretrain.py."""
    options, overrides = split_key_values(Options, arguments)
    for key in (override.partition("=")[0] for override in overrides):
        near = nearest(key, list(Options.model_fields))
        if near and "." not in key and not nearest(key, list(PretrainConfig.model_fields)):
            raise UserError(f"unknown key '{key}': did you mean '{near}'?")
    if options.config_dir is not None:
        overrides = ["--config-dir", str(options.config_dir), *overrides]
    if options.hardware not in HARDWARE:
        near = nearest(options.hardware, list(HARDWARE), cutoff=0.8)  # a b200 is not an h200
        advice = f"did you mean '{near}'? " if near else ""
        raise UserError(
            f"hardware={options.hardware} is unknown; {advice}choose one of {', '.join(HARDWARE)}"
        )
    return options, overrides


def changed(overrides: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Return `overrides`, with those of the same keys replaced by `extra`."""
    replaced = {override.partition("=")[0].lstrip("+") for override in extra}
    kept = [o for o in overrides if o.partition("=")[0].lstrip("+") not in replaced]
    return [*kept, *extra]


def rows_of(p: Plan) -> list[tuple[str, str]]:
    """Return the lines printed for a plan, as (name, value)."""
    c, rows = p.counted, p.config.global_batch_size
    steps = p.tokens * p.act_steps / (rows * c.seq_len)
    room = "fits" if p.fits else "DOES NOT FIT"
    return [
        ("parameters", format_count(c.parameters.total)),
        ("  core", format_count(c.parameters.core)),
        ("  embeddings", format_count(c.parameters.embeddings)),
        ("  output head", format_count(c.parameters.head)),
        ("identifier embedding", format_count(c.parameters.identifiers)),
        ("layer passes per ACT step", f"{c.passes} ({c.gradient_passes} with gradient)"),
        ("ACT steps of an example", f"{p.act_steps:.1f} of {c.max_steps}"),
        ("FLOPs per token", ""),
        ("  training, an ACT step", format_flops(c.train_flops)),
        ("  training, all its steps", format_flops(c.train_flops * p.act_steps)),
        ("  evaluation, all its steps", format_flops(evaluation_flops(p.model))),
        ("memory of a device", f"{format_bytes(p.total)} of {format_bytes(p.memory)}: {room}"),
        *((f"  {name}", format_bytes(part)) for name, part in p.parts.items()),
        ("rows at once", f"{p.micro_rows} of {p.config.rows_per_rank(p.devices)}"),
        ("checkpoint on disk", format_bytes(p.memory_plan.checkpoint_bytes())),
        ("tokens", f"{p.tokens:.3g}"),
        ("optimizer steps", f"{steps:,.0f}"),
        ("time", duration(p.seconds)),
        ("money", dollars(p.money)),
    ]


def duration(seconds: float) -> str:
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def dollars(amount: float) -> str:
    return f"${amount:,.0f}" if amount >= 10 else f"${amount:.2f}"


def assumptions(p: Plan) -> str:
    return (
        f"on {p.devices} x {p.hardware.title}, {p.config.global_batch_size} rows a step of "
        f"{p.counted.seq_len} tokens, vocabulary {p.model.config.vocab_size:,}; assumed: "
        f"{p.utilisation:.0%} of the peak rate (utilisation=), ${p.price:g} per device and hour "
        f"(price=), and for ACT steps: {p.assumed}. Evaluations and saving are not included."
    )


# --- warnings ------------------------------------------------------------------------------


def warnings_of(p: Plan) -> list[str]:
    """Return the reasons why a plan is impractical, each with cheaper settings and their cost."""
    found = []
    carry = p.parts["carry"]
    if not p.fits:
        what = f"needs {format_bytes(p.total)} with {p.micro_rows} rows at once, but only " + (
            f"{FILLED:.0%} of {format_bytes(p.memory)} can be used"
        )
        found.append(what + advice(p, SMALLER, "fits"))
    elif carry > 0.25 * p.memory:
        what = f"the carry of {p.config.rows_per_rank(p.devices)} rows takes {format_bytes(carry)}"
        found.append(what + advice(p, (["global_batch_size=64"],), "carry"))
    if p.seconds > LONG or p.money > EXPENSIVE or p.passes > DEEP:
        what = (
            f"takes {duration(p.seconds)} and {dollars(p.money)}; a trained token goes through "
            f"{p.passes:,.0f} layer passes, as in a decoder of as many layers"
        )
        found.append(what + advice(p, CHEAPER, "seconds"))
    outside = p.parameters - p.counted.parameters.core
    if outside > 0.6 * p.parameters and not p.model.config.tie_embeddings:
        what = f"{outside / p.parameters:.0%} of the parameters are embedding and head"
        found.append(what + advice(p, (["arch.tie_embeddings=true"],), "parameters"))
    return found


def advice(p: Plan, settings: Sequence[list[str]], gain: str) -> str:
    """Return the settings that would help and are not set yet, each for the same number of
    tokens.
    """
    helpful: dict[tuple[float, ...], str] = {}
    recursive = hasattr(p.model.config, "H_cycles")
    for extra in settings:
        if not recursive and any(setting.startswith("arch=") for setting in extra):
            continue  # it would be another architecture
        try:
            other = plan(p.options, changed(p.overrides, extra), tokens=p.tokens)
        except UserError:  # conflicts with the given overrides
            continue
        better = {
            "fits": other.fits,
            "carry": other.parts["carry"] < p.parts["carry"],
            "seconds": other.seconds < 0.9 * p.seconds and (other.fits or not p.fits),
            "parameters": other.parameters < p.parameters,
        }[gain]
        counted = (other.total, other.parameters, other.seconds)
        # a preset may have the same effect as an earlier single key
        if better and other.parameters <= p.parameters and counted not in helpful:
            room = "" if other.fits else ", which does not fit"
            helpful[counted] = (
                f"\n    {' '.join(differing(p, extra))}: {format_bytes(other.total)}{room}, "
                f"{format_count(other.parameters)} parameters, {duration(other.seconds)}, "
                f"{dollars(other.money)}"
            )
            if len(helpful) == SHOWN:
                break
    if not helpful:
        return "; no single preset solves this: use more or larger devices, or fewer tokens"
    return "; with" + "".join(helpful.values())


def differing(p: Plan, extra: Sequence[str]) -> list[str]:
    """Return the overrides in `extra` that change the plan."""
    whole = configure(changed(p.overrides, extra), p.devices)
    kept = list(extra)
    for setting in extra:
        fewer = [other for other in kept if other != setting]
        with suppress(UserError):  # conflicts without it
            if configure(changed(p.overrides, fewer), p.devices) == whole:
                kept = fewer
    return kept


# --- the command ---------------------------------------------------------------------------


def compared(overrides: Sequence[str]) -> str:
    """Run training steps on this machine; return a table of measurements next to the estimates."""
    config = configure(overrides, 1)
    backend, _ = select_backend(config.device_type)
    device, free = backend.device.type, backend.available_memory()
    metadata, _ = plan_metadata(config)
    planned = MemoryPlan(config, metadata, device=device)
    micro_rows = config.micro_rows(1) or planned.fitting_rows(free)
    parts = planned.parts(micro_rows)
    if sum(parts.values()) > free:
        raise UserError(
            f"a step with {micro_rows} rows at once needs about "
            f"{format_bytes(sum(parts.values()))}, but {format_bytes(free)} are free here; use a "
            "smaller arch, global_batch_size or seq_len"
        )
    sizes = dict(vocab_size=metadata.vocab_size, seq_len=metadata.seq_len)
    found, seconds = measure_step(config.model_copy(update=sizes), micro_rows, backend)
    lines = [f"{'memory':<16}{'estimated':>12}{'measured':>12}{'ratio':>8}"]
    both = {name: (parts[name], found[name]) for name in parts}
    both["total"] = sum(parts.values()), sum(found.values())
    for name, (guess, real) in both.items():
        ratio = f"{guess / real:.2f}" if real else ""
        lines.append(f"  {name:<14}{format_bytes(guess):>12}{format_bytes(real):>12}{ratio:>8}")
    spent = planned.cost.row_train_flops * config.global_batch_size
    dtype = planned.head.model.config.forward_dtype
    rate = cpu_rate(dtype) if device == "cpu" else backend.peak_flops(torch.bfloat16)
    share = f", utilisation={spent / seconds / rate:.2f}" if rate else ""
    lines.append(
        f"an optimizer step of {config.global_batch_size} rows, {micro_rows} at once, on "
        f"{backend.describe()}: {format_flops(spent)} in {seconds:.2f} s{share}"
    )
    return "\n".join(lines)


def run(arguments: Sequence[str]) -> None:
    options, overrides = parse(arguments)
    presets = (arch_of(overrides) or "").split(",")
    several = len(presets) > 1
    each = (
        [changed(overrides, [f"arch={preset}"]) for preset in presets] if several else [overrides]
    )
    plans = [plan(options, these) for these in each]
    columns = [dict(rows_of(p)) for p in plans]
    names = [p.name for p in plans]
    widths = [
        max(12, *map(len, [*column.values(), name]))
        for column, name in zip(columns, names, strict=True)
    ]
    lines = [(row, [column.get(row, "") for column in columns]) for row in columns[0]]
    for row, cells in [("", names), *lines] if several else lines:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(f"{row:<28}" + "  ".join(padded).rstrip())
    for p in plans:
        prefix = f"{p.name}: " if several else ""
        print(f"\n{prefix}{assumptions(p)}")
        for line in warnings_of(p):
            print(f"warning: {prefix}{line}")
        if options.measure:
            print("\n" + compared(p.overrides))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    hardware = "; ".join(f"{name}: {machine.title}" for name, machine in HARDWARE.items())
    run_command(Options, f"{__doc__}\nhardware: {hardware}\n", run, argv, closed_status=0)


if __name__ == "__main__":
    main()
