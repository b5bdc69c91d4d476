"""What pictures share."""

from typing import Any


def with_slack(axes: Any) -> None:
    """Widens a narrow y axis: a difference of a thousandth must not look like a cliff."""
    low, high = axes.get_ylim()
    slack = 0.02 * max(abs(low), abs(high)) - (high - low)
    if slack > 0:
        axes.set_ylim(low - slack / 2, high + slack / 2)
