"""Build tables and charts that compare the metrics logged by runs.

The name of a figure is the last part of its key, and its place is the part before:
eval/text/bits_per_byte is `bits_per_byte` of `text`. Places within another place that has figures
(domains, groups of a task) are its parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from scripts.report_page.charts import Axis, Chart, Line
from scripts.report_page.runs import STEPPED, Run, is_number
from utils.monitoring.run_log import better, label_of, rank

BOOKKEEPING = {"epoch", "progress", "examples", "tokens", "seconds", "eta_seconds"}
FROM_ZERO = {"lr", "puzzle_emb_lr", "tokens_per_s", "token_steps_per_s", "flops_per_s", "mfu",
             "memory_bytes", "share", "nonfinite"}  # fmt: skip
OPEN_CHARTS, MOST_CHARTS = 6, 24  # per section: shown initially, and in total
SAME = {
    "nats_per_token": "bits_per_byte",
    "perplexity": "bits_per_byte",
}  # the same curve in other units


# --- tables ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell of a table. value: as logged; None if it is not finite or the run does not have it
    (see `text`).
    """

    value: float | None
    text: str
    error: float | None
    best: bool


@dataclass(frozen=True)
class Row:
    label: str
    better: str
    cells: list[Cell]


@dataclass
class Group:
    """The figures of one place and of its parts."""

    place: str
    rows: list[Row]
    parts: list["Group"] = field(default_factory=list)


def number(value: float) -> str:
    """Format whole numbers in full, others with about five digits."""
    if isinstance(value, int):
        return f"{value:,}"
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-3:
        return f"{value:.3e}"
    return f"{value:,.{1 if size >= 1000 else 2 if size >= 100 else 4}f}"


def evaluation_groups(runs: Sequence[Run], mark: bool) -> list[Group]:
    """Return the figures of the last evaluations. mark: whether figures may be compared."""
    keys = dict.fromkeys(
        key.removeprefix("eval/")
        for run in runs
        for key, value in run.last_evaluation.items()
        if key.startswith("eval/") and not isinstance(value, list) and not STEPPED.fullmatch(key)
    )
    keys.pop("evaluators_failed", None)
    places: dict[str, list[str]] = {}
    for key in keys:
        place, _, name = key.rpartition("/")
        places.setdefault(place, []).append(name)
    groups: dict[str, Group] = {}
    for place in sorted(places, key=lambda p: (min(map(rank, places[p])), p)):
        names = sorted(places[place], key=lambda n: (rank(n), n))
        groups[place] = Group(place, [
            _row(runs, place, name, mark) for name in names if not name.startswith("stderr")
        ])  # fmt: skip
    top: list[Group] = []
    for place, group in groups.items():
        whole = next((p for p in _above(place) if p in groups), None)
        (top if whole is None else groups[whole].parts).append(group)
    return [group for group in top if group.rows or group.parts]


def _above(place: str) -> list[str]:
    """Return the places that contain a place, outermost first."""
    parts = place.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def _row(runs: Sequence[Run], place: str, name: str, mark: bool) -> Row:
    where = f"eval/{place}/" if place else "eval/"
    found = [run.last_evaluation.get(where + name) for run in runs]
    values: list[float] = [v for v in found if is_number(v)]
    direction, best = better(name), None
    if mark and direction and len(values) > 1 and min(values) < max(values):
        best = (min if direction == "lower" else max)(values)
    suffix = name.removeprefix("accuracy") if name.startswith("accuracy") else None
    cells = []
    for run, value in zip(runs, found, strict=True):
        error = None if suffix is None else run.last_evaluation.get(f"{where}stderr{suffix}")
        if is_number(value):
            cells.append(Cell(value, number(value), error, value == best))
        else:
            text = "not finite" if where + name in run.last_evaluation else "–"
            cells.append(Cell(None, text, error, False))
    return Row(label_of(name), direction, cells)


