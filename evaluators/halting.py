"""Report the quality and cost of each ACT step, and the accuracy of the halting head.

The halting head reads the whole row, including later tokens, so the steps at which it halts
describe the head but must not be used to score text.
"""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel
from torch import Tensor

from dataset.common import DatasetMetadata
from evaluators.interface import Batch, Summing
from models.inference.language_model import LanguageModel
from utils.core.console import notify
from utils.core.errors import UserError
from utils.monitoring.plotting import save_figure, with_slack

BINS = 10  # of the halting head's probability


class HaltingEvaluator(Summing):
    """Figures over all rows and ranks, below <prefix>/:

    step_<k>/loss, accuracy, exact_accuracy   after k ACT steps, mean of the rows' means
    step_<k>/flops_per_token                  cost of k steps and one pass of the output head
    step_<k>/<latent>_change                  ‖z_k − z_{k−1}‖ of a scored position
    step_<k>/share                            share of rows that the head first halts at step k
                                              (at the last step: all remaining rows)
    act/steps, act/loss, act/accuracy         if the head decided when to halt
    budget/steps                              mean iteration budget, capped at the last step
    calibration_error                         |share of correct halts − predicted probability|,
                                              averaged over ten bins of predictions (ECE: Guo et
                                              al. 2017, arXiv 1706.04599)
    brier                                     mean squared error of the predicted probability

    and halting.png in the run's evaluation folder.
    """

    class Config(BaseModel, extra="forbid"):
        prefix: str = "halting"
        plot: bool = True

    CURVES: ClassVar[dict[str, str]] = {
        "loss": "row_loss",
        "accuracy": "row_accuracy",
        "exact_accuracy": "row_exact",
    }
    HEAD = ("q_halt_logits_by_step", "row_halt_target_by_step")
    CHANGES = "*_change_by_step"  # of every latent
    required_outputs = frozenset(
        {f"{name}_by_step" for name in CURVES.values()} | {*HEAD, CHANGES, "valid"}
    )

    def __init__(self, data_path: str, eval_metadata: DatasetMetadata, **options: Any):
        self.config = self.Config(**options)
        self.begin_eval()

    def begin_eval(self) -> None:
        super().begin_eval()
        self.flops: list[float] = []

    def update_batch(self, batch: Batch, preds: Batch) -> None:
        """Add a batch. preds: valid (B,), outputs by step (B, steps)."""
        valid = preds["valid"].cpu().numpy().astype(bool)
        curves = {
            name: _rows(preds[f"{source}_by_step"], valid)
            for name, source in self.CURVES.items()
            if f"{source}_by_step" in preds
        }
        curves |= {
            name.removesuffix("_by_step"): _rows(values, valid)
            for name, values in preds.items()
            if name.endswith("_change_by_step")
        }
        count, steps = curves["loss"].shape
        self.add("rows", np.array([count]))
        for name, curve in curves.items():
            self.add(name, curve.sum(0))
        if "iteration_targets" in batch:
            budget = _rows(batch["iteration_targets"], valid).clip(1, steps)
            self.add("budget", np.array([budget.sum()]))
        if all(name in preds for name in self.HEAD):
            logits, right = (_rows(preds[name], valid) for name in self.HEAD)
            self._add_head(logits, right, curves)

    def _add_head(self, logits: np.ndarray, right: np.ndarray, curves: dict[str, Any]) -> None:
        """Add the head's logits and the right answers, both (rows, steps)."""
        count, steps = logits.shape
        says = logits > 0
        says[:, -1] = True
        last = says.argmax(1)
        self.add("share", np.bincount(last, minlength=steps))
        for name in ("loss", "accuracy"):
            self.add(f"act/{name}", curves[name][np.arange(count), last].sum(keepdims=True))
        probability = 1 / (1 + np.exp(-logits.ravel()))
        place = np.minimum((probability * BINS).astype(int), BINS - 1)
        for name, weights in (("said", probability), ("right", right.ravel()), ("answers", None)):
            self.add(name, np.bincount(place, weights, BINS))
        self.add("brier", np.square(probability - right.ravel()).sum(keepdims=True))

    def examine(self, model: LanguageModel, group: Any) -> None:
        """Read the cost of each step from the model."""
        depths = [model.steps] if model.model.takes_depth else range(1, model.steps + 1)
        self.flops = [model.flops_per_token(depth) for depth in depths]

    def summarize(self, sums: dict[str, np.ndarray], save_path: str | None) -> dict[str, float]:
        if not sums or sums["rows"][0] == 0:
            return {}
        rows = sums["rows"][0]
        changes = [name for name in sums if name.endswith("_change")]
        shown = (*self.CURVES, *changes, "share")
        curves = {name: sums[name] / rows for name in shown if name in sums}
        steps = len(curves["loss"])
        if self.flops:
            curves["flops_per_token"] = np.array(self.flops)
        figures = {
            f"step_{k + 1}/{name}": float(curve[k])
            for k in range(steps)
            for name, curve in curves.items()
        }
        if "budget" in sums:
            figures["budget/steps"] = sums["budget"][0] / rows
        if "share" in curves:
            figures |= self._of_head(sums, curves["share"])
        if save_path is not None and self.config.plot:
            try:
                draw(Path(save_path) / "halting.png", curves, sums)
            except (UserError, ImportError) as error:
                notify(f"warning: halting.png was not drawn ({error})")
        return {f"{self.config.prefix}/{name}": value for name, value in figures.items()}

    def _of_head(self, sums: dict[str, np.ndarray], share: np.ndarray) -> dict[str, float]:
        rows, answers = sums["rows"][0], sums["answers"].sum()
        return {
            "act/steps": float(share @ np.arange(1, len(share) + 1)),
            "act/loss": sums["act/loss"][0] / rows,
            "act/accuracy": sums["act/accuracy"][0] / rows,
            "calibration_error": float(np.abs(sums["said"] - sums["right"]).sum() / answers),
            "brier": sums["brier"][0] / answers,
        }


