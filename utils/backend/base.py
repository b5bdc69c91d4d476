"""The interface to devices: where tensors are stored, and how ranks communicate.

`Backend` handles a single process and, under torchrun, a process group of torch.distributed; its
subclasses define the device and the collective library. Only this package imports
torch.distributed.
"""

import gc
import inspect
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from utils.backend.board import Board, connect_store
from utils.backend.memory import free_host_memory, peak_host_memory
from utils.backend.process import Received, catch_stop_signals, end_with_launcher
from utils.backend.state import is_sharded_model, shard
from utils.core.console import notify
from utils.core.errors import UserError

T = TypeVar("T")

_launches = itertools.count()


class Backend:
    """One rank's device, and its connection to the other ranks."""

    name = "cpu"
    capability: tuple[int, int] = (0, 0)
    """Compute capability of an NVIDIA GPU."""
    compiles_by_default = False
    tries_sizes = False
    """Whether `micro_batch_size=auto` may run a trial, because running out of memory raises an
    error. On the CPU the system would swap or kill the process instead.
    """
    launch_number = 0
    """Number of runs that this process launched before this one."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(self.name)

    # --- the process and its device

    @classmethod
    def missing(cls) -> str | None:
        """Return the reason why this device cannot be used here; None if it can."""
        return None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def report(self, message: str) -> None:
        """Print `message` on rank 0."""
        if self.is_main:
            notify(message)

    def describe(self) -> str:
        """Return the name of the device for messages."""
        return str(self.device)

    def launch(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn(backend, *args)` as this rank, inside a process group if there are several."""
        end_with_launcher()
        self.forget_earlier_runs()
        self.launch_number = next(_launches)
        if self.world_size == 1:
            return fn(self, *args)
        # Long, because rank 0 may download for hours while others wait; the watchdog ends a
        # training step that hangs.
        timeout = timedelta(hours=6)
        options = self.group_options()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The launcher's store outlives its workers: restarted ones would read the addresses
            # of dead ranks.
            store = connect_store(self.launch_number, timeout)
            options |= dict(store=store, rank=self.rank, world_size=self.world_size)
        dist.init_process_group(timeout=timeout, **options)
        result = fn(self, *args)
        dist.destroy_process_group()  # not after a failure: it would wait for the others
        return result

    def group_options(self) -> dict[str, Any]:
        """Return arguments of `init_process_group`."""
        return {"backend": "gloo"}

    def release_memory(self) -> None:
        """Return unused memory to the device."""
        gc.collect()

    def forget_earlier_runs(self) -> None:
        """Drop compiled programs and other state of earlier runs of a sweep in this process."""
        self.release_memory()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # it stops compiling a function after a number of shapes
        with suppress(OSError):  # on Linux this resets the peak that getrusage reports
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def end_now(self, status: int) -> NoReturn:
        """End this process from a thread, even if its main thread is blocked."""
        os._exit(status)

    def signals(self) -> AbstractContextManager[Received]:
        """Collect the numbers of signals that ask the run to stop."""
        return catch_stop_signals(announce=self.is_main)

    def one_rank_at_a_time(self) -> AbstractContextManager:
        """Exclude other ranks of this process within the context, which draws random numbers."""
        return nullcontext()

    def available_memory(self) -> int:
        """Return the bytes that this rank may still allocate on its device."""
        return free_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    def memory_bytes(self) -> int | None:
        """Return the peak memory on this rank's device since the run began; None if not known."""
        return peak_host_memory()

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Return the dense matrix FLOP/s of the device in `dtype`; None if not known."""
        return None

    def usable_dtype(self, name: str) -> str:
        """Return the dtype for activations: `name`, or a replacement if the device does not support
        it.
        """
        return name

    def compiles(self, wanted: bool | Literal["auto"]) -> bool:
        """Return whether models are compiled on this device; `auto`: its default."""
        if not (self.compiles_by_default if wanted == "auto" else wanted):
            return False
        return self.cannot_compile() is None

    def cannot_compile(self) -> str | None:
        """Return the reason why torch.compile does not work on this device; None if it works."""
        named = os.environ.get("CXX", "")
        if any(shutil.which(name) for name in (named, "g++", "clang++")):
            return None
        return "it needs a C++ compiler, but neither g++ nor clang++ is installed"

    def set_deterministic(self, wanted: bool) -> None:
        """Make operations deterministic on devices where they are not by default.

        Operations without a deterministic implementation then raise a RuntimeError; see
        `explain_nondeterminism`.
        """

    def set_matmul_precision(self, wanted: str) -> None:
        """Set the precision of float32 matrix products on devices with several: `highest` or
        `high`.
        """

    # --- tensors and steps

    def to_device(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Move arrays to the device."""
        return {k: torch.from_numpy(v).to(self.device) for k, v in batch.items()}

    def to_host(self, tensor: Tensor) -> np.ndarray:
        """Copy a tensor to the host, which waits for the device."""
        return tensor.cpu().numpy()

    def batches(
        self, stream: Iterable[tuple[str, dict[str, Any], int]]
    ) -> Iterator[tuple[str, dict[str, Tensor], int]]:
        """Yield the batches of an evaluation, moved to the device."""
        return ((name, self.to_device(batch), count) for name, batch, count in stream)

    def end_step(self) -> None:
        """Mark the end of a step; devices that defer operations run them here."""

    # --- gradients of several ranks

    def wrap(self, model: nn.Module, parallel: str = "ddp") -> nn.Module:
        """Return the module to call in training; its backward pass sums gradients over ranks.

        parallel: `ddp` keeps whole weights on every rank, `fsdp` a shard of each.
        """
        if self.world_size == 1:
            return model
        if parallel == "fsdp":
            return shard(model, self.device.type, self.world_size)
        # Otherwise compiled blocks are split at DDP's bucket boundaries to reduce gradients early,
        # which does not help here: blocks applied many times get their gradients only at the end.
        torch._dynamo.config.optimize_ddp = False
        # The only buffer that changes is the identifier embedding, equally on all ranks. The option
        # was renamed after torch 2.9.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(model, **options)

    def needs_rehearsal(self, model: nn.Module) -> bool:
        """Return whether the first backward pass sums gradients in another order than later ones.

        DDP reorders its buckets after the first pass. With three or more ranks this changes the
        last bits of the sum, so a resumed run would differ.
        """
        return isinstance(model, DistributedDataParallel) and self.world_size > 2

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Skip the reduction of gradients within the context, unless this is the last
        micro-batch.
        """
        if is_sharded_model(model):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Compute gradients that sum over ranks. DDP and FSDP average, so the loss is scaled."""
        (loss * self.world_size).backward()

    def reduce_gradients(self, optimizers: Sequence[Optimizer]) -> None:
        """Sum gradients over ranks unless `backward` has done so already."""

    # --- collectives

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate over ranks along the first axis; shapes must agree."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks; may change `tensor`."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's value, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, act: Callable[[], T]) -> T:
        """Run `act` on rank 0 and return its result on every rank.

        A UserError in `act` is raised on every rank, so that all ranks exit with its message.
        """
        outcome: tuple[T | None, str | None] = (None, None)
        if self.is_main:
            try:
                outcome = act(), None
            except UserError as error:
                outcome = None, str(error)
        value, fault = self.broadcast_object(outcome)
        if fault is not None:
            raise UserError(fault)
        return value  # type: ignore[return-value]

    @cached_property
    def board(self) -> Board:
        """Texts that ranks can exchange without a collective."""
        return Board(self.world_size, self.launch_number)
