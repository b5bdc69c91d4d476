"""One evaluation: every row of a split, a fixed number of ACT steps, metrics over all ranks."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.backend import Backend
from utils.functions import load_class

Batch = dict[str, Tensor]


class Evaluator(Protocol):
    """A plug-in: constructed with (data_path, eval_metadata, **options) and named module@Class.

    `group.gather_objects(value)` gives every rank's value as a list, on every rank.
    """

    required_outputs: Iterable[str]

    def begin_eval(self) -> None: ...

    def update_batch(self, batch: Batch, preds: Batch) -> None: ...

    def result(
        self, save_path: str | None, rank: int, world_size: int, group: Any
    ) -> dict[str, float] | None: ...


class SetFigures:
    """Sums over the rows of one set, on the device: a curve over ACT steps, and histograms."""

    CURVE = ("row_loss", "row_accuracy", "row_exact")
    BINS = 10

    def __init__(self, max_steps: int, device: torch.device):
        self.max_steps = max_steps
        # A tensor for each step, and zeros from the host: to XLA every index is another program,
        # and so is a sum with a constant, which zeros made there are.
        self.curve = [torch.zeros(len(self.CURVE)).to(device) for _ in range(max_steps)]
        self.rows = torch.zeros(1).to(device)
        sizes = {"accuracy": self.BINS, "exact_accuracy": 2, "q_halt_accuracy": 2}
        self.histograms = {
            name: torch.zeros(size).to(device)
            for name, size in (sizes | {"steps": max_steps}).items()
        }

    def add_step(self, step: int, preds: Batch) -> None:
        valid = preds["valid"]
        self.curve[step] = self.curve[step] + torch.stack(
            [torch.where(valid, preds[name], 0).sum().float() for name in self.CURVE]
        )

    def add_end(self, preds: Batch) -> None:
        valid = preds["valid"]
        self.rows += valid.sum()
        values = {
            "accuracy": (preds["row_accuracy"] * self.BINS).long().clamp_max(self.BINS - 1),
            "exact_accuracy": preds["row_exact"].long(),
            "steps": preds["steps"].long() - 1,
        }
        if "q_halt_logits" in preds:
            right = (preds["q_halt_logits"] >= 0) == preds["row_halt_target"]
            values["q_halt_accuracy"] = right.long()
        for name, value in values.items():
            self.histograms[name].index_add_(0, value, valid.float())

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Means by name, and lists of row counts under hist/. A collective."""
        parts = [self.rows, torch.cat(self.curve), *self.histograms.values()]
        sizes = [part.numel() for part in parts]
        rows, curve, *histograms = reduce(torch.cat(parts)).cpu().split(sizes)
        count = max(rows.item(), 1.0)
        curve = (curve / count).view(self.max_steps, -1)
        names = ("lm_loss", "accuracy", "exact_accuracy")
        found: dict[str, Any] = {}
        if self.max_steps > 1:
            for k, figures in enumerate(curve.tolist(), 1):
                found |= {f"step_{k}/{n}": v for n, v in zip(names, figures, strict=True)}
        found |= dict(zip(names, curve[-1].tolist(), strict=True))
        for name, histogram in zip(self.histograms, histograms, strict=True):
            if histogram.sum() > 0:
                found[f"hist/{name}"] = histogram.int().tolist()
        if "hist/q_halt_accuracy" in found:
            found["q_halt_accuracy"] = found["hist/q_halt_accuracy"][1] / count
        steps = found.get("hist/steps", [])
        found["steps"] = sum(k * n for k, n in enumerate(steps, 1)) / count
        return found | {"rows": int(rows.item())}