def _rows(values: Tensor, valid: np.ndarray) -> np.ndarray:
    return values.cpu().double().numpy()[valid]


def draw(path: Path, curves: dict[str, np.ndarray], sums: dict[str, np.ndarray]) -> None:
    """Plot all reported figures in one image."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps = np.arange(1, len(curves["loss"]) + 1)
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = figure.subplots(2, 3).ravel()

    def panel(at: int, title: str, x: str, y: str, *lines: tuple[Any, np.ndarray, str]) -> Any:
        axes = panels[at]
        for along, values, label in lines:
            axes.plot(along, values, marker="o", markersize=3, label=label)
        axes.set(title=title, xlabel=x, ylabel=y)
        if len(lines) > 1:
            axes.legend()
        return axes

    def by_step(at: int, title: str, y: str, *names: str) -> None:
        lines = [(steps, curves[name], name) for name in names if name in curves]
        axes = panel(at, title, "ACT step", y, *lines)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    by_step(0, "test-time compute", "loss, nats per token", "loss")
    by_step(1, "accuracy", "share of tokens, of rows", "accuracy", "exact_accuracy")
    if "flops_per_token" in curves:
        line = (curves["flops_per_token"], curves["loss"], "loss")
        panel(2, "loss against compute", "FLOPs per token", "loss, nats per token", line)
    changes = [name for name in curves if name.endswith("_change")]
    by_step(3, "change of the latents per step", "norm", *changes)
    if "share" in curves:
        panels[4].bar(steps, curves["share"])
        panels[4].set(title="halting step of each row", xlabel="ACT step", ylabel="rows")
        panels[4].xaxis.set_major_locator(MaxNLocator(integer=True))
        some = sums["answers"] > 0
        said, right = (sums[name][some] / sums["answers"][some] for name in ("said", "right"))
        panels[5].plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        panels[5].plot(said, right, marker="o")
        panels[5].set(title="calibration of the halting head", xlabel="predicted probability",
                      ylabel="share that should halt")  # fmt: skip
    for axes in (panels[0], panels[2]):
        with_slack(axes)
    for axes in panels:
        axes.set_visible(axes.has_data())
    save_figure(figure, path, str(path))
