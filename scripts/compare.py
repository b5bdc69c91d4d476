r"""Train recipes for the same time on the same machine, and print which one is better.

    python scripts/compare.py seconds=360
    python scripts/compare.py seconds=60 seed=1 global_batch_size=16

By default it compares the recursive model of experiment=quickstart with the plain decoder of
experiment=compare_transformer, which has as many core parameters and uses the same corpus. All keys
of pretrain.py and the presets in config_dir are passed to all runs. max_steps=N compares at equal
steps, which is fair even on a shared machine. Each call trains in a new folder; to resume an
interrupted call, set output_dir to its folder.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pydantic import Field

from dataset.common import DatasetMetadata
from models import cost
from models.inference.loading import saved_arch
from scripts.plot_run import draw
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.config.key_values import CommandKeys, run_command, split_key_values
from utils.config.load import compose_config, load_config
from utils.config.plugins import use_configured_plugins
from utils.config.saved import read_arch
from utils.config.schema import PositiveFloat
from utils.config.values import assignment
from utils.core.atomic import write_result
from utils.core.errors import UserError
from utils.monitoring.run_log import RunMetrics
from utils.training.plan import build_untrained

ROOT = Path(__file__).resolve().parents[1]


class Options(CommandKeys):
    """The keys of this command, in addition to those of pretrain.py."""

    seconds: PositiveFloat = Field(360, description="training time of each run")
    experiments: str = Field(
        "quickstart,compare_transformer", description="presets to compare, separated by commas"
    )
    config_dir: Path | None = Field(
        None, description="directory of your own presets, in addition to config/"
    )
    output_dir: Path | None = Field(
        None, description="folder for the runs; null: a new folder in checkpoints/compare"
    )


@dataclass(frozen=True)
class Result:
    """The result of a finished run."""

    metrics: RunMetrics
    core_parameters: int
    parameters: int
    train_flops: float
    """FLOPs per token and optimizer step, in which every row takes one ACT step."""
    eval_flops: float
    """FLOPs per token of an answer after all ACT steps of an evaluation."""
    seconds: float
    steps: int
    examples: int
    tokens: int
    flops: float
    act_steps: float
    """Mean ACT steps of a training example."""


def training_arguments(
    args: Options, overrides: Sequence[str], experiment: str, folder: Path
) -> list[str]:
    """Return the arguments of pretrain.py for one of the runs."""
    return [
        *([] if args.config_dir is None else ["--config-dir", str(args.config_dir)]),
        f"experiment={experiment}",
        assignment("checkpoint_path", folder),
        assignment("run_name", experiment),
        f"max_seconds={args.seconds:g}",
        "max_steps=null",
        "epochs=null",
        "keep_checkpoints=1",
        *overrides,
    ]


def train(experiment: str, folder: Path, arguments: Sequence[str]) -> None:
    """Run pretrain.py once, printing the command so that it can be repeated by hand."""
    print("+ " + shlex.join(["python", "pretrain.py", *arguments]), flush=True)
    status = subprocess.run([sys.executable, str(ROOT / "pretrain.py"), *arguments]).returncode
    if status:
        resumes = f"; output_dir={folder.parent} resumes the comparison" if folder.exists() else ""
        raise UserError(f"the run experiment={experiment} ended with status {status}{resumes}")


def measure(folder: Path) -> Result:
    """Return the result and cost of a finished run, from its newest checkpoint and its metrics."""
    opened = Checkpoint(checkpoints_of(folder)[-1])
    arch, _ = read_arch(saved_arch(opened))
    metadata = DatasetMetadata.model_validate_json(opened.text("dataset.json"))
    head = build_untrained(
        arch, metadata
    )  # includes the bases of loss terms, which cost FLOPs, too
    counted = cost.measure_mean(head)
    state = opened.json("state.json")
    step = state["counters"]["step"]
    metrics = RunMetrics(folder)
    length, slots = metadata.seq_len, state["stream"]["global_batch_size"]
    taken = metrics.series("train/steps")[1]
    return Result(
        metrics=metrics,
        core_parameters=counted.parameters.core,
        parameters=counted.parameters.total,
        train_flops=counted.train_flops,
        eval_flops=cost.evaluation_flops(head.model),
        seconds=state["counters"]["seconds"],
        steps=step,
        examples=state["stream"]["examples_entered"],
        tokens=state["stream"]["examples_entered"] * length,
        flops=counted.train_flops * slots * length * step,
        act_steps=sum(taken) / len(taken) if taken else 1.0,
    )


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table, one column per run; the better figure is in bold."""
    rows: list[tuple[str, list[str]]] = [
        ("core parameters", [f"{r.core_parameters:,}" for r in results]),
        ("all parameters", [f"{r.parameters:,}" for r in results]),
        ("ACT steps of a training example", [f"{r.act_steps:.2f}" for r in results]),
        (
            "MFLOP per token and ACT step, training",
            [f"{r.train_flops / 1e6:,.2f}" for r in results],
        ),
        ("MFLOP per token, evaluation", [f"{r.eval_flops / 1e6:,.2f}" for r in results]),
        ("seconds of training", [f"{r.seconds:.0f}" for r in results]),
        ("optimizer steps", [f"{r.steps:,}" for r in results]),
        ("tokens seen", [f"{r.tokens:,}" for r in results]),
        ("TFLOP spent in training", [f"{r.flops / 1e12:,.2f}" for r in results]),
    ]
    headline = results[0].metrics.headline
    if headline is not None:
        values = [r.metrics.last(headline.key) for r in results]
        rows.append((f"{headline.label}, held out", _mark_best(values, headline.better)))
        curves = [r.metrics.by_act_step() for r in results]
        for step in sorted(set().union(*curves)):
            shown = [curve.get(step) for curve in curves]
            cells = ["–" if value is None else f"{value:.4f}" for value in shown]
            rows.append((f"… after ACT step {step}", cells))
    names = [r.metrics.name for r in results]
    lines = [["", *names], ["---", *("---:" for _ in names)], *([name, *row] for name, row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded)


def _mark_best(values: Sequence[float | None], better: str) -> list[str]:
    """Format values, with the best in bold."""
    known = [value for value in values if value is not None]
    best = (min if better == "lower" else max)(known) if known else None
    return [
        "–" if value is None else f"**{value:.4f}**" if value == best else f"{value:.4f}"
        for value in values
    ]


def verdict(results: Sequence[Result]) -> str:
    """Return one sentence with the better run and the difference."""
    headline = results[0].metrics.headline
    found = [] if headline is None else [(r.metrics.last(headline.key), r) for r in results]
    scored = [(value, r.metrics.name) for value, r in found if value is not None]
    if headline is None or len(scored) < len(results):
        return "No verdict: not every run was evaluated on held-out data."
    scored.sort(reverse=headline.better == "higher")
    (best, winner), (second, _) = scored[:2]
    if best == second:
        return f"A draw: {best:.4f} {headline.label}."
    return (
        f"Ahead: {winner}, with {best:.4f} against {second:.4f} {headline.label} "
        f"(a difference of {abs(best - second):.4f}; one run each, so repeat it with other seeds)."
    )


def notes(results: Sequence[Result], max_steps: int | None) -> list[str]:
    """Return reasons why a comparison may be unfair: a shared machine, or runs that ran out of
    time.
    """
    found = []
    slow, fast = (pick(results, key=lambda r: r.flops / r.seconds) for pick in (min, max))
    ratio = (fast.flops / fast.seconds) / (slow.flops / slow.seconds)
    alike = max(r.train_flops for r in results) < 1.1 * min(r.train_flops for r in results)
    if alike and ratio > 1.1:
        found.append(
            f"note: a token costs about the same FLOPs in all runs, but {fast.metrics.name} "
            f"computed {ratio:.1f} times as many per second as {slow.metrics.name}; if something "
            f"else ran on this machine, compare at equal steps: max_steps={slow.steps}"
        )
    if max_steps is not None:
        found += [
            f"note: {r.metrics.name} took {r.steps} of max_steps={max_steps} steps: it ran out of "
            "time; raise seconds"
            for r in results
            if r.steps < max_steps
        ]
    return found


def parse(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Return the keys of this command, and the overrides for every run."""
    return split_key_values(Options, arguments)


def run(arguments: Sequence[str]) -> None:
    args, overrides = parse(arguments)
    if stray := next((word for word in overrides if "=" not in word and word[0] != "~"), None):
        raise UserError(f"cannot read '{stray}': arguments are key=value, with commas in lists")
    experiments = args.experiments.split(",")
    if len(experiments) < 2 or len(set(experiments)) < len(experiments):
        raise UserError(f"experiments={args.experiments}: give at least two different presets")
    given = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("plugins=")]
    use_configured_plugins({"plugins": given[-1] if given else []})
    folder = args.output_dir or Path("checkpoints/compare") / time.strftime("%Y-%m-%d_%H-%M-%S")
    arguments_of = {
        experiment: training_arguments(args, overrides, experiment, folder / experiment)
        for experiment in experiments
    }
    configs = [load_config(compose_config(words)) for words in arguments_of.values()]
    for experiment, words in arguments_of.items():
        train(experiment, folder / experiment, words)
    results = [measure(folder / experiment) for experiment in experiments]
    remarks = [verdict(results), *notes(results, configs[0].max_steps)]
    report = "\n".join([table(results), "", *remarks, ""])
    print(f"\n{report}")
    place = f"output_dir={folder}"
    draw([result.metrics for result in results], folder / "compare.png", place)
    with write_result(folder / "compare.md", place) as part:
        part.write_text(report, encoding="utf-8")
    print(f"wrote {folder / 'compare.md'} and {folder / 'compare.png'}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    run_command(Options, __doc__, run, argv)


if __name__ == "__main__":
    main()
