"""One set of one corpus: its files mapped read-only, checked when opened, and read by row.

The only place that knows how arrays lie on disk, so that a further storage is a change here.
"""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from dataset.common import ARRAY_NAMES, IGNORE_LABEL_ID, DatasetMetadata, UserError, array_path

REBUILD = "copy the corpus again, or build it again"
LARGE_CORPUS = 2 << 30
"""Bytes above which a corpus is not read whole when it is opened."""

_REQUIRED = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")
_CHUNK = 1 << 20
_SAMPLE = 1024


@dataclass
class CorpusPart:
    """One set of one corpus; arrays are mapped, and indices into it are local.

    Checked when made: a `UserError` names the file, what is wrong with it and the way out.
    """

    folder: Path
    set_name: str
    metadata: DatasetMetadata
    arrays: dict[str, np.ndarray]
    identifier_map: np.ndarray  # stored identifier -> joined one
    domain_map: np.ndarray  # stored domain -> joined one
    first_row: int  # global numbers of this part's first row and group
    first_group: int

    def __post_init__(self) -> None:
        _check_tokens(self)
        no_puzzle_empty = _check_indices(self)
        _check_row_arrays(self)
        stored = self.arrays["puzzle_identifiers"].size
        # As many puzzles as rows, and some of them empty: only TRM's layout, by puzzle.
        self._identifiers_per_row = stored == self.num_rows and (
            no_puzzle_empty or stored != self.num_puzzles
        )

    @property
    def num_rows(self) -> int:
        return self.arrays["inputs"].shape[0]

    @property
    def num_puzzles(self) -> int:
        return self.arrays["puzzle_indices"].size - 1

    @property
    def num_groups(self) -> int:
        return self.arrays["group_indices"].size - 1

    def tokens(self, name: str, rows: np.ndarray) -> np.ndarray:
        """`inputs` or a kind of labels as (n, S) int32, ignored positions as IGNORE_LABEL_ID."""
        stored = self.arrays[name][rows]
        values = stored.astype(np.int32)
        if name != "inputs" and self.metadata.ignore_label_id is not None:
            # Compared as stored: the largest unsigned value does not survive the conversion.
            ignored = stored == self.metadata.ignore_label_id
            np.copyto(values, IGNORE_LABEL_ID, where=ignored)
        return values

    def highest(self, name: str) -> int:
        """Largest value of a kind of labels, ignored ones left out; -1 without any."""
        if name not in self.arrays:
            return -1
        rows, width = self.arrays[name].shape
        size = max(1, _CHUNK // max(1, width))
        chunks = (np.arange(i, min(i + size, rows)) for i in range(0, rows, size))
        return max((int(self.tokens(name, chunk).max(initial=-1)) for chunk in chunks), default=-1)

    def identifiers(self, rows: np.ndarray) -> np.ndarray:
        """Joined identifiers of rows (n,), whether stored by row or, as TRM does, by puzzle."""
        if not self._identifiers_per_row:
            rows = np.searchsorted(self.arrays["puzzle_indices"], rows, side="right") - 1
        return self.identifier_map[self.arrays["puzzle_identifiers"][rows]]

    def domains(self, rows: np.ndarray) -> np.ndarray:
        """Joined domain of rows (n,)."""
        if "domain_ids" not in self.arrays:
            return np.full(rows.size, self.domain_map[0])
        return self.domain_map[self.arrays["domain_ids"][rows]]

    def puzzles(self, groups: np.ndarray, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First row and number of rows of puzzle `choice mod size` of each group, (n,) each."""
        group_indices, puzzle_indices = self.arrays["group_indices"], self.arrays["puzzle_indices"]
        first = group_indices[groups].astype(np.int64)
        count = group_indices[groups + 1].astype(np.int64) - first
        puzzle = first + (choice % count.astype(np.uint64)).astype(np.int64)
        start = puzzle_indices[puzzle].astype(np.int64)
        return start, puzzle_indices[puzzle + 1].astype(np.int64) - start

    def first_rows(self) -> np.ndarray:
        """First row of every group, (num_groups,) int64."""
        rows = self.arrays["puzzle_indices"][self.arrays["group_indices"][:-1]].astype(np.int64)
        # The part's last puzzle may be empty, and then begins past the last row.
        return np.minimum(rows, max(0, self.num_rows - 1))


def open_arrays(folder: Path, set_name: str, random_access: bool) -> dict[str, np.ndarray]:
    """Map every array of a set; `random_access` says that rows will be read in random order."""
    arrays = {}
    for name in (*ARRAY_NAMES, "reasoning_labels"):
        path = array_path(folder, name, set_name)
        if not path.is_file():
            if name in _REQUIRED:
                raise UserError(f"{path} is missing; {REBUILD}.")
            continue
        try:
            # Plain arrays over the mapping: np.memmap's own indexing is slower.
            mapped = np.load(path, mmap_mode="r")
            array = np.asarray(mapped)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                f"{path} is truncated or not an array of numbers ({error}); {REBUILD}."
            ) from error
        if array.dtype.kind not in "iu":
            raise UserError(f"{path} holds {array.dtype}, not integers; {REBUILD}.")
        if random_access and array.nbytes > LARGE_CORPUS and hasattr(mmap, "MADV_RANDOM"):
            # The kernel reads 128 KiB ahead at each touch; a row needs a few KiB of it.
            mapped._mmap.madvise(mmap.MADV_RANDOM)
        arrays[name] = array
    return arrays


def _fail(part: CorpusPart, name: str, problem: str) -> NoReturn:
    raise UserError(f"{array_path(part.folder, name, part.set_name)} {problem}; {REBUILD}.")


def _check_tokens(part: CorpusPart) -> None:
    """Shapes of all token arrays, and the ids in a sample of their rows."""
    inputs, meta = part.arrays["inputs"], part.metadata
    if inputs.ndim != 2 or inputs.shape[1] != meta.seq_len:
        problem = f"has shape {inputs.shape}, but its metadata says seq_len {meta.seq_len}"
        _fail(part, "inputs", problem)
    for name in ("inputs", "labels"):
        array = part.arrays[name]
        if array.shape != inputs.shape:
            _fail(part, name, f"has shape {array.shape}, but inputs have {inputs.shape}")
        sample = sample_rows(array)
        if name == "labels":
            sample = sample[(sample != meta.ignore_label_id) & (sample != IGNORE_LABEL_ID)]
        wrong = sample[(sample < 0) | (sample >= meta.vocab_size)]
        if wrong.size:
            _fail(part, name, f"holds token id {wrong[0]}, but vocab_size is {meta.vocab_size}")
    reasoning = part.arrays.get("reasoning_labels")
    if reasoning is not None and (reasoning.ndim != 2 or len(reasoning) != len(inputs)):
        problem = f"has shape {reasoning.shape}, but inputs have {inputs.shape}"
        _fail(part, "reasoning_labels", problem)


def _check_indices(part: CorpusPart) -> bool:
    """Borders of puzzles and groups; returns whether every puzzle holds a row."""
    puzzles, groups = part.arrays["puzzle_indices"], part.arrays["group_indices"]
    no_puzzle_empty = _border_problem(puzzles, part.num_rows, "rows", least=1) is None
    if not no_puzzle_empty:
        problem = _border_problem(puzzles, part.num_rows, "rows", least=0)
        if problem:
            _fail(part, "puzzle_indices", problem)
    problem = _border_problem(groups, part.num_puzzles, "puzzles", least=1)
    if problem:
        _fail(part, "group_indices", problem)
    return no_puzzle_empty


def _check_row_arrays(part: CorpusPart) -> None:
    """Lengths of the arrays with one number a row, and the names that the numbers stand for."""
    names = {"puzzle_identifiers": len(part.identifier_map), "domain_ids": len(part.domain_map)}
    for name in ("puzzle_identifiers", "iteration_targets", "domain_ids"):
        array = part.arrays.get(name)
        if array is None:
            continue
        by_puzzle = name == "puzzle_identifiers" and array.shape == (part.num_puzzles,)
        if array.shape != (part.num_rows,) and not by_puzzle:
            _fail(part, name, f"has shape {array.shape}, but there are {part.num_rows} rows")
        if name in names and maximum(array) >= names[name]:
            _fail(part, name, f"holds {maximum(array)}, but there are {names[name]} names")


def _border_problem(array: np.ndarray, last: int, what: str, *, least: int) -> str | None:
    """Why `array` is not 0 = b0, b1, .. = last in steps of at least `least`; None if it is."""
    if array.ndim != 1 or array.size < 1 or array[0] != 0:
        return "must be one-dimensional and start at 0"
    for start in range(0, array.size - 1, _CHUNK):
        chunk = array[start : start + _CHUNK + 1].astype(np.int64)
        bad = np.flatnonzero(np.diff(chunk) < least)
        if bad.size:
            place = start + int(bad[0])
            return f"goes from {array[place]} to {array[place + 1]} at {place}: it must rise"
    return None if array[-1] == last else f"ends at {array[-1]}, but there are {last} {what}"


def maximum(array: np.ndarray) -> int:
    """Largest value of a mapped (n,) array, read in chunks; -1 if it is empty."""
    return max((int(array[i : i + _CHUNK].max()) for i in range(0, len(array), _CHUNK)), default=-1)


def sample_rows(array: np.ndarray) -> np.ndarray:
    """About a thousand rows at even distances; all of them where there are fewer."""
    return array[:: max(1, len(array) // _SAMPLE)]
