"""Iteration budgets that grow over a run."""

import numpy as np

from utils.config.schema import IterationCurriculumConfig


def grown(
    budgets: np.ndarray, rule: IterationCurriculumConfig, progress: float, least: int
) -> np.ndarray:
    """Budgets of rows that enter at `progress` (0..1): the share `rule.start` of them at first,
    growing evenly to all of them at `rule.until`; rounded to whole ACT steps, halves up.

    None falls below `least`, or below what it is whole.
    """
    share = rule.start + (1 - rule.start) * min(1.0, progress / rule.until)
    scaled = np.floor(budgets * share + 0.5).astype(budgets.dtype)
    return np.maximum(scaled, np.minimum(budgets, least))
