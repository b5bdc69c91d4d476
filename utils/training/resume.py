"""Resume a run: find its checkpoint, compare the configs, restore the state."""

from pathlib import Path
from typing import Any

import torch

from dataset.common import DatasetMetadata
from models.build import create_model
from models.inference.loading import settle_bases, usable_dtype
from sequence_dataset import TrainStream, drop_halted
from utils.backend import Backend
from utils.checkpoint import format as checkpoint
from utils.checkpoint.format import Checkpoint
from utils.config.saved import changed_keys, is_fixed, read_config
from utils.config.schema import OptimizerConfig, PretrainConfig
from utils.core.console import notify
from utils.core.errors import UserError
from utils.training.optimizers import share_moments
from utils.training.state import TrainState


def prepare_resume(config: PretrainConfig, folder: Path, backend: Backend) -> Checkpoint | None:
    """Open the checkpoint to resume and check that the config fits it; None for a new run.

    A collective. Sets the dtype and the base model in `config`, and renames the checkpoints in
    `folder` that the run wrote after that one.
    """
    source = backend.from_main(lambda: find_checkpoint(config, folder))
    if source is None:
        choose_dtype(config, backend, None)
        settle_bases(config, backend, {})
        if backend.is_main and not config.eval_only:
            checkpoint.forget_evaluation(folder, after=-1)
        return None
    backend.report(f"resuming from {source}")
    opened = Checkpoint(source)
    if opened.state.get("format") not in checkpoint.READABLE:
        raise UserError(
            f"{source} was written by an incompatible version of Athena and cannot be resumed; "
            f"start a new run from its weights with load_checkpoint={source}"
        )
    saved = opened.config
    choose_dtype(config, backend, saved["arch"])
    settle_bases(config, backend, saved["arch"]["loss"])
    check_unchanged(config, saved, opened)
    if not config.eval_only:
        step = opened.state["counters"]["step"]
        backend.from_main(lambda: checkpoint.set_aside(folder, source, step))
        if backend.is_main:
            checkpoint.note_start(folder, config.resume)
    return opened


def choose_dtype(config: PretrainConfig, backend: Backend, saved: dict[str, Any] | None) -> None:
    """Set activations to float32 on a device without bfloat16. A collective.

    saved: architecture of the resumed run, which keeps its dtype; None for a new run.
    """
    options = config.arch.options | {"name": config.arch.name}
    chosen = set(backend.gather_objects(usable_dtype(options, backend)))
    if (lacks := chosen - {options.get("forward_dtype", "bfloat16")}) == set():
        return
    usable = lacks.pop()
    if saved is None or saved.get("forward_dtype") == usable:
        config.arch.forward_dtype = usable  # type: ignore[attr-defined]
        message = f"this device does not support bfloat16: the run uses arch.forward_dtype={usable}"
    else:
        message = "the run is resumed in bfloat16, which this device only emulates: it will be slow"
    backend.report(f"note: {message}")


def find_checkpoint(config: PretrainConfig, folder: Path) -> Path | None:
    """Find the checkpoint that `resume` asks for, and verify it against its manifest.

    folder: the run's directory. Returns None for a new run.
    """
    own = not config.eval_only
    saved = [path.name for path in checkpoint.checkpoints_of(folder)]
    if config.resume == "none":
        if own and saved:
            raise UserError(
                f"resume=none starts a new run, but {folder} contains {saved[-1]}; "
                "choose another run_name, or move the folder away"
            )
        return None
    if own:
        checkpoint.recover(folder)
    # A launcher that restarts its ranks repeats the command: continue from their last checkpoint.
    if config.resume == "auto" or (own and checkpoint.is_restart(folder, config.resume)):
        found = checkpoint.newest_whole(folder, rename=own)
        return None if found is None else found.folder
    named = next((p for p in (Path(config.resume), folder / config.resume) if p.is_dir()), None)
    if named is not None:
        named = named.resolve()  # `best` is a link
        if (named / checkpoint.MANIFEST).is_file():
            Checkpoint(named).verify()
            return named
        own = own and named == folder.resolve()  # another run may be in progress there
        if (found := checkpoint.newest_whole(named, rename=own)) is not None:
            return found.folder
    held = f"which holds {', '.join(saved)}" if saved else "which holds none"
    raise UserError(
        f"resume={config.resume} is neither a checkpoint, nor a run that has one, nor the name of "
        f"one in {folder}, {held}"
    )


