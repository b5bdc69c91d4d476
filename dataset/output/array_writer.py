"""Write growing `.npy` files, and the set of them that forms a split.

Rows are appended after an `.npy` header of fixed size whose row count is patched in at the end, so
neither memory nor a known number of rows is required. Writing can resume from an earlier row count
by truncating the file.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dataset.common import METADATA_NAME, DatasetMetadata, checksum_file
from dataset.output.journal import DamagedBuildError

HEADER_BYTES = 128


def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Return a version 1.0 header, padded with spaces to `HEADER_BYTES` for any shape."""
    descr = np.lib.format.dtype_to_descr(dtype)
    description = {"descr": descr, "fortran_order": False, "shape": shape}
    text = repr(description).ljust(HEADER_BYTES - 11) + "\n"
    assert len(text) == HEADER_BYTES - 10, f"header of {dtype} {shape} does not fit"
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.encode("latin1")


class ArrayWriter:
    """Writes one `.npy` file (N, *row_shape) in blocks of rows.

    `rows`: append to an existing file after its first `rows` rows.
    """

    def __init__(
        self, path: Path, dtype: Any, row_shape: tuple[int, ...] = (), rows: int | None = None
    ) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.row_shape = row_shape
        self.rows = rows or 0
        size = HEADER_BYTES + self.rows * self.dtype.itemsize * int(np.prod(row_shape))
        if rows is not None and (not path.is_file() or path.stat().st_size < size):
            raise DamagedBuildError(
                f"{path} of the unfinished build is missing or shorter than when it was saved; "
                "start over with --overwrite."
            )
        mode = "wb" if rows is None else "r+b"
        self._file = open(path, mode, buffering=1 << 20)  # noqa: SIM115  closed by close()
        if rows is None:
            self._file.write(_npy_header(self.dtype, (0, *row_shape)))
        else:
            self._file.truncate(size)
            self._file.seek(size)

    def append(self, rows: np.ndarray) -> None:
        """Append rows (n, *row_shape), cast to the file's dtype."""
        assert rows.shape[1:] == self.row_shape, f"{self.path}: rows of {rows.shape[1:]}"
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.rows += len(rows)

    def sync(self) -> None:
        """Flush all rows to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write the final row count into the header and flush the file to disk."""
        self._file.seek(0)
        self._file.write(_npy_header(self.dtype, (self.rows, *self.row_shape)))
        self.sync()
        self._file.close()


class SplitWriter:
    """Writes the arrays of one split, one row per puzzle and group, and their `dataset.json`.

    Args:
        arrays: dtype and row shape by array name; must include `puzzle_identifiers`.
        prefix: "" for Athena's layout and "all__" for TRM's.
        indices: also write `puzzle_indices` and `group_indices`, in which each row is its own
            puzzle and group.
        rows: append to existing files, each after this many rows.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, tuple[Any, tuple[int, ...]]],
        prefix: str = "",
        indices: bool = True,
        rows: Mapping[str, int] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.prefix = prefix
        self._indices = indices
        self._writers = {
            name: ArrayWriter(self._path(name), dtype, shape, rows[name] if rows else None)
            for name, (dtype, shape) in arrays.items()
        }

    @property
    def rows(self) -> int:
        return self._writers["puzzle_identifiers"].rows

    def append(self, **arrays: np.ndarray) -> None:
        """Append to every array; all except `tokens` get the same number of rows."""
        assert arrays.keys() == self._writers.keys(), f"{self.folder}: got {sorted(arrays)}"
        per_row = {len(rows) for name, rows in arrays.items() if name != "tokens"}
        assert len(per_row) == 1, f"{self.folder}: uneven rows"
        for name, rows in arrays.items():
            self._writers[name].append(rows)

    def saved_rows(self) -> dict[str, int]:
        """Flush all arrays to disk and return the number of rows of each."""
        for writer in self._writers.values():
            writer.sync()
        return {name: writer.rows for name, writer in self._writers.items()}

    def finish(self, **metadata: Any) -> DatasetMetadata:
        """Close the arrays and write `dataset.json` with their checksums."""
        rows = self.rows
        for name in ("puzzle_indices", "group_indices") if self._indices else ():
            writer = self._writers[name] = ArrayWriter(self._path(name), np.int64)
            for start in range(0, rows + 1, 1 << 20):
                writer.append(np.arange(start, min(start + (1 << 20), rows + 1)))
        for writer in self._writers.values():
            writer.close()
        paths = [writer.path for writer in self._writers.values()]
        with ThreadPoolExecutor() as pool:
            checksums = dict(
                zip((path.name for path in paths), pool.map(checksum_file, paths), strict=True)
            )
        result = DatasetMetadata(
            total_groups=rows,
            total_puzzles=rows,
            mean_puzzle_examples=1.0,
            checksums=checksums,
            **metadata,
        )
        write_json(self.folder / METADATA_NAME, result.model_dump())
        return result

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.prefix}{name}.npy"


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON and flush it to disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
