"""What a device backend is: where tensors live and how ranks talk.

The only home of torch.distributed. `Backend` serves one process and, under torchrun, a process
group; its subclasses say which device, which collective library, and what to do when asked for
something that is not there.
"""

import ctypes
import gc
import inspect
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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

from utils.backend.state import accumulate, is_sharded, shard
from utils.core.errors import UserError

T = TypeVar("T")
Received = Sequence[int]  # numbers of the signals that came

_launches = itertools.count()

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Save and leave: a scheduler's, Ctrl-C's or a lost connection's way to end a run."""


class Backend:
    """One replica's view of its device and of the other replicas."""

    name = "cpu"
    collective = "gloo"
    prefetch_to_device: Callable[[Iterable[Any]], Iterator[Any]] | None = None
    """Gives items with their tensors on the device, made ready ahead of use; None: not needed."""

    capability: tuple[int, int] = (0, 0)
    """Compute capability of an NVIDIA GPU."""
    compiles_by_default = False
    tries_sizes = False
    """Whether `micro_batch_size=auto` is tried out: running out of memory raises here. A host swaps
    or ends the process instead."""
    launch_number = 0
    """Runs of this process that were launched before this one."""
    _board_is_gone = False

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(self.name)

    @classmethod
    def missing(cls) -> str | None:
        """Why this device cannot be used here; None if it can."""
        return None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def describe(self) -> str:
        """The device, as a user reads it."""
        return str(self.device)

    def launch(self, fn: Callable[..., T], *args: Any) -> T:
        """Runs `fn(backend, *args)` as this replica, inside a process group if there are more."""
        end_with_launcher()
        self.forget_earlier_runs()
        self.launch_number = next(_launches)
        if self.world_size == 1:
            return fn(self, *args)
        # Generous, because rank 0 may download for long while others wait; a training step that
        # hangs is the watchdog's to end.
        patience = timedelta(hours=6)
        options = self.group_options()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The launcher's store outlives its workers: restarted ones would read the addresses of
            # the dead.
            options |= dict(store=self._store(patience), rank=self.rank, world_size=self.world_size)
        dist.init_process_group(self.collective, timeout=patience, **options)
        result = fn(self, *args)
        dist.destroy_process_group()  # not after a failure: it would wait for the others
        return result

    def end_now(self, status: int) -> NoReturn:
        """Ends this process from a thread, whatever its main thread is doing."""
        os._exit(status)

    def group_options(self) -> dict[str, Any]:
        """More arguments of init_process_group."""
        return {}

    @cached_property
    def _board(self) -> dist.Store | None:
        """A connection of its own, so that a thread may use it beside the collectives."""
        if self.world_size == 1 or "MASTER_PORT" not in os.environ:
            return None
        return self._store(timedelta(seconds=10))

    def _store(self, patience: timedelta) -> dist.Store:
        """A connection to the store through which ranks meet, apart for each restart of them and
        for each run of a sweep."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=patience)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        return dist.PrefixStore(f"attempt_{attempt}_{self.launch_number}", store)

    def post(self, name: str, text: str) -> None:
        """Writes where every rank can read it, without a collective, if there is such a place."""
        with self._using_board() as board:
            if board is not None:
                board.set(name, text)

    def posted(self, name: str) -> str | None:
        """What was posted last under `name`, by any rank."""
        with self._using_board() as board:
            if board is not None and board.check([name]):
                return board.get(name).decode()
        return None

    @contextmanager
    def _using_board(self) -> Iterator[dist.Store | None]:
        """None once it did not answer: it is gone with its process, and each try takes seconds."""
        board = None
        try:
            board = None if self._board_is_gone else self._board
        except (RuntimeError, OSError):
            self._board_is_gone = True
        try:
            yield board
        except (RuntimeError, OSError):
            self._board_is_gone = True

    def set_deterministic(self, wanted: bool) -> None:
        """Has the same operations give the same bits each time, where that costs something.

        An operation that cannot then raises a RuntimeError, see `explain_nondeterminism`.
        """

    def any_algorithm(self) -> AbstractContextManager:
        """Allow operations that `set_deterministic` forbids, where no weights depend on them."""
        return nullcontext()

    def wrap(self, model: nn.Module, parallel: str = "ddp") -> nn.Module:
        """The module to call in training; its backward pass sums gradients over ranks.

        parallel: `ddp` keeps whole weights on every rank, `fsdp` a part of each.
        """
        if self.world_size == 1:
            return model
        if parallel == "fsdp":
            return shard(model, self.device.type, self.world_size)
        # Otherwise compiled blocks are cut where DDP's buckets end, so that their gradients can be
        # reduced early: those of blocks that are applied many times are there at the end only.
        torch._dynamo.config.optimize_ddp = False
        # Only the identifier embedding changes among the buffers, alike on all ranks. The option
        # got another name after torch 2.9.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
        return DistributedDataParallel(model, **options)

    def backward(self, loss: Tensor) -> None:
        """Gradients are summed over ranks; DDP and FSDP take means, so the loss is scaled first."""
        (loss * self.world_size).backward()

    def needs_rehearsal(self, model: nn.Module) -> bool:
        """Whether gradients of the first backward pass are summed in another order than later ones.

        DDP reorders its buckets after the first; from three ranks on the order of a sum shows
        in its last bits, so that a run that is resumed would not be the same.
        """
        return isinstance(model, DistributedDataParallel) and self.world_size > 2

    def reduce_gradients(self, optimizers: Sequence[Optimizer]) -> None:
        """Sums gradients over ranks where `backward` has not done so already."""

    def end_step(self) -> None:
        """Called when a step's update is done; where operations are only noted, runs them."""

    def to_host(self, tensor: Tensor) -> np.ndarray:
        """Values that the host waits for."""
        return tensor.cpu().numpy()

    def one_rank_at_a_time(self) -> AbstractContextManager:
        """Where replicas share a process, only one at a time is inside: it draws random numbers."""
        return nullcontext()

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """No reduction of gradients inside, unless this is the last micro-batch."""
        if is_sharded(model):
            accumulate(model, last)
        elif isinstance(model, DistributedDataParallel) and not last:
            return model.no_sync()
        return nullcontext()

    def to_device(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {k: torch.from_numpy(v).to(self.device) for k, v in batch.items()}

    def batches(
        self, stream: Iterable[tuple[str, dict[str, Any], int]]
    ) -> Iterator[tuple[str, dict[str, Tensor], int]]:
        """An evaluation's batches on the device."""
        return ((name, self.to_device(batch), count) for name, batch, count in stream)

    @contextmanager
    def signals(self) -> Iterator[Received]:
        """Notes signals that ask the run to stop; a second SIGINT interrupts at once."""
        received: list[int] = []
        terminals = [stream for stream in (1, 2) if os.isatty(stream)]

        def note(number: int, frame: Any) -> None:
            if received and number == signal.SIGINT:
                raise KeyboardInterrupt
            if number == signal.SIGHUP:  # writing to a terminal that is gone would be an error
                nowhere = os.open(os.devnull, os.O_WRONLY)
                for stream in terminals:
                    os.dup2(nowhere, stream)
                os.close(nowhere)
            if self.is_main and not received:
                name = signal.Signals(number).name
                # not print, which may be in the middle of printing
                os.write(2, f"\n{name}: saves after this step, then ends\n".encode())
            received.append(number)

        heeded = [*STOP_SIGNALS]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: the run is to go on
            heeded.remove(signal.SIGHUP)
        previous = {number: signal.signal(number, note) for number in heeded}
        try:
            yield received
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenates over ranks along the first axis; shapes must agree."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_main(self, act: Callable[[], T]) -> T:
        """What `act` returns on rank 0, on every rank; a UserError there is raised on every rank.

        So that a mistake ends all of them in its sentence, none in a lost connection.
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

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def forget_earlier_runs(self) -> None:
        """Drop compiled programs, and what else earlier runs of a sweep left in this process."""
        gc.collect()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # it stops compiling a function after some shapes
        with suppress(OSError):  # Linux: the peak that getrusage knows starts again
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def release_memory(self) -> None:
        """Return what nothing uses any more to the device."""
        gc.collect()

    def compiles(self, wanted: bool | Literal["auto"]) -> bool:
        """Return whether a model is compiled here; `auto`: where that is usual."""
        if not (self.compiles_by_default if wanted == "auto" else wanted):
            return False
        return self.cannot_compile() is None

    def usable_dtype(self, name: str) -> str:
        """Return the dtype for activations in place of `name`, if the device lacks that."""
        return name

    def cannot_compile(self) -> str | None:
        """Why torch.compile will not work on this device; None if it should."""
        if (
            shutil.which(os.environ.get("CXX", ""))
            or shutil.which("g++")
            or shutil.which("clang++")
        ):
            return None
        return "it needs a C++ compiler, and there is neither g++ nor clang++"

    def available_memory(self) -> int:
        """Bytes that this replica may still take."""
        return free_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    def memory_bytes(self) -> int | None:
        """Return the peak memory of this process on its device since the run began, if known."""
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense matrix FLOP/s of the device in `dtype`, where known."""
        return None


def end_with_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher dies, so that no rank goes on unseen."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def free_host_memory() -> int:
    """Bytes that the host still gives, within the limit of a container."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    fields = dict(line.split(":", 1) for line in meminfo.read_text("utf-8").splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text("utf-8").strip()).isdigit():
        free = min(free, max(0, int(text) - int(used.read_text("utf-8"))))
    return free


def require(backend: type[Backend]) -> Backend:
    reason = backend.missing()
    if reason is not None:
        raise UserError(f"device_type={backend.name} was asked for, but {reason}")
    return backend()
