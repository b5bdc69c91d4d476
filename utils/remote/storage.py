"""Storage behind a `scheme://`: listing and downloading through fsspec, and what may go wrong.

fsspec is imported only here, and only when a url is met. Its file systems differ in what they
call a version, a folder and a fault; above this file there are `RemoteFile`s and `UserError`s.
"""

import errno
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

from utils.core.errors import UserError

T = TypeVar("T")

PACKAGES = {
    "http": "aiohttp",
    "https": "aiohttp",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
"""Package that fsspec needs for a scheme; of others, fsspec tells it."""
ATTEMPTS = 4
FIRST_PAUSE = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Faults of the disk that a download goes to; they stay `OSError`s."""

# What tells one version of a file from another, best first, by the names that storages use.
_VERSIONS = (
    "etag ETag md5Hash blob_id oid Content-MD5 Digest content_hash checksum generation "
    "mtime LastModified last_modified Last-Modified updated modified created"
).split()
# Faults that may pass: by name, because the libraries that they come from need not be there.
_PASSING = set(
    "TimeoutError Timeout ConnectionError ClientConnectionError ClientPayloadError "
    "TransportError HTTPClientError _Incomplete".split()
)


class Unreachable(UserError):
    """The storage did not answer, or with a fault of its own: the url may be right."""


class _Incomplete(Exception):
    """A download that ended early, although the connection did not say so."""


@dataclass(frozen=True)
class RemoteFile:
    """One remote file: its path as the file system names it, and its place below the url's."""

    path: str
    place: PurePosixPath
    size: int | None
    version: str
    """Differs where the contents do, as far as the storage tells."""


def is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def name_of(url: str) -> str:
    """Last component of a url's path: it tells a file's format and a corpus' identifiers."""
    path = unquote(urlsplit(url).path) if is_http(url) else url.partition("://")[2]
    name = PurePosixPath(path.rstrip("/")).name
    return name if name not in ("", ".", "..") else "remote"


def shown(url: str) -> str:
    """A url for people: without its query and user, which may hold keys."""
    head, sign, rest = url.partition("://")
    rest = rest.partition("?")[0] if is_http(url) else rest
    host, slash, path = rest.partition("/")
    return f"{head}{sign}{host.rpartition('@')[2] if is_http(url) else host}{slash}{path}"


class Storage:
    """A url as its file system sees it; every fault is a `UserError` that names the url."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_http = is_http(url)
        self._fs, self._path = _file_system(url)
        # Listings that fsspec remembers would hide that a remote has changed.
        self._fs.invalidate_cache()

    def files(self) -> list[RemoteFile]:
        """The file, or the files below the folder in the order of their paths; never none."""
        info = self._ask(partial(self._fs.info, self._path))
        if not self._is_folder(info):
            return [self._file(self._path, PurePosixPath(), info)]
        found = []
        for path, entry in self._below():
            if self.is_http:  # a web server's listing tells names alone
                entry = self._ask(partial(self._fs.info, path))
            found.append(self._file(path, self._place(path), entry))
        return found

    def urls(self) -> list[str]:
        """Urls of the file, of those that match the glob, or of those below the folder; sorted."""
        if self._is_glob():
            found = self._sorted(self._ask(partial(self._fs.glob, self._path, detail=True)))
            if not found:
                raise UserError(f"{shown(self.url)} matches no file; check the url.")
        elif self._is_folder(self._ask(partial(self._fs.info, self._path))):
            found = self._below()
        else:
            return [self.url]
        paths = [path for path, _ in found]
        # Not fsspec's own way back: it would lose the host of sftp://host/path.
        given, own = self.url.rstrip("/"), self._path.rstrip("/")
        if given.endswith(own):
            return [given.removesuffix(own) + path for path in paths]
        return [self._fs.unstrip_protocol(path) for path in paths]

    def download(self, file: RemoteFile, target: Path, progress: Callable[[int], Any]) -> None:
        """Copy a file to `target` and wait until the disk has it.

        `progress` is called with the number of bytes that arrived newly: less than 0 where an
        attempt failed. Raises OSError where the disk is at fault.
        """
        from fsspec.callbacks import Callback

        arrived = 0

        def show(size: int | None, value: int, **others: Any) -> None:
            nonlocal arrived
            progress(value - arrived)
            arrived = value

        def copy() -> None:
            show(None, 0)
            self._fs.get_file(file.path, str(target), callback=Callback(hooks={"bar": show}))
            with open(target, "rb") as written:
                os.fsync(written.fileno())
            found = target.stat().st_size
            if file.size not in (None, found):
                raise _Incomplete(f"{found:,} of {file.size:,} bytes arrived")
            show(None, found)  # not every file system calls back

        self._ask(copy)

    def _ask(self, call: Callable[[], T]) -> T:
        """A call of the file system; time-outs and the server's own faults are tried again."""
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except Exception as error:  # each file system has exceptions of its own
                if isinstance(error, OSError) and error.errno in DISK_FAULTS:
                    raise
                if not _is_passing(error) or attempt == ATTEMPTS - 1:
                    raise _fault(self.url, error) from error
                time.sleep(FIRST_PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _is_glob(self) -> bool:
        if self.is_http:  # where `?` begins the query
            return re.search(r"[*\[]", urlsplit(self._path).path) is not None
        return re.search(r"[*?\[]", self._path) is not None

    def _is_folder(self, info: dict[str, Any]) -> bool:
        if not self.is_http:
            return info["type"] == "directory"
        # To a web server all is a file; those that list folders send their readers to a `/`.
        address = urlsplit(info.get("url") or self._path)
        return address.path.endswith("/") and not address.query

    def _below(self) -> list[tuple[str, dict[str, Any]]]:
        """Paths and entries of all files below the folder; never none."""
        root = self._path.rstrip("/") + "/" if self.is_http else self._path
        found = self._sorted(self._ask(partial(self._fs.find, root, detail=True)))
        if not found:
            raise UserError(f"{shown(self.url)} is a folder in which no file is listed.")
        return found

    def _sorted(self, entries: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        """The files among the entries of a listing."""
        # Buckets may hold empty objects that stand for folders, with names that end in a slash;
        # listings of web servers link to themselves in another order (`?C=S`).
        odd = re.compile(r"/$|[?#]" if self.is_http else r"/$")
        return [
            (path, entry)
            for path, entry in sorted(entries.items())
            if entry.get("type") != "directory" and not odd.search(path)
        ]

    def _place(self, path: str) -> PurePosixPath:
        """Where a file lies below the folder."""
        below = path.removeprefix(self._path.rstrip("/")).lstrip("/")
        place = PurePosixPath(unquote(below) if self.is_http else below)
        if ".." in place.parts or place.is_absolute() or not place.parts:
            raise UserError(f"{shown(self.url)} lists {path!r}, which lies outside of it.")
        return place

    def _file(self, path: str, place: PurePosixPath, info: dict[str, Any]) -> RemoteFile:
        size = info.get("size")
        known = next((info[key] for key in _VERSIONS if info.get(key)), None)
        if known is None and not self.is_http:  # of the web, fsspec's key is only the url
            known = self._ask(partial(self._fs.ukey, path))
        return RemoteFile(path, place, size, f"{size} {known}")


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a url and the path in it; UserError where a package is missing."""
    scheme = url.partition("://")[0].lower()
    try:
        import fsspec

        if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:
            raise UserError(f"{shown(url)}: fsspec knows no storage called {scheme}://.")
        if is_http(url):
            # Quoted here, and only what must be: more would break the signature of a signed url.
            url = quote(url, safe="%/:?#[]@!$&'()*+,;=~")
            return fsspec.core.url_to_fs(url, **_http_options())
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(scheme, f"({error})")
        raise UserError(
            f"{scheme}:// urls need packages that are missing: pip install fsspec {package}"
        ) from error
    except UserError:
        raise
    except Exception as error:  # some file systems connect, or look for credentials, at once
        raise _fault(url, error) from error


def _http_options() -> dict[str, Any]:
    import aiohttp

    # Not aiohttp's five minutes for a whole download, but a limit on silence.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {
        "simple_links": False,
        "encoded": True,
        # Bytes as they are stored: a .gz file must not arrive unpacked.
        "headers": {"Accept-Encoding": "identity"},
        "client_kwargs": {"timeout": timeout, "trust_env": True, "auto_decompress": False},
    }


# --- faults -----------------------------------------------------------------------------------


def _causes(error: BaseException) -> list[BaseException]:
    """An exception and what it was raised from; fsspec calls any fault of the web "not found"."""
    cause = error.__cause__
    return [error] if cause is None else [error, *_causes(cause)]


def _status(error: BaseException) -> int | None:
    """HTTP status of an exception, wherever its library keeps it."""
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            found = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:
            found = [getattr(response, "status_code", None)]
        # In this order: aiohttp warns of its older name.
        found.append(getattr(cause, "status", None) or getattr(cause, "code", None))
        for value in found:
            if str(value).isdigit() and 400 <= int(str(value)) < 600:
                return int(str(value))
    return None


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed."""
    # Kinds first: aiohttp gives a broken body the status 400.
    kinds = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    status = _status(error) or 0
    return bool(kinds & _PASSING) or status >= 500 or status in (408, 429)


def _fault(url: str, error: BaseException) -> UserError:
    """One sentence for what a file system could not do."""
    status, last = _status(error), _causes(error)[-1]
    code = f" (HTTP {status})" if status else ""
    detail = " ".join(str(last).split())[:200] or type(last).__name__
    if _is_passing(error):
        why = f"HTTP {status}" if status and status != 400 else detail
        return Unreachable(f"cannot download {shown(url)}: {why}, in {ATTEMPTS} attempts.")
    if status in (401, 403) or isinstance(last, PermissionError):
        return UserError(f"access to {shown(url)} is denied{code}; check it and your credentials.")
    if status in (404, 410) or isinstance(last, FileNotFoundError):
        return UserError(f"{shown(url)} does not exist{code}; check the url.")
    return UserError(f"cannot read {shown(url)}: {type(last).__name__}: {detail}")
