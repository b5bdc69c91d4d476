"""Arrays on disk, and reading stretches of them: a row costs its own bytes and no more.

Through a memory map each touch of a random row drags 128 KiB and more of its neighbours off a
cold disk. So rows are read with `preadv` from a descriptor for which read-ahead is off; where
that cannot be done (another system, arrays stored by column) the map serves instead.
"""

import errno
import mmap
import os
import weakref
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from dataset.common import array_path
from utils.core.errors import UserError

REBUILD = "copy the corpus again, or build it again"
CHUNK = 1 << 20
"""Elements of a large array that are looked at together."""

_SAMPLE = 1024
_IN_MEMORY = 32 << 20  # bytes up to which an array with one number a row is held in memory


class RowFile:
    """An array of integers in a .npy file; stretches of it are read when asked for.

    `random_access` says that they will be far apart. Safe to read from several threads.
    """

    def __init__(self, path: Path, random_access: bool):
        mapped = map_array(path)
        self.path, self.shape, self.dtype = path, mapped.shape, mapped.dtype
        self.nbytes = mapped.nbytes
        self._random_access = random_access and hasattr(os, "posix_fadvise")
        self._mapped: np.memmap | None = mapped
        if not (mapped.flags.c_contiguous and hasattr(os, "preadv")):
            return
        self._mapped, self._first_byte = None, mapped.offset
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        if self._random_access:
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n,) int64 of a two-dimensional array, (n, width) as stored."""
        if self._mapped is not None:
            return np.asarray(self._mapped[rows])
        out = np.empty((rows.size, self.shape[1]), self.dtype)
        width = self.shape[1] * self.dtype.itemsize
        first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # neighbours are read at once
        counts = np.diff(first, append=rows.size)
        self._read(out, first * width, rows[first] * width, counts * width)
        return out

    def spans(self, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
        """Elements starts[i] .. starts[i] + lengths[i] of a one-dimensional array as row i.

        Args: starts, lengths (n,) int64, lengths at most `width`.
        Returns: (n, width) as stored; what lies behind a row's length is undefined.
        """
        out = np.empty((starts.size, width), self.dtype)
        if self._mapped is not None:
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                out[row, :length] = self._mapped[start : start + length]
            return out
        size = self.dtype.itemsize
        self._read(out, np.arange(starts.size) * (width * size), starts * size, lengths * size)
        return out

    def _read(
        self, out: np.ndarray, into: np.ndarray, offsets: np.ndarray, sizes: np.ndarray
    ) -> None:
        """Bytes at `offsets` of the array to the bytes `into` of `out`; (n,) int64 each."""
        view = out.reshape(-1).view(np.uint8).data
        lists = [array.tolist() for array in (into, into + sizes, offsets + self._first_byte)]
        spans = [(view[begin:end], start) for begin, end, start in zip(*lists, strict=True)]
        try:
            if self._random_access and len(spans) > 1:
                spans = self._not_in_memory(spans)
                for rest, start in spans:  # so that the disk works on all at once
                    os.posix_fadvise(self._descriptor, start, len(rest), os.POSIX_FADV_WILLNEED)
            for rest, start in spans:
                while rest:
                    count = os.preadv(self._descriptor, [rest], start)
                    if count == 0:
                        raise UserError(
                            f"{self.path} ends at byte {start}: it was cut off after it was "
                            f"opened; {REBUILD}."
                        )
                    rest, start = rest[count:], start + count
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error}); {REBUILD}.") from error

    def _not_in_memory(self, spans: list[tuple[memoryview, int]]) -> list[tuple[memoryview, int]]:
        """Read what the system has in memory; gives back what is left for the disk."""
        if not hasattr(os, "RWF_NOWAIT"):
            return spans
        left: list[tuple[memoryview, int]] = []
        for place, (rest, start) in enumerate(spans):
            try:
                count = os.preadv(self._descriptor, [rest], start, os.RWF_NOWAIT)
            except BlockingIOError:
                count = 0
            except OSError:  # a file system without such reads
                return left + spans[place:]
            if count < len(rest):
                left.append((rest[count:], start + count))
        return left


class ArrayFolder(NamedTuple):
    """Where the arrays of one set of a corpus lie, and how they will be read."""

    folder: Path
    set_name: str
    random_access: bool

    def has(self, name: str) -> bool:
        return array_path(self.folder, name, self.set_name).is_file()

    def _path(self, name: str) -> Path:
        path = array_path(self.folder, name, self.set_name)
        if not path.is_file():
            raise UserError(f"{path} is missing; {REBUILD}.")
        return path

    def map(self, name: str) -> np.memmap:
        return map_array(self._path(name))

    def rows(self, name: str) -> RowFile:
        return RowFile(self._path(name), self.random_access)

    def fail(self, name: str, problem: str) -> NoReturn:
        path = array_path(self.folder, name, self.set_name)
        raise UserError(f"{path} {problem}; {REBUILD}.")

    def settled(self, array: np.ndarray) -> np.ndarray:
        """A mapped array, checked by now, as it is best looked up row by row."""
        if array.nbytes <= _IN_MEMORY:
            return np.array(array)
        if self.random_access and hasattr(mmap, "MADV_RANDOM"):
            array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        return np.asarray(array)  # np.memmap's own indexing is slower


class Sample(NamedTuple):
    """What a fingerprint takes of an array: its kind, and about a thousand rows as stored."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: np.ndarray


def map_array(path: Path) -> np.memmap:
    """Map an array of integers read-only; UserError where the file is damaged or another thing."""
    try:
        mapped = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            advice = "; raise the limit, with ulimit -n" if error.errno == errno.EMFILE else ""
            raise UserError(f"cannot read {path}: {error.strerror}{advice}.") from error
        # numpy takes what is no array for pickled data, and advises to load that.
        why = "" if "pickle" in str(error) else f" ({error})"
        raise UserError(
            f"{path} is truncated, damaged or not an array of numbers{why}; {REBUILD}."
        ) from error
    if mapped.dtype.kind not in "iu":
        raise UserError(f"{path} holds {mapped.dtype}, not integers; {REBUILD}.")
    return mapped


def maximum(array: np.ndarray) -> int:
    """Largest value of a mapped (n,) array, read in chunks; -1 if it is empty."""
    return max((int(array[i : i + CHUNK].max()) for i in range(0, len(array), CHUNK)), default=-1)


def sample_numbers(length: int) -> np.ndarray:
    """About a thousand of `length` row numbers at even distances; all where there are fewer."""
    return np.arange(0, length, max(1, length // _SAMPLE))


def sample_of(array: RowFile | np.ndarray) -> Sample:
    numbers = sample_numbers(len(array))
    rows = array.rows(numbers) if isinstance(array, RowFile) else np.asarray(array[numbers])
    return Sample(array.shape, array.dtype, rows)
