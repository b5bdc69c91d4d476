"""Open an input file as a stream of decompressed bytes.

Unreadable, truncated and damaged files always raise a `UserError` with the file and the position:
a decompressor that stops early without an error would silently lose documents.
"""

import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from dataset.input.text_sources import Source
from utils.core.errors import UserError

# Reading lines directly from a decompressor is slow, so it is wrapped in a buffer of this size.
_BUFFER = 1 << 20


def _open_zstd(raw: IO[bytes]) -> IO[bytes]:
    # Not the `zstandard` package, which reads truncated files without an error.
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise UserError(
                "reading .zst requires backports.zstd: pip install backports.zstd"
            ) from None
    # The largest window of the format, for files written with `zstd --long=31`.
    return zstd.open(raw, "rb", options={zstd.DecompressionParameter.window_log_max: 31})


class _XzReader(io.RawIOBase):
    """Reads all streams of an .xz file.

    `lzma.LZMAFile` takes invalid data after the first stream for the end of the file, so it would
    silently ignore a damaged second stream.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._stream = lzma.LZMADecompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof:
                rest = self._stream.unused_data.lstrip(b"\0")  # padding between streams
                while not rest and (block := self._raw.read(_BUFFER)):
                    rest = block.lstrip(b"\0")
                if not rest:
                    return 0
                self._stream = lzma.LZMADecompressor()
            else:
                rest = self._raw.read(_BUFFER) if self._stream.needs_input else b""
                if not rest and self._stream.needs_input:
                    raise EOFError("the file ends in the middle of a stream")
            data = self._stream.decompress(rest, len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)


_OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
    "zstd": _open_zstd,
    "xz": _XzReader,
}
_POINTER = b"version https://git-lfs.github.com/spec/"


def check_not_lfs_pointer(source: Source, start: bytes) -> None:
    """Raise UserError if a file's first bytes show that it is a Git LFS pointer."""
    if start.startswith(_POINTER):
        raise UserError(
            f"{source} is a Git LFS pointer, not the file itself; fetch it with git lfs pull."
        )


@contextmanager
def open_source(source: Source) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a source for reading; errors inside the block become `UserError`s.

    Yields:
        The decompressed stream, and a function that returns how many bytes of the file on disk
        have been read so far.
    """
    if source.is_stdin:
        if sys.stdin is None:  # python <&-
            raise UserError("standard input is closed; pass a file or pipe one into the command.")
        yield sys.stdin.buffer, lambda: 0
        return
    position = 0
    try:
        with io.BufferedReader(io.FileIO(source.path), _BUFFER) as raw:
            get_position = raw.tell if raw.seekable() else lambda: 0  # a pipe such as <(cat FILE)
            check_not_lfs_pointer(source, cast(io.BufferedReader, raw).peek(len(_POINTER)))
            if source.compression is None:
                yield raw, get_position
                return
            with _OPENERS[source.compression](raw) as stream:
                buffered = io.BufferedReader(stream, _BUFFER)
                try:
                    yield cast(IO[bytes], buffered), get_position
                finally:
                    position = get_position()
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise _reading_fault(source, error, position) from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise _reading_fault(source, error, position) from error
        raise


def _reading_fault(source: Source, error: Exception, position: int) -> UserError:
    """Return the error for a file that is truncated, damaged, or cannot be opened."""
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"cannot read {source}: {error.strerror}.")
    what = (
        "is truncated" if isinstance(error, EOFError) else f"is not valid {source.compression} data"
    )
    return UserError(
        f"{source} {what} at or before byte {position:,} of {source.size:,} ({error}); "
        "copy or download it again."
    )
