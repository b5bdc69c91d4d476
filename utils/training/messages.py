"""Compose the messages of a run: its device, its failures, its end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.backend import Backend
from utils.config.load import PretrainConfig, config_warnings
from utils.training.state import TrainState


def announce(backend: Backend, config: PretrainConfig, reason: str) -> None:
    """Print the device, the reason for it, and notes on config values that are rarely intended."""
    ranks = f", {backend.world_size} ranks" if backend.world_size > 1 else ""
    backend.report(f"device: {backend.describe()} ({reason}){ranks}")
    notes = config_warnings(config)
    if config.parallel == "fsdp" and backend.world_size == 1:
        notes.append("parallel=fsdp has no effect with a single rank")
    for line in notes:
        backend.report(f"note: {line}")


def advise_on_memory(rows: int) -> str:
    """Describe how to train with less memory. rows: number of rows that a replica processes at
    once.
    """
    return (
        f"with {rows} rows at once; lower micro_batch_size (now {rows}), or "
        "global_batch_size, or set arch.use_gradient_checkpointing=true"
    )


def describe_nonfinite(config: PretrainConfig, skipped: int, saved: Sequence[Path]) -> str:
    """Describe a run that ends because of non-finite updates, and how to avoid them.

    skipped: number of consecutive non-finite updates. saved: the run's checkpoints, oldest first.
    """
    lower = f"lower lr (now {config.lr:g})"
    if saved:
        advice = (
            f"the last good checkpoint is {saved[-1]}; {lower} and resume with resume_allow=[lr]"
        )
    else:
        advice = (
            f"no checkpoint was saved, so start again: {lower}, or increase lr_warmup_steps (now "
            f"{config.lr_warmup_steps}); a lower checkpoint_interval (now "
            f"{config.checkpoint_interval or 'null'}) saves earlier"
        )
    return (
        f"{skipped} consecutive updates were not finite (max_nonfinite={config.max_nonfinite}); "
        f"{advice}"
    )


def describe_never_finite(config: PretrainConfig, steps: int) -> str:
    """Describe a run in whose every step loss or gradient was not finite, so that the weights are
    what they were at the start."""
    name = f"arch.name={config.arch.name}"
    weights = "its initial weights"
    if config.load_checkpoint is not None:
        weights = f"the weights of load_checkpoint={config.load_checkpoint}"
    return (
        f"loss or gradient was not finite in each of the {steps:,} steps so far, so nothing was "
        f"trained and lr is not the reason: {name} computes it with {weights}; look for a "
        "division by 0, the log or root of a negative number or an overflow "
        "(arch.forward_dtype=float32)"
    )


def describe_end(config: PretrainConfig, last: Path, state: TrainState, first_step: int) -> str:
    """Describe where the last checkpoint of a run is, or why there was nothing to train and which
    key to change. first_step: the step that this process started from.
    """
    if state.step > first_step:
        return f"finished at step {state.step:,}: {last}"
    if state.stopped:
        return (
            f"already finished: the run stopped early at step {state.step:,}, {last}; "
            "set early_stopping=null to train further"
        )
    key, now = "epochs", f"now {config.epochs}"
    if config.max_steps is not None and state.step >= config.max_steps:
        key, now = "max_steps", f"now {config.max_steps}"
    elif config.max_seconds is not None and state.seconds >= config.max_seconds:
        key, now = "max_seconds", f"now {config.max_seconds:g}, used {state.seconds:.1f}"
    return (
        f"already finished at step {state.step:,}, {last}; to train further, "
        f"raise {key} ({now}) and add resume_allow=[{key}]; eval_only=true evaluates it again"
    )


def format_evaluation(results: dict[str, Any], step: int) -> str:
    """Format the figures of an evaluation, one per line, with curves over ACT steps as rows."""
    plain: dict[str, str] = {}
    curves: dict[str, dict[int, float]] = {}
    for name, value in results.items():
        parts = name.split("/")
        at = next((i for i, part in enumerate(parts) if part.startswith("step_")), None)
        if at is not None and parts[at].removeprefix("step_").isdigit():
            curve = "/".join(parts[:at] + parts[at + 1 :])
            curves.setdefault(curve, {})[int(parts[at].removeprefix("step_"))] = value
        elif not isinstance(value, list):
            plain[name] = f"{value:,}" if isinstance(value, int) else _format_value(value, 4)
    rows = {
        name: "  ".join(_format_value(values[k], 3) for k in sorted(values))
        for name, values in curves.items()
    }
    width = max([40, *map(len, [*plain, *rows])]) + 2
    lines = [f"evaluation at step {step}", *(f"  {k:<{width}}{v}" for k, v in plain.items())]
    if rows:
        lines += ["  by ACT step", *(f"  {k:<{width}}{v}" for k, v in rows.items())]
    return "\n".join(lines)


def _format_value(value: float, digits: int) -> str:
    """Format with `digits` decimals, or significant digits if the value is huge."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.{digits}g}"
