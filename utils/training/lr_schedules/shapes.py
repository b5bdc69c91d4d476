"""The schedules with short names."""

import math
from typing import Literal

from pydantic import Field

from utils.config.schema import ScheduleOptions


class WSDOptions(ScheduleOptions):
    decay: float = Field(0.2, gt=0, le=1, description="share of the run spent in the decay")
    shape: Literal["linear", "cosine", "sqrt"] = Field(
        "linear", description="shape of the decay; sqrt: 1 − √(progress of the decay)"
    )


def constant(progress: float, step: int, options: ScheduleOptions) -> float:
    """Keep the peak learning rate."""
    return 1.0


def cosine(progress: float, step: int, options: ScheduleOptions) -> float:
    """Decay from 1 to `lr_min_ratio` along half a cosine."""
    return _between(options.lr_min_ratio, (1 + math.cos(math.pi * progress)) / 2)


def wsd(progress: float, step: int, options: WSDOptions) -> float:
    """Keep the peak, then decay in the last part of the run (Hu et al. 2024, arXiv 2404.06395)."""
    into = max(0.0, (progress - (1 - options.decay)) / options.decay)
    left = {
        "linear": 1 - into,
        "cosine": (1 + math.cos(math.pi * into)) / 2,
        "sqrt": 1 - math.sqrt(into),
    }
    return _between(options.lr_min_ratio, left[options.shape])


def _between(least: float, share: float) -> float:
    return least + (1 - least) * share