@torch.no_grad()
def run_batch(
    model,
    batch: Batch,
    keys: set[str],
    max_steps: int,
    figures: SetFigures,
    end_step: Callable[[], None],
) -> Batch:
    """All ACT steps on one batch; returns the outputs of the last one that `keys` names.

    Rows that have halted keep their outputs. `row_nll_by_step` (B, steps) is the sum of a row's
    nats after each step, without refinement, which belongs to the end of the run.
    `reasoning_preds` (B, steps, R) is what the reasoning head reads in z_L after each step.
    """
    curve = "row_nll_by_step" in keys
    stream = "reasoning_preds" in keys
    wanted = keys - {"row_nll_by_step", "reasoning_preds"} | set(SetFigures.CURVE) | {"valid"}
    wanted |= {"steps", "q_halt_logits", "row_halt_target"}
    if curve:
        wanted |= {"token_nll", "unrefined_token_nll"}
    if stream:
        wanted |= {"reasoning_logits"}
    carry, preds = model.initial_carry(batch), {}
    end_step()
    row_nll: list[Tensor] = []
    decoded: list[Tensor] = []
    for step in range(max_steps):
        carry, _, _, preds, _ = model(return_keys=sorted(wanted), carry=carry, batch=batch)
        figures.add_step(step, preds)
        if curve:
            source = preds.get("unrefined_token_nll", preds["token_nll"])
            row_nll.append(source.sum(-1))
        if "reasoning_logits" in preds and stream:
            decoded.append(preds["reasoning_logits"].argmax(-1))
        end_step()
    figures.add_end(preds)
    if decoded:
        preds["reasoning_preds"] = torch.stack(decoded, dim=1)
    if curve:
        preds["row_nll_by_step"] = torch.stack(row_nll, dim=1)
    end_step()
    return preds


def evaluate(
    model,
    stream: Iterable,
    evaluators: Sequence[Evaluator],
    backend: Backend,
    *,
    save_outputs: Sequence[str] = (),
    save_path: Path | None = None,
) -> dict[str, Any]:
    """<set>/<metric>, <set>/step_<k>/<metric>, <set>/hist/<metric> (row counts) and each
    evaluator's figures; the same on all ranks.

    Under `eval_halting` budget or act the depth at which a token is scored depends on the whole
    row, later tokens included: the names of those figures carry the rule.
    """
    was_training = model.training
    model.eval()
    config = model.model.config
    max_steps = getattr(config, "max_eval_steps", 1)
    halting = getattr(config, "eval_halting", "max")
    keys = set(save_outputs)
    for evaluator in evaluators:
        evaluator.begin_eval()
        keys.update(evaluator.required_outputs)
    sets: dict[str, SetFigures] = {}
    saved: dict[str, list[Tensor]] = {}
    for set_name, batch, _ in backend.batches(stream):
        if set_name not in sets:
            sets[set_name] = SetFigures(max_steps, backend.device)
        figures = sets[set_name]
        preds = run_batch(model, batch, keys, max_steps, figures, backend.end_step)
        for evaluator in evaluators:
            evaluator.update_batch(batch, preds)
        for name in save_outputs:
            if (value := preds.get(name, batch.get(name))) is not None:
                saved.setdefault(name, []).append(value.cpu())
    if missing := sorted(set(save_outputs) - set(saved)):
        warnings.warn(f"eval_save_outputs: there is no {', '.join(missing)}", stacklevel=2)
    if saved and save_path is not None:
        save_path.mkdir(parents=True, exist_ok=True)
        joined = {name: torch.cat(parts) for name, parts in saved.items()}
        torch.save(joined, save_path / f"predictions_rank{backend.rank}.pt")
    results = {
        f"{set_name}/{name}": value
        for set_name, figures in sets.items()
        for name, value in figures.read(backend.sum).items()
    }
    path = None if save_path is None else str(save_path)
    for evaluator in evaluators:
        own = evaluator.result(path, backend.rank, backend.world_size, backend)
        results |= backend.broadcast_object(own or {})
    model.train(was_training)
    if halting in ("budget", "act"):
        results = {f"{halting}/{name}": value for name, value in results.items()}
    return results


def create_evaluators(
    named: Sequence[Any], data_paths: Sequence[str], metadata: Any
) -> list[Evaluator]:
    """One of each configured evaluator, on the first of the evaluated corpora."""
    return [
        load_class(entry.name, "evaluators.")(data_paths[0], metadata, **entry.options)
        for entry in named
    ]