def not_comparable(runs: Sequence[Run]) -> str:
    """Return the reason why the runs' figures cannot be compared; "" if they can."""
    evaluated = [run for run in runs if run.last_evaluation]
    corpora = {
        run.config.get("data_paths_test", "[]").replace("[]", "") or run.config.get("data_paths")
        for run in evaluated
        if run.config
    }
    if len(corpora) > 1:
        return f"They were evaluated on different corpora ({' and '.join(map(str, corpora))})."
    rows = {
        key: {run.last_evaluation.get(key, 0) for run in evaluated if key in run.last_evaluation}
        for run in evaluated
        for key in run.last_evaluation
        if key.endswith("/rows")
    }
    for key, counts in rows.items():
        if len(counts) > 1:
            shown = " and ".join(f"{count:,}" for count in sorted(counts))
            return f"They were evaluated on different numbers of rows ({shown} in {key})."
    return ""


# --- charts ----------------------------------------------------------------------------------


TIME_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def time_unit(runs: Sequence[Run]) -> tuple[str, float]:
    """Return the name and the seconds of the largest time unit of which the longest run takes more
    than five.
    """
    longest = max((run.last("train/seconds") or 0.0 for run in runs), default=0.0)
    return next((unit for unit in TIME_UNITS if longest > 5 * unit[1]), TIME_UNITS[-1])


def training_axes(runs: Sequence[Run]) -> list[Axis]:
    """Return the horizontal axes for charts of training."""
    return [
        Axis("step", "optimizer step", integer=True, large=True),
        Axis("tokens", "tokens seen", large=True),
        Axis("time", f"training time, {time_unit(runs)[0]}"),
    ]


@dataclass
class Section:
    """A section of charts, most important first. constant: figures that never changed, with their
    values.
    """

    charts: list[Chart] = field(default_factory=list)
    constant: list[tuple[str, float]] = field(default_factory=list)
    left_out: int = 0

    @property
    def first(self) -> list[Chart]:
        return self.charts[:OPEN_CHARTS]

    @property
    def folded(self) -> list[Chart]:
        return self.charts[OPEN_CHARTS:]

    def add(self, chart: Chart, name: str) -> None:
        """Add a chart, unless it shows only one value, or an earlier chart shows the same."""
        values = [value for line in chart.lines for value in line.y]
        if len(values) > len(chart.lines) and min(values) == max(values):
            self.constant.append((name, values[0]))
        elif not values or any(_equal(chart, other) for other in self.charts):
            return
        elif len(self.charts) == MOST_CHARTS:
            self.left_out += 1
        else:
            self.charts.append(chart)

    def draw(self) -> "Section":
        """Draw initially visible charts along every axis, and the others only along the first."""
        for chart in self.first:
            chart.draw(len(chart.axes))
        for chart in self.folded:
            chart.draw(1)
        return self


def _equal(one: Chart, other: Chart) -> bool:
    """Return whether two charts show the same values in the same unit."""
    shapes = [[(line.run, len(line.y)) for line in chart.lines] for chart in (one, other)]
    return (
        one.label == other.label
        and shapes[0] == shapes[1]
        and all(
            np.allclose(a.y, b.y, rtol=1e-5, atol=1e-9)
            for a, b in zip(one.lines, other.lines, strict=True)
        )
    )


def training_section(runs: Sequence[Run]) -> Section:
    section = Section()
    for key in _keys(runs, "train/"):
        name = key.removeprefix("train/")
        if name not in BOOKKEEPING:
            chart = Chart(_title(name), label_of(name), _course(runs, key), training_axes(runs),
                          from_zero=name in FROM_ZERO)  # fmt: skip
            section.add(chart, label_of(name))
    return section


def evaluation_section(runs: Sequence[Run]) -> Section:
    """Chart figures that were evaluated more than once over the course of training."""
    section = Section()
    keys = _keys(runs, "eval/")
    for key in keys:
        place, _, name = key.removeprefix("eval/").rpartition("/")
        lines = _course(runs, key)
        if _says_more(key, keys) and max(len(line.y) for line in lines) > 1:
            axes = training_axes(runs)
            chart = Chart(_title(name, place), label_of(name), lines, axes, marks=True)
            section.add(chart, f"{place}: {label_of(name)}")
    return section


def _keys(runs: Sequence[Run], prefix: str) -> list[str]:
    """Return the keys of numbers that start with `prefix`, most important first, places before
    their parts.
    """
    keys = {
        key
        for run in runs
        for record in run.records
        for key, value in record.items()
        if key.startswith(prefix) and is_number(value) and not STEPPED.fullmatch(key)
    }
    return sorted(keys, key=lambda key: (_depth(key, keys), rank(key)))


