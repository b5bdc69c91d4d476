"""Read the log of a run, metrics.jsonl, and label its metrics."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.core.errors import UserError

METRICS, ABANDONED = "metrics.jsonl", "metrics_abandoned.jsonl"
# Label and better direction, most important first; other metrics are shown by name.
FIGURES: dict[str, tuple[str, str]] = {
    "bits_per_byte": ("bits per byte", "lower"),
    "exact_accuracy": ("share of rows solved exactly", "higher"),
    "lm_loss": ("loss, nats per label", "lower"),
    "loss": ("loss, nats per label", "lower"),
    "accuracy": ("accuracy, share", "higher"),
    "accuracy_norm": ("length-normalised accuracy", "higher"),
    "exact_match": ("share of exact matches", "higher"),
    "cell_accuracy": ("share of cells right", "higher"),
    "nats_per_token": ("nats per token", "lower"),
    "perplexity": ("perplexity", "lower"),
    "bleu": ("BLEU, 0 to 100", "higher"),
    "chrf": ("chrF, 0 to 100", "higher"),
    "rouge1": ("ROUGE-1, F-measure", "higher"),
    "rouge2": ("ROUGE-2, F-measure", "higher"),
    "rougeL": ("ROUGE-L, F-measure", "higher"),
    "within_two": ("share of rows right in the top two votes", "higher"),
    "calibration_error": ("calibration error of the halting head", "lower"),
    "brier": ("squared error of the halting head (Brier)", "lower"),
    "q_halt_accuracy": ("accuracy of the halting head", "higher"),
    "share": ("share of rows that halt at this step", ""),
    "steps": ("mean ACT steps", ""),
    "grad_norm": ("gradient norm", ""),
    "lr": ("learning rate", ""),
    "puzzle_emb_lr": ("learning rate of identifiers", ""),
    "tokens_per_s": ("new tokens per second", ""),
    "token_steps_per_s": ("tokens × ACT steps per second", ""),
    "flops_per_s": ("FLOP per second", ""),
    "mfu": ("model FLOPs utilisation", ""),
    "memory_bytes": ("memory, bytes", ""),
    "q_halt_loss": ("loss of the halting head, nats", ""),
    "nonfinite": ("skipped non-finite updates", ""),
    "flops_per_token": ("FLOP per token", ""),
    "ended": ("share ended before the token limit", ""),
    "agreement": ("share of views that agree", ""),
    "chance": ("chance", ""),
    "examples": ("examples", ""),
    "rows": ("rows", ""),
}
HEADLINES = list(FIGURES)[:3]  # the headline of an evaluation is the first of these that it has
_RANK = {name: rank for rank, name in enumerate(FIGURES)}
_OF_LATENTS = {"_change": "change of {}, norm", "_norm": "norm of {}"}


def label_of(name: str) -> str:
    """Return the label of a figure, with its unit; `name` is the last part of its key."""
    if name in FIGURES:
        return FIGURES[name][0]
    for ending, label in _OF_LATENTS.items():
        if name.startswith("z_") and name.endswith(ending):
            return label.format(name.removesuffix(ending))
    return name.replace("_", " ")


def better(name: str) -> str:
    """Return "lower" or "higher", whichever is better, or "" if neither is."""
    return FIGURES.get(name, ("", ""))[1]


def rank(key: str) -> tuple[int, str]:
    """Return a sort key that puts the most important metrics first."""
    return _RANK.get(key.rpartition("/")[2], len(_RANK)), key


@dataclass(frozen=True)
class Headline:
    """The headline metric of a run. key: for example eval/text/bits_per_byte. label: includes the
    unit. better: lower | higher.
    """

    key: str
    label: str
    better: str

    def at_step(self, step: int) -> str:
        """Return the key of the same metric after an ACT step."""
        place, _, name = self.key.rpartition("/")
        return f"{place}/step_{step}/{name}"


class RunMetrics:
    """The log of a run, in the order of its optimizer steps."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.records = read_records(self.folder)
        self.headline = find_headline(self.records)

    def series(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """Return the values of `against` and of `key` where both were logged."""
        points = [
            (record[against], record[key])
            for record in self.records
            if record.get(key) is not None and record.get(against) is not None
        ]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None

    def by_act_step(self) -> dict[int, float]:
        """Return the headline metric after each ACT step, from the last evaluation."""
        if self.headline is None:
            return {}
        found: dict[int, float] = {}
        step = 1
        while (value := self.last(self.headline.at_step(step))) is not None:
            found[step] = value
            step += 1
        return found


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; raise UserError if there are none.

    A run that resumed from an older checkpoint logged some steps twice; the later records are
    returned. Incomplete lines, from a crash or still being written, are skipped.
    """
    path = folder / METRICS
    if not path.is_file():
        below = ", ".join(str(found.parent) for found in sorted(folder.glob(f"*/{METRICS}"))[:5])
        raise UserError(
            f"{path} does not exist; give the folder of a run that was trained with logger=[jsonl]"
            + (f"; runs below it: {below}" if below else "")
        )
    records: list[dict[str, Any]] = []
    for record in json_lines(path):
        if not isinstance(record.get("step"), int):
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        records.append(record)
    if not records:
        raise UserError(f"{path} has no metrics yet; wait until log_interval steps are done")
    return records


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file; skip lines that are not objects."""
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):  # invalid JSON or UTF-8
                if isinstance(record := json.loads(line), dict):
                    yield record


def find_headline(records: Sequence[dict[str, Any]]) -> Headline | None:
    """Return the first metric of HEADLINES that was evaluated; None without an evaluation."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    for name in HEADLINES:
        pattern = re.compile(rf"eval/((budget|act)/)?[^/]+/{name}")
        key = next((key for key in keys if pattern.fullmatch(key)), None)
        if key is not None:
            return Headline(key, *FIGURES[name])
    return None
