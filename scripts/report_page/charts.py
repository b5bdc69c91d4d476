"""Draw the charts of a report as SVG with matplotlib; the page's style sheet sets their colours.

Each run has the same colour, marker and dash pattern in all charts. The drawing numbers the
colours, and the style sheet defines them for light and dark mode.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from utils.monitoring.plotting import with_slack

COLOURS = 8
MARKERS, SIGNS = "os^DvPX*", "●■▲◆▼✚✖★"
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))
MOST_POINTS = 120  # of a line; longer ones are drawn as means and extremes of this many intervals
SIZE = (4.6, 2.9)  # in inches, 72 drawing units each
MARGINS = dict(left=0.14, right=0.97, bottom=0.165, top=0.9)  # computing them is slow
PLAIN = FuncFormatter(lambda value, _: f"{value:.6g}")
# Stand-ins, replaced by variables of the style sheet.
RUN, INK, FAINT = "#a000{:02x}", "#b00001", "#b00002"
STYLE: Any = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.titlesize": 9,
    "axes.labelsize": 8.5, "xtick.labelsize": 8, "ytick.labelsize": 8, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.edgecolor": FAINT,
    "grid.color": FAINT, "grid.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "axes.spines.left": False, "xtick.major.size": 0,
    "ytick.major.size": 0, "ytick.minor.size": 0, "xtick.minor.size": 0, "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False, "axes.formatter.limits": (-4, 5),
}  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """An axis. key: its name in the page. integer: ticks only at whole numbers. large: format as 2
    M, 30 k.
    """

    key: str
    label: str
    integer: bool = False
    large: bool = False
    log: bool = False


@dataclass
class Line:
    """One run's values, and their positions along each axis, by the axis' key."""

    run: int
    x: dict[str, list[float]]
    y: list[float]


@dataclass
class Chart:
    """A chart. axes: the possible horizontal axes, of which the page shows one at a time. marks:
    draw every value as a separate event; otherwise long lines are thinned out. bars: draw counts by
    bin.
    """

    title: str
    label: str
    lines: list[Line]
    axes: Sequence[Axis]
    marks: bool = False
    bars: bool = False
    from_zero: bool = False
    level: bool = False
    """Whether to widen the axis so that small differences look small."""
    views: dict[str, Markup] = field(default_factory=dict)
    stretch: int = 1
    """Maximum number of values per drawn point."""

    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Position of the axes in each view."""

    def __post_init__(self) -> None:
        self.lines = [line for line in self.lines if line.y]
        if not self.marks:
            longest = max((len(line.y) for line in self.lines), default=0)
            self.stretch = max(1, -(-longest // MOST_POINTS))

    def draw(self, views: int) -> None:
        """Draw the views along the first `views` axes."""
        for axis in self.axes[:views]:
            if any(axis.key in line.x for line in self.lines):
                self.views[axis.key], self.places[axis.key] = _svg(self, axis)

    def data(self) -> dict[str, Any]:
        """Return the data with which the page's script shows values, with six digits."""
        lines = []
        for line in self.lines:
            keep = extremes(line.y, self.stretch)
            lines.append({
                "run": line.run, "y": [_compact(line.y[i]) for i in keep],
                "x": {k: [_compact(line.x[k][i]) for i in keep] for k in self.views if k in line.x},
            })  # fmt: skip
        return {"places": self.places, "lines": lines, "bars": self.bars}


def extremes(values: Sequence[float], stretch: int) -> list[int]:
    """Return the indices of the extremes of each interval, and of the first and last value."""
    if stretch <= 1:
        return list(range(len(values)))
    kept = {0, len(values) - 1}
    for start in range(0, len(values), stretch):
        part = np.asarray(values[start : start + stretch])
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    return sorted(kept)


def _compact(value: float) -> float | int:
    short = float(f"{value:.6g}")
    return int(value) if float(value).is_integer() else short


def means(values: Sequence[float], stretch: int) -> list[float]:
    parts = (values[start : start + stretch] for start in range(0, len(values), stretch))
    return [float(np.mean(part)) for part in parts]


def marker(run: int) -> str:
    """Return the marker of a run in a legend."""
    return SIGNS[run % len(SIGNS)]


def _svg(chart: Chart, axis: Axis) -> tuple[Markup, dict[str, Any]]:
    """Return one view, and the position of its axes (units of the drawing, limits, scales)."""
    with rc_context(STYLE | {"svg.hashsalt": f"{chart.title} {axis.key}"}):
        figure = Figure(figsize=SIZE)
        figure.subplots_adjust(**MARGINS)
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        shown = [line for line in chart.lines if axis.key in line.x]
        (_bars if chart.bars else _lines)(axes, chart, axis, shown)
        axes.set_xlabel(axis.label)
        axes.set_title(chart.label, loc="left", color=INK)
        axes.grid(axis="y")
        _scales(axes, chart, axis, shown)
        return _clean(figure), _place(axes)


def _lines(axes: Axes, chart: Chart, axis: Axis, shown: Sequence[Line]) -> None:
    for line in shown:
        x, y = line.x[axis.key], line.y
        colour = RUN.format(line.run % COLOURS)
        draw = partial(axes.plot, color=colour, solid_joinstyle="round",
                       linestyle=DASHES[line.run // COLOURS % len(DASHES)])  # fmt: skip
        if chart.marks or len(y) == 1:
            sign = MARKERS[line.run % len(MARKERS)]
            draw(x, y, linewidth=1.4, marker=sign, markersize=4 if len(y) < 60 else 0)
            continue
        if chart.stretch > 1:
            keep = extremes(y, chart.stretch)
            draw([x[i] for i in keep], [y[i] for i in keep], linewidth=0.5, alpha=0.4)
        draw(means(x, chart.stretch), means(y, chart.stretch), linewidth=1.3)


def _bars(axes: Axes, chart: Chart, axis: Axis, shown: Sequence[Line]) -> None:
    for place, line in enumerate(shown):
        x = np.asarray(line.x[axis.key])
        gap = float(np.diff(x).min()) if len(x) > 1 else 1.0
        width = 0.8 * gap / len(shown)
        shift = (place - (len(shown) - 1) / 2) * width
        axes.bar(x + shift, line.y, width=0.92 * width, color=RUN.format(line.run % COLOURS))


def _scales(axes: Axes, chart: Chart, axis: Axis, shown: Sequence[Line]) -> None:
    values = [value for line in shown for value in line.y]
    spread = min(values) > 0 and max(values) > 20 * min(values)
    if spread and not (chart.bars or chart.from_zero):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(_log_ticks(min(values), max(values)))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif chart.from_zero or chart.bars:
        axes.set_ylim(bottom=min(0.0, *values), top=None if any(values) else 1.0)
    elif chart.level:
        with_slack(axes)
    if axes.get_yscale() == "linear":
        largest = max(map(abs, values))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(EngFormatter() if largest >= 1e4 else PLAIN)
    places = [x for line in shown for x in line.x[axis.key]]
    if axis.log and min(places) > 0 and max(places) > 3 * min(places):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(_log_ticks(min(places), max(places)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis.integer, min_n_ticks=1))
    if axis.large and max(places) >= 1e4:
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())


def _log_ticks(low: float, high: float) -> LogLocator:
    return LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5), numticks=7)


def _place(axes: Axes) -> dict[str, Any]:
    box = axes.get_position()
    width, height = SIZE[0] * 72, SIZE[1] * 72
    numbers = [
        float(number)
        for number in (box.x0 * width, box.x1 * width, (1 - box.y0) * height, (1 - box.y1) * height)
    ]
    return {
        "box": [round(number, 2) for number in numbers],
        "x": [*map(float, axes.get_xlim())], "y": [*map(float, axes.get_ylim())],
        "log_x": axes.get_xscale() == "log", "log_y": axes.get_yscale() == "log",
    }  # fmt: skip


def _clean(figure: Figure) -> Markup:
    """Convert the drawing to a part of the page, with the page's fonts and colours and short
    numbers.
    """
    file = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    for pattern, instead in _REPLACED:
        text = pattern.sub(instead, text)
    return Markup(text)


def _short(found: re.Match[str]) -> str:
    return " " + re.sub(r"(\.\d)\d+", r"\1", " ".join(found[0].split()))


# Applied in order. Nothing extends beyond its axes, so clipping is not needed; the only ids needed
# are those of markers, which are hashes of their content.
_REPLACED: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(pattern, re.DOTALL), instead)
    for pattern, instead in (
        (r"^.*?<svg.*?viewBox", '<svg role="img" viewBox'),
        (r' xmlns="[^"]*" version="1.1">', ">"),
        (r"<metadata>.*?</metadata>|<style.*?</style>|<clipPath.*?</clipPath>", ""),
        (r' id="(?!m[0-9a-f]{8,}")[^"]*"| clip-path="[^"]*"| transform="rotate\(-0 [^"]*"', ""),
        (r"font-family: [^;\"]*;? ?", ""),
        (r' (d|x|y|transform)="[^"]*"', _short),
        (r"#a000([0-9a-f]{2})", lambda found: f"var(--run-{int(found[1], 16)})"),
        (INK, "var(--ink)"),
        (FAINT, "var(--grid)"),
        (r">\s+<", "><"),
        (r"<g/>|<defs></defs>|<defs/>", ""),
        (r"<g></g>", ""),
    )
]
