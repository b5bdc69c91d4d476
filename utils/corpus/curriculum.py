"""Curriculum of iteration budgets that grow over a run."""

import numpy as np

from utils.config.schema import IterationCurriculumConfig


def scale_budgets(
    budgets: np.ndarray, rule: IterationCurriculumConfig, progress: float, least: int
) -> np.ndarray:
    """Scale the budgets of rows that enter at `progress` (0..1).

    The factor grows linearly from `rule.start` to 1 at `rule.until`. Results are rounded to whole
    ACT steps (halves up) and never below `least`, unless the full budget is.
    """
    share = rule.start + (1 - rule.start) * min(1.0, progress / rule.until)
    scaled = np.floor(budgets * share + 0.5).astype(budgets.dtype)
    return np.maximum(scaled, np.minimum(budgets, least))
