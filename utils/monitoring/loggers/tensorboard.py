"""Write metrics for TensorBoard."""

from pathlib import Path
from typing import Any

import numpy as np

from utils.core.errors import UserError


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
        except OSError as error:  # also raised for a folder name that is not UTF-8
            raise UserError(
                f"logger=[tensorboard] cannot write to {place} ({error.strerror or error}); name "
                "another folder with checkpoint_path, or remove tensorboard"
            ) from None

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, list):  # counts by bin
                self.writer.add_histogram(name, np.repeat(np.arange(len(value)), value), step)
            else:
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
