"""Counts what would make the host wait for a GPU, in real runs on the CPU.

Operations whose result's shape or value the host must know, copies to the host, and copies from it
that are not prepared by `Backend.to_device`. It cannot tell a tensor that is on the host anyway.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from utils.backend.cpu import CPUBackend

DATA_DEPENDENT = frozenset(
    "_local_scalar_dense nonzero _unique _unique2 unique_dim unique_consecutive masked_select "
    "equal bincount repeat_interleave".split()
)
INDEXING = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index".split())
TO_HOST = frozenset({Tensor.cpu, Tensor.tolist, Tensor.__array__})
FROM_HOST = frozenset({torch.tensor, torch.as_tensor, torch.asarray})


class HostWaits:
    """Count waits by name, apart for each stretch between two calls of `mark`, while entered.

    operations: names of all operations that ran.
    """

    def __init__(self) -> None:
        self.stretches = [Counter[str]()]
        self.operations: set[str] = set()
        self._paused = False
        self._modes = (_Calls(self.note), _Operations(self.note, self.operations))

    def __enter__(self) -> "HostWaits":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, name: str) -> None:
        if not self._paused:
            self.stretches[-1][name] += 1

    def mark(self) -> None:
        self.stretches.append(Counter())

    def total(self) -> Counter[str]:
        return sum(self.stretches, Counter[str]())

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before


class _Calls(TorchFunctionMode):
    """Sees what a CPU tensor does without an operation, such as `tolist`."""

    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        moves = (
            function is Tensor.to
            and any(isinstance(x, torch.device | str) for x in (*args[1:], kwargs.get("device")))
            and "site-packages" not in sys._getframe(1).f_code.co_filename  # moves within a device
        )
        if function in TO_HOST or moves or (function in FROM_HOST and kwargs.get("device")):
            self.note(function.__name__)
        return function(*args, **kwargs)


class _Operations(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None], seen: set[str]):
        super().__init__()
        self.note, self.seen = note, seen

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        self.seen.add(name)
        masked = name in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masked or (name in DATA_DEPENDENT and not _reads_step_count()):
            self.note(f"{name} by a mask" if masked else name)
        return operation(*args, **(kwargs or {}))


def _reads_step_count() -> bool:
    """torch's optimizers count steps in a tensor that stays on the host."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("torch/optim/optimizer.py"):
            return frame.f_code.co_name == "_get_value"
        frame = frame.f_back
    return False


class CountingBackend(CPUBackend):
    """The CPU, on which steps are counted apart and `to_host` is the one wait that is meant."""

    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def to_host(self, tensor: Tensor) -> np.ndarray:
        self.waits.note("to_host")
        with self.waits.paused():
            return super().to_host(tensor)

    def to_device(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        with self.waits.paused():  # on a GPU from pinned memory, beside what it does
            return super().to_device(batch)

    def end_step(self) -> None:
        self.waits.mark()
