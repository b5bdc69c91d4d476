"""Cache remote files and corpora locally, atomically.

A cached copy is named after the URL and the version reported by the storage: if the remote file
changes it gets a new directory, so a copy never changes while a run reads it. Copies are downloaded
to a temporary sibling and renamed once complete. A lock per URL ensures that the ranks of one
machine download only once. Nothing is evicted automatically; the cache may be deleted whenever no
run is using it.
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
from utils.remote.storage import RemoteFile, Storage, Unreachable, extract_name, redact

CACHE_VARIABLE = "ATHENA_CACHE"
BAR_BYTES = 8 << 20
"""Smaller downloads finish before a progress bar would be useful."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(path: str | Path) -> bool:
    """Return whether a path is a URL, that is, starts with `scheme://`."""
    return _SCHEME.match(str(path)) is not None


def local_path(path: str) -> str:
    """Return a local path as is, and the path of the cached copy for a URL."""
    return str(fetch(path)) if is_remote(path) else path


def fetch(url: str, progress: bool = True) -> Path:
    """Return the path of a local copy of a remote file or directory (a corpus).

    The copy keeps the remote name. It is downloaded only if the cache does not contain the current
    version. If the storage cannot be reached, the most recently used copy is returned with a
    warning; without one, raises UserError. `progress` shows a bar for large downloads.
    """
    home = _url_folder(url)
    try:
        storage = Storage(url)
        files = storage.files()
    except Unreachable as error:
        copy = _find_latest_copy(home, extract_name(url))
        if copy is None:
            raise
        warnings.warn(f"{error} Using the cached copy in {copy.parent} instead.", stacklevel=2)
        return copy
    target = home / _version(files) / extract_name(url)
    if not _is_complete(target, files):
        with _lock(home):
            if not _is_complete(target, files):  # another process may have downloaded it meanwhile
                _download(storage, files, target, progress)
    with suppress(OSError):  # a shared cache may be read-only
        os.utime(target.parent)  # for `_find_latest_copy`
    return target


def cache_folder() -> Path:
    """Return the cache directory: $ATHENA_CACHE, or ~/.cache/athena."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/athena").expanduser().resolve()


def _url_folder(url: str) -> Path:
    """Return the directory of all copies of a URL, with a readable name free of secrets."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", redact(url)).strip("_.")[-80:]
    return cache_folder() / f"{readable}-{_digest(url.rstrip('/'))}"


def _version(files: list[RemoteFile]) -> str:
    return _digest("\n".join(f"{file.place} {file.version}" for file in files))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _find_latest_copy(home: Path, name: str) -> Path | None:
    """Return the most recently used copy; incomplete ones start with a dot and are ignored."""
    copies = [version / name for version in home.glob("[!.]*") if (version / name).exists()]
    return max(copies, key=lambda copy: copy.parent.stat().st_mtime, default=None)


def _is_complete(target: Path, files: list[RemoteFile]) -> bool:
    """Return whether all files of a copy exist; users may have deleted some from the cache."""
    paths = [(target / file.place, file.size) for file in files]
    return all(path.is_file() and size in (None, path.stat().st_size) for path, size in paths)


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    """Allow one process at a time to download into `home`; released if that process is killed."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = open(home / "lock", "a", encoding="utf-8")  # noqa: SIM115  closed below
    except OSError as error:
        raise _cache_error(error) from error
    with file:
        try:
            import fcntl
        except ImportError:  # Windows: concurrent downloads are possible
            pass
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(storage: Storage, files: list[RemoteFile], target: Path, progress: bool) -> None:
    """Download `files` into a temporary directory and rename it to the target's when complete."""
    home, machine = target.parent.parent, socket.gethostname()
    building = home / f".{target.parent.name}.{machine}.{os.getpid()}"
    total = sum(file.size or 0 for file in files)
    # None: show the bar only on a terminal.
    disable = None if progress and total >= BAR_BYTES else True
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc=extract_name(storage.url), disable=disable
    )
    try:
        for stale in home.glob(f".*.{machine}.*"):  # from a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        with bar:
            for file in files:
                path = building / target.name / file.place
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.download(file, path, bar.update)
        if _version(Storage(storage.url).files()) != target.parent.name:
            raise UserError(f"{redact(storage.url)} changed during the download; try again.")
        shutil.rmtree(target.parent, ignore_errors=True)  # an incomplete copy
        building.rename(target.parent)
    except OSError as error:
        raise _cache_error(error) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _cache_error(error: OSError) -> UserError:
    return UserError(
        f"cannot write to the cache {cache_folder()}: {error.strerror or error}; free up space, or "
        f"set ${CACHE_VARIABLE} to another directory."
    )
