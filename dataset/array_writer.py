"""Writing a corpus: arrays as streams, and folders that appear whole or not at all.

Rows go to a raw stream behind an `.npy` header of fixed size, whose row count is patched in at the
end, so that neither memory nor a count known beforehand is needed.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dataset.common import METADATA_NAME, DatasetMetadata, UserError, sha256_file

HEADER_BYTES = 128
CORPUS_ENTRIES = {"train", "test", "identifiers.json", "tokenizer.json", "build_report.json"}


def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Version 1.0 header, padded with spaces to `HEADER_BYTES` whatever the shape."""
    description = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    text = repr(description).ljust(HEADER_BYTES - 11) + "\n"
    assert len(text) == HEADER_BYTES - 10, f"header of {dtype} {shape} does not fit"
    return b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + text.encode("latin1")


class ArrayWriter:
    """One `.npy` file that grows by blocks of rows: (N, *row_shape)."""

    def __init__(self, path: Path, dtype: Any, row_shape: tuple[int, ...] = ()) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self.row_shape = row_shape
        self.rows = 0
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115  closed by close()
        self._file.write(_npy_header(self.dtype, (0, *row_shape)))

    def append(self, rows: np.ndarray) -> None:
        """Append rows (n, *row_shape); they are cast to the file's dtype."""
        assert rows.shape[1:] == self.row_shape, f"{self.path}: rows of {rows.shape[1:]}"
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self.rows += len(rows)

    def close(self) -> None:
        """Patch the row count in and wait until the disk has the file."""
        self._file.seek(0)
        self._file.write(_npy_header(self.dtype, (self.rows, *self.row_shape)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close without finishing; the folder is about to be removed."""
        self._file.close()


class SplitWriter:
    """The arrays of one split, one row per puzzle and group, and their `dataset.json`.

    `prefix` is "" for Athena's layout and "all__" for TRM's. Rows appended: inputs and labels
    (n, S) in `dtype`; puzzle_identifiers and, if `per_row` names them, iteration_targets and
    domain_ids (n,) int32.
    """

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype,
        seq_len: int,
        prefix: str = "",
        per_row: tuple[str, ...] = ("puzzle_identifiers", "iteration_targets", "domain_ids"),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.prefix = prefix
        self._writers = {
            name: ArrayWriter(folder / f"{prefix}{name}.npy", dtype, (seq_len,))
            for name in ("inputs", "labels")
        }
        for name in per_row:
            self._writers[name] = ArrayWriter(folder / f"{prefix}{name}.npy", np.int32)

    @property
    def rows(self) -> int:
        return self._writers["inputs"].rows

    def append(self, **arrays: np.ndarray) -> None:
        """Append the same number of rows to every array."""
        assert arrays.keys() == self._writers.keys(), f"{self.folder}: got {sorted(arrays)}"
        assert len({len(rows) for rows in arrays.values()}) == 1, f"{self.folder}: uneven rows"
        for name, rows in arrays.items():
            self._writers[name].append(rows)

    def finish(self, **metadata: Any) -> DatasetMetadata:
        """Close the arrays, add both index arrays and write `dataset.json` with checksums."""
        rows = self.rows
        for name in ("puzzle_indices", "group_indices"):
            writer = ArrayWriter(self.folder / f"{self.prefix}{name}.npy", np.int64)
            self._writers[name] = writer
            for start in range(0, rows + 1, 1 << 20):
                writer.append(np.arange(start, min(start + (1 << 20), rows + 1)))
        for writer in self._writers.values():
            writer.close()
        checksums = {
            writer.path.name: sha256_file(writer.path) for writer in self._writers.values()
        }
        result = DatasetMetadata(
            total_groups=rows,
            total_puzzles=rows,
            mean_puzzle_examples=1.0,
            checksums=checksums,
            **metadata,
        )
        write_json(self.folder / METADATA_NAME, result.model_dump())
        return result

    def abandon(self) -> None:
        for writer in self._writers.values():
            writer.abandon()


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON and wait until the disk has it."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def is_corpus(folder: Path) -> bool:
    """Whether a builder of Athena (or of TRM) finished this folder."""
    return any(
        (folder / "train" / layout / METADATA_NAME).is_file() for layout in ("all", ".")
    ) and ((folder / "identifiers.json").is_file())


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """The options that every builder shares."""
    parser.add_argument("--output-dir", required=True, type=Path, metavar="FOLDER")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a finished corpus, at the very end"
    )


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Refuse, before any work is done, a folder that must not be replaced."""
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file; name a folder.")
    entries = {entry.name for entry in output_dir.iterdir()}
    if not entries:
        return
    if not is_corpus(output_dir):
        raise UserError(
            f"--output-dir {output_dir} is not empty and holds no finished corpus; name a new "
            "folder, or empty this one yourself."
        )
    if not overwrite:
        raise UserError(
            f"--output-dir {output_dir} holds a finished corpus; name another folder, or pass "
            "--overwrite to replace it."
        )
    if foreign := sorted(entries - CORPUS_ENTRIES):
        raise UserError(
            f"--output-dir {output_dir} also holds {', '.join(foreign[:5])}, which --overwrite "
            "would delete; move that away first."
        )


@contextmanager
def corpus_folder(output_dir: str | Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling to build in; it takes `output_dir`'s place when the block succeeds.

    On any exception the sibling is removed and `output_dir` is as it was.
    """
    target = Path(output_dir).expanduser().resolve()
    check_output_dir(target, overwrite)
    building = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(building, ignore_errors=True)  # of an earlier process of the same number
        building.mkdir()
    except OSError as error:
        raise UserError(f"cannot write to {target.parent}: {error.strerror or error}.") from error
    try:
        yield building
        _sync_folders(building)
        check_output_dir(target, overwrite)  # someone else may have finished meanwhile
        _replace(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _sync_folders(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(building: Path, target: Path) -> None:
    """Put `building` in `target`'s place; what stood there is deleted last."""
    former = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.rename(target, former)
    try:
        os.rename(building, target)
    except OSError:
        if former.exists():
            os.rename(former, target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(former, ignore_errors=True)
