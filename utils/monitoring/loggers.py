"""Where metrics go: JSONL, TensorBoard, Weights & Biases. Only rank 0 has loggers.

Warnings are printed, not raised: a run outlives its loggers.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from utils.core.atomic import write_atomically
from utils.core.console import tell
from utils.core.errors import UserError


class Logger(Protocol):
    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Scalars, and lists of counts by bin."""

    def close(self) -> None:
        """Writes what is still held back."""


class JSONLLogger:
    """One object a line in <run>/metrics.jsonl: step, time (seconds since 1970), metrics.

    A run that goes on from `step` writes what came after it anew; those lines move to
    metrics_abandoned.jsonl.
    """

    def __init__(self, run: Path, config: dict[str, Any], step: int | None):
        self.path = run / "metrics.jsonl"
        if step is not None:
            _cut_back(self.path, run / "metrics_abandoned.jsonl", step)
        self.file = self.path.open("a", buffering=1, encoding="utf-8")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if not self._is_there():  # the folder vanished: lines would go nowhere
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", buffering=1, encoding="utf-8")
            tell(f"warning: {self.path} had vanished; it begins again")
        # JSON has no NaN: a reader would choke on the very line that tells of trouble
        finite = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None
            for k, v in metrics.items()
        }
        self.file.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except OSError:
            return False

    def close(self) -> None:
        self.file.close()


def _cut_back(path: Path, aside: Path, step: int) -> None:
    """Moves lines later than `step`, and one that a crash cut short, from `path` to `aside`."""
    if not path.is_file():
        return
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            (kept if json.loads(line)["step"] <= step and line.endswith("\n") else moved).append(
                line
            )
        except (ValueError, KeyError, TypeError):
            moved.append(line)
    if not moved:
        return
    with aside.open("a", encoding="utf-8") as file:
        file.writelines(moved)
    with write_atomically(path) as part:
        part.write_text("".join(kept), "utf-8")


class TensorBoardLogger:
    def __init__(self, run: Path, config: dict[str, Any], step: int | None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logger=[tensorboard] needs the package tensorboard: pip install tensorboard"
            ) from None
        place = run / "tensorboard"
        try:
            self.writer = SummaryWriter(str(place), purge_step=None if step is None else step + 1)
        except OSError as error:  # also where it takes the name of a folder for UTF-8
            raise UserError(
                f"logger=[tensorboard] cannot write to {place} ({error.strerror or error}); name "
                "another folder with checkpoint_path, or leave tensorboard out"
            ) from None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, list):  # counts by bin
                self.writer.add_histogram(name, np.repeat(np.arange(len(value)), value), step)
            else:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """Offline unless the user is logged in; `wandb sync` uploads an offline run later.

    A run that goes on is the same run there: its id is kept in <run>/wandb_id.
    """

    def __init__(self, run: Path, config: dict[str, Any], step: int | None):
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logger=[wandb] needs the package wandb: pip install wandb, or logger=[jsonl]"
            ) from None
        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None:
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        self.histogram = wandb.Histogram
        known = run / "wandb_id"
        if not known.is_file():
            known.write_text(secrets.token_hex(4), "utf-8")
        options: dict[str, Any] = dict(
            project=config["project_name"],
            name=config["run_name"],
            dir=str(run),
            config=config,
            settings=wandb.Settings(silent=True),
        )
        try:
            same = known.read_text("utf-8").strip() if step is not None else secrets.token_hex(4)
            self.run = wandb.init(mode=mode, id=same, resume="allow", **options)
        except Exception as error:  # whatever an unreachable server makes of it
            tell(
                f"warning: wandb cannot be reached ({_first_line(error)}); the run is logged "
                f"offline, upload it later with: wandb sync {run / 'wandb'}/offline-run-*",
            )
            wandb.teardown()  # or it insists that the failed run is still there
            self.run = wandb.init(mode="offline", id=secrets.token_hex(4), **options)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        shown = {
            name: self.histogram(np_histogram=(np.array(value), np.arange(len(value) + 1)))
            if isinstance(value, list)
            else value
            for name, value in metrics.items()
        }
        self.run.log(shown, step=step)

    def close(self) -> None:
        self.run.finish()


LOGGERS: dict[str, Callable[[Path, dict[str, Any], int | None], Logger]] = {
    "jsonl": JSONLLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


class Loggers:
    """All loggers of a run. One that fails is reported and does not end the run.

    step: where the run goes on; None to add to what is there, whatever else writes it. A logger
    that cannot even start raises, before anything is lost.
    """

    def __init__(self, names: Sequence[str], run: Path, config: dict[str, Any], step: int | None):
        self.loggers = {name: LOGGERS[name](run, config, step) for name in names}
        self.failures: dict[str, int] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for name, logger in self.loggers.items():
            self._try(name, f"step {step} is missing there", logger.log, metrics, step)

    def close(self) -> None:
        for name, logger in self.loggers.items():
            self._try(name, "its last lines may be missing", logger.close)

    def _try(self, name: str, loss: str, act: Callable[..., None], *args: Any) -> None:
        try:
            act(*args)
        except Exception as error:  # a logger is not worth a run, whatever it raises
            self.failures[name] = self.failures.get(name, 0) + 1
            if self.failures[name] in (1, 10, 100, 1000):
                count = f", failure {self.failures[name]}" if self.failures[name] > 1 else ""
                tell(f"warning: logger {name}{count}: {_first_line(error)}; {loss}")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
