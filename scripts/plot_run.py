r"""Plot the curves of one or more runs, and print their final figures.

    python scripts/plot_run.py checkpoints/athena/quickstart
    python scripts/plot_run.py checkpoints/athena/one checkpoints/athena/two --output both.png

Reads metrics.jsonl in each run's folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.core.console import command_parser, run_cli
from utils.core.errors import UserError
from utils.monitoring.plotting import save_figure, with_slack
from utils.monitoring.run_log import RunMetrics


def summary(run: RunMetrics) -> str:
    """Format the final figures of a run in a few lines."""
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
    """Plot six panels, with one line per run in each, to a PNG. setting: see `write_result`."""
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
    """Run the command; see the top of this file."""
    parser = command_parser("python scripts/plot_run.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="(default: curves.png in the first run's folder)"
    )
    args = parser.parse_args(argv)
    run_cli(lambda: run(args))


if __name__ == "__main__":
    main()
