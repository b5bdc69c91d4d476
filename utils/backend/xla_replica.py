"""One replica on PyTorch/XLA: a core of a TPU, or XLA's own CPU.

Operations on XLA tensors are deferred, and run as one compiled program when `torch_xla.sync` is
called. A training step is two programs: everything up to the values that the host reads
(`to_host`), and the update (`end_step`). A program is compiled once for each set of shapes and
constants.
"""

import logging
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.backend.base import Backend
from utils.backend.memory import free_host_memory
from utils.backend.process import Received
from utils.core.atomic import write_atomically
from utils.core.errors import UserError

T = TypeVar("T")

# Dense bfloat16 FLOP/s of one device by part of its kind (Google's published figures; on v2 and v3
# a device is a core, on later ones a chip). The first match is used.
_BF16_PEAK = {
    "v6 lite": 918e12,
    "v5 lite": 197e12,
    "v5": 459e12,
    "v4": 275e12,
    "v3": 61.5e12,
    "v2": 22.5e12,
}
COMPILES_ITSELF = "XLA compiles every model itself"
_TURN = threading.Lock()  # replicas may be threads of one process


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, so that other processes never read a partial one."""
    with write_atomically(path) as part:
        part.write_bytes(content)


class SignalFile(Sequence[int]):
    """The number of the signal that the parent process received; empty until then."""

    def __init__(self, path: Path):
        self.path = path

    def __len__(self) -> int:
        return int(self.path.exists())

    def __getitem__(self, index):
        return [int(path.read_text("utf-8")) for path in [self.path] if path.exists()][index]


class Replica(Backend):
    """One replica, in the process or thread that `torch_xla.launch` started for it.

    folder: directory where the parent process announces signals; None without such a parent.
    """

    name = "xla"

    def __init__(self, folder: Path | None = None) -> None:
        import torch_xla
        import torch_xla.backends
        import torch_xla.core.xla_model as xm
        import torch_xla.runtime as xr

        self.xla, self.xm, self.folder = torch_xla, xm, folder
        self.device = torch_xla.device()
        self.rank, self.local_rank = xr.global_ordinal(), xr.local_ordinal()
        self.world_size, self.local_world_size = xr.world_size(), xr.local_device_count()
        self.hardware = xm.xla_device_hw(self.device)
        # By default a TPU multiplies float32 in bfloat16. The call warns each time.
        logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)
        torch_xla.backends.set_mat_mul_precision("highest")

    def describe(self) -> str:
        return f"{self.device} on {self.hardware}"

    def launch(self, fn: Callable[..., T], *args: Any) -> T:
        return fn(self, *args)

    def cannot_compile(self) -> str | None:
        return COMPILES_ITSELF

    def end_now(self, status: int) -> NoReturn:
        if self.folder is not None:  # otherwise the parent would not see the message
            write_whole(self.folder / f"outcome_{self.rank:06}", pickle.dumps(("status", status)))
        os._exit(status)

    def wrap(self, model: nn.Module, parallel: str = "ddp") -> nn.Module:
        if parallel != "ddp":
            raise UserError(f"parallel={parallel} does not run on XLA devices; use parallel=ddp")
        if self.world_size > 1:  # broadcast rank 0's weights, as DistributedDataParallel does
            self.xm.broadcast_master_param(model)
        return model

    def reduce_gradients(self, optimizers: Sequence[Optimizer]) -> None:
        # Averages over replicas, which become sums because `backward` scales the loss.
        for optimizer in optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if any(
                p.grad is not None for p in parameters
            ):  # identifier gradients are summed elsewhere
                self.xm.reduce_gradients(optimizer)

    def end_step(self) -> None:
        self.xla.sync()

    def to_host(self, tensor: Tensor) -> np.ndarray:
        try:
            # Run everything pending first: reading a tensor runs only the operations that it
            # depends on, and others that depend on these would run them a second time.
            self.xla.sync()
            return tensor.cpu().numpy()
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    def one_rank_at_a_time(self) -> AbstractContextManager:
        return _TURN

    def batches(
        self, stream: Iterable[tuple[str, dict[str, Any], int]]
    ) -> Iterator[tuple[str, dict[str, Tensor], int]]:
        """Move batches with MpDeviceLoader, two ahead of their use.

        The loader reads `stream` in a thread and would treat an error there as the end of the
        stream, so errors are raised here.
        """
        from torch_xla.distributed.parallel_loader import MpDeviceLoader

        failures: list[BaseException] = []

        def read() -> Iterator[tuple[str, dict[str, Tensor], int]]:
            try:
                for name, batch, count in stream:
                    yield name, {k: torch.from_numpy(v) for k, v in batch.items()}, count
            except BaseException as error:
                failures.append(error)

        # batches_per_execution: otherwise the loader runs pending operations with every item
        loader = MpDeviceLoader(
            read(),
            self.device,
            loader_prefetch_size=2,
            device_prefetch_size=2,
            batches_per_execution=1 << 62,
        )
        batches = iter(loader)
        try:
            yield from batches
        finally:
            loader._parallel_loader.close()
        if failures:
            raise failures[0]

    def signals(self) -> AbstractContextManager[Received]:
        if self.folder is None:
            return super().signals()
        return nullcontext(SignalFile(self.folder / "signal"))

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.xm.all_gather(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        return self.xm.all_reduce(self.xm.REDUCE_SUM, tensor)

    def broadcast_object(self, value: T) -> T:
        if self.world_size == 1:
            return value
        return self._exchange(value if self.is_main else None)[0]

    def gather_objects(self, value: T) -> list[T]:
        return [value] if self.world_size == 1 else self._exchange(value)

    def _exchange(self, value: Any) -> list[Any]:
        """Return every replica's value."""
        payload = pickle.dumps(value)
        # Padded to a few lengths, because each length needs another program. Unpickling ignores the
        # padding.
        padded = payload.ljust(1 << max(10, len(payload).bit_length()), b"\0")
        return [pickle.loads(part) for part in self.xm.rendezvous("objects", padded)]

    def available_memory(self) -> int:
        memory = self._memory()
        if memory is None:
            return free_host_memory() // self.local_world_size
        return memory["bytes_limit"] - memory["bytes_used"]

    def memory_bytes(self) -> int | None:
        memory = self._memory()
        return super().memory_bytes() if memory is None else memory.get("peak_bytes_used")

    def _memory(self) -> dict[str, int] | None:
        """Return the device's memory statistics; None on XLA's own CPU, which has none."""
        return self.xm.get_memory_info(self.device) if self.hardware == "TPU" else None

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        if dtype != torch.bfloat16 or self.hardware != "TPU":
            return None
        kind = self.xm.xla_device_kind(self.device)
        return next((peak for part, peak in _BF16_PEAK.items() if part in kind), None)
