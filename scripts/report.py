r"""Write one page about one or more runs: figures, curves, samples, config, and times.

    python scripts/report.py checkpoints/athena/quickstart
    python scripts/report.py checkpoints/athena/one checkpoints/athena/two --output both.html

Reads metrics.jsonl in each run's folder, and config.yaml, checkpoints and files of evaluations if
they exist. The page is a single HTML file that works offline.
"""

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps

from scripts.report_page import charts, figures
from scripts.report_page.runs import Run
from utils.checkpoint.format import checkpoints_of, step_of
from utils.core.atomic import write_result
from utils.core.console import command_parser, run_cli
from utils.core.errors import UserError

TEMPLATES = Path(__file__).resolve().parent / "report_page"
FEW, MOST_SAMPLES, LONGEST = (
    5,
    40,
    2000,
)  # samples shown initially and in total, characters per sample
LARGEST_PICTURE = 200_000  # bytes
OF_ITS_OWN = {"run_name", "checkpoint_path"}  # keys that differ between any two runs


class Sample(NamedTuple):
    evaluator: str
    prompt: str
    texts: list[tuple[Run, str]]
    reference: str | None


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Open the runs and give them unique names."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"a run occurs twice in {' '.join(map(str, folders))}; give each run once")
    runs = [Run(folder, number) for number, folder in enumerate(folders)]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    return runs


# --- overview of a run -----------------------------------------------------------------------