def check_unchanged(config: PretrainConfig, saved: dict[str, Any], opened: Checkpoint) -> None:
    """Raise UserError if keys differ that would change the result; the message lists them.

    It suggests resume_allow only for keys with which the run can be resumed.
    """
    changed, gone = changed_keys(config, saved)
    if gone:
        notify(f"note: the run's config has {', '.join(gone)}, which no longer exists: ignoring it")
    if not changed:
        return
    fixed = [key for key in changed if is_fixed(config, key)]
    arch = [key for key in changed if key.startswith("arch.") and key not in fixed]
    if not arch or match_weights(config, opened):
        arch = []
    advice = ["Restore the old values"]
    if possible := [key for key in changed if key not in (*fixed, *arch)]:
        together = ",".join([*config.resume_allow, *possible])
        advice.append(f"allow {', '.join(possible)} with resume_allow=[{together}]")
    if arch:
        advice.append(f"train a new run, because the saved weights do not fit {', '.join(arch)}")
    else:
        advice.append(
            f"start a new run from these weights with load_checkpoint={opened.folder} and another "
            "run_name"
        )
    listed = "; ".join(f"{key} (was {old}, is {new})" for key, (old, new) in changed.items())
    raise UserError(
        f"resuming with changed keys would change the result: {listed}. "
        f"{', '.join(advice[:-1])}, or {advice[-1]}"
    )


def match_weights(config: PretrainConfig, opened: Checkpoint) -> bool:
    """Return whether a checkpoint's weights are those of the model that `config` describes."""
    metadata = DatasetMetadata.model_validate_json(opened.text("dataset.json"))
    try:
        model = create_model(config.arch, metadata, batch_size=1, device="meta")
    except UserError:
        return False
    own, saved = model.state_dict(), opened.tensors("model")
    return {name: value.shape for name, value in own.items()} == {
        name: value.shape for name, value in saved.items()
    }


def restore(
    config: PretrainConfig,
    state: TrainState,
    stream: TrainStream,
    backend: Backend,
    opened: Checkpoint,
    folder: Path,
    micro_batches: int,
) -> None:
    """Restore weights, optimizers, averages, stream, rows in progress and counters from a
    checkpoint.

    If the evaluation at that step was finished, it is not repeated.
    """
    saved = opened.state
    position, rows = saved["stream"], None
    size, before = config.global_batch_size, position["global_batch_size"]
    if config.checkpoint_carry and size == before:
        share = size // backend.world_size
        rows = opened.carry(range(backend.rank * share, (backend.rank + 1) * share))
    if rows is None and (flags := opened.carry(range(before), only="halted")) is not None:
        position = drop_halted(position, flags["halted"].tolist())
    # Checked first, because changed corpora are the most likely reason for mismatched weights.
    stream.load_state_dict(position, restart_held=rows is None)
    values, _ = read_config(opened.config)
    kept = share_moments(config.optimizer, OptimizerConfig.model_validate(values["optimizer"]))
    if not state.load_tensors(opened, moments=kept):
        backend.report(
            "note: the checkpoint has no moments for this optimizer; they start from zero"
        )
    state.load_counters(saved["counters"])
    same_run = opened.folder.parent.resolve() == folder.resolve()
    done = backend.from_main(lambda: checkpoint.read_evaluation(folder) if same_run else {})
    if done.get("step") == state.step:
        state.load_counters(done)
        state.evaluated_step = state.step
    state.apply_stopping_rule(config.early_stopping)
    if backend.is_main and not config.eval_only:
        checkpoint.link_best(folder, state.best.step)
    if rows is None:
        reason = "rows in progress were not saved"
        if size != before:
            reason = f"global_batch_size is {size} and was {before}"
        backend.report(f"note: {reason}, so rows in progress restart and the run is not exact")
        return
    state.load_carry(rows, micro_batches)
    own = torch.cat([carry.halted for carry in state.carries])
    state.halted = backend.all_gather(own.int()).cpu().numpy().astype(bool)
