"""What a run would cost, told before anything real is built."""

import os

import yaml

from dataset.common import DatasetMetadata, UserError
from models import cost
from models.persistence import resolved
from models.train_state import create_model
from utils.backend import select_backend
from utils.config_schema import PretrainConfig
from utils.data import open_data


def dry_run(config: PretrainConfig) -> None:
    """Prints the resolved config and the cost of a run; reads at most the corpora's metadata."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.data_paths:
        metadata = open_data(config).train.metadata
    else:
        metadata = DatasetMetadata(
            pad_id=0, ignore_label_id=None, vocab_size=config.vocab_size or 1,
            seq_len=config.seq_len or 1, num_puzzle_identifiers=1, total_groups=0,
            mean_puzzle_examples=1, total_puzzles=0,
        )  # fmt: skip
    rows = config.rows_per_rank(world_size)
    model = create_model(config, metadata, batch_size=rows, device="meta").model
    print(yaml.safe_dump(resolved(config), sort_keys=False))
    micro_rows, chosen = config.micro_rows(world_size), "as configured"
    if micro_rows is None:
        micro_rows, chosen = fitting_here(config, model, rows)
    print(
        cost.report(
            model, rows=rows, micro_rows=micro_rows, world_size=world_size,
            optimizer=config.optimizer, ema=config.ema,
        )
    )  # fmt: skip
    print(f"{'rows at once':<26}{micro_rows} of {rows}, {chosen}")


def fitting_here(config: PretrainConfig, model, rows: int) -> tuple[int, str]:
    """What micro_batch_size=auto would take on this machine, and why."""
    try:
        backend, _ = select_backend(config.device_type)
        free = backend.available_memory()
    except UserError:
        return rows, f"as there is no {config.device_type} here to fit them to"
    fitting = cost.fitting_rows(model, rows, free, optimizer=config.optimizer, ema=config.ema)
    parts = cost.memory(
        model.config, cost.measure(model), rows=rows, micro_rows=fitting,
        optimizer=config.optimizer, ema=config.ema,
    )  # fmt: skip
    fits = "chosen for" if sum(parts.values()) < free else "which is still too much for"
    return fitting, f"{fits} the {free / 1e9:.1f} GB free on this {backend.name}"
