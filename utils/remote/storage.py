"""List and download files from remote storage through fsspec, with uniform error handling.

fsspec is imported only here, and only if a URL is used. Its file systems represent versions,
directories and errors differently; this module hides that behind `RemoteFile` and `UserError`.
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
"""Package that fsspec needs for a scheme; for other schemes, fsspec's own message names it."""
ATTEMPTS = 4
FIRST_PAUSE = 1.0
"""Seconds before the second attempt; doubles with each further attempt."""
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Errors of the local disk, which are raised as `OSError`s."""

# Keys under which storages report the version of a file, best first.
_VERSIONS = (
    "etag ETag md5Hash blob_id oid Content-MD5 Digest content_hash checksum generation "
    "mtime LastModified last_modified Last-Modified updated modified created"
).split()
# Transient errors, by name, because the libraries that define them may not be installed.
_TRANSIENT = set(
    "TimeoutError Timeout ConnectionError ClientConnectionError ClientPayloadError "
    "TransportError HTTPClientError _Incomplete".split()
)


class Unreachable(UserError):
    """The storage did not respond, or reported an internal error; the URL may be correct."""


class _Incomplete(Exception):
    """A download that ended early without a connection error."""


@dataclass(frozen=True)
class RemoteFile:
    """One remote file: its path in the file system, and its path relative to the URL."""

    path: str
    place: PurePosixPath
    size: int | None
    version: str
    """Changes with the contents, as far as the storage reports it."""


def is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def extract_name(url: str) -> str:
    """Return the last path component, which determines a file's format and identifier names."""
    path = unquote(urlsplit(url).path) if is_http(url) else url.partition("://")[2]
    name = PurePosixPath(path.rstrip("/")).name
    return name if name not in ("", ".", "..") else "remote"


def redact(url: str) -> str:
    """Return a URL for messages, without its query and user, which may contain credentials."""
    head, sign, rest = url.partition("://")
    rest = rest.partition("?")[0] if is_http(url) else rest
    host, slash, path = rest.partition("/")
    return f"{head}{sign}{host.rpartition('@')[2] if is_http(url) else host}{slash}{path}"


