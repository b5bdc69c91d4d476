"""Learning-rate factors as pure functions."""

import math


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
