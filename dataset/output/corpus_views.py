"""Show a corpus: rows as text with document boundaries and ignored positions, and histograms."""

import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset.common import IGNORE_LABEL_ID, DatasetMetadata
from dataset.output.corpus_statistics import SplitStatistics, count_real_tokens
from utils.core.errors import UserError
from utils.monitoring.plotting import save_figure

MOST_LINES = 14
"""Maximum lines per row; the middle of longer rows is omitted."""
MOST_BARS = 16
BAR_WIDTH = 48
END = "── end of document ─────────────────"

Decode = Callable[[list[int]], str]


# --- rows ---------------------------------------------------------------------------------------


def format_row(
    inputs: np.ndarray,
    labels: np.ndarray,
    metadata: DatasetMetadata,
    decode: Decode | None,
    width: int,
) -> list[str]:
    """Format one row, inputs and labels (S,), as lines of at most `width` characters.

    With a tokenizer, shows the text; ⟦ ⟧ encloses text that is not scored and a rule marks the end
    of each document. Without, shows token ids and, below them, labels, with dots for ignored ones.
    """
    real = int(count_real_tokens(inputs[None], metadata)[0])
    if decode is None:
        ids = " ".join(map(str, inputs.tolist()))
        scored = " ".join("·" if label < 0 else str(label) for label in labels.tolist())
        parts = (("inputs ", ids), ("labels ", scored))
        lines = [line for name, text in parts for line in _wrap(text, width, name)]
    else:
        lines = []
        for piece, ended in _split_documents(inputs, labels, real, metadata.eos_id):
            lines += _wrap(_mark_unscored(inputs, labels, piece, decode), width)
            if ended:
                lines.append(END)
        if real < len(inputs):
            lines.append(f"({len(inputs) - real:,} positions of padding)")
    if len(lines) <= MOST_LINES:
        return lines
    tail = MOST_LINES // 3
    head = MOST_LINES - tail - 1
    middle = lines[head:-tail]
    ends = middle.count(END)
    also = f", including {ends:,} document ends" if ends else ""
    return [*lines[:head], f"... {len(middle):,} more lines{also} ...", *lines[-tail:]]


def _split_documents(
    inputs: np.ndarray, labels: np.ndarray, real: int, eos_id: int | None
) -> list[tuple[range, bool]]:
    """Return the positions of each document in a row, without eos, and whether it ends there."""
    ends = [] if eos_id is None else np.flatnonzero(inputs[:real] == eos_id).tolist()
    starts = [0, *(end + 1 for end in ends)]
    parts = [(range(start, end), True) for start, end in zip(starts, ends, strict=False)]
    if starts[-1] < real:
        # The eos may also be only the row's last label.
        parts.append((range(starts[-1], real), bool(labels[real - 1] == eos_id)))
    return parts


