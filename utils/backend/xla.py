"""TPUs, and XLA's own CPU, through PyTorch/XLA: find the device and start its replicas.

The user's process never touches the device: `torch_xla.launch` spawns the processes that do, one
replica per core, and fails if their parent has touched it. Replicas use xla_replica.py.
"""

import importlib.metadata
import importlib.util
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils.backend.base import Backend
from utils.backend.process import STOP_SIGNALS, Received
from utils.backend.xla_replica import COMPILES_ITSELF, Replica, write_whole
from utils.core.console import describe_error, warnings_as_notes
from utils.core.errors import UserError

T = TypeVar("T")

PROBE_SECONDS = 60.0
"""Time limit for a TPU to answer; without a TPU torch_xla retries for minutes."""
GRACE_SECONDS = 10.0
"""Time limit for replicas after one has failed: most fail for the same reason, others hang."""
_PROBE = "import torch_xla, torch_xla.core.xla_model as xm; print(xm.xla_device_hw('xla:0'))"
# Use one chip of this host, so that the hosts of a pod need not be probed simultaneously.
_ONE_CHIP = {
    "TPU_VISIBLE_CHIPS": "0",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
    "TPU_PROCESS_BOUNDS": "1,1,1",
}


def not_installed() -> str | None:
    """Return the reason why torch_xla cannot be imported here; None if it can."""
    if importlib.util.find_spec("torch_xla") is None:
        return (
            "torch_xla is not installed; it needs its own environment with "
            "requirements-tpu.txt, see TPU_SETUP.md"
        )
    own, needs = torch.__version__, importlib.metadata.version("torch_xla")
    if own.split(".")[:2] != needs.split(".")[:2]:
        return f"torch_xla {needs} does not load with torch {own}; install requirements-tpu.txt"
    return None


def no_tpu() -> str | None:
    """Return the reason why no TPU can be used here; None if one can. Tries it in a subprocess."""
    named = os.environ.get("PJRT_DEVICE") or None
    if named not in (None, "TPU"):
        return f"PJRT_DEVICE={named} selects another device; unset it, or use device_type=xla"
    files = glob("/dev/accel*") + glob("/dev/vfio/[0-9]*")
    if not (files or named or os.environ.get("TPU_ACCELERATOR_TYPE")):
        return (
            "this machine has no TPU: neither /dev/accel* nor /dev/vfio/<number> exists; "
            "if it does have one, set PJRT_DEVICE=TPU"
        )
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=os.environ | _ONE_CHIP | {"PJRT_DEVICE": "TPU"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no TPU answered within {PROBE_SECONDS:g} s; see Troubleshooting in TPU_SETUP.md"
    if done.returncode == 0 and done.stdout.split()[-1:] == ["TPU"]:
        return None
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"no TPU answers ({last}); see Troubleshooting in TPU_SETUP.md"


class XLABackend(Backend):
    """The device selected by PJRT_DEVICE; by default a TPU."""

    name = "xla"

    def __init__(self) -> None:
        if dist.is_torchelastic_launched():
            raise UserError(
                f"device_type={self.name} starts one process per core itself; run "
                "`python pretrain.py` without torchrun"
            )
        self.rank, self.world_size = 0, 1  # each replica has its own

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        raise UserError(
            f"device_type={self.name} is only for training, which starts its own processes for "
            "the device; use device_type=cpu here"
        )

    @classmethod
    def missing(cls) -> str | None:
        if (reason := not_installed()) is not None:
            return reason
        if os.environ.get("PJRT_DEVICE") not in (None, "", "TPU"):
            return None
        reason = no_tpu()
        return reason and f"{reason}; to run on XLA's own CPU, set PJRT_DEVICE=CPU"

    def available_memory(self) -> int:
        raise UserError(f"only the replicas of device_type={self.name} know its memory")

    def cannot_compile(self) -> str | None:
        return COMPILES_ITSELF

    def launch(self, fn: Callable[..., T], *args: Any) -> T:
        """Run `fn(replica, *args)` on every core of this host; return the first one's result.

        Raises a replica's UserError, or a RuntimeError with the traceback of any other failure.
        """
        os.environ.setdefault("PJRT_DEVICE", "TPU")
        before = set(multiprocessing.active_children())
        with tempfile.TemporaryDirectory(prefix="athena_xla_") as name, self.signals() as received:
            folder, errors = Path(name), []  # type: tuple[Path, list[BaseException]]

            def start() -> None:
                import torch_xla

                # Spawned processes inherit this: a signal that the parent handles must not
                # kill them.
                signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
                try:
                    torch_xla.launch(run_replica, args=(folder, self.name, fn, args))
                except BaseException as error:
                    errors.append(error)

            starter = threading.Thread(target=start, daemon=True)
            starter.start()
            try:
                wait_for(starter, folder, received, before)
            finally:  # even after a second Ctrl-C
                end_processes(before)
                starter.join()
            return result_of(folder, errors)


class TPUBackend(XLABackend):
    """A TPU, and no other device."""

    name = "tpu"

    @classmethod
    def missing(cls) -> str | None:
        return not_installed() or no_tpu()


def wait_for(starter: threading.Thread, folder: Path, received: Received, before: set) -> None:
    """Wait for all replicas; forward signals to them, and kill those that wait for a dead
    replica.
    """
    failed_at = None
    while starter.is_alive():
        starter.join(0.2)
        if received and not (folder / "signal").exists():
            write_whole(folder / "signal", str(received[0]).encode())
        if failed_at is None and any(kind != "value" for kind, _ in outcomes(folder)):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + GRACE_SECONDS:
            end_processes(before)


def end_processes(before: set) -> None:
    """Kill the child processes that were not in `before`."""
    for process in set(multiprocessing.active_children()) - before:
        process.kill()  # SIGTERM is blocked there


def run_replica(ordinal: int, folder: Path, wanted: str, fn: Callable[..., Any], args: Any) -> None:
    """Run one replica and write its outcome to a file, because `torch_xla.launch` returns
    nothing.
    """
    outcome: tuple[str, Any]
    try:
        backend = Replica(folder)
        if wanted == "tpu" and backend.hardware != "TPU":
            raise UserError(f"device_type=tpu was asked for, but this is a {backend.hardware}")
        with warnings_as_notes(shown=backend.is_main):
            outcome = "value", backend.launch(fn, *args)
    except BaseException as error:
        sentence = describe_error(error) if isinstance(error, Exception) else None
        outcome = "traceback", traceback.format_exc()
        if sentence is not None:
            outcome = "sentence", sentence
    write_whole(folder / f"outcome_{ordinal:06}", pickle.dumps(outcome))


def outcomes(folder: Path) -> list[tuple[str, Any]]:
    """Return the kind and value of each outcome so far, in the order of the replicas."""
    return [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("outcome_*"))]


def result_of(folder: Path, errors: list[BaseException]) -> Any:
    """Return the first replica's value, or raise the first failure, preferably a UserError."""
    found = outcomes(folder)
    for kind, value in found:
        if kind == "sentence":
            raise UserError(value)
    for kind, value in found:
        if kind == "traceback":
            raise RuntimeError(f"a replica failed:\n{value}")
    for kind, value in found:
        if kind == "status":  # it exited immediately, so the others have no outcome
            return value
    if errors:
        raise RuntimeError(
            "the processes of the replicas ended without a message; they may have run out of memory"
        ) from errors[0]
    return found[0][1]
