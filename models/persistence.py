"""Saving and restoring a run: what goes into a checkpoint, and what may change on the way back."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml

from dataset.common import DatasetMetadata, UserError
from models.losses import ACTLossHead
from models.train_state import (
    TrainState,
    carry_rows,
    load_into,
    match_identifiers,
    source_files,
)
from utils import checkpoint
from utils.backend import Backend
from utils.checkpoint import Checkpoint
from utils.config_schema import PretrainConfig

# Keys that leave the training curve as it is, up to rounding; all others must agree on resume.
HARMLESS = frozenset(
    "data_paths data_paths_test vocab_size seq_len micro_batch_size grad_accum_steps num_workers "
    "evaluators eval_interval min_eval_interval eval_batch_size eval_max_batches eval_only "
    "eval_save_outputs early_stopping project_name run_name checkpoint_path checkpoint_every_eval "
    "checkpoint_interval keep_checkpoints checkpoint_carry resume resume_allow load_checkpoint "
    "load_weights device_type parallel compile dry_run logger log_interval max_nonfinite".split()
)


class Resumable(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], *, restart_held: bool = False) -> None: ...


def resolved(config: PretrainConfig) -> dict[str, Any]:
    """The whole config as plain values."""
    return config.model_dump(mode="json")


def save(
    config: PretrainConfig,
    state: TrainState,
    stream: Resumable,
    backend: Backend,
    run: Path,
    *,
    metadata: DatasetMetadata,
    identifiers: list[str],
    tokenizer: Path | None,
) -> Path:
    """Writes `run`/step_<n> and prunes older ones; every rank calls it."""
    folder = checkpoint.step_folder(run, state.step)
    shard = None
    if config.checkpoint_carry and state.carries:
        share = len(state.halted) // backend.world_size
        slots = [backend.rank * share, (backend.rank + 1) * share]
        shard = {"slots": slots, "carry": carry_rows(state.carries)}
    position = stream.state_dict()
    if shard is None and config.feed == "consume":
        # held rows start again, but those that have halted are done
        places = zip(position["held_places"], state.halted.tolist(), strict=True)
        position["held_places"] = [-1 if halted else place for place, halted in places]
    micro_rows = len(state.carries[0].halted) if state.carries else None
    counters = {"counters": state.counters(), "stream": position, "micro_rows": micro_rows}
    checkpoint.save(
        folder,
        tensors=state.tensors() if backend.is_main else {},
        texts={
            "state.json": json.dumps(counters),
            "config.yaml": yaml.safe_dump(resolved(config), sort_keys=False),
            "dataset.json": metadata.model_dump_json(),
            "identifiers.json": json.dumps(identifiers),
        },
        shard=shard,
        copies=[*source_files(state.model), *([(tokenizer, tokenizer.name)] if tokenizer else [])],
        rank=backend.rank,
        barrier=backend.barrier,
    )
    if backend.is_main:
        checkpoint.prune(run, config.keep_checkpoints)
    return folder


def find_resume(config: PretrainConfig, run: Path, backend: Backend) -> Checkpoint | None:
    """The checkpoint to go on from, checked; None for a new run."""
    if config.resume == "none":
        if not config.eval_only and (there := checkpoint.checkpoints_of(run)):
            raise UserError(
                f"resume=none starts a new run, but {run} holds {there[-1].name} of an old one; "
                "choose another run_name, or move the folder away"
            )
        return None
    folder: Path | None = None
    if config.resume != "auto" and (Path(config.resume) / checkpoint.MANIFEST).is_file():
        folder = Path(config.resume)
    elif found := checkpoint.checkpoints_of(
        run if config.resume == "auto" else Path(config.resume)
    ):
        folder = found[-1]
    elif config.resume != "auto":
        raise UserError(f"resume={config.resume} is neither a checkpoint nor a run that has one")
    folder = backend.broadcast_object(folder)
    if folder is None:
        return None
    opened = Checkpoint(folder)
    if backend.is_main:
        opened.verify()
        print(f"resuming from {folder}")
        if folder.parent.resolve() == run.resolve() and not config.eval_only:
            checkpoint.set_aside(run, after=folder)
    backend.barrier()
    check_unchanged(config, yaml.safe_load(opened.text("config.yaml")))
    return opened


def check_unchanged(config: PretrainConfig, saved: dict[str, Any]) -> None:
    """UserError that lists the keys which changed and would change the result."""
    old, new = flat(saved), flat(resolved(config))
    allowed = set(config.resume_allow)
    changed = []
    for key in sorted(old.keys() | new.keys()):
        top = key.split(".")[0]
        if old.get(key) == new.get(key) or top in HARMLESS or {key, top} & allowed:
            continue
        changed.append(f"{key} (was {old.get(key)}, is {new.get(key)})")
    if changed:
        keys = ",".join(line.split(" ")[0] for line in changed)
        raise UserError(
            f"resuming with changed keys would change the result: {'; '.join(changed)}. Take them "
            f"back, allow them with resume_allow=[{keys}], or start a new run"
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as {"arch.loss.name": value}."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def saved_micro_rows(resumed: Checkpoint | None, rows: int) -> int | None:
    """Rows of a micro-batch as before, so that a resumed run stays exact whatever is free today.

    None for a new run, or where they do not divide the `rows` of a rank (another world size).
    """
    saved = resumed.json("state.json").get("micro_rows") if resumed is not None else None
    return saved if saved is not None and rows % saved == 0 else None


def restore(
    config: PretrainConfig,
    state: TrainState,
    stream: Resumable,
    backend: Backend,
    opened: Checkpoint,
    micro_batches: int,
) -> None:
    """Continues where `opened` was taken: weights, optimizers, averages, stream, held rows."""
    saved = opened.json("state.json")
    share = len(state.halted) // backend.world_size
    slots = range(backend.rank * share, (backend.rank + 1) * share)
    rows = opened.carry(slots) if config.checkpoint_carry else None
    # First, because other corpora are the likeliest reason for weights of other shapes.
    stream.load_state_dict(saved["stream"], restart_held=rows is None)
    state.load_tensors(opened.tensors)
    state.load_counters(saved["counters"])
    if rows is None:
        if backend.is_main:
            print("note: held rows were not saved, they start again; the run is not exact")
        return
    state.load_carry(rows, micro_batches)
    own = torch.cat([carry.halted for carry in state.carries])
    state.halted = backend.all_gather(own.int()).cpu().numpy().astype(bool)


def load_pretrained(
    config: PretrainConfig, model: ACTLossHead, identifiers: list[str], tokenizer: Path | None
) -> None:
    """Starts a new run from the weights that `load_checkpoint` names."""
    assert config.load_checkpoint is not None
    weights, opened = checkpoint.load_weights(config.load_checkpoint, config.load_weights)
    old = None
    if opened is not None:
        old = opened.json("identifiers.json")
        known = opened.text("tokenizer.json") if "tokenizer.json" in opened else None
        if tokenizer is not None and known is not None and known != tokenizer.read_text():
            raise UserError(
                f"load_checkpoint={config.load_checkpoint} was trained with another tokenizer "
                f"than {tokenizer}; build the corpus with the checkpoint's tokenizer.json"
            )
    match_identifiers(weights, old, identifiers)
    load_into(model.model, weights)
