"""Print what a run would cost, before anything is built."""

import os
from pathlib import Path
from typing import Any

from torch import nn

from dataset.common import DatasetMetadata
from models import cost
from models.build import create_model
from models.losses import ACTLossHead
from utils.backend import select_backend
from utils.checkpoint.format import missing_advice
from utils.config.plugins import checkpoint_options
from utils.config.saved import config_yaml
from utils.config.schema import PretrainConfig
from utils.core.errors import UserError
from utils.corpus.data import Data, open_data


def dry_run(config: PretrainConfig) -> None:
    """Print the whole config and the cost of a run. Reads at most the corpora's metadata."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    head, _ = plan_model(config, ranks)
    for term, option in checkpoint_options(config.arch.loss.options):
        base = Path(config.arch.loss.options["terms"][term][option])
        if not base.is_dir():
            key = f"arch.loss.terms.{term}.{option}"
            raise UserError(f"{key}={base} is not a folder; {missing_advice(base)}")
    print(config_yaml(config))
    device, free = "cuda", None
    rows = micro_rows = config.rows_per_rank(ranks)
    why = f"as there is no {config.device_type} here to fit them to"
    try:
        backend, _ = select_backend(config.device_type)
        device, free = backend.device.type, backend.available_memory()
    except UserError:
        pass
    if free is not None:
        micro_rows = cost.fitting_rows(head.model, config, free, ranks=ranks, device=device)
    if (given := config.micro_rows(ranks)) is not None:
        micro_rows, why = given, "as configured"
    sizes: dict[str, Any] = dict(ranks=ranks, micro_rows=micro_rows, device=device)
    if given is None and free is not None:
        fits = sum(cost.memory(head.model, config, **sizes).values()) < free
        why = "chosen for" if fits else "which is still too much for"
        why += f" the {free / 1e9:.1f} GB free on this {backend.name}"
    lines = describe_model(head.model) + describe_step(head.model, config, **sizes)
    print("\n".join(f"{name:<26}{value}" for name, value in lines))
    print(f"{'rows at once':<26}{micro_rows} of {rows}, {why}")


def plan_model(config: PretrainConfig, ranks: int) -> tuple[ACTLossHead, Data | None]:
    """Build the model of a run on the meta device; return it with its corpora, if it names any."""
    data = open_data(config) if config.data_paths else None
    if data is not None:
        metadata = data.train.metadata
    else:
        metadata = DatasetMetadata(
            pad_id=0, ignore_label_id=None, vocab_size=config.vocab_size or 1,
            seq_len=config.seq_len or 1, num_puzzle_identifiers=1, total_groups=0,
            mean_puzzle_examples=1, total_puzzles=0,
        )  # fmt: skip
    rows = config.rows_per_rank(ranks)
    return create_model(config.arch, metadata, batch_size=rows, device="meta"), data


def describe_model(model: nn.Module) -> list[tuple[str, str]]:
    """Return parameters, layer passes and FLOPs as (name, value)."""
    counted = cost.measure(model)
    plain = counted.layer_passes - counted.gradient_passes
    return [
        ("parameters", format_count(counted.parameters)),
        ("  core (blocks)", format_count(counted.core_parameters)),
        ("  embeddings", format_count(counted.embedding_parameters)),
        ("  heads", format_count(counted.head_parameters)),
        ("identifier embedding", format_count(counted.identifier_parameters) + " (own optimizer)"),
        ("buffers", format_count(counted.buffers)),
        (
            "layer passes per token",
            f"{counted.layer_passes} per ACT step ({counted.gradient_passes} with gradient, "
            f"{plain} without), up to {counted.layer_passes * counted.max_steps:,} in "
            f"{counted.max_steps} steps",
        ),
        (
            "FLOPs per token",
            f"{format_flops(counted.train_flops)} per ACT step in training, "
            f"{format_flops(counted.forward_flops)} in evaluation",
        ),
    ]


def describe_step(
    model: nn.Module, config: PretrainConfig, *, ranks: int, micro_rows: int, device: str
) -> list[tuple[str, str]]:
    """Return the FLOPs of an optimizer step and the memory of a replica as (name, value)."""
    counted, rows = cost.measure_run(model, config), config.rows_per_rank(ranks)
    sizes: dict[str, Any] = dict(ranks=ranks, device=device)
    parts = cost.memory(model, config, micro_rows=micro_rows, **sizes)
    least = sum(cost.memory(model, config, micro_rows=1, **sizes).values())
    return [
        (
            "FLOPs per optimizer step",
            f"{format_flops(counted.row_train_flops * rows * ranks)} "
            f"({rows * ranks} rows x {counted.seq_len} tokens)",
        ),
        (
            "memory of a replica",
            f"about {format_bytes(sum(parts.values()))} "
            f"({rows} rows, {micro_rows} at once; {format_bytes(least)} with one at once)",
        ),
        *((f"  {name}", format_bytes(part)) for name, part in parts.items()),
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