def _mark_unscored(inputs: np.ndarray, labels: np.ndarray, piece: range, decode: Decode) -> str:
    """Return the text of a document's positions in a row, with unscored text in ⟦ ⟧."""
    # Position i is predicted by label i - 1. First tokens are never scored and need no mark.
    scored = [bool(i and labels[i - 1] != IGNORE_LABEL_ID) for i in piece]
    if len(scored) > 1:
        scored[0] = scored[1]
    elif scored:
        scored[0] = True
    text, start = "", 0
    for stop in range(1, len(scored) + 1):
        if stop == len(scored) or scored[stop] != scored[start]:
            run = decode(inputs[piece[start] : piece[stop - 1] + 1].tolist())
            text += run if scored[start] else f"⟦{run}⟧"
            start = stop
    return text


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Wrap a text into lines and replace unprintable and control characters."""
    lines = []
    for paragraph in text.expandtabs(4).split("\n"):
        safe = "".join(char if char.isprintable() else "�" for char in paragraph)
        after = " " * len(indent)
        lines += textwrap.wrap(safe, width, initial_indent=indent, subsequent_indent=after) or [""]
    return lines


# --- figures ------------------------------------------------------------------------------------


def format_histogram(counts: Counter[int]) -> list[str]:
    """Format a text histogram with one line per value, or per range if there are many values."""
    low, high = min(counts), max(counts)
    step = -(-(high - low + 1) // MOST_BARS)
    bins = [range(start, min(start + step, high + 1)) for start in range(low, high + 1, step)]
    sums = [sum(counts[value] for value in each) for each in bins]
    labels = [f"{each[0]}" if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in bins]
    wide, digits = max(map(len, labels)), len(f"{max(sums):,}")
    drawn = ["█" * -(-BAR_WIDTH * count // max(sums)) for count in sums]
    return [
        f"    {label:>{wide}}  {count:>{digits},}  {bar}".rstrip()
        for label, count, bar in zip(labels, sums, drawn, strict=True)
    ]


def draw(splits: dict[str, SplitStatistics], title: str, output: Path) -> None:
    """Plot document lengths, iteration budgets, tokens by domain and padding into one PNG."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots require matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    (lengths, budgets), (domains, padding) = panels
    _draw_lengths(lengths, {name: split.lengths for name, split in splits.items()})
    _draw_shares(budgets, {name: split.budgets for name, split in splits.items()}, _step_edges)
    _draw_domains(domains, splits)
    shares = {name: _count_padding(split.filled) for name, split in splits.items()}
    _draw_shares(padding, shares, lambda low, high: np.linspace(0, 100, 41))
    padding.set(xlim=(0, 100), ylim=(0, None))
    titles = (
        (lengths, "Document lengths", "tokens, including eos", "share of documents"),
        (budgets, "Iteration budgets", "ACT steps", "share of rows"),
        (domains, "Tokens by domain", "tokens", domains.get_ylabel()),
        (padding, "Padding", "padding of a row, %", "share of rows"),
    )
    for panel, name, x, y in titles:
        panel.set(title=name, xlabel=x, ylabel=y)
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
        if not panel.has_data():
            panel.text(0.5, 0.5, "none in this corpus", ha="center", transform=panel.transAxes)
        elif len(splits) > 1:
            panel.legend()
    figure.suptitle(title)
    try:
        save_figure(figure, output, f"--png {output}")
    finally:
        plt.close(figure)


def _draw_shares(
    panel: Any,
    counted: Mapping[str, Mapping[int, int] | Mapping[float, int]],
    make_edges: Callable[[Any, Any], np.ndarray],
) -> tuple[Any, Any]:
    """Draw counted values of each split as shares of its total; return the lowest and highest.

    make_edges: (lowest, highest) -> edges of the bins.
    """
    counted = {name: counts for name, counts in counted.items() if counts}
    if not counted:
        return 1, 1
    low, high = min(map(min, counted.values())), max(map(max, counted.values()))
    for name, counts in counted.items():
        values, weights = np.array(list(counts)), np.array(list(counts.values()), float)
        edges = make_edges(low, high)
        panel.hist(values, edges, weights=weights / weights.sum(), label=name, alpha=0.6)
    return low, high


def _draw_lengths(panel: Any, counted: Mapping[str, Counter[int]]) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    def make_edges(low: int, high: int) -> np.ndarray:
        space = np.geomspace if high >= 10 * low else np.linspace
        return np.unique(space(low, high + 1, 41).round())  # no bin is narrower than one token

    low, high = _draw_shares(panel, counted, make_edges)
    if high >= 10 * low:
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high < 1000 * low else (1,)))
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())


def _step_edges(low: int, high: int) -> np.ndarray:
    step = -(-(high - low + 1) // 60)
    return np.arange(low, high + step + 1, step) - 0.5


def _count_padding(filled: np.ndarray) -> dict[float, int]:
    """Return rows by percentage of padding; filled (S + 1,) rows by non-padding tokens."""
    width = len(filled) - 1
    return {100 * (width - n) / width: rows for n, rows in enumerate(filled.tolist()) if rows}


def _draw_domains(panel: Any, splits: dict[str, SplitStatistics], most: int = 12) -> None:
    from matplotlib.ticker import EngFormatter

    sizes: Counter[str] = Counter()
    for split in splits.values():
        sizes.update({name: figures.tokens for name, figures in split.domains.items()})
    names = [name for name, _ in sizes.most_common(most)]
    left = np.zeros(len(names))
    for split_name, split in splits.items():
        tokens = [split.domains[name].tokens if name in split.domains else 0 for name in names]
        panel.barh(_shorten(names), tokens, left=left, label=split_name, alpha=0.8)
        left += tokens
    panel.invert_yaxis()
    panel.xaxis.set_major_formatter(EngFormatter())
    if len(sizes) > most:
        panel.set_ylabel(f"{most} largest of {len(sizes):,}")


def _shorten(names: Sequence[str]) -> list[str]:
    """Truncate names while keeping them distinct."""
    cut = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    return [f"{name} #{i}" if cut.count(name) > 1 else name for i, name in enumerate(cut, 1)]
