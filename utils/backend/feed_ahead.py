"""`feed=present` with batches on the device before they are asked for.

Under `present` every step is a full new batch, whatever has halted, so batches can be read and
moved ahead. Where the run stands is still the batch used last, not the one moved last: two streams
walk the same way, one that reads, and one that only says where the run stands.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

Moved = Callable[[Iterator[Any]], Iterator[Any]]


class PresentAhead:
    """A `TrainStream` under `present` whose batches are tensors on the device.

    Args:
        reader: the stream that is read, in the mover's thread.
        place: a stream over the same that stands where the run does.
        prefetch_to_device: yields the items of an iterator with their tensors on the device.
    """

    def __init__(self, reader: Any, place: Any, prefetch_to_device: Moved):
        self._reader, self._place, self._prefetch_to_device = reader, place, prefetch_to_device
        self._batches: Iterator[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        """Position, progress and what a checkpoint keeps are those of the batch used last."""
        return getattr(self._place, name)

    def next(self, step: int, halted: np.ndarray) -> list[dict[str, torch.Tensor]] | None:
        """As `TrainStream.next`; `step` must be the one after the last."""
        if self._batches is None:
            self._reader.load_state_dict(self._place.state_dict())
            self._batches = self._prefetch_to_device(self._read(step, np.zeros_like(halted)))
        batches = next(self._batches, None)
        if batches is None:
            return None
        drawn_for, moved = batches
        assert drawn_for == step, f"step {step} asks for the batch of step {drawn_for}"
        self._place.skip_batch(halted)
        return moved

    def _read(self, step: int, halted: np.ndarray) -> Iterator[Any]:
        while (batches := self._reader.next(step, halted)) is not None:
            yield step, [{k: torch.from_numpy(v) for k, v in batch.items()} for batch in batches]
            step += 1

    def load_state_dict(self, state: dict[str, Any], *, restart_held: bool = False) -> None:
        self._drop()
        self._place.load_state_dict(state, restart_held=restart_held)

    def close(self) -> None:
        self._drop()
        self._reader.close()
        self._place.close()

    def _drop(self) -> None:
        if self._batches is not None:
            self._batches.close()  # type: ignore[attr-defined]  # a generator
            self._batches = None
