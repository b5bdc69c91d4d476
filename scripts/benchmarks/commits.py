"""Compare the training speed and the result of this checkout with those of another one.

    git worktree add ../old main
    python scripts/benchmarks/commits.py other=../old experiment=quickstart seconds=50

Runs of pretrain.py alternate between the two checkouts, with this Python environment and the same
data. Speed is optimizer steps per second of training after the first logged interval. Takes every
key of pretrain.py that both have.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pydantic import Field

from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import compose_config
from utils.config.schema import PositiveFloat, PositiveInt
from utils.config.values import assignment
from utils.core.errors import UserError
from utils.monitoring.run_log import RunMetrics

ROOT = Path(__file__).resolve().parents[2]


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    other: Path = Field(description="directory of the other checkout")
    seconds: PositiveFloat = Field(50, description="training time of a run")
    rounds: PositiveInt = Field(3, description="runs of each checkout")


class Result(NamedTuple):
    """Optimizer steps per second, and the last value of the headline metric, with its label."""

    speed: float
    figure: float | None
    label: str


def train(checkout: Path, folder: Path, arguments: Sequence[str]) -> Result:
    """Run pretrain.py of a checkout."""
    command = [
        sys.executable, "pretrain.py", *arguments, "run_name=run",
        assignment("checkpoint_path", folder),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=checkout, capture_output=True, encoding="utf-8")
    if done.returncode:
        end = done.stderr.strip()[-500:]
        raise UserError(f"pretrain.py in {checkout} ended with status {done.returncode}: {end}")
    found = next(folder.rglob("metrics.jsonl"), folder / "metrics.jsonl")
    metrics = RunMetrics(found.parent)
    seconds, steps = metrics.series("step", against="train/seconds")
    # the first record is the first step, the second ends the interval that warms up
    if len(steps) < 3 or seconds[-1] <= seconds[1]:
        raise UserError(
            f"{checkout}: only {len(steps)} records of steps were logged; raise seconds, or lower "
            "log_interval"
        )
    speed = (steps[-1] - steps[1]) / (seconds[-1] - seconds[1])
    headline = metrics.headline
    if headline is None:
        return Result(speed, None, "")
    return Result(speed, metrics.last(headline.key), headline.label)


def revision(checkout: Path) -> str:
    """Return the commit of a checkout, marked if it has changes; its name if git fails."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    return done.stdout.strip() if done.returncode == 0 else checkout.name


def run(arguments: Sequence[str]) -> None:
    options, given = split_key_values(Options, arguments)
    other = options.other.expanduser().resolve()
    if not (other / "pretrain.py").is_file():
        raise UserError(f"other={options.other}: there is no {other / 'pretrain.py'}")
    data = [Path(path).absolute() for path in compose_config(given).data_paths]
    keys = [
        "eval_interval=null", f"max_seconds={options.seconds:g}", *given, "logger=[jsonl]",
        assignment("data_paths", data),
    ]  # fmt: skip
    checkouts = {f"this, {revision(ROOT)}": ROOT, f"other, {revision(other)}": other}
    results: dict[str, list[Result]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for i, (name, checkout) in enumerate(checkouts.items()):
                found = train(checkout, Path(folder) / f"{number}_{i}", keys)
                results[name].append(found)
                print(f"{name}: {found.speed:.3f} steps/s, {shown(found.figure)}", flush=True)
    speeds = {k: statistics.median(r.speed for r in each) for k, each in results.items()}
    label = next(iter(results.values()))[0].label
    print(f"\nmedians of {options.rounds} rounds\n\n{'':<32}{'steps/s':>10}  {label}")
    for name, each in results.items():
        figures = [r.figure for r in each if r.figure is not None]
        figure = statistics.median(figures) if figures else None
        print(f"{name:<32}{speeds[name]:>10.3f}  {shown(figure)}")
    this, old = speeds.values()
    print(f"{'ratio of this to other':<32}{this / old:>10.2f}")


def shown(figure: float | None) -> str:
    return "not evaluated" if figure is None else f"{figure:.4f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    main()
