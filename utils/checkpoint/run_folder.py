"""The directory of a run: name it, lock it against other processes, check that all ranks see it."""

import fcntl
import hashlib
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from utils.backend import Backend
from utils.config.schema import PretrainConfig
from utils.core.errors import UserError

LOCK = ".lock"
LR_FIND = "lr_find"
"""A subdirectory of the run, so that a sweep never changes the checkpoints of the run."""
_WAIT = 20.0  # seconds for an earlier process to exit, and for slow shared storage


class RunFolder:
    """Create and lock the directory `path` of a run, until the end of the context.

    A collective. Gives the run the same name on all ranks; raises UserError if the directory cannot
    be written, is in use, or is not visible to every rank. An evaluation does not lock it. If the
    run fails before it writes results, the lock and the directories created here are deleted.
    """

    def __init__(self, config: PretrainConfig, backend: Backend):
        config.run_name = backend.broadcast_object(
            config.run_name or _make_name(backend.launch_number)
        )
        path = folder_of(config.checkpoint_path, config.project_name, config.run_name)
        assert path is not None
        self.path = path
        if config.lr_find:
            self.path /= LR_FIND
        self.failed = False
        """Set this after a failure that is not raised through the context manager."""
        self._lock: TextIO | None = None
        self._made: list[Path] = []  # created here, innermost first
        token = backend.from_main(lambda: self._open(config))
        if not config.eval_only and not _sees(self.path, token):
            raise UserError(
                f"rank {backend.rank} on {socket.gethostname()} does not see what rank 0 wrote to "
                f"{self.path}; set checkpoint_path to a directory that all machines share"
            )

    def _open(self, config: PretrainConfig) -> str:
        """Create and lock the directory; return the content of the lock file."""
        print(f"run: {config.run_name}, folder {self.path}", flush=True)
        try:
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = None if config.eval_only else _lock(self.path)
        except OSError as error:
            raise UserError(
                f"cannot write to the run's folder {self.path} ({error.strerror or error}); "
                "choose another one with checkpoint_path"
            ) from None
        return _describe_process()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self.failed or kind is not None:
            with suppress(OSError):
                self._remove_unused()
        if self._lock is not None:
            self._lock.close()

    def _remove_unused(self) -> None:
        """Delete the lock and the directories created here, unless there is a result."""
        locked = self._lock is not None  # another process may hold the lock that is there
        entries = list(self.path.iterdir()) if self._made or locked else []
        ours = {"config.yaml"} if self._made else set()
        if locked:
            ours.add(LOCK)
        if any(e.name not in ours and (e.is_dir() or e.stat().st_size) for e in entries):
            return
        for entry in entries:
            if self._made or entry.name == LOCK:
                entry.unlink()
        for folder in self._made:
            folder.rmdir()


def folder_of(checkpoint_path: str | None, project_name: str, run_name: str | None) -> Path | None:
    """Return the directory of a run; None before it has a name."""
    if checkpoint_path or run_name:
        return Path(checkpoint_path or Path("checkpoints") / project_name / str(run_name))
    return None


def _make_name(number: int) -> str:
    """Return a new name, such as 1126-0912-a3f1: month and day, hour and minute, a random part.

    Under a launcher that restarts its workers, the name follows from the launch and the run's
    number in a sweep, so that they find the run again.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if launch == "none":
        return time.strftime("%m%d-%H%M-") + secrets.token_hex(2)
    return "run-" + hashlib.sha256(f"{launch} {number}".encode()).hexdigest()[:8]


def _describe_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _lock(path: Path) -> TextIO:
    """Lock the directory and return the lock file: closing it or ending the process unlocks."""
    deadline, notified = time.monotonic() + _WAIT, False
    while True:
        path.mkdir(
            parents=True, exist_ok=True
        )  # the process that held the lock may have removed both
        file = (path / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(path) or "another process"
            if time.monotonic() > deadline:
                raise UserError(
                    f"{owner} is training the run in {path}; wait for it, end it, or choose "
                    "another run_name"
                ) from None
            if not notified:
                print(f"note: {owner} still holds the run's folder, waiting {_WAIT:.0f} s")
                notified = True
            file.close()
            time.sleep(0.2)
            continue
        except OSError:  # storage without locks: train without one
            print(f"note: {path} cannot be locked; do not run two processes on it at a time")
        file.truncate(0)
        file.write(_describe_process())
        file.flush()
        with suppress(OSError):
            os.fsync(file.fileno())  # so that other machines see it
        if _owner(path) == _describe_process() or time.monotonic() > deadline:
            return file
        file.close()  # the file was removed after it was opened


def _owner(path: Path) -> str | None:
    """Return the content of the lock file; None if it cannot be read."""
    try:
        return (path / LOCK).read_text("utf-8").strip()
    except OSError:
        return None


def _sees(path: Path, token: str) -> bool:
    """Return whether the lock file contains `token`, as rank 0 wrote it."""
    deadline = time.monotonic() + 4 * _WAIT  # network storage may cache for a minute
    while (seen := _owner(path)) != token and time.monotonic() < deadline:
        time.sleep(0.1)
    return seen == token
