"""Report which rank delays a step, and where, if a step takes many times the median.

Ranks wait for each other in collectives, so when one hangs, all look the same from outside.
Therefore a thread of each rank posts the position of its main thread to a board that all ranks can
read, and the lowest rank that responds reports the ranks that are not waiting for others.
"""

import json
import statistics
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from utils.backend import Backend
from utils.core.clock import Clock
from utils.core.console import notify

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 30.0  # shorter steps are never reported
STALLED = 4  # exit status of a run that was ended because it made no progress
_KNOWN = 5  # steps before the median is used, because the first ones compile
_REPORT = 3.0  # seconds for the other ranks to post their positions
_SPEAK = 20.0  # time limit of a report in seconds, because its output may block, too


class Place(NamedTuple):
    """The position of a rank. waits: whether it is inside a backend, where it waits for other ranks
    or for its device.
    """

    step: int
    where: str
    waits: bool
    time: float


class Watchdog:
    """Context manager that watches the steps of this rank from a thread.

    factor: a step that takes this many times the median is reported. timeout: seconds without
    progress after which the process ends with status STALLED; None for never.
    """

    def __init__(self, backend: Backend, clock: Clock, factor: float, timeout: float | None):
        self.backend, self.clock, self.factor, self.timeout = backend, clock, factor, timeout
        self._main = threading.get_ident()
        self._durations: deque[float] = deque(maxlen=50)
        self._step, self._began = 0, clock.seconds
        self._sign = time.monotonic()
        self._told = 0.0  # seconds into the current step at the last warning
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join(_SPEAK)

    def beat(self, step: int) -> None:
        """Record that a step is finished."""
        now = self.clock.seconds
        self._durations.append(now - self._began)
        self._step, self._began, self._told = step, now, 0.0
        self.sign()

    def sign(self) -> None:
        """Record progress other than a step, such as a batch of an evaluation."""
        self._sign = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, LEAST_SECONDS / 4)):
            durations, taken = list(self._durations), self.clock.seconds - self._began
            silent = time.monotonic() - self._sign
            if self.timeout is not None and silent > self.timeout:
                self._report(f"error: no sign of life for {silent:.0f} s in step {self._step + 1}")
                self.backend.end_now(STALLED)
            if len(durations) < _KNOWN:
                continue
            usual = statistics.median(durations)
            if taken < max(LEAST_SECONDS, self.factor * usual, 2 * self._told):
                continue
            self._told = taken
            self._report(
                f"warning: step {self._step + 1} has taken {taken:.0f} s, usually {usual:.2g} s"
            )

    def _report(self, headline: str) -> None:
        """Report the positions of all ranks, unless a lower rank does, until the output blocks."""
        speaker = threading.Thread(target=self._speak, args=(headline,), daemon=True)
        speaker.start()
        speaker.join(_SPEAK)

    def _speak(self, headline: str) -> None:
        own = self._place()
        self.backend.board.post(f"watchdog/{self.backend.rank}", json.dumps(own))
        time.sleep(_REPORT)
        places: dict[int, Place] = {self.backend.rank: own}
        for rank in range(self.backend.world_size):
            text = self.backend.board.read(f"watchdog/{rank}")
            if text is not None and time.time() - (place := Place(*json.loads(text))).time < 60:
                places[rank] = place
        if min(places) == self.backend.rank:
            with suppress(OSError):  # the reader may be gone
                on_device = self.backend.device.type != "cpu"
                notify(f"{headline}; {describe(places, self.backend.world_size, on_device)}")

    def _place(self) -> Place:
        """Return the position of the main thread: its innermost frame in Athena, outside the
        backend.
        """
        frame, waits = sys._current_frames().get(self._main), None
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
                backend = path.parent.name == "backend"
                waits = backend if waits is None else waits
                if not backend:
                    return Place(self._step + 1, _name(frame, path), waits, time.time())
            frame = frame.f_back
        return Place(self._step + 1, "code outside Athena", bool(waits), time.time())


def _name(frame: FrameType, path: Path) -> str:
    return f"{path.relative_to(ROOT)}:{frame.f_lineno} ({frame.f_code.co_name})"


def describe(places: dict[int, Place], world_size: int, on_device: bool = False) -> str:
    """Describe in one sentence which ranks do not answer, which delay the others, and the position
    of each.

    on_device: whether ranks compute on devices; waiting for a collective then looks the same as
    waiting for the device.
    """
    awaited = ["other ranks"] * (world_size > 1) + ["its device"] * on_device
    silent = [rank for rank in range(world_size) if rank not in places]
    busy = {rank: place for rank, place in places.items() if not place.waits}
    behind = min((place.step for place in places.values()), default=0)
    late = busy or {rank: place for rank, place in places.items() if place.step == behind}
    parts = []
    if silent:
        parts.append(f"rank {_listed(silent)} does not answer: it stopped, or its machine is down")
    if not silent and len(late) < world_size:
        parts.append(f"rank {_listed(sorted(late))} holds up the others")
    by_place: dict[str, list[int]] = {}
    for rank, place in sorted(places.items()):
        verb = f"waits for {' or '.join(awaited)}" if place.waits and awaited else "is"
        by_place.setdefault(f"{verb} at {place.where}, step {place.step}", []).append(rank)
    parts += [f"rank {_listed(ranks)} {where}" for where, ranks in by_place.items()]
    return "; ".join(parts)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
