"""Read rows of arrays on disk without reading more than their own bytes.

With a memory map, every access to a random row reads 128 KiB or more from a cold disk. Rows are
therefore read with `preadv` from a descriptor with kernel read-ahead disabled; the map is the
fallback on other systems and for column-major arrays.
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

REBUILD = "copy the corpus again or rebuild it"
CHUNK = 1 << 20
"""Elements of a large array processed at once."""

_SAMPLE = 1024
_IN_MEMORY = 32 << 20  # per-row arrays of up to this many bytes are held in memory


class RowFile:
    """An integer array in a .npy file that is read on demand.

    `random_access`: expect reads far apart. Thread-safe.
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
        """Return rows (n,) int64 of a two-dimensional array, (n, width) in the stored dtype."""
        if self._mapped is not None:
            return np.asarray(self._mapped[rows])
        out = np.empty((rows.size, self.shape[1]), self.dtype)
        width = self.shape[1] * self.dtype.itemsize
        first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # merge reads of adjacent rows
        counts = np.diff(first, append=rows.size)
        self._read(out, first * width, rows[first] * width, counts * width)
        return out

    def spans(self, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
        """Return elements starts[i] .. starts[i] + lengths[i] of a 1-D array as row i.

        Args: starts, lengths (n,) int64, lengths at most `width`.
        Returns: (n, width) in the stored dtype; values beyond a row's length are undefined.
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
        """Read `sizes` bytes at `offsets` of the array into `out` at bytes `into`; (n,) each."""
        view = out.reshape(-1).view(np.uint8).data
        lists = [array.tolist() for array in (into, into + sizes, offsets + self._first_byte)]
        spans = [(view[begin:end], start) for begin, end, start in zip(*lists, strict=True)]
        try:
            if self._random_access and len(spans) > 1:
                spans = self._read_cached(spans)
                for rest, start in spans:  # let the disk serve all reads in parallel
                    os.posix_fadvise(self._descriptor, start, len(rest), os.POSIX_FADV_WILLNEED)
            for rest, start in spans:
                while rest:
                    count = os.preadv(self._descriptor, [rest], start)
                    if count == 0:
                        raise UserError(
                            f"{self.path} ends at byte {start}: it was truncated while open; "
                            f"{REBUILD}."
                        )
                    rest, start = rest[count:], start + count
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error}); {REBUILD}.") from error

    def _read_cached(self, spans: list[tuple[memoryview, int]]) -> list[tuple[memoryview, int]]:
        """Read the parts in the page cache and return the spans left to read from disk."""
        if not hasattr(os, "RWF_NOWAIT"):
            return spans
        left: list[tuple[memoryview, int]] = []
        for place, (rest, start) in enumerate(spans):
            try:
                count = os.preadv(self._descriptor, [rest], start, os.RWF_NOWAIT)
            except BlockingIOError:
                count = 0
            except OSError:  # not supported by the file system
                return left + spans[place:]
            if count < len(rest):
                left.append((rest[count:], start + count))
        return left


class ArrayFolder(NamedTuple):
    """Location of the arrays of one set of a corpus, and how they will be accessed."""

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

    def prepare_lookup(self, array: np.ndarray) -> np.ndarray:
        """Return a mapped array in the form that is fastest for lookups of single rows."""
        if array.nbytes <= _IN_MEMORY:
            return np.array(array)
        if self.random_access and hasattr(mmap, "MADV_RANDOM"):
            array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
        return np.asarray(array)  # np.memmap's own indexing is slower


class Sample(NamedTuple):
    """The part of an array covered by a fingerprint: shape, dtype and about a thousand rows."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: np.ndarray


def map_array(path: Path) -> np.memmap:
    """Map an integer array read-only; raise UserError if the file is damaged or of another kind."""
    try:
        mapped = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            advice = "; raise the limit with ulimit -n" if error.errno == errno.EMFILE else ""
            raise UserError(f"cannot read {path}: {error.strerror}{advice}.") from error
        # numpy takes other files for pickled data and advises loading them as such.
        why = "" if "pickle" in str(error) else f" ({error})"
        raise UserError(
            f"{path} is truncated, damaged or not an array of numbers{why}; {REBUILD}."
        ) from error
    if mapped.dtype.kind not in "iu":
        raise UserError(f"{path} contains {mapped.dtype}, not integers; {REBUILD}.")
    return mapped


def maximum(array: np.ndarray) -> int:
    """Return the largest value of a mapped (n,) array, read in chunks; -1 if it is empty."""
    return max((int(array[i : i + CHUNK].max()) for i in range(0, len(array), CHUNK)), default=-1)


def sample_numbers(length: int) -> np.ndarray:
    """Return about a thousand evenly spaced row numbers below `length`, or all if fewer."""
    return np.arange(0, length, max(1, length // _SAMPLE))


def take_sample(array: RowFile | np.ndarray) -> Sample:
    """Return the sample of an array that goes into a fingerprint."""
    numbers = sample_numbers(len(array))
    rows = array.rows(numbers) if isinstance(array, RowFile) else np.asarray(array[numbers])
    return Sample(array.shape, array.dtype, rows)