class Storage:
    """Access to a URL through its file system; errors are `UserError`s that contain the URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_http = is_http(url)
        self._fs, self._path = _file_system(url)
        # Listings cached by fsspec would hide changes of the remote files.
        self._fs.invalidate_cache()

    def files(self) -> list[RemoteFile]:
        """Return the file, or all files below the directory sorted by path; never empty."""
        info = self._retry(partial(self._fs.info, self._path))
        if not self._is_folder(info):
            return [self._make_file(self._path, PurePosixPath(), info)]
        found = []
        for path, entry in self._list_files():
            if self.is_http:  # listings of web servers contain only names
                entry = self._retry(partial(self._fs.info, path))
            found.append(self._make_file(path, self._relative_path(path), entry))
        return found

    def urls(self) -> list[str]:
        """Return the sorted URLs of the file, the glob's matches, or the directory's files."""
        if self._is_glob():
            found = self._select_files(self._retry(partial(self._fs.glob, self._path, detail=True)))
            if not found:
                raise UserError(f"{redact(self.url)} matches no files; check the URL.")
        elif self._is_folder(self._retry(partial(self._fs.info, self._path))):
            found = self._list_files()
        else:
            return [self.url]
        paths = [path for path, _ in found]
        # Not fsspec's unstrip_protocol, which would lose the host of sftp://host/path.
        given, own = self.url.rstrip("/"), self._path.rstrip("/")
        if given.endswith(own):
            return [given.removesuffix(own) + path for path in paths]
        return [self._fs.unstrip_protocol(path) for path in paths]

    def download(self, file: RemoteFile, target: Path, progress: Callable[[int], Any]) -> None:
        """Download a file to `target` and flush it to disk.

        `progress` is called with the number of bytes received since the last call, which is
        negative after a failed attempt. Raises OSError for errors of the local disk.
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
                raise _Incomplete(f"received {found:,} of {file.size:,} bytes")
            show(None, found)  # not every file system reports progress

        self._retry(copy)

    def _retry(self, call: Callable[[], T]) -> T:
        """Call the file system, retrying on timeouts and server errors."""
        for attempt in range(ATTEMPTS):
            try:
                return call()
            except Exception as error:  # each file system has its own exceptions
                if isinstance(error, OSError) and error.errno in DISK_FAULTS:
                    raise
                if not _is_transient(error) or attempt == ATTEMPTS - 1:
                    raise _make_error(self.url, error) from error
                time.sleep(FIRST_PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _is_glob(self) -> bool:
        if self.is_http:  # where `?` starts the query
            return re.search(r"[*\[]", urlsplit(self._path).path) is not None
        return re.search(r"[*?\[]", self._path) is not None

    def _is_folder(self, info: dict[str, Any]) -> bool:
        if not self.is_http:
            return info["type"] == "directory"
        # HTTP has no directories; servers that list them redirect to a URL that ends in `/`.
        address = urlsplit(info.get("url") or self._path)
        return address.path.endswith("/") and not address.query

    def _list_files(self) -> list[tuple[str, dict[str, Any]]]:
        """Return paths and entries of all files below the directory; never empty."""
        root = self._path.rstrip("/") + "/" if self.is_http else self._path
        found = self._select_files(self._retry(partial(self._fs.find, root, detail=True)))
        if not found:
            raise UserError(f"{redact(self.url)} is a directory without files.")
        return found

    def _select_files(self, entries: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
        """Return the files of a listing, sorted by path."""
        # Buckets may contain empty directory placeholders that end in a slash, and listings of web
        # servers link to themselves with other sort orders (`?C=S`).
        odd = re.compile(r"/$|[?#]" if self.is_http else r"/$")
        return [
            (path, entry)
            for path, entry in sorted(entries.items())
            if entry.get("type") != "directory" and not odd.search(path)
        ]

    def _relative_path(self, path: str) -> PurePosixPath:
        """Return the path of a file relative to the directory."""
        below = path.removeprefix(self._path.rstrip("/")).lstrip("/")
        place = PurePosixPath(unquote(below) if self.is_http else below)
        if ".." in place.parts or place.is_absolute() or not place.parts:
            raise UserError(f"{redact(self.url)} lists {path!r}, which is outside of it.")
        return place

    def _make_file(self, path: str, place: PurePosixPath, info: dict[str, Any]) -> RemoteFile:
        size = info.get("size")
        known = next((info[key] for key in _VERSIONS if info.get(key)), None)
        if known is None and not self.is_http:  # for HTTP, fsspec's key is just the URL
            known = self._retry(partial(self._fs.ukey, path))
        return RemoteFile(path, place, size, f"{size} {known}")


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    scheme = url.partition("://")[0].lower()
    try:
        import fsspec

        if scheme not in {*fsspec.available_protocols(), *fsspec.registry}:
            raise UserError(f"{redact(url)}: fsspec does not support {scheme}://.")
        if is_http(url):
            # Quote only what is necessary: more would invalidate the signature of signed URLs.
            url = quote(url, safe="%/:?#[]@!$&'()*+,;=~")
            return fsspec.core.url_to_fs(url, **_http_options())
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(scheme, f"({error})")
        raise UserError(
            f"{scheme}:// URLs require missing packages: pip install fsspec {package}"
        ) from error
    except UserError:
        raise
    except Exception as error:  # some file systems connect or look up credentials immediately
        raise _make_error(url, error) from error


def _http_options() -> dict[str, Any]:
    import aiohttp

    # Limit inactivity rather than the whole download (aiohttp's default is five minutes).
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
    return {
        "simple_links": False,
        "encoded": True,
        # Raw bytes: a .gz file must not be decompressed in transit.
        "headers": {"Accept-Encoding": "identity"},
        "client_kwargs": {"timeout": timeout, "trust_env": True, "auto_decompress": False},
    }


# --- errors -----------------------------------------------------------------------------------


def _list_causes(error: BaseException) -> list[BaseException]:
    """Return an exception and its causes; fsspec reports any HTTP error as "not found"."""
    cause = error.__cause__
    return [error] if cause is None else [error, *_list_causes(cause)]


def _get_status(error: BaseException) -> int | None:
    """Return the HTTP status of an exception, wherever its library stores it."""
    for cause in _list_causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            found = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
        else:
            found = [getattr(response, "status_code", None)]
        # In this order, because aiohttp warns about its deprecated name.
        found.append(getattr(cause, "status", None) or getattr(cause, "code", None))
        for value in found:
            if str(value).isdigit() and 400 <= int(str(value)) < 600:
                return int(str(value))
    return None


def _is_transient(error: BaseException) -> bool:
    """Return whether another attempt may succeed."""
    # Types first: aiohttp reports a broken body with status 400.
    kinds = {kind.__name__ for cause in _list_causes(error) for kind in type(cause).__mro__}
    status = _get_status(error) or 0
    return bool(kinds & _TRANSIENT) or status >= 500 or status in (408, 429)


def _make_error(url: str, error: BaseException) -> UserError:
    """Return a one-sentence UserError for an exception of a file system."""
    status, last = _get_status(error), _list_causes(error)[-1]
    code = f" (HTTP {status})" if status else ""
    detail = " ".join(str(last).split())[:200] or type(last).__name__
    if _is_transient(error):
        why = f"HTTP {status}" if status and status != 400 else detail
        return Unreachable(f"cannot download {redact(url)}: {why}, after {ATTEMPTS} attempts.")
    if status in (401, 403) or isinstance(last, PermissionError):
        return UserError(
            f"access to {redact(url)} is denied{code}; check the URL and your credentials."
        )
    if status in (404, 410) or isinstance(last, FileNotFoundError):
        return UserError(f"{redact(url)} does not exist{code}; check the URL.")
    return UserError(f"cannot read {redact(url)}: {type(last).__name__}: {detail}")
