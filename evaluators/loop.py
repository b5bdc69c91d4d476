"""Evaluate every row of a split with a fixed number of ACT steps, over all ranks."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.common import IGNORE_LABEL_ID
from evaluators.guard import FAILURES, Group, Guarded, interrupt_if_asked
from evaluators.interface import Batch, Evaluator
from models.inference.language_model import LanguageModel
from utils.backend import Backend
from utils.checkpoint.writer import save_tensors
from utils.core.atomic import write_atomically
from utils.core.console import notify
from utils.core.functions import load_class
from utils.corpus.data import Data


class SetFigures:
    """Sums over the rows of one set, kept on the device: a curve over ACT steps, and histograms."""

    CURVE = ("row_loss", "row_accuracy", "row_exact")
    BINS = 10

    def __init__(self, max_steps: int, device: torch.device, dtype: torch.dtype):
        self.max_steps = max_steps
        # One tensor per step, initialised with zeros from the host: XLA compiles another program
        # for every index, and for every constant, such as zeros created on the device.
        least = torch.float64 if device.type == "cpu" else torch.float32  # not all devices have it
        wide = torch.promote_types(dtype, least)
        self.curve = [torch.zeros(len(self.CURVE), dtype=wide).to(device) for _ in range(max_steps)]
        self.rows = torch.zeros(1).to(device)
        self.depths: dict[int, SetFigures] = {}
        sizes = {"accuracy": self.BINS, "exact_accuracy": 2, "q_halt_accuracy": 2}
        self.histograms = {
            name: torch.zeros(size).to(device)
            for name, size in (sizes | {"steps": max_steps}).items()
        }

    def add_step(self, step: int, preds: Batch) -> None:
        valid = preds["valid"]
        wide = self.curve[step].dtype
        self.curve[step] = self.curve[step] + torch.stack(
            [torch.where(valid, preds[name], 0).sum().to(wide) for name in self.CURVE]
        )

    def add_rows(self, preds: Batch) -> None:
        """Add the figures of a batch of rows that is finished."""
        self.add_step(0, preds)
        self.rows += preds["valid"].sum()

    def add_end(self, preds: Batch) -> None:
        valid = preds["valid"]
        self.rows += valid.sum()
        values = {
            "accuracy": (preds["row_accuracy"] * self.BINS).long().clamp_max(self.BINS - 1),
            "exact_accuracy": preds["row_exact"].long(),
            "steps": preds["steps"].long() - 1,
        }
        if {"q_halt_logits", "row_halt_target"} <= preds.keys():
            right = (preds["q_halt_logits"] >= 0) == preds["row_halt_target"]
            values["q_halt_accuracy"] = right.long()
        for name, value in values.items():
            self.histograms[name].index_add_(0, value, valid.float())

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return means by name, and lists of row counts under hist/. A collective."""
        parts = [self.rows, torch.cat(self.curve), *self.histograms.values()]
        sizes = [part.numel() for part in parts]
        rows, curve, *histograms = reduce(torch.cat(parts)).cpu().split(sizes)
        if not (count := rows.item()):
            return {"rows": 0}  # no mean over zero rows: 0 would look like a perfect loss
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
        for depth, figures in self.depths.items():
            of_depth = figures.read(reduce)
            found |= {f"depth_{depth}/{name}": of_depth[name] for name in names}
        return found | {"rows": int(rows.item())}


BY_STEP = "_by_step"
CHANGE = "_change"  # of a latent in a step
EVERY_CHANGE = f"*{CHANGE}{BY_STEP}"
REASONING = "reasoning_preds"  # holds every step, too, without the suffix _by_step


@torch.no_grad()
def run_batch(
    model,
    batch: Batch,
    keys: set[str],
    depth: int,
    figures: SetFigures,
    end_step: Callable[[], None],
) -> Batch:
    """Run all ACT steps on one batch; return the last step's outputs named in `keys`.

    Rows that have halted keep their outputs. <name>_by_step is an output after each step, stacked
    in the second dimension. Besides the loss head's outputs there are row_nll (B,), the sum of a
    row's nats before the final refinement; <latent>_change (B,), the mean distance by which a step
    moved a latent at the scored positions (*_change: every latent, by name); and reasoning_preds
    (B, steps, R), the reasoning head's predictions from z_L after each step.
    """
    carry, preds = model.initial_carry(batch), {}
    if EVERY_CHANGE in keys:
        keys = keys - {EVERY_CHANGE} | {f"{name}{CHANGE}{BY_STEP}" for name in carry.latents}
    stepped = {k: k.removesuffix(BY_STEP) for k in keys if k.endswith(BY_STEP) or k == REASONING}
    wanted = keys - stepped.keys() | set(stepped.values()) | set(SetFigures.CURVE) | {"valid"}
    wanted |= {"steps", "q_halt_logits", "row_halt_target"}
    if "row_nll" in wanted:
        wanted |= {"token_nll", "unrefined_token_nll"}
    if REASONING in wanted:
        wanted |= {"reasoning_logits"}
    if any(name.endswith(CHANGE) for name in wanted):
        carry = model.model.admit(carry, batch)  # the first step starts from these latents
    end_step()
    curves: dict[str, list[Tensor]] = {key: [] for key in stepped}
    options = {"depth": depth} if model.model.takes_depth else {}
    for step in range(figures.max_steps):
        before = carry.latents
        carry, _, _, preds, _ = model(
            return_keys=sorted(wanted), carry=carry, batch=batch, **options
        )
        figures.add_step(step, preds)
        for key, name in stepped.items():
            if (value := _of_step(name, preds, before, carry.latents, batch)) is not None:
                curves[key].append(value)
        end_step()
    figures.add_end(preds)
    preds |= {key: torch.stack(values, dim=1) for key, values in curves.items() if values}
    end_step()
    return preds


