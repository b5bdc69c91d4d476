"""Helpers for plots."""

from pathlib import Path
from typing import Any

from utils.core.atomic import write_result
from utils.core.errors import UserError


def save_figure(figure: Any, path: Path, setting: str) -> None:
    """Write a matplotlib figure atomically, in the format of the file extension (PNG if there is
    none). setting: see `write_result`.
    """
    with write_result(path, setting) as part:
        try:
            figure.savefig(part, dpi=110, format=path.suffix[1:] or "png")
        except ValueError as error:  # the extension is not an image format
            raise UserError(f"{setting} cannot be written: {error}") from error


def with_slack(axes: Any) -> None:
    """Widen a narrow y axis, so that small differences do not look large."""
    low, high = axes.get_ylim()
    slack = 0.02 * max(abs(low), abs(high)) - (high - low)
    if slack > 0:
        axes.set_ylim(low - slack / 2, high + slack / 2)