def _says_more(key: str, keys: Sequence[str]) -> bool:
    """Return whether a figure gets a chart. Repetitions in other units do not, and of a part only
    the most important figure does.
    """
    place, _, name = key.rpartition("/")
    if not better(name) or f"{place}/{SAME.get(name, '')}" in keys:
        return False
    ranks = [rank(other) for other in keys if other.rpartition("/")[0] == place]
    return _depth(key, set(keys)) == 0 or rank(key) == min(ranks)


def _depth(key: str, keys: set[str]) -> int:
    places = {known.rpartition("/")[0] for known in keys}
    return sum(place in places for place in _above(key.rpartition("/")[0]))


def _course(runs: Sequence[Run], key: str) -> list[Line]:
    lines, unit = [], time_unit(runs)[1]
    for run in runs:
        steps, values = run.series(key)
        x: dict[str, list[float]] = {"step": [float(step) for step in steps]}
        if tokens := run.along("tokens", steps):
            x["tokens"] = tokens
        if seconds := run.along("seconds", steps):
            x["time"] = [value / unit for value in seconds]
        lines.append(Line(run.number, x, values))
    return lines


def depth_section(runs: Sequence[Run]) -> Section:
    """Chart the last evaluation by ACT step, and by FLOPs if they are known."""
    section = Section()
    axes = [Axis("act", "ACT steps", integer=True),
            Axis("flops", "FLOP per token", large=True, log=True)]  # fmt: skip
    names = {name for run in runs for name in run.by_step if name[1] != "flops_per_token"}
    for place, name in sorted(names, key=lambda found: (rank(found[1]), found)):
        if (place, SAME.get(name)) in names:
            continue
        lines = []
        for run in runs:
            curve = run.by_step.get((place, name)) or _only_step(run, place, name)
            cost = next((c for (_, n), c in run.by_step.items() if n == "flops_per_token"), {})
            cost = cost or _only_step(run, "halting", "flops_per_token")
            x = {"act": [float(step) for step in curve]}
            if curve and all(step in cost for step in curve):
                x["flops"] = [cost[step] for step in curve]
            lines.append(Line(run.number, x, list(curve.values())))
        chart = Chart(_title(name, place), label_of(name), lines, axes, marks=True, level=True,
                      from_zero=name in FROM_ZERO)  # fmt: skip
        section.add(chart, f"{place}: {label_of(name)}")
    return section


def _only_step(run: Run, place: str, name: str) -> dict[int, float]:
    """Return the figure of a model with one ACT step, which is logged without a step number."""
    stepped = any(found[0] == place for found in run.by_step)
    value = run.last_evaluation.get(f"eval/{place}/{name}")
    return {1: value} if is_number(value) and not stepped else {}


def histogram_section(runs: Sequence[Run]) -> Section:
    """Chart shares of rows by bin at the last evaluation; figures with only two bins are in the
    table.
    """
    section = Section()
    counts: dict[str, dict[int, list[int]]] = {}
    for run in runs:
        for key, value in run.last_evaluation.items():
            if isinstance(value, list) and "/hist/" in key and sum(value):
                counts.setdefault(key, {})[run.number] = value
    for key, found in sorted(counts.items(), key=lambda item: rank(item[0])):
        place, _, name = key.removeprefix("eval/").replace("/hist/", "/").rpartition("/")
        if max(map(len, found.values())) <= 2:
            continue
        lines = []
        for run_number, bins in found.items():
            width = 1.0 if name == "steps" else 1 / len(bins)
            first = 1.0 if name == "steps" else width / 2
            x = [first + width * i for i in range(len(bins))]
            lines.append(Line(run_number, {"bin": x}, [count / sum(bins) for count in bins]))
        axis = Axis("bin", label_of(name).removesuffix(", mean"), integer=name == "steps")
        section.add(Chart(_title(name, place), "share of rows", lines, [axis], bars=True), name)
    return section


def _title(name: str, place: str = "") -> str:
    title = label_of(name).partition(",")[0]
    return f"{place}: {title}" if place else title[:1].upper() + title[1:]
