"""What a user watches: time, progress, tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from utils.backend import Backend
from utils.config.load import PretrainConfig, config_warnings
from utils.training.schedule import Counters

T = TypeVar("T")


def announce(backend: Backend, config: PretrainConfig, reason: str) -> None:
    """Says which device was taken and why, and what of the config is rarely meant."""
    if backend.is_main:
        ranks = f", {backend.world_size} ranks" if backend.world_size > 1 else ""
        print(f"device: {backend.describe()} ({reason}){ranks}")
        notes = config_warnings(config)
        if config.parallel == "fsdp" and backend.world_size == 1:
            notes.append("parallel=fsdp has no effect on one rank: there is nobody to share with")
        for line in notes:
            print(f"note: {line}")


def advice_on_nonfinite(config: PretrainConfig, good: Sequence[Path]) -> str:
    """What to do about updates that are not finite; `good`: the run's checkpoints."""
    lower = f"lower lr (now {config.lr:g})"
    if good:
        return f"the last good checkpoint is {good[-1]}; {lower} and resume, resume_allow=[lr]"
    return (
        f"nothing was saved before, so start again: {lower}, or raise lr_warmup_steps (now "
        f"{config.lr_warmup_steps}); a lower checkpoint_interval (now "
        f"{config.checkpoint_interval or 'null'}) saves earlier"
    )


def ending(config: PretrainConfig, last: Path, state: Counters, began: int) -> str:
    """Say in one sentence where the last checkpoint of a run lies, or why nothing was left to train
    and which key would change that."""
    if state.step > began:
        return f"finished at step {state.step:,}: {last}"
    if state.stopped:
        return (
            f"nothing is left to train: the run stopped early at step {state.step:,}, {last}; "
            "early_stopping=null trains on"
        )
    key, now = "epochs", f"now {config.epochs}"
    if config.max_steps is not None and state.step >= config.max_steps:
        key, now = "max_steps", f"now {config.max_steps}"
    elif config.max_seconds is not None and state.seconds >= config.max_seconds:
        key, now = "max_seconds", f"now {config.max_seconds:g}, used {state.seconds:.1f}"
    return (
        f"nothing is left to train: the run is at step {state.step:,} already, {last}; to train "
        f"on, raise {key} ({now}) and add resume_allow=[{key}]; eval_only=true evaluates it again"
    )


def evaluation_table(results: dict[str, Any], step: int) -> str:
    """Headline figures a line each; curves over ACT steps in a row."""
    plain: dict[str, str] = {}
    curves: dict[str, dict[int, float]] = {}
    for name, value in results.items():
        parts = name.split("/")
        at = next((i for i, part in enumerate(parts) if part.startswith("step_")), None)
        if at is not None and parts[at].removeprefix("step_").isdigit():
            curve = "/".join(parts[:at] + parts[at + 1 :])
            curves.setdefault(curve, {})[int(parts[at].removeprefix("step_"))] = value
        elif not isinstance(value, list):
            plain[name] = f"{value:,}" if isinstance(value, int) else _short(value, 4)
    rows = {
        name: "  ".join(_short(values[k], 3) for k in sorted(values))
        for name, values in curves.items()
    }
    width = max([40, *map(len, [*plain, *rows])]) + 2
    lines = [f"evaluation at step {step}", *(f"  {k:<{width}}{v}" for k, v in plain.items())]
    if rows:
        lines += ["  by ACT step", *(f"  {k:<{width}}{v}" for k, v in rows.items())]
    return "\n".join(lines)


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.{digits}g}"
