"""Progress and end of a run, and the learning rate that depends on them."""

import math
from collections.abc import Callable
from typing import Any

from sequence_dataset import TrainStream
from utils.config.plugins import load_plugin, read_options
from utils.config.schema import PretrainConfig
from utils.core.errors import UserError
from utils.training.state import TrainState


class Schedule:
    """The length of a run, given by the limit that is reached first."""

    def __init__(self, config: PretrainConfig, stream: TrainStream):
        self.config, self.stream = config, stream
        self._shape: Callable[[float, int, Any], float] = load_plugin(config.lr_schedule)
        self._options = read_options(config.lr_schedule, lr_min_ratio=config.lr_min_ratio)

    def progress(self, state: TrainState) -> float:
        """Return the share of the run completed, 0..1."""
        steps, seconds = self.config.max_steps, self.config.max_seconds
        shares = [
            self.stream.progress,
            state.step / steps if steps else 0.0,
            state.seconds / seconds if seconds else 0.0,
        ]
        return min(1.0, max(shares))

    def over(self, state: TrainState) -> bool:
        """Return whether a limit or early stopping ends the run here. The end of the stream is not
        checked.
        """
        steps, seconds = self.config.max_steps, self.config.max_seconds
        return (
            state.stopped
            or (steps is not None and state.step >= steps)
            or (seconds is not None and state.seconds >= seconds)
        )

    def learning_rate_factor(self, state: TrainState) -> float:
        """Return the factor on the peak learning rate at `state.step` (from 1)."""
        present = self.config.feed == "present"
        progress = self._progress_after_warmup(state) if present else self.progress(state)
        factor = self._shape(progress, state.step, self._options)
        if not 0 <= factor < math.inf:
            raise UserError(
                f"lr_schedule={self.config.lr_schedule.name} returned {factor} at step "
                f"{state.step}: the factor must be a finite number of at least 0"
            )
        return warmup(state.step, self.config.lr_warmup_steps) * factor

    def _progress_after_warmup(self, state: TrainState) -> float:
        """Return the progress as TRM counts it: in steps since the end of the warm-up."""
        config, begin = self.config, self.config.lr_warmup_steps
        in_time = config.max_seconds and state.step * config.max_seconds / (state.seconds or 1)
        limits = (self.stream.total_steps, config.max_steps, in_time)
        total = min((limit for limit in limits if limit), default=math.inf)
        return min(max((state.step - begin) / max(1, total - begin), 0.0), 1.0)


def warmup(step: int, steps: int) -> float:
    """Return the factor of a linear warm-up on the learning rate at `step` (from 1)."""
    return min(1.0, step / steps) if steps > 0 else 1.0
