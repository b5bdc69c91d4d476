"""How far a run is, when it ends, and what depends on it: learning rate, iteration budgets."""

import math
from typing import Protocol

from utils.config.schema import PretrainConfig


class Stream(Protocol):
    total_steps: int | None
    examples_entered: int

    @property
    def progress(self) -> float: ...

    @property
    def epoch(self) -> float: ...


class Counters(Protocol):
    step: int
    seconds: float
    stopped: bool
    nonfinite: int


class Schedule:
    """The length of a run, by whichever of its limits is nearest."""

    def __init__(self, config: PretrainConfig, stream: Stream):
        self.config, self.stream = config, stream

    def progress(self, state: Counters) -> float:
        """Share of the run that is done, 0..1."""
        steps, seconds = self.config.max_steps, self.config.max_seconds
        shares = [
            self.stream.progress,
            state.step / steps if steps else 0.0,
            state.seconds / seconds if seconds else 0.0,
        ]
        return min(1.0, max(shares))

    def over(self, state: Counters) -> bool:
        """Whether a limit or early stopping ends the run here; the stream ends by itself."""
        steps, seconds = self.config.max_steps, self.config.max_seconds
        return (
            state.stopped
            or (steps is not None and state.step >= steps)
            or (seconds is not None and state.seconds >= seconds)
        )

    def learning_rate_factor(self, state: Counters) -> float:
        """What the peak learning rate is multiplied by at `state.step` (from 1)."""
        config, warmup = self.config, self.config.lr_warmup_steps
        if config.feed == "present":
            in_time = config.max_seconds and state.step * config.max_seconds / (state.seconds or 1)
            limits = (self.stream.total_steps, config.max_steps, in_time)
            total = min((limit for limit in limits if limit), default=math.inf)
            return trm_warmup_cosine(state.step, warmup, total, config.lr_min_ratio)
        return warmup_cosine(state.step, warmup, self.progress(state), config.lr_min_ratio)


def cosine(progress: float, min_ratio: float) -> float:
    """Falls from 1 at progress 0 to `min_ratio` at 1 along half a cosine."""
    progress = min(max(progress, 0.0), 1.0)
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(step: int, warmup: int, progress: float, min_ratio: float) -> float:
    """Factor on the learning rate at `step` (from 1): linear warm-up times a cosine."""
    return (min(1.0, step / warmup) if warmup > 0 else 1.0) * cosine(progress, min_ratio)


def trm_warmup_cosine(step: int, warmup: int, total_steps: float, min_ratio: float) -> float:
    """TRM's schedule: the cosine begins where the warm-up ends, both counted in steps."""
    if step < warmup:
        return step / warmup
    return cosine((step - warmup) / max(1, total_steps - warmup), min_ratio)
