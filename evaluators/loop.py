"""One evaluation: every row of a split, a fixed number of ACT steps, metrics over all ranks."""

import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from utils.backend import Backend
from utils.data import Data
from utils.functions import load_class
from utils.reporting import tell

Batch = dict[str, Tensor]
T = TypeVar("T")


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

    def __init__(self, max_steps: int, device: torch.device, dtype: torch.dtype):
        self.max_steps = max_steps
        # A tensor for each step, and zeros from the host: to XLA every index is another program,
        # and so is a sum with a constant, which zeros made there are.
        least = torch.float64 if device.type == "cpu" else torch.float32  # not all devices have it
        wide = torch.promote_types(dtype, least)
        self.curve = [torch.zeros(len(self.CURVE), dtype=wide).to(device) for _ in range(max_steps)]
        self.rows = torch.zeros(1).to(device)
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


class Interrupted(Exception):
    """A rank received a signal that asks the run to stop; all ranks raise it together."""

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal


FAILURES = "evaluators_failed"


class PeerFailed(Exception):
    """Another rank has left the evaluator that this one is in."""


class Group:
    """The ranks, as an evaluator's `result` sees them: where one fails, none waits for it."""

    def __init__(self, backend: Backend):
        self.backend = backend

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        parts = self.backend.gather_objects((True, value))
        if not all(inside for inside, _ in parts):
            raise PeerFailed
        return [part for _, part in parts]

    def leave(self) -> None:
        """Returns when no rank is inside `result` any more."""
        while any(inside for inside, _ in self.backend.gather_objects((False, None))):
            pass


class Guarded:
    """Evaluators, of which one may fail without ending the run or leaving other ranks waiting."""

    def __init__(self, evaluators: Sequence[Evaluator], backend: Backend):
        self.evaluators, self.backend = evaluators, backend
        self.faults: dict[int, str] = {}  # on this rank, by place

    def _try(self, place: int, act: Callable[..., T], *args: Any) -> T | None:
        if place in self.faults:
            return None
        try:
            return act(*args)
        except PeerFailed:
            self.faults[place] = ""  # the other rank tells
            return None
        except Exception as error:  # a plug-in may raise anything
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.faults[place] = (
                f"{type(error).__name__}: {error} ({where.filename}:{where.lineno}, rank "
                f"{self.backend.rank})"
            )
            return None

    def begin(self) -> set[str]:
        """The outputs that they need."""
        keys: set[str] = set()
        for place, evaluator in enumerate(self.evaluators):
            self._try(place, evaluator.begin_eval)
            keys.update(evaluator.required_outputs)
        return keys

    def update(self, batch: Batch, preds: Batch) -> None:
        for place, evaluator in enumerate(self.evaluators):
            self._try(place, evaluator.update_batch, batch, preds)

    def results(self, save_path: str | None) -> dict[str, Any]:
        """Their figures; of those that failed on any rank a warning, and how many they are."""
        backend, figures = self.backend, list[dict[str, Any]]()
        self._share_faults()
        for place, evaluator in enumerate(self.evaluators):
            group = Group(backend)
            own = self._try(
                place, evaluator.result, save_path, backend.rank, backend.world_size, group
            )
            group.leave()
            figures.append(backend.broadcast_object(self._try(place, _checked, own) or {}))
        self._share_faults()
        for place, fault in sorted(self.faults.items()):
            if backend.is_main:
                name = type(self.evaluators[place]).__name__
                why = fault or "its ranks did not gather the same number of times"
                tell(f"warning: evaluator {name} failed, its figures are missing: {why}")
        sound = (found for place, found in enumerate(figures) if place not in self.faults)
        found = {name: value for of_one in sound for name, value in of_one.items()}
        if self.faults:
            found[FAILURES] = len(self.faults)
        return found

    def _share_faults(self) -> None:
        for faults in self.backend.gather_objects(self.faults):
            for place, fault in faults.items():
                self.faults[place] = self.faults.get(place) or fault


