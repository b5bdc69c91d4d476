"""Write metrics as JSON lines."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from utils.core.atomic import write_atomically
from utils.core.console import notify
from utils.monitoring.run_log import ABANDONED, METRICS


class JSONLLogger:
    """One object per line in <run>/metrics.jsonl: step, time (seconds since 1970), metrics.

    When a run resumes at `step`, later lines move to metrics_abandoned.jsonl.
    """

    def __init__(self, run: Path, config: dict[str, Any], step: int | None):
        self.path = run / METRICS
        if step is not None:
            _cut_back(self.path, run / ABANDONED, step)
        self.file = self.path.open("a", buffering=1, encoding="utf-8")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if not self._is_there():  # the folder was deleted, so lines would be lost
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", buffering=1, encoding="utf-8")
            notify(f"warning: {self.path} was deleted; starting a new file")
        # JSON has no NaN, which would make the line unreadable
        finite = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None
            for k, v in metrics.items()
        }
        self.file.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except OSError:
            return False

    def close(self) -> None:
        self.file.close()


def _cut_back(path: Path, aside: Path, step: int) -> None:
    """Move lines later than `step`, and a line truncated by a crash, from `path` to `aside`."""
    if not path.is_file():
        return
    kept: list[str] = []
    moved: list[str] = []
    for line in path.read_text("utf-8").splitlines(keepends=True):
        try:
            (kept if json.loads(line)["step"] <= step and line.endswith("\n") else moved).append(
                line
            )
        except (ValueError, KeyError, TypeError):
            moved.append(line)
    if not moved:
        return
    with aside.open("a", encoding="utf-8") as file:
        file.writelines(moved)
    with write_atomically(path) as part:
        part.write_text("".join(kept), "utf-8")
