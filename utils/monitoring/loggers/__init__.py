"""Loggers, one file each: classes that the key `logger` names. Only rank 0 has loggers.

An entry of `NAMES` is a short name; any class below this package is named `module@Class`. It is
called as `Class(run, config, step, **options)` and has the methods of `Logger`. Its options are
the fields of its `Config`, a pydantic model, or without one its constructor's other arguments.

Warnings are printed, not raised: a run outlives its loggers.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from utils.config.plugins import load_plugin, read_options
from utils.config.schema import LoggerConfig
from utils.core.console import notify
from utils.core.errors import first_line

NAMES = {
    "jsonl": "jsonl@JSONLLogger",
    "tensorboard": "tensorboard@TensorBoardLogger",
    "wandb": "wandb@WandbLogger",
}


class Logger(Protocol):
    """Where metrics go.

    run: the run's folder. config: all its keys. step: where a run is resumed, whose later lines are
    written again; None where they are added to what is there, whatever else writes it.
    """

    def log(self, values: dict[str, Any], step: int) -> None:
        """Write scalars, and lists of counts by bin."""

    def close(self) -> None:
        """Write what is still held back."""


class Loggers:
    """All loggers of a run. One that fails is reported and does not end the run.

    step: where the run goes on; None to add to what is there, whatever else writes it. A logger
    that cannot even start raises, before anything is lost.
    """

    def __init__(
        self, named: Sequence[LoggerConfig], run: Path, config: dict[str, Any], step: int | None
    ):
        once = [entry for i, entry in enumerate(named) if entry not in named[:i]]
        self.loggers: list[tuple[str, Logger]] = [
            (entry.name, load_plugin(entry)(run, config, step, **dict(read_options(entry))))
            for entry in once
        ]
        self.failures: dict[str, int] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        for name, logger in self.loggers:
            self._try(name, f"step {step} is missing there", logger.log, metrics, step)

    def close(self) -> None:
        for name, logger in self.loggers:
            self._try(name, "its last lines may be missing", logger.close)

    def _try(self, name: str, loss: str, act: Callable[..., None], *args: Any) -> None:
        try:
            act(*args)
        except Exception as error:  # a logger is not worth a run, whatever it raises
            self.failures[name] = self.failures.get(name, 0) + 1
            if self.failures[name] in (1, 10, 100, 1000):
                count = f", failure {self.failures[name]}" if self.failures[name] > 1 else ""
                notify(f"warning: logger {name}{count}: {first_line(error)}; {loss}")
