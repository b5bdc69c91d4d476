r"""Estimate a run before it starts: parameters, FLOPs, memory, time and money.

    python scripts/estimate.py arch=athena_trm_small hardware=h200
    python scripts/estimate.py arch=athena_trm_large hardware=a100 devices=8 tokens=1e10
    python scripts/estimate.py arch=athena_trm_small,athena_trm_medium,transformer hardware=4060
    python scripts/estimate.py data_paths="[data/mine]" experiment=quickstart measure=true

Takes every key of pretrain.py and its --config-dir, several presets at once as arch=a,b, and the
keys below. Without a
corpus it assumes vocab_size=32000, seq_len=2048 and 20 tokens per parameter. measure=true runs real
training steps on this machine and prints what they took beside the estimate.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of measure=true; before torch is imported

import torch

from models.cost import evaluation_flops
from scripts.run_plan import HARDWARE, Options, Plan, configure, cpu_rate, plan
from scripts.training_step import measure_step
from utils.backend import select_backend
from utils.config.key_values import run_command, split_key_values
from utils.config.load import PretrainConfig
from utils.core.errors import UserError
from utils.core.functions import nearest
from utils.training.dry_run import format_bytes, format_count, format_flops
from utils.training.plan import FILLED, MemoryPlan, plan_metadata

LONG = 30 * 86400
"""Seconds of training that deserve a warning."""
EXPENSIVE = 5000
"""US dollars that do."""
DEEP = 1000
"""Layer passes per trained token that do: a decoder of as many layers."""
SHOWN = 3
"""Settings that a warning offers at most."""
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


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the own keys, and the arguments that are pretrain.py's."""
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
            f"hardware={options.hardware} is unknown; {advice}there are {', '.join(HARDWARE)}"
        )
    return options, overrides


