"""Isolate evaluators, so that the run continues if one of them fails on some or all ranks.

Every collective of an evaluator goes through `Group`, which notices ranks that have dropped out, so
that the others do not wait for them.
"""

import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from evaluators.interface import Batch, Evaluator
from models.inference.language_model import LanguageModel
from utils.backend import Backend
from utils.backend.determinism import allow_any_algorithm
from utils.core.errors import UserError

T = TypeVar("T")
FAILURES = "evaluators_failed"


class Interrupted(Exception):
    """A rank received a signal that asks the run to stop; all ranks raise it together."""

    def __init__(self, signal: int):
        super().__init__(signal)
        self.signal = signal


def interrupt_if_asked(received: Sequence[int], backend: Backend) -> None:
    """Raise Interrupted on all ranks if one of them received a signal. A collective."""
    stop = received[0] if received else 0
    if backend.world_size > 1:
        number = backend.to_device({"stop": np.array([stop])})["stop"]
        stop = int(backend.to_host(backend.all_gather(number)).max())
    if stop:
        raise Interrupted(stop)


class PeerFailed(Exception):
    """Another rank has left the evaluator that this rank is still running."""


class Group:
    """The collectives that evaluators use; if one rank fails, the others do not wait for it."""

    def __init__(self, backend: Backend, received: Sequence[int] = ()):
        self.backend, self.received = backend, received

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's value, on every rank."""
        parts = self.backend.gather_objects((True, value))
        if not all(inside for inside, _ in parts):
            raise PeerFailed
        return [part for _, part in parts]

    def pause(self) -> None:
        """Raise Interrupted on all ranks if one received a signal. Call this between requests."""
        if stop := max(self.gather_objects(self.received[0] if self.received else 0)):
            raise Interrupted(stop)

    def wait_for_others(self) -> None:
        """Wait until every rank has left the evaluator."""
        while any(inside for inside, _ in self.backend.gather_objects((False, None))):
            pass


class Guarded:
    """Run evaluators; if one fails, the run continues and no other rank waits for it."""

    def __init__(
        self, evaluators: Sequence[Evaluator], backend: Backend, received: Sequence[int] = ()
    ):
        self.evaluators, self.backend, self.received = evaluators, backend, received
        self.faults: dict[int, str] = {}  # on this rank, by position in the list

    def _try(self, place: int, act: Callable[..., T], *args: Any) -> T | None:
        if place in self.faults:
            return None
        try:
            return act(*args)
        except Interrupted:
            return None  # raised once every rank has left the evaluator
        except PeerFailed:
            self.faults[place] = ""  # the other rank reports it
            return None
        except UserError as error:
            self.faults[place] = str(error)
            return None
        except Exception as error:  # a plug-in may raise anything
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.faults[place] = (
                f"{type(error).__name__}: {error} ({where.filename}:{where.lineno}, rank "
                f"{self.backend.rank})"
            )
            return None

    def begin(self) -> set[str]:
        """Reset the evaluators; return the outputs they need."""
        keys: set[str] = set()
        for place, evaluator in enumerate(self.evaluators):
            self._try(place, evaluator.begin_eval)
            keys.update(evaluator.required_outputs)
        return keys

    def update(self, batch: Batch, preds: Batch) -> None:
        with allow_any_algorithm():  # evaluators do not change the weights
            for place, evaluator in enumerate(self.evaluators):
                self._try(place, evaluator.update_batch, batch, preds)

    def examine(self, ask: Callable[[Group], LanguageModel]) -> None:
        """Call `examine` of the evaluators that define it. Raises Interrupted on all ranks
        together.
        """
        self._share_faults()
        for place, evaluator in enumerate(self.evaluators):
            if (examine := getattr(evaluator, "examine", None)) is None:
                continue
            group = Group(self.backend, self.received)
            self._try(place, lambda examine=examine, group=group: examine(ask(group), group))
            group.wait_for_others()
            interrupt_if_asked(self.received, self.backend)

    def results(self, save_path: str | None) -> dict[str, Any]:
        """Return the figures of all evaluators and the number that failed on any rank, with a
        warning for each failure.
        """
        backend, figures = self.backend, list[dict[str, Any]]()
        self._share_faults()
        for place, evaluator in enumerate(self.evaluators):
            group = Group(backend)
            with allow_any_algorithm():
                own = self._try(
                    place, evaluator.result, save_path, backend.rank, backend.world_size, group
                )
            group.wait_for_others()
            figures.append(backend.broadcast_object(self._try(place, _checked, own) or {}))
        self._share_faults()
        for place, fault in sorted(self.faults.items()):
            name = type(self.evaluators[place]).__name__
            why = fault or "its ranks called gather_objects a different number of times"
            backend.report(f"warning: evaluator {name} failed, its figures are missing: {why}")
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
        if hasattr(value, "tolist"):  # from NumPy or PyTorch
            value = value.tolist()
        if not isinstance(value, int | float | list):
            raise TypeError(f"the figure {name} is {value!r}, which is not a number")
        found[name] = value
    return found
