"""Remote files and corpora as local ones: copied into a cache, whole or not at all.

A copy lies in the cache below a name made of the url and of the version that the storage tells:
a remote that changes gets another folder, so a copy never changes under a run that reads it.
Copies are downloaded beside their place and renamed when they are complete. A lock per url makes
the ranks of one machine download once. Nothing is removed by itself: the cache may be deleted
whenever nothing runs.
"""

import hashlib
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from utils.core.errors import UserError
from utils.remote.storage import RemoteFile, Storage, Unreachable, name_of, shown

CACHE_VARIABLE = "ATHENA_CACHE"
BAR_BYTES = 8 << 20
"""Smaller downloads are over before a bar would tell anything."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(path: str | Path) -> bool:
    """Whether a path is a url: something that begins with `scheme://`."""
    return _SCHEME.match(str(path)) is not None


def local_path(path: str) -> str:
    """The path itself; of a url, the path of its copy."""
    return str(fetch(path)) if is_remote(path) else path


def expand(url: str) -> list[str]:
    """Urls of the files that a url stands for, sorted: a file, a glob, or all below a folder."""
    return Storage(url).urls()


def fetch(url: str, progress: bool = True) -> Path:
    """Local copy of a remote file, or of a remote folder with all below it (a corpus).

    The copy has the remote's own name. It is downloaded only where the cache does not hold the
    version that the storage has now; where the storage cannot be reached, the copy that was used
    last is taken, with a warning. `progress` shows a bar for large downloads.
    Raises UserError where there is neither.
    """
    home = _home(url)
    try:
        storage = Storage(url)
        files = storage.files()
    except Unreachable as error:
        copy = _used_last(home, name_of(url))
        if copy is None:
            raise
        warnings.warn(f"{error} The copy in {copy.parent} is used instead.", stacklevel=2)
        return copy
    target = home / _version(files) / name_of(url)
    if not _is_whole(target, files):
        with _lock(home):
            if not _is_whole(target, files):  # another process may have been at it meanwhile
                _download(storage, files, target, progress)
    with suppress(OSError):  # a cache that others fill may be read-only
        os.utime(target.parent)  # for `_used_last`
    return target


def cache_folder() -> Path:
    """Where copies lie: $ATHENA_CACHE, or ~/.cache/athena."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/athena").expanduser().resolve()


def _home(url: str) -> Path:
    """Folder of all copies of a url: readable, but without what may be secret in it."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", shown(url)).strip("_.")[-80:]
    return cache_folder() / f"{readable}-{_digest(url.rstrip('/'))}"


def _version(files: list[RemoteFile]) -> str:
    return _digest("\n".join(f"{file.place} {file.version}" for file in files))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _used_last(home: Path, name: str) -> Path | None:
    """The newest whole copy; folders in the making have names that begin with a dot."""
    copies = [version / name for version in home.glob("[!.]*") if (version / name).exists()]
    return max(copies, key=lambda copy: copy.parent.stat().st_mtime, default=None)


def _is_whole(target: Path, files: list[RemoteFile]) -> bool:
    """Whether a copy is there with all its files: a user may have tidied up in the cache."""
    for file in files:
        path = target / file.place
        if not path.is_file() or file.size not in (None, path.stat().st_size):
            return False
    return True


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """Only one process at a time downloads into `home`; the kernel unlocks where one is killed."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = open(home / "lock", "a", encoding="utf-8")  # noqa: SIM115  closed below
    except OSError as error:
        raise _cache_fault(error) from error
    with file:
        try:
            import fcntl
        except ImportError:  # Windows: two may download at once
            pass
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(storage: Storage, files: list[RemoteFile], target: Path, progress: bool) -> None:
    """Copy `files` into a folder beside the target's, which is renamed when it is complete."""
    home, machine = target.parent.parent, socket.gethostname()
    building = home / f".{target.parent.name}.{machine}.{os.getpid()}"
    total = sum(file.size or 0 for file in files)
    # None: only where someone may be looking at it.
    disable = None if progress and total >= BAR_BYTES else True
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=name_of(storage.url), disable=disable)
    try:
        for left in home.glob(f".*.{machine}.*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with bar:
            for file in files:
                path = building / target.name / file.place
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.download(file, path, bar.update)
        if _version(Storage(storage.url).files()) != target.parent.name:
            raise UserError(f"{shown(storage.url)} changed while it was downloaded; try again.")
        shutil.rmtree(target.parent, ignore_errors=True)  # a copy of which something is missing
        building.rename(target.parent)
    except OSError as error:
        raise _cache_fault(error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _cache_fault(error: OSError) -> UserError:
    return UserError(
        f"cannot write to the cache {cache_folder()}: {error.strerror or error}; make room, or "
        f"name another folder in ${CACHE_VARIABLE}."
    )