def changed(overrides: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Return overrides with those of `extra` in place of others of the same key."""
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


def assumptions(options: Options, p: Plan) -> str:
    price = p.hardware.price if options.price is None else options.price
    utilisation = options.utilisation or p.hardware.utilisation
    return (
        f"on {p.devices} x {p.hardware.title}, {p.config.global_batch_size} rows a step of "
        f"{p.counted.seq_len} tokens, vocabulary {p.model.config.vocab_size:,}; assumed: "
        f"{utilisation:.0%} of the peak rate (utilisation=), ${price:g} for a device and hour "
        f"(price=), and of ACT steps: {p.assumed}. Evaluations and saving are not counted."
    )


# --- warnings ------------------------------------------------------------------------------


def warnings_of(options: Options, overrides: Sequence[str], p: Plan) -> list[str]:
    """Return what makes the plan impractical, each with cheaper settings and their cost."""
    found = []
    carry = p.parts["carry"]
    if not p.fits:
        what = f"needs {format_bytes(p.total)} with {p.micro_rows} rows at once, but only " + (
            f"{FILLED:.0%} of {format_bytes(p.memory)} can be planned with"
        )
        found.append(what + advice(options, overrides, p, SMALLER, "fits"))
    elif carry > 0.25 * p.memory:
        what = f"the carry of {p.config.rows_per_rank(p.devices)} rows takes {format_bytes(carry)}"
        found.append(what + advice(options, overrides, p, (["global_batch_size=64"],), "carry"))
    if p.seconds > LONG or p.money > EXPENSIVE:
        what = (
            f"takes {duration(p.seconds)} and {dollars(p.money)}; a trained token goes through "
            f"{p.passes:,.0f} layer passes"
        )
        found.append(what + advice(options, overrides, p, CHEAPER, "seconds"))
    elif p.passes > DEEP:
        what = (
            f"runs {p.passes:,.0f} layer passes for each trained token, as a decoder of as many "
            f"layers would ({duration(p.seconds)}, {dollars(p.money)})"
        )
        found.append(what + advice(options, overrides, p, CHEAPER, "seconds"))
    arch = p.model.config
    parameters = p.counted.parameters
    outside = parameters.total - parameters.core
    if outside > 0.6 * parameters.total and not arch.tie_embeddings:
        what = f"{outside / parameters.total:.0%} of the parameters are embedding and head"
        settings = (["arch.tie_embeddings=true"],)
        found.append(what + advice(options, overrides, p, settings, "parameters"))
    return found


def advice(
    options: Options, overrides: Sequence[str], p: Plan, settings: Sequence[list[str]], gain: str
) -> str:
    """Return the settings that help, less what is set already, each counted on the same tokens."""
    helpful: dict[tuple[float, ...], str] = {}
    recursive = hasattr(p.model.config, "H_cycles")
    for extra in settings:
        if not recursive and any(setting.startswith("arch=") for setting in extra):
            continue  # another architecture is not a cheaper setting of this one
        try:
            other = plan(options, changed(overrides, extra), tokens=p.tokens)
        except UserError:  # clashes with what was given
            continue
        better = {
            "fits": other.fits,
            "carry": other.parts["carry"] < p.parts["carry"],
            "seconds": other.seconds < 0.9 * p.seconds and (other.fits or not p.fits),
            "parameters": size(other) < size(p),
        }[gain]
        if better and size(other) <= size(p):
            room = "" if other.fits else ", which does not fit"
            counted = (other.total, size(other), other.seconds)
            if counted in helpful:
                continue  # a preset may say no more than a single key before it
            named = " ".join(differing(overrides, extra, p.devices))
            helpful[counted] = (
                f"\n    {named}: {format_bytes(other.total)}{room}, "
                f"{format_count(size(other))} parameters, {duration(other.seconds)}, "
                f"{dollars(other.money)}"
            )
            if len(helpful) == SHOWN:
                break
    if not helpful:
        return "; no single preset here changes that: take more or larger devices, or fewer tokens"
    return "; with" + "".join(helpful.values())


def size(p: Plan) -> int:
    return p.counted.parameters.total


def differing(overrides: Sequence[str], extra: Sequence[str], devices: int) -> list[str]:
    """Return those of `extra` that make a difference in place of `overrides`."""
    whole = configure(changed(overrides, extra), devices)
    kept = list(extra)
    for setting in extra:
        fewer = [other for other in kept if other != setting]
        with suppress(UserError):  # clashes without it
            if configure(changed(overrides, fewer), devices) == whole:
                kept = fewer
    return kept


# --- the command ---------------------------------------------------------------------------


def compared(overrides: Sequence[str]) -> str:
    """Run training steps on this machine; return a table of measurements beside the estimate."""
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
            f"{format_bytes(sum(parts.values()))}, but {format_bytes(free)} are free here; give a "
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
    presets = next((o.partition("=")[2] for o in overrides if o.startswith("arch=")), None)
    each = [overrides]
    if presets and "," in presets:
        each = [changed(overrides, [f"arch={preset}"]) for preset in presets.split(",")]
    plans = [plan(options, these) for these in each]
    columns = [dict(rows_of(p)) for p in plans]
    widths = [
        max(12, *map(len, [*column.values(), p.name]))
        for column, p in zip(columns, plans, strict=True)
    ]
    if len(plans) > 1:
        print(
            f"{'':<28}"
            + "  ".join(p.name.ljust(w) for p, w in zip(plans, widths, strict=True)).rstrip()
        )
    for name in columns[0]:
        cells = (column.get(name, "").ljust(w) for column, w in zip(columns, widths, strict=True))
        print(f"{name:<28}" + "  ".join(cells).rstrip())
    for these, p in zip(each, plans, strict=True):
        prefix = f"{p.name}: " if len(plans) > 1 else ""
        print(f"\n{prefix}{assumptions(options, p)}")
        for line in warnings_of(options, these, p):
            print(f"warning: {prefix}{line}")
        if options.measure:
            print("\n" + compared(these))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    hardware = "; ".join(f"{name}: {machine.title}" for name, machine in HARDWARE.items())
    run_command(Options, f"{__doc__}\nhardware: {hardware}\n", run, argv, closed_status=0)


if __name__ == "__main__":
    main()
