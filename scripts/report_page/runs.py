"""Read a run's folder: its log, config, samples, and how its time was spent."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml

from scripts.compare import Result, measure
from utils.checkpoint.format import checkpoints_of
from utils.config.values import flatten
from utils.core.errors import UserError
from utils.monitoring.run_log import ABANDONED, METRICS, RunMetrics, json_lines

STEPPED = re.compile(r"eval/(?P<place>.*)/step_(?P<step>\d+)/(?P<name>[^/]+)")


LONG = 5.0  # shorter pauses, in seconds, are not listed


@dataclass(frozen=True)
class Times:
    """Times in seconds. pauses: (preceding step, length) of each pause, except evaluations, that
    was long or after which the run resumed from an older checkpoint. other: saving, and other work
    between log lines.
    """

    training: float
    evaluation: float
    pauses: list[tuple[int, float]]
    other: float


class Run(RunMetrics):
    """One run: its position in the report, and the contents of its folder."""

    def __init__(self, folder: Path, number: int):
        super().__init__(folder)
        self.number = number
        self.training = [r for r in self.records if any(key.startswith("train/") for key in r)]
        self.evaluations = [r for r in self.records if any(k.startswith("eval/") for k in r)]

    @cached_property
    def config(self) -> dict[str, str]:
        """Return every dotted key with its value as YAML writes it; empty without a config."""
        try:
            found = yaml.safe_load((self.folder / "config.yaml").read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        values = flatten(found) if isinstance(found, dict) else {}
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}

    @cached_property
    def cost(self) -> Result | None:
        """Return parameters and FLOPs, from the newest checkpoint; None without a readable one."""
        if not checkpoints_of(self.folder):
            return None
        try:
            return measure(self.folder)
        except (
            UserError,
            OSError,
            KeyError,
            TypeError,
            ValueError,
        ):  # an older or damaged checkpoint
            return None

    @cached_property
    def cut(self) -> bool:
        """Return whether the last line of the log is incomplete."""
        return not (self.folder / METRICS).read_bytes().endswith(b"\n")

    @cached_property
    def last_evaluation(self) -> dict[str, Any]:
        """Return every figure of the last evaluation and its step; {} without an evaluation."""
        newest = self.evaluations[-1]["step"] if self.evaluations else None
        found: dict[str, Any] = {}
        for record in self.evaluations:
            if record["step"] == newest:
                found |= record
        return found

    @cached_property
    def by_step(self) -> dict[tuple[str, str], dict[int, float]]:
        """Return (place, figure) -> value after each ACT step, at the last evaluation."""
        found: dict[tuple[str, str], dict[int, float]] = {}
        for key, value in self.last_evaluation.items():
            if (match := STEPPED.fullmatch(key)) and is_number(value):
                curve = found.setdefault((match["place"], match["name"]), {})
                curve[int(match["step"])] = value
        return {name: dict(sorted(curve.items())) for name, curve in found.items()}

    def along(self, key: str, steps: Sequence[float]) -> list[float]:
        """Return train/<key> at these steps, interpolated between log lines."""
        known, values = self.series(f"train/{key}")
        return [float(v) for v in np.interp(steps, known, values)] if known else []

    # --- progress --------------------------------------------------------------------------

    @cached_property
    def abandoned(self) -> list[dict[str, Any]]:
        """Return the log lines of steps that were trained again after a restart."""
        path = self.folder / ABANDONED
        return [r for r in json_lines(path) if "step" in r] if path.is_file() else []

    @cached_property
    def times(self) -> Times | None:
        """Return the times of the run; None if the log does not contain them."""
        records = [r for r in self.records if "time" in r]
        if self.last("train/seconds") is None or not records:
            return None
        given_up = [r["time"] for r in self.abandoned if "time" in r]
        begun = {"step": 0, "time": records[0]["time"], "train/seconds": 0.0}
        begun["time"] -= records[0].get("train/seconds", 0.0)
        begun["time"] = min([begun["time"], *given_up])
        evaluation, pauses, other = 0.0, list[tuple[int, float]](), 0.0
        evaluated = False
        for record in [*records, None]:
            if record is not None and "train/seconds" not in record:
                evaluated = True
                continue
            if record is None and not evaluated:
                break
            end = record or records[-1] | {"train/seconds": begun["train/seconds"]}
            pause = end["time"] - begun["time"] - end["train/seconds"] + begun["train/seconds"]
            again = any(begun["time"] <= time < end["time"] for time in given_up)
            if again or (pause >= LONG and not evaluated):
                pauses.append((begun["step"], pause))
            elif evaluated:
                evaluation += max(0.0, pause)
            else:
                other += max(0.0, pause)
            begun, evaluated = end, False
        return Times(self.last("train/seconds") or 0.0, evaluation, pauses, other)

    # --- files -----------------------------------------------------------------------------

    def evaluation_folder(self) -> Path | None:
        """Return the folder of the newest evaluation that wrote files."""
        found = {}
        for path in self.folder.glob("evaluation_step_*"):
            number = path.name.removeprefix("evaluation_step_")
            if number.isdigit() and any(path.iterdir()):
                found[int(number)] = path
        return found[max(found)] if found else None

    def samples(self) -> dict[tuple[str, str], dict[str, str]]:
        """Return (evaluator, prompt) -> text and optional reference, from the newest evaluation."""
        folder = self.evaluation_folder()
        path = None if folder is None else folder / "samples.jsonl"
        if path is None or not path.is_file():
            return {}
        return {
            (str(line.get("evaluator", "")), str(line["prompt"])): line
            for line in json_lines(path)
            if "prompt" in line and "text" in line
        }


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a logged value is a finite number; others are null in the log."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)
