"""Where metrics go: JSONL, TensorBoard, Weights & Biases. Only rank 0 has loggers."""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dataset.common import UserError


class Logger(Protocol):
    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Scalars, and lists of counts by bin."""

    def close(self) -> None:
        """Writes what is still held back."""


class JSONLLogger:
    """One object a line in <run>/metrics.jsonl: step, time (seconds since 1970), metrics."""

    def __init__(self, run: Path, config: dict[str, Any]):
        self.file = (run / "metrics.jsonl").open("a", buffering=1)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        # JSON has no NaN: a reader would choke on the very line that tells of trouble
        finite = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None
            for k, v in metrics.items()
        }
        self.file.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoardLogger:
    def __init__(self, run: Path, config: dict[str, Any]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logger=[tensorboard] needs the package tensorboard: pip install tensorboard"
            ) from None
        self.writer = SummaryWriter(str(run / "tensorboard"))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, list):  # counts by bin
                self.writer.add_histogram(name, np.repeat(np.arange(len(value)), value), step)
            else:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """Offline unless the user is logged in; `wandb sync` uploads an offline run later."""

    def __init__(self, run: Path, config: dict[str, Any]):
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
        self.run = wandb.init(
            project=config["project_name"],
            name=config["run_name"],
            dir=str(run),
            config=config,
            mode=mode,
            settings=wandb.Settings(silent=True),
        )

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


LOGGERS: dict[str, Callable[[Path, dict[str, Any]], Logger]] = {
    "jsonl": JSONLLogger,
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
}


def create_loggers(names: Sequence[str], run: Path, config: dict[str, Any]) -> list[Logger]:
    return [LOGGERS[name](run, config) for name in names]