def _of_step(name: str, preds: Batch, before: Batch, after: Batch, batch: Batch) -> Tensor | None:
    """Return one output after a step, by name; before and after: the latents."""
    if name == "row_nll":
        return preds.get("unrefined_token_nll", preds["token_nll"]).sum(-1)
    if name == REASONING:
        return preds["reasoning_logits"].argmax(-1) if "reasoning_logits" in preds else None
    if name.endswith(CHANGE):
        if (latent := name.removesuffix(CHANGE)) not in after:
            return None
        old, new = before[latent], after[latent]
        scored = (batch["labels"] != IGNORE_LABEL_ID).float()
        moved = (new.float() - old.float()).norm(dim=-1)[:, -scored.shape[1] :]
        return (moved * scored).sum(-1) / scored.sum(-1).clamp_min(1)
    return preds.get(name)


def evaluate(
    model,
    stream: Iterable,
    evaluators: Sequence[Evaluator],
    backend: Backend,
    *,
    received: Sequence[int],
    save_outputs: Sequence[str],
    save_path: Path,
    ask: Callable[[Group], LanguageModel],
    depth: int,
    depths: Sequence[int],
) -> dict[str, Any]:
    """Return <set>/<metric>, <set>/step_<k>/<metric>, <set>/hist/<metric> (row counts) and each
    evaluator's figures; the same on all ranks.

    depth: ACT steps or loops of every row. depths: additional depths, whose figures are named
    depth_<d>/. received: signals received so far; any raises Interrupted. save_outputs: names of
    outputs and data to save below `save_path`. ask: builds the model for evaluators with inputs of
    their own. If `eval_halting` is budget or act, the depth at which a token is scored depends on
    the whole row, including later tokens; the names of those figures contain the rule.
    """
    guarded = Guarded(evaluators, backend, received)
    steps = 1 if model.model.takes_depth else depth
    dtype = model.model.config.dtype
    keys = guarded.begin() | set(save_outputs)
    sets: dict[str, SetFigures] = {}
    saved: dict[str, list[Tensor]] = {}
    was_training = model.training
    model.eval()
    try:
        for set_name, batch, _ in backend.batches(stream):
            interrupt_if_asked(received, backend)
            if set_name not in sets:
                sets[set_name] = SetFigures(steps, backend.device, dtype)
                sets[set_name].depths = {d: SetFigures(1, backend.device, dtype) for d in depths}
            preds = run_batch(model, batch, keys, depth, sets[set_name], backend.end_step)
            for d, figures in sets[set_name].depths.items():
                figures.add_rows(model.score_at(batch, d))
                backend.end_step()
            guarded.update(batch, preds)
            for name in save_outputs:
                if (value := preds.get(name, batch.get(name))) is not None:
                    saved.setdefault(name, []).append(value.cpu())
        if missing := sorted(set(save_outputs) - set(saved)):
            warnings.warn(f"eval_save_outputs: there is no {', '.join(missing)}", stacklevel=2)
        if saved:
            save_predictions(saved, save_path, backend.rank)
        guarded.examine(ask)
    finally:
        model.train(was_training)
    results = {
        f"{set_name}/{name}": value
        for set_name, of_set in sets.items()
        for name, value in of_set.read(backend.sum).items()
    }
    results |= guarded.results(str(save_path))
    if (prefix := model.model.row_depth) is not None:
        results = {
            name if name == FAILURES or "/depth_" in name else f"{prefix}/{name}": value
            for name, value in results.items()
        }
    return results


def save_predictions(saved: dict[str, list[Tensor]], folder: Path, rank: int) -> None:
    path = folder / f"predictions_rank{rank}.pt"
    try:
        with write_atomically(path) as part:
            save_tensors({name: torch.cat(parts) for name, parts in saved.items()}, part)
    except OSError as error:
        notify(f"warning: {path} could not be written ({error}); the run continues without it")


def create_evaluators(named: Sequence[Any], data: Data) -> list[Evaluator]:
    """Create the configured evaluators for the first evaluated corpus.

    Called before training, so that mistakes in their options are reported immediately. If there is
    no test split, evaluators that read its rows are skipped.
    """
    split = data.train if data.test is None else data.test
    made = [
        load_class(entry.name, "evaluators.")(data.test_paths[0], split.metadata, **entry.options)
        for entry in named
    ]
    return [one for one in made if data.test is not None or not getattr(one, "reads_rows", True)]
