"""Writes checkpoints while training goes on: the loop waits for the copy in host memory alone.

Every rank writes its own files into a hidden folder, and tells by a marker when they are on the
disk. Once all have, rank 0 seals the folder with a manifest and renames it to its place. No
collective runs in the background, so a checkpoint becomes whole whatever the ranks do meanwhile.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.backend import Backend
from utils.checkpoint.format import MANIFEST, checkpoints_of, prune, sha256, step_folder
from utils.core.console import notify


class Contents(NamedTuple):
    """What one rank writes, all of it in host memory and its own.

    tensors: file stem -> what torch.save takes. files: name -> content. shard: this rank's held
    rows. Other ranks than 0 have a shard only.
    """

    tensors: Mapping[str, Any]
    files: Mapping[str, bytes]
    shard: Mapping[str, Any] | None


_PATIENCE = 120.0  # seconds until a file that another machine wrote must be seen here


class _Pending(NamedTuple):
    step: int
    folder: Path
    written: Future[None]
    committed: Future[None] | None
    abandon: threading.Event


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. `begin` and `settle` are collectives.

    keep: how many checkpoints remain, the newest; None for all.
    """

    def __init__(self, run: Path, backend: Backend, keep: int | None):
        self.run, self.backend, self.keep = run, backend, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    def begin(self, step: int, contents: Contents, spare: Collection[int] = ()) -> bool:
        """Starts writing `step`, once the checkpoint before it is done; False if it cannot start.

        spare: steps that are kept besides the newest.
        """
        self.settle()
        temporary = self.run / f".step_{step}.tmp"
        fault = None
        if self.backend.is_main:
            fault = _fault_of(lambda: _make_folder(temporary, contents))
        fault = self.backend.broadcast_object(fault)
        if fault is not None:
            self._report(step, fault, temporary)
            return False
        abandon, committed = threading.Event(), None
        written = self._pool.submit(self._write, temporary, contents)
        if self.backend.is_main:
            committed = self._pool.submit(
                self._commit, step, temporary, written, abandon, frozenset(spare)
            )
        self._pending = _Pending(step, temporary, written, committed, abandon)
        return True

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint in work will not become whole."""
        if self._pending is None:
            return False
        futures = (self._pending.written, self._pending.committed)
        return any(f is not None and f.done() and f.exception() is not None for f in futures)

    @property
    def done(self) -> bool:
        """Whether this rank has nothing to write any more, or has failed to."""
        futures = (self._pending.written, self._pending.committed) if self._pending else ()
        return all(future is None or future.done() for future in futures)

    def settle(self) -> bool:
        """Waits until the checkpoint in work is whole, or given up and reported: then False."""
        if self._pending is None:
            return True
        step, folder, written, committed, abandon = self._pending
        faults = self.backend.gather_objects(_fault_of(written.result))
        told = [f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault is not None]
        if told:
            abandon.set()
        fault = None
        if committed is not None:
            # All parts are written: what is still missing is slow to be seen, or gone.
            wait([committed], timeout=_PATIENCE)
            abandon.set()
            fault = _fault_of(committed.result)
        fault = self.backend.broadcast_object("; ".join(told) or fault)
        self._pending = None
        if fault is not None:
            self._report(step, fault, folder)
        return fault is None

    def close(self) -> None:
        """Ends the threads; called on every way out, also where other ranks are gone."""
        if self._pending is not None and (committed := self._pending.committed) is not None:
            try:
                self._pending.written.exception()
                committed.exception(timeout=30)
            except FutureTimeout:
                self._pending.abandon.set()
        self._pool.shutdown()

    def _report(self, step: int, fault: str, folder: Path) -> None:
        if not self.backend.is_main:
            return
        shutil.rmtree(folder, ignore_errors=True)
        good = checkpoints_of(self.run)
        last = f"the last good checkpoint is {good[-1].name}" if good else "there is none before"
        notify(f"warning: step {step} could not be saved ({fault}); {last}")

    def _write(self, folder: Path, contents: Contents) -> None:
        """This rank's files, on the disk when this returns, and the marker that says so."""
        rank, names = self.backend.rank, []
        for stem, value in contents.tensors.items():
            names.append(f"{stem}.pt")
            save_tensors(value, folder / names[-1])
        if contents.shard is not None:
            names.append(f"carry_{rank}.pt")
            save_tensors(contents.shard, folder / names[-1])
        for name, content in contents.files.items():
            names.append(name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name in names:
            _fsync(folder / name)
        digests = {name: sha256(folder / name) for name in names}
        part = folder / f".written_{rank}.part"
        part.write_text(json.dumps(digests), "utf-8")
        part.rename(_marker(folder, rank))

    def _commit(
        self,
        step: int,
        folder: Path,
        written: Future[None],
        abandon: threading.Event,
        spare: Collection[int],
    ) -> None:
        if written.exception() is not None:
            return  # its own fault is reported
        markers = [_marker(folder, rank) for rank in range(self.backend.world_size)]
        while not all(marker.is_file() for marker in markers):
            if abandon.wait(0.02):
                raise OSError("parts of other ranks are missing")
        manifest: dict[str, str] = {}
        for marker in markers:
            manifest |= json.loads(marker.read_text("utf-8"))
            marker.unlink()
        (folder / MANIFEST).write_text(
            json.dumps(dict(sorted(manifest.items())), indent=1), "utf-8"
        )
        for path in (folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder):
            _fsync(path)
        place = step_folder(self.run, step)
        if place.exists():
            former = place.with_name(f".{place.name}.old")
            place.rename(former)
            folder.rename(place)
            shutil.rmtree(former, ignore_errors=True)
        else:
            folder.rename(place)
        _fsync(self.run)
        try:
            prune(self.run, self.keep, {step, *spare})
        except OSError as error:
            notify(f"warning: older checkpoints could not be removed ({error})")


def _marker(folder: Path, rank: int) -> Path:
    return folder / f".written_{rank}"


def _make_folder(folder: Path, contents: Contents) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed, free = _bytes_of(contents), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it takes {_size(needed)} and {_size(free)} are free")


def _bytes_of(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_bytes_of, value.values()))
    return sum(map(_bytes_of, value)) if isinstance(value, list | tuple) else 0


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def save_tensors(value: Any, path: Path) -> None:
    """Call `torch.save`; raise OSError where the disk refuses."""
    try:
        torch.save(value, path)
    except RuntimeError as error:  # what torch makes of a write that failed
        free = _size(shutil.disk_usage(path.parent).free)
        raise OSError(f"{path.name} could not be written, {free} are free") from error


def _fault_of(act: Callable[[], object]) -> str | None:
    """Runs `act`; why the file system refused, if it did."""
    try:
        act()
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    return None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # not all storage knows folders
            raise
    finally:
        os.close(descriptor)
