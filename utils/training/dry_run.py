"""Print the cost of a run without building it."""

import os
from pathlib import Path

from models.cost import evaluation_flops
from utils.backend import select_backend
from utils.checkpoint.format import missing_advice
from utils.config.plugins import checkpoint_options
from utils.config.saved import config_yaml
from utils.config.schema import PretrainConfig
from utils.core.errors import UserError
from utils.training.plan import MemoryPlan, plan_metadata


def dry_run(config: PretrainConfig) -> None:
    """Print the whole config and the cost of a run. Reads only the corpora's metadata."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    metadata, _ = plan_metadata(config)
    for term, option in checkpoint_options(config.arch.loss.options):
        base = Path(config.arch.loss.options["terms"][term][option])
        if not base.is_dir():
            key = f"arch.loss.terms.{term}.{option}"
            raise UserError(f"{key}={base} is not a folder; {missing_advice(base)}")
    print(config_yaml(config))
    device, free = "cuda", None
    try:
        backend, _ = select_backend(config.device_type)
        device, free = backend.device.type, backend.available_memory()
    except UserError:
        pass
    plan = MemoryPlan(config, metadata, ranks=ranks, device=device)
    if (given := config.micro_rows(ranks)) is not None:
        micro_rows, why = given, "as configured"
    elif free is None:
        micro_rows = 1
        why = f"because there is no {config.device_type} here to measure"
    else:
        micro_rows = plan.fitting_rows(free)
        why = "chosen for" if plan.total(micro_rows) < free else "which is still too much for"
        why += f" the {free / 1e9:.1f} GB free on this {backend.name}"
    lines = [*describe(plan, micro_rows), ("rows at once", f"{micro_rows} of {plan.rows}, {why}")]
    print("\n".join(f"{name:<26}{value}" for name, value in lines))


def describe(plan: MemoryPlan, micro_rows: int) -> list[tuple[str, str]]:
    """Return the parameters, layer passes, FLOPs and memory of a run as (name, value)."""
    counted, model, rows = plan.cost, plan.head.model, plan.rows * plan.ranks
    parameters, steps = counted.parameters, counted.max_steps
    plain = counted.passes - counted.gradient_passes
    again = counted.row_recomputed_flops * rows
    return [
        ("parameters", format_count(parameters.total)),
        ("  core", format_count(parameters.core)),
        ("  embeddings", format_count(parameters.embeddings)),
        ("  output head", format_count(parameters.head)),
        ("identifier embedding", format_count(parameters.identifiers) + " (own optimizer)"),
        ("buffers", format_count(parameters.buffers)),
        (
            "layer passes per token",
            f"{counted.passes} per ACT step ({counted.gradient_passes} with gradient, "
            f"{plain} without), up to {counted.passes * steps:,} in {steps} steps",
        ),
        (
            "FLOPs per token",
            f"{format_flops(counted.train_flops)} per ACT step in training, "
            f"{format_flops(evaluation_flops(model))} in an evaluation of depth "
            f"{model.eval_depth()}",
        ),
        (
            "FLOPs per optimizer step",
            f"{format_flops(counted.row_train_flops * rows)} "
            f"({rows} rows x {counted.seq_len} tokens)"
            + (f", and {format_flops(again)} of recomputation" if again else ""),
        ),
        (
            "memory of a replica",
            f"about {format_bytes(plan.total(micro_rows))} ({plan.rows} rows, {micro_rows} at "
            f"once; {format_bytes(plan.total(1))} with 1 row at once)",
        ),
        *((f"  {name}", format_bytes(part)) for name, part in plan.parts(micro_rows).items()),
    ]


def format_count(count: int) -> str:
    """Format a number of parameters."""
    return f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,}"


def format_flops(count: float) -> str:
    """Format a number of FLOPs with the fitting SI prefix."""
    for scale, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= scale:
            return f"{count / scale:.2f} {unit}FLOP"
    return f"{count:.0f} FLOP"


def format_bytes(count: float) -> str:
    """Format a number of bytes in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