def _checked(figures: dict[str, Any] | None) -> dict[str, Any]:
    found = {}
    for name, value in (figures or {}).items():
        if hasattr(value, "tolist"):  # of numpy or torch
            value = value.tolist()
        if not isinstance(value, int | float | list):
            raise TypeError(f"the figure {name} is {value!r}, which is no number")
        found[name] = value
    return found


def interrupt_if_asked(received: Sequence[int], backend: Backend) -> None:
    """Raises Interrupted on all ranks if one of them received a signal. A collective."""
    number = torch.tensor([received[0] if received else 0], device=backend.device)
    if stop := int(backend.to_host(backend.all_gather(number)).max()):
        raise Interrupted(stop)


def evaluate(
    model,
    stream: Iterable,
    evaluators: Sequence[Evaluator],
    backend: Backend,
    *,
    received: Sequence[int] = (),
    save_outputs: Sequence[str] = (),
    save_path: Path | None = None,
) -> dict[str, Any]:
    """<set>/<metric>, <set>/step_<k>/<metric>, <set>/hist/<metric> (row counts) and each
    evaluator's figures; the same on all ranks.

    received: numbers of signals that ask to stop, which raise Interrupted. Under `eval_halting`
    budget or act the depth at which a token is scored depends on the whole row, later tokens
    included: the names of those figures carry the rule.
    """
    was_training = model.training
    model.eval()
    try:
        guarded = Guarded(evaluators, backend)
        figures = run_all(model, stream, guarded, backend, received, save_outputs, save_path)
        results = {
            f"{set_name}/{name}": value
            for set_name, of_set in figures.items()
            for name, value in of_set.read(backend.sum).items()
        }
        results |= guarded.results(None if save_path is None else str(save_path))
    finally:
        model.train(was_training)
    halting = getattr(model.model.config, "eval_halting", "max")
    if halting in ("budget", "act"):
        results = {
            name if name == FAILURES else f"{halting}/{name}": value
            for name, value in results.items()
        }
    return results


def run_all(
    model,
    stream: Iterable,
    guarded: Guarded,
    backend: Backend,
    received: Sequence[int],
    save_outputs: Sequence[str],
    save_path: Path | None,
) -> dict[str, SetFigures]:
    """Every batch through the model, to the evaluators, and to the disk what is to be saved."""
    max_steps = getattr(model.model.config, "max_eval_steps", 1)
    keys = guarded.begin() | set(save_outputs)
    sets: dict[str, SetFigures] = {}
    saved: dict[str, list[Tensor]] = {}
    for set_name, batch, _ in backend.batches(stream):
        interrupt_if_asked(received, backend)
        if set_name not in sets:
            sets[set_name] = SetFigures(max_steps, backend.device, model.model.config.dtype)
        preds = run_batch(model, batch, keys, max_steps, sets[set_name], backend.end_step)
        guarded.update(batch, preds)
        for name in save_outputs:
            if (value := preds.get(name, batch.get(name))) is not None:
                saved.setdefault(name, []).append(value.cpu())
    if missing := sorted(set(save_outputs) - set(saved)):
        warnings.warn(f"eval_save_outputs: there is no {', '.join(missing)}", stacklevel=2)
    if saved and save_path is not None:
        save_predictions(saved, save_path, backend.rank)
    return sets


def save_predictions(saved: dict[str, list[Tensor]], folder: Path, rank: int) -> None:
    path = folder / f"predictions_rank{rank}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({name: torch.cat(parts) for name, parts in saved.items()}, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        path.unlink(missing_ok=True)
        tell(f"warning: {path} could not be written ({error}); the run goes on without it")


def create_evaluators(named: Sequence[Any], data: Data) -> list[Evaluator]:
    """One of each configured evaluator, on the first of the evaluated corpora.

    Made before training, so that one that cannot be made is known before hours are spent.
    """
    if data.test is None:
        return []
    path, metadata = data.test_paths[0], data.test.metadata
    return [
        load_class(entry.name, "evaluators.")(path, metadata, **entry.options) for entry in named
    ]
