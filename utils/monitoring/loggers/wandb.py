"""Write metrics for Weights & Biases."""

import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from utils.core.console import notify
from utils.core.errors import UserError, first_line


class WandbLogger:
    """Offline unless the user is logged in; `wandb sync` uploads an offline run later.

    A resumed run continues the same run there: its id is stored in <run>/wandb_id.
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
        except Exception as error:  # any error, if the server is unreachable
            notify(
                f"warning: wandb cannot be reached ({first_line(error)}); the run is logged "
                f"offline, upload it later with: wandb sync {run / 'wandb'}/offline-run-*",
            )
            wandb.teardown()  # otherwise it assumes that the failed run still exists
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
