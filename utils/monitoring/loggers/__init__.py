"""Loggers, one file each: classes, chosen by the key `logger`. Only rank 0 has loggers.

`NAMES` has short names; any other class in this package is named `module@Class`. It is called as
`Class(run, config, step, **options)` and has the methods of `Logger`. Its options are the fields of
its `Config`, a pydantic model, or if it has none, the other arguments of its constructor.

Failures of a logger are printed, not raised, because they must not end a run.
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
    """The interface of loggers.

    run: the run's folder. config: all its keys. step: the step from which a run resumes; later
    entries are replaced. None: append to existing entries, which other processes may write, too.
    """

    def log(self, values: dict[str, Any], step: int) -> None:
        """Write scalars, and lists of counts by bin."""

    def close(self) -> None:
        """Write buffered entries."""


class Loggers:
    """All loggers of a run. If one fails, that is reported, and the run continues.

    step: see `Logger`. A logger that cannot start raises an error, before the run starts.
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
        except Exception as error:  # no error of a logger may end the run
            self.failures[name] = self.failures.get(name, 0) + 1
            if self.failures[name] in (1, 10, 100, 1000):
                count = f", failure {self.failures[name]}" if self.failures[name] > 1 else ""
                notify(f"warning: logger {name}{count}: {first_line(error)}; {loss}")
