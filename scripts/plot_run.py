r"""Draw the curves of one or more runs, and print where they ended.

    python scripts/plot_run.py checkpoints/athena/quickstart
    python scripts/plot_run.py checkpoints/athena/one checkpoints/athena/two --output both.png

Reads metrics.jsonl in each run's folder.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.core.console import run_cli
from utils.core.errors import UserError
from utils.monitoring.plotting import save_figure, with_slack

METRICS = "metrics.jsonl"
# What an evaluation is judged by: the first of these that a run has.
HEADLINES = (
    ("bits_per_byte", "bits per byte", "lower"),
    ("exact_accuracy", "rows solved exactly, share", "higher"),
    ("lm_loss", "loss, nats per label", "lower"),
)


@dataclass(frozen=True)
class Headline:
    """key: metric, such as eval/text/bits_per_byte. label: with its unit, for people."""

    key: str
    label: str
    better: str
    """lower | higher"""

    def at_step(self, step: int) -> str:
        """The same metric after one ACT step."""
        place, _, name = self.key.rpartition("/")
        return f"{place}/step_{step}/{name}"


class RunMetrics:
    """What a run logged, in the order of its optimizer steps."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.records = read_records(self.folder)
        self.headline = find_headline(self.records)

    def series(self, key: str, against: str = "step") -> tuple[list[float], list[float]]:
        """(values of `against`, values of `key`) where both were logged."""
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
        """The headline after each ACT step, at the last evaluation."""
        if self.headline is None:
            return {}
        found: dict[int, float] = {}
        step = 1
        while (value := self.last(self.headline.at_step(step))) is not None:
            found[step] = value
            step += 1
        return found


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; UserError where there is none.

    A run that went on from an older checkpoint logged some steps twice: the later ones count. A
    line that was cut off by a crash, or is just being written, is left out.
    """
    path = folder / METRICS
    if not path.is_file():
        below = ", ".join(str(found.parent) for found in sorted(folder.glob(f"*/{METRICS}"))[:5])
        raise UserError(
            f"{path} does not exist; name the folder of a run that was trained with logger=[jsonl]"
            + (f"; below it there are {below}" if below else "")
        )
    records: list[dict[str, Any]] = []
    for record in json_lines(path):
        if not isinstance(record.get("step"), int):
            continue
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no metrics yet; wait until log_interval steps are done")
    return records


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; what is not one is left out."""
    with path.open("rb") as file:
        for line in file:
            with suppress(ValueError):  # of JSON or of UTF-8
                if isinstance(record := json.loads(line), dict):
                    yield record


def find_headline(records: Sequence[dict[str, Any]]) -> Headline | None:
    """What the evaluations are judged by; None where there was none."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    for name, label, better in HEADLINES:
        pattern = re.compile(rf"eval/((budget|act)/)?[^/]+/{name}")
        key = next((key for key in keys if pattern.fullmatch(key)), None)
        if key is not None:
            return Headline(key, label, better)
    return None


def summary(run: RunMetrics) -> str:
    """Where a run ended, in a few lines."""
    lines = [f"{run.folder}: {run.records[-1]['step']:,} optimizer steps"]
    if (loss := run.last("train/lm_loss")) is not None:
        lines.append(f"  training loss        {loss:.4f} nats per token")
    if run.headline is None:
        return "\n".join([*lines, "  no evaluation yet"])
    lines.append(f"  {run.headline.label:<20} {run.last(run.headline.key):.4f} held out")
    steps = run.by_act_step()
    if steps:
        values = "  ".join(f"{step}: {value:.4f}" for step, value in steps.items())
        lines.append(f"  by ACT step          {values}")
    return "\n".join(lines)


def draw(runs: Sequence[RunMetrics], output: Path, setting: str | None = None) -> None:
    """Six panels, one line a run in each; writes a PNG. setting: see `write_result`."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need the package matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter, MaxNLocator

    held_out = next((run.headline.label for run in runs if run.headline is not None), "nothing yet")
    figure, panels = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    (loss, tokens, evaluated), (act, rate, speed) = panels
    for run in runs:
        points = dict(label=run.name, linewidth=1.2)
        few = dict(points, marker="o", markersize=4)
        loss.plot(*run.series("train/lm_loss"), **points)
        tokens.plot(*run.series("train/lm_loss", "train/tokens"), **points)
        if run.headline is not None:
            evaluated.plot(*run.series(run.headline.key), **few)
            steps = run.by_act_step() or {1: run.series(run.headline.key)[1][-1]}
            act.plot(list(steps), list(steps.values()), **few)
        rate.plot(*run.series("train/lr"), **points)
        speed.plot(*run.series("train/tokens_per_s"), **points)
    titles = (
        (loss, "Training loss", "optimizer step", "nats per token"),
        (tokens, "Training loss by data", "tokens seen", "nats per token"),
        (evaluated, "Held out", "optimizer step", held_out),
        (act, "Held out, by ACT step (last evaluation)", "ACT step", held_out),
        (rate, "Learning rate", "optimizer step", "learning rate"),
        (speed, "Speed", "optimizer step", "new tokens per second"),
    )
    for panel, title, x, y in titles:
        panel.set(title=title, xlabel=x, ylabel=y)
        panel.grid(alpha=0.3)
        if not panel.lines or not any(len(line.get_xdata()) for line in panel.lines):
            panel.text(0.5, 0.5, "nothing logged", ha="center", transform=panel.transAxes)
    for panel in (loss, evaluated, act, rate, speed):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    tokens.xaxis.set_major_formatter(EngFormatter())
    speed.yaxis.set_major_formatter(EngFormatter())
    with_slack(act)
    speed.set_ylim(bottom=0)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    if len(runs) > 1:
        loss.legend()
    figure.suptitle(", ".join(run.name for run in runs))
    try:
        save_figure(figure, output, setting or f"--output {output}")
    finally:
        plt.close(figure)


def run(args: argparse.Namespace) -> None:
    runs = [RunMetrics(folder) for folder in args.runs]
    output = args.output or runs[0].folder / "curves.png"
    draw(runs, output)
    for each in runs:
        print(summary(each))
    print(f"wrote {output}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python scripts/plot_run.py", description="Draw the curves of one or more runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="(default: curves.png in the first run's folder)"
    )
    args = parser.parse_args(argv)
    run_cli(lambda: run(args))


if __name__ == "__main__":
    main()
