"""The folder of a run: its name, that all ranks see it, that one process writes it at a time, that
a failed evaluation leaves none behind."""

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
"""Below the run's folder, so that a sweep never meets the checkpoints of the run."""
_WAIT = 20.0  # seconds for the process before to leave, and for slow shared storage


class RunFolder:
    """Opens `path`, naming the run alike on all ranks; a context manager that lets others in at its
    end. A collective."""

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
        """Set where a failure is not raised through the context manager."""
        self._lock: TextIO | None = None
        self._made: list[Path] = []  # for an evaluation; the innermost comes first
        token = backend.from_main(lambda: self._open(config))
        if not config.eval_only and not _sees(self.path, token):
            raise UserError(
                f"rank {backend.rank} on {socket.gethostname()} does not see what rank 0 wrote to "
                f"{self.path}; name a folder on storage that all machines share, with "
                "checkpoint_path"
            )

    def _open(self, config: PretrainConfig) -> str:
        """Makes and locks the folder; what the lock says."""
        print(f"run: {config.run_name}, folder {self.path}", flush=True)
        try:
            missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            if config.eval_only:
                self._made = missing
            self._lock = None if config.eval_only else _locked(self.path)
        except OSError as error:
            raise UserError(
                f"cannot write to the run's folder {self.path} ({error.strerror or error}); "
                "name another with checkpoint_path"
            ) from None
        return _holder()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()
        if (self.failed or kind is not None) and self._made:
            with suppress(OSError):
                self._remove_unused()

    def _remove_unused(self) -> None:
        """Remove the folders that were made for an evaluation, unless one holds more than what is
        written before the first result."""
        entries = list(self.path.iterdir())
        if any(e.name != "config.yaml" and (e.is_dir() or e.stat().st_size) for e in entries):
            return
        for entry in entries:
            entry.unlink()
        for folder in self._made:
            folder.rmdir()


def folder_of(checkpoint_path: str | None, project_name: str, run_name: str | None) -> Path | None:
    """Where a run is kept; None before it has a name."""
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


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _locked(path: Path) -> TextIO:
    """The lock file, held until it is closed or the process ends, however it ends."""
    file = (path / LOCK).open("a+", encoding="utf-8")
    deadline, told = time.monotonic() + _WAIT, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            if time.monotonic() > deadline:
                raise UserError(
                    f"{owner} is training the run in {path}; wait for it, end it, or choose "
                    "another run_name"
                ) from None
            if not told:
                print(f"note: {owner} still holds the run's folder, waiting {_WAIT:.0f} s")
                told = True
            time.sleep(0.2)
        except OSError:  # storage without locks: better unguarded than not at all
            print(f"note: {path} cannot be locked; do not start this run twice at a time")
            break
    file.truncate(0)
    file.write(_holder())
    file.flush()
    with suppress(OSError):
        os.fsync(file.fileno())  # other machines see it only then
    return file


def _sees(path: Path, token: str) -> bool:
    deadline = time.monotonic() + 4 * _WAIT  # network storage may remember for a minute
    while True:
        try:
            if (path / LOCK).read_text("utf-8") == token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
