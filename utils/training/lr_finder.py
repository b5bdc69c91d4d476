"""Sweep the learning rate: a short run that multiplies it by a constant factor every step.

After L. N. Smith, "Cyclical Learning Rates for Training Neural Networks" (arXiv:1506.01186),
section 3.3. The curve shows where the loss starts to fall and where training diverges.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.config.schema import LoggerConfig, LRFindConfig, PretrainConfig
from utils.core.errors import UserError
from utils.monitoring.plotting import save_figure
from utils.monitoring.run_log import read_records
from utils.training.schedule import Schedule
from utils.training.state import TrainState

_SMOOTHING = 0.9  # decay of the running mean of the loss, per step


def configure_sweep(config: PretrainConfig) -> PretrainConfig:
    """Return `config` adapted to a sweep: its length, logging every step, no evaluation or
    saving.
    """
    assert config.lr_find is not None
    return config.model_copy(
        update=dict(
            max_steps=config.lr_find.steps, epochs=None, max_seconds=None,
            iteration_curriculum=None, evaluators=[], eval_interval=None, early_stopping=None,
            checkpoint_interval=None, ema=False, log_interval=1,
            logger=[LoggerConfig(name="jsonl")], lr_warmup_steps=0, max_nonfinite=10,
        )
    )  # fmt: skip


def rate_at(step: int, rule: LRFindConfig) -> float:
    """Return the learning rate of optimizer step `step`, from 1."""
    return rule.low * (rule.high / rule.low) ** ((step - 1) / (rule.steps - 1))


class Sweep(Schedule):
    """Increases `lr` geometrically from `low` to `high`; other rates keep their ratio to it."""

    @property
    def rule(self) -> LRFindConfig:
        assert self.config.lr_find is not None
        return self.config.lr_find

    def over(self, state: TrainState) -> bool:
        return super().over(state) or state.nonfinite > 0

    def learning_rate_factor(self, state: TrainState) -> float:
        return rate_at(state.step, self.rule) / self.config.lr


class Findings(NamedTuple):
    """The rates at which the running mean of the losses falls fastest and is lowest."""

    steepest: float
    lowest: float


def analyze(rates: np.ndarray, losses: np.ndarray) -> Findings | None:
    """Return the findings for the losses (N,) at these rates; None if the loss never falls."""
    smooth = running_mean(losses)
    least = int(smooth.argmin())
    if least < 3:
        return None
    slopes = np.gradient(smooth, np.log(rates))[: least + 1]
    return Findings(float(rates[slopes.argmin()]), float(rates[least]))


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the exponential moving average, corrected for the bias of starting at zero."""
    decay = _SMOOTHING ** np.arange(len(values), dtype=float)
    sums = np.array([(values[: i + 1] * decay[: i + 1][::-1]).sum() for i in range(len(values))])
    return sums / decay.cumsum()


def conclude(folder: Path, rule: LRFindConfig) -> str:
    """Read the log of a sweep, plot `lr_find.png` next to it, and return advice in one sentence."""
    # a step whose update was skipped logs the rate of the previous step
    points = [(rate_at(r["step"], rule), r["train/lm_loss"]) for r in read_records(folder)]
    rates, losses = np.array([p for p in points if None not in p], dtype=float).reshape(-1, 2).T
    found, picture, ended = None, "", ""
    if len(rates):
        found = analyze(rates, losses)
        path = folder / "lr_find.png"
        try:
            draw(path, rates, losses, found)
            picture = f"; see {path}"
        except UserError as error:  # report the findings even without the plot
            picture = f"; {error}"
        if len(rates) < rule.steps:
            ended = f"; the loss was no longer finite after lr {rates[-1]:.2g}"
    if found is None:
        return (
            f"the loss did not fall between lr {rule.low:g} and {rule.high:g}{ended}: lower "
            f"lr_find.low, or increase lr_find.steps (now {rule.steps}){picture}"
        )
    # The loss is lowest just below the rates at which training diverges: keep a margin.
    most = f"{found.lowest / 3:.1e}"
    advised = min(most, f"{found.steepest:.1e}", key=float)
    limit = "a third of the latter" if advised == most else f"and at most {most}"
    said = (
        f"the loss falls fastest at lr {found.steepest:.2g} and is lowest at {found.lowest:.2g}"
        f"{ended}: try lr={advised}, {limit}{picture}"
    )
    if found.lowest >= 0.9 * rule.high:
        said += f"; it still falls at the end: raise lr_find.high (now {rule.high:g})"
    return said


def draw(path: Path, rates: np.ndarray, losses: np.ndarray, found: Findings | None) -> None:
    """Plot the losses over the rates into an image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss of a step")
    smooth = running_mean(losses)
    axes.plot(rates, smooth, color="tab:blue", label="running mean")
    if found is not None:
        for rate, name, colour in (
            (found.steepest, "falls fastest", "tab:green"),
            (found.lowest, "lowest", "tab:red"),
        ):
            axes.axvline(rate, color=colour, linestyle="--", label=f"{name}: {rate:.2g}")
        # losses after divergence would flatten the rest of the curve
        low, first = losses.min(), smooth[0]
        axes.set_ylim(low - 0.1 * (first - low), first + 0.5 * (first - low))
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss, nats per token")
    axes.set_title(f"Learning-rate sweep over {len(rates)} steps")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    save_figure(figure, path, str(path))
