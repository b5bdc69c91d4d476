"""Write checkpoints in the background: training waits only for the copy in host memory.

Every rank writes its own files into a hidden directory, and then a marker that they are on disk.
After all markers, rank 0 adds the manifest and renames the directory. No collective runs in the
background, so it does not matter what the ranks do meanwhile.
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
from torch.utils._pytree import tree_iter

from utils.backend import Backend
from utils.checkpoint.format import MANIFEST, checkpoints_of, prune, sha256, step_folder
from utils.core.console import notify

_PATIENCE = 120.0  # seconds until a file that another machine wrote must be visible here


class _Pending(NamedTuple):
    """The checkpoint in progress. abandon: set to make rank 0 stop waiting for other ranks."""

    step: int
    folder: Path
    written: Future[None]
    committed: Future[None] | None
    abandon: threading.Event


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time. `begin` and `wait` are collectives.

    keep: number of recent checkpoints to keep; None for all.
    """

    def __init__(self, run: Path, backend: Backend, keep: int | None):
        self.run, self.backend, self.keep = run, backend, keep
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    def begin(self, step: int, files: Mapping[str, Any], spare: Collection[int] = ()) -> bool:
        """Wait for the previous checkpoint, then start writing that of `step`; return False on
        failure.

        files: content by file name, either bytes or a value for torch.save, in host memory that
        training does not use. spare: steps to keep in addition to the newest.
        """
        self.wait()
        temporary = self.run / f".step_{step}.tmp"
        fault = None
        if self.backend.is_main:
            fault = _fault_of(lambda: _make_folder(temporary, files))
        fault = self.backend.broadcast_object(fault)
        if fault is not None:
            self._report(step, fault, temporary)
            return False
        abandon, committed = threading.Event(), None
        written = self._pool.submit(self._write, temporary, files)
        if self.backend.is_main:
            committed = self._pool.submit(
                self._commit, step, temporary, written, abandon, frozenset(spare)
            )
        self._pending = _Pending(step, temporary, written, committed, abandon)
        return True

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the checkpoint in progress cannot be completed."""
        if self._pending is None:
            return False
        futures = (self._pending.written, self._pending.committed)
        return any(f is not None and f.done() and f.exception() is not None for f in futures)

    @property
    def done(self) -> bool:
        """Whether this rank has finished writing or has failed."""
        futures = (self._pending.written, self._pending.committed) if self._pending else ()
        return all(future is None or future.done() for future in futures)

    def wait(self) -> bool:
        """Wait for the checkpoint in progress; return False if it failed, which is reported."""
        if self._pending is None:
            return True
        step, folder, written, committed, abandon = self._pending
        faults = self.backend.gather_objects(_fault_of(written.result))
        found = [f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault is not None]
        if found:
            abandon.set()
        fault = None
        if committed is not None:
            # All parts are written: a missing one is not visible yet, or lost.
            wait([committed], timeout=_PATIENCE)
            abandon.set()
            fault = _fault_of(committed.result)
        fault = self.backend.broadcast_object("; ".join(found) or fault)
        self._pending = None
        if fault is not None:
            self._report(step, fault, folder)
        return fault is None

    def close(self) -> None:
        """Stop the threads. Not a collective: other ranks may have failed."""
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
        last = (
            f"the last good checkpoint is {good[-1].name}" if good else "there is no checkpoint yet"
        )
        notify(f"warning: step {step} could not be saved ({fault}); {last}")

    def _write(self, folder: Path, files: Mapping[str, Any]) -> None:
        """Write this rank's files, flush them to disk, and write the marker."""
        for name, content in files.items():
            path = folder / name
            if isinstance(content, bytes):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            else:
                save_tensors(content, path)
        for name in files:
            _fsync(folder / name)
        digests = {name: sha256(folder / name) for name in files}
        marker = _marker(folder, self.backend.rank)
        part = marker.with_suffix(".part")
        part.write_text(json.dumps(digests), "utf-8")
        part.rename(marker)

    def _commit(
        self,
        step: int,
        folder: Path,
        written: Future[None],
        abandon: threading.Event,
        spare: Collection[int],
    ) -> None:
        """Wait for the markers of all ranks, then complete the checkpoint and prune older ones."""
        if written.exception() is not None:
            return  # reported as this rank's failure
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
            notify(f"warning: older checkpoints could not be deleted ({error})")


def _marker(folder: Path, rank: int) -> Path:
    return folder / f".written_{rank}"


def _make_folder(folder: Path, files: Mapping[str, Any]) -> None:
    """Create an empty directory; raise OSError if the disk has no room for the files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    needed = sum(leaf.nbytes for leaf in tree_iter(files) if isinstance(leaf, torch.Tensor))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"it takes {_size(needed)}, but only {_size(free)} are free")


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def save_tensors(value: Any, path: Path) -> None:
    """Call `torch.save`; raise OSError if the file cannot be written."""
    try:
        torch.save(value, path)
    except RuntimeError as error:  # torch's error for a failed write
        free = _size(shutil.disk_usage(path.parent).free)
        raise OSError(f"{path.name} could not be written, {free} are free") from error


def _fault_of(act: Callable[[], object]) -> str | None:
    """Run `act`; return the message of an OSError, or None."""
    try:
        act()
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    return None


def _fsync(path: Path) -> None:
    """Flush a file or a directory's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some storage syncs only files
            raise
    finally:
        os.close(descriptor)