def overview(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return labels with one text per run, omitting labels that no run has."""
    facts = [_facts(run) for run in runs]
    labels = dict.fromkeys(label for found in facts for label in found)
    return [(label, [found.get(label, "–") for found in facts]) for label in labels]


def _facts(run: Run) -> dict[str, str]:
    found: dict[str, str | None] = {"folder": str(run.folder)}
    config, cost, times = run.config, run.cost, run.times
    last = run.training[-1] if run.training else {}
    found["architecture"] = config.get("arch.name", "").partition("@")[2]
    if cost is not None:
        found["parameters"] = (
            f"{_large(cost.parameters)}, {_large(cost.core_parameters)} of them core"
        )
        found["training cost"] = f"{_large(cost.train_flops)}FLOP per token and ACT step"
        found["training cost, total"] = f"{_large(cost.flops)}FLOP"
    if "device_type" in config:
        dtype = config.get("arch.forward_dtype")
        found["device"] = f"device_type={config['device_type']}" + (f", {dtype}" if dtype else "")
    found["corpus"] = config.get("data_paths")
    found["optimizer steps"] = figures.number(last["step"]) if last else None
    if is_known(last, "train/progress"):
        under_way = last["train/progress"] < 1 and is_known(last, "train/eta_seconds")
        left = f", {duration(last['train/eta_seconds'])} were left" if under_way else ""
        found["progress"] = f"{last['train/progress']:.0%}{left}"
    if is_known(last, "train/tokens"):
        epochs = f", {last['train/epoch']:.3g} epochs" if is_known(last, "train/epoch") else ""
        found["tokens seen"] = f"{last['train/tokens']:,}{epochs}"
    if times is not None:
        found["training time"] = duration(times.training)
        if times.training > 0:
            speed = f"{last['step'] / times.training:.3g} steps/s"
            if is_known(last, "train/tokens"):
                speed = f"{last['train/tokens'] / times.training:,.0f} new tokens/s, {speed}"
            found["speed"] = speed
        found["evaluation time"] = duration(times.evaluation) if run.evaluations else None
        pauses = [f"after step {step:,}: {duration(length)}" for step, length in times.pauses]
        found["other pauses over 5 s"] = ", ".join(pauses) or "none"
        found["saving and other"] = duration(times.other)
    memory = run.series("train/memory_bytes")[1]
    found["memory, most"] = f"{_large(max(memory))}B" if memory else None
    shares = run.series("train/mfu")[1]
    found["model FLOPs utilisation"] = f"{sum(shares) / len(shares):.1%}" if shares else None
    found["evaluations"] = str(len({r["step"] for r in run.evaluations}))
    if is_known(last, "train/nonfinite"):
        found["skipped non-finite updates"] = figures.number(last["train/nonfinite"])
    found["checkpoints"] = _checkpoints(run)
    return {label: text for label, text in found.items() if text}


def is_known(record: dict[str, Any], key: str) -> bool:
    return record.get(key) is not None


def _checkpoints(run: Run) -> str:
    steps = ", ".join(f"{step_of(folder):,}" for folder in checkpoints_of(run.folder))
    best = run.folder / "best"
    if best.is_symlink() and best.exists():
        steps += f"; best: {step_of(best.resolve()):,}"
    return f"at step {steps}" if steps else "none"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _large(value: float) -> str:
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def notes(runs: Sequence[Run]) -> list[str]:
    """Return warnings to show above the figures, one sentence each."""
    found = []
    for run in runs:
        last = run.training[-1] if run.training else {}
        if skipped := last.get("train/nonfinite"):
            found.append(f"{run.name}: {skipped:,} updates were skipped: they were not finite.")
        if failed := run.last_evaluation.get("eval/evaluators_failed"):
            found.append(f"{run.name}: {failed} evaluator{'s' * (failed > 1)} failed in the last "
                         "evaluation; the figures are missing.")  # fmt: skip
        if run.abandoned:
            found.append(f"{run.name}: resumed from an older checkpoint; {len(run.abandoned)} log "
                         "lines of repeated steps are omitted.")  # fmt: skip
        if run.cut:
            found.append(f"{run.name}: the last line of its log is incomplete and omitted; the run "
                         "is in progress, or was interrupted.")  # fmt: skip
    return found


# --- config, samples, pictures -----------------------------------------------------------------


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str | None]]]:
    """Return the keys whose values differ between the runs that have a config."""
    known = dict.fromkeys(key for run in runs for key in run.config if key not in OF_ITS_OWN)
    rows = [(key, [run.config.get(key) for run in runs]) for key in known]
    with_config = [i for i, run in enumerate(runs) if run.config]
    return [(key, values) for key, values in rows if len({values[i] for i in with_config}) > 1]


def samples(runs: Sequence[Run]) -> list[Sample]:
    """Return every prompt of the newest evaluations, with the text of each run."""
    written = [(run, run.samples()) for run in runs]
    found = []
    for key in dict.fromkeys(key for _, texts in written for key in texts):
        lines = [(run, texts[key]) for run, texts in written if key in texts]
        references = [str(line["reference"]) for _, line in lines if "reference" in line]
        found.append(Sample(
            evaluator=key[0], prompt=_cut(key[1]),
            texts=[(run, _cut(str(line["text"]))) for run, line in lines],
            reference=_cut(references[0]) if references else None,
        ))  # fmt: skip
    return found


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + f" … ({len(text):,} characters)"


def pictures(runs: Sequence[Run]) -> list[tuple[Run, str, str]]:
    """Return run, name and data URL of the evaluators' latest pictures."""
    found = []
    for run in runs:
        folder = run.evaluation_folder()
        if folder is None:
            continue
        for path in sorted(folder.glob("*.png")):
            if path.stat().st_size <= LARGEST_PICTURE:
                code = base64.b64encode(path.read_bytes()).decode()
                found.append((run, f"{folder.name}/{path.name}", f"data:image/png;base64,{code}"))
    return found


# --- the page --------------------------------------------------------------------------------


def page(runs: Sequence[Run]) -> str:
    """Return the whole HTML file."""
    caution = figures.not_comparable(runs)
    sections = {
        "depth": figures.depth_section(runs).draw(),
        "evaluated": figures.evaluation_section(runs).draw(),
        "training": figures.training_section(runs).draw(),
        "histograms": figures.histogram_section(runs).draw(),
    }
    shown = samples(runs)
    drawn = pictures(runs)
    curves = sections["evaluated"].charts or sections["training"].charts
    contents = [
        ("overview", "Overview", True),
        ("evaluation", "Evaluation", True),
        ("depth", "Test-time compute", sections["depth"].charts),
        ("curves", "Curves", curves),
        ("rows", "Rows", sections["histograms"].charts),
        ("samples", "Samples", shown),
        ("pictures", "Pictures", drawn),
        ("config", "Config", True),
    ]
    data = {
        "names": [run.name for run in runs],
        "colours": charts.COLOURS,
        "list": [chart.data() for section in sections.values() for chart in section.charts],
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html").render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        contents=[(place, name) for place, name, there in contents if there],
        notes=notes(runs),
        overview=overview(runs),
        groups=figures.evaluation_groups(runs, mark=not caution),
        caution=caution,
        costed=any("flops" in chart.views for chart in sections["depth"].charts),
        samples=shown[:MOST_SAMPLES],
        left_out=max(0, len(shown) - MOST_SAMPLES),
        few=FEW,
        pictures=drawn,
        differences=differences(runs),
        data=htmlsafe_json_dumps(data, separators=(",", ":")),
        number=figures.number,
        marker=charts.marker,
        colours=charts.COLOURS,
        **sections,
    )


def run(args: argparse.Namespace) -> None:
    runs = open_runs(args.runs)
    alone = runs[0].folder / "report.html"
    output: Path = args.output or (alone if len(runs) == 1 else Path("report.html"))
    text = page(runs)
    with write_result(output, f"--output {output}") as part:
        part.write_text(text, encoding="utf-8")
    print(f"wrote {output} ({len(text.encode()) / 1e6:.2f} MB)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    parser = command_parser("python scripts/report.py", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", type=Path, metavar="HTML",
        help="(default: report.html in the run's folder, or here for several runs)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    run_cli(lambda: run(args))


if __name__ == "__main__":
    main()
