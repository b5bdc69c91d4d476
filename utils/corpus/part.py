"""One set of one corpus: its files, checked when opened, and everything that is asked of its rows.

How token rows lie on disk is in `token_rows`; here are the puzzles and groups that rows belong to
and the arrays with one number a row.
"""

import hashlib

import numpy as np

from dataset.common import DatasetMetadata
from utils.corpus.row_file import CHUNK, ArrayFolder, RowFile, maximum, sample_of
from utils.corpus.token_rows import fill_labels, open_token_rows

LARGE_CORPUS = 2 << 30
"""Bytes above which a corpus is not read whole when it is opened."""

_NUMBERS = ("puzzle_identifiers", "iteration_targets", "domain_ids", "scored_bytes")


class CorpusPart:
    """One set of one corpus; indices into it are local.

    Checked when made: a `UserError` names the file, what is wrong with it and the way out.

    Args:
        identifier_map, domain_map: from stored numbers to joined ones.
        first_row, first_group: global numbers of the part's first row and group.
    """

    def __init__(
        self,
        files: ArrayFolder,
        metadata: DatasetMetadata,
        identifier_map: np.ndarray,
        domain_map: np.ndarray,
        first_row: int,
        first_group: int,
    ):
        self._files, self.metadata = files, metadata
        self.set_name = files.set_name
        self._identifier_map, self._domain_map = identifier_map, domain_map
        self.first_row, self.first_group = first_row, first_group
        self._tokens = open_token_rows(files, metadata)
        self.num_rows = self.num_puzzles = self.num_groups = self._tokens.num_rows
        self._arrays: dict[str, np.ndarray] = {}
        no_puzzle_empty = metadata.layout == "stream" or self._open_indices()
        self.one_row_a_group = self.num_groups == self.num_rows and no_puzzle_empty
        """Whether group, puzzle and row are the same: then nothing is looked up."""
        self._open_numbers()
        self._reasoning = self._open_reasoning()
        stored = self._arrays["puzzle_identifiers"].size
        # As many puzzles as rows, and some of them empty: only TRM's layout, by puzzle.
        self._identifiers_per_row = stored == self.num_rows and (
            no_puzzle_empty or stored != self.num_puzzles
        )
        targets = self._arrays.get("iteration_targets")
        self.has_targets = targets is not None
        self.has_scored_bytes = "scored_bytes" in self._arrays
        self.max_target = 0 if targets is None else maximum(targets)
        self._samples = self._tokens.samples | {
            name: sample_of(array) for name, array in self._arrays.items()
        }
        self.nbytes = self._tokens.nbytes + sum(array.nbytes for array in self._arrays.values())
        """Size of all arrays."""
        if self._reasoning is not None:
            self._samples["reasoning_labels"] = sample_of(self._reasoning)
            self.nbytes += self._reasoning.nbytes
        self._settle()

    def _open_indices(self) -> bool:
        """Borders of puzzles and groups; returns whether every puzzle holds a row."""
        for name in ("puzzle_indices", "group_indices"):
            self._arrays[name] = self._files.map(name)
        puzzles, groups = self._arrays["puzzle_indices"], self._arrays["group_indices"]
        self.num_puzzles, self.num_groups = puzzles.size - 1, groups.size - 1
        no_puzzle_empty = _border_problem(puzzles, self.num_rows, "rows", least=1) is None
        if not no_puzzle_empty:
            problem = _border_problem(puzzles, self.num_rows, "rows", least=0)
            if problem:
                self._files.fail("puzzle_indices", problem)
        problem = _border_problem(groups, self.num_puzzles, "puzzles", least=1)
        if problem:
            self._files.fail("group_indices", problem)
        return no_puzzle_empty

    def _open_numbers(self) -> None:
        """The arrays with one number a row, and the names that the numbers stand for."""
        names = {"puzzle_identifiers": self._identifier_map, "domain_ids": self._domain_map}
        for name in _NUMBERS:
            if name != "puzzle_identifiers" and not self._files.has(name):
                continue
            array = self._files.map(name)
            by_puzzle = name == "puzzle_identifiers" and array.shape == (self.num_puzzles,)
            if array.shape != (self.num_rows,) and not by_puzzle:
                problem = f"has shape {array.shape}, but there are {self.num_rows} rows"
                self._files.fail(name, problem)
            if name in names and maximum(array) >= len(names[name]):
                problem = f"holds {maximum(array)}, but there are {len(names[name])} names"
                self._files.fail(name, problem)
            self._arrays[name] = array

    def _open_reasoning(self) -> RowFile | None:
        if not self._files.has("reasoning_labels"):
            return None
        labels = self._files.rows("reasoning_labels")
        if len(labels.shape) != 2 or len(labels) != self.num_rows:
            problem = f"has shape {labels.shape}, but there are {self.num_rows} rows"
            self._files.fail("reasoning_labels", problem)
        return labels

    def _settle(self) -> None:
        """From now on the arrays are looked up in random order, and some of them never."""
        if self.one_row_a_group:
            self._arrays = {name: a for name, a in self._arrays.items() if name in _NUMBERS}
        self._arrays = {name: self._files.settled(a) for name, a in self._arrays.items()}

    def fingerprint(self, digest: "hashlib._Hash") -> None:
        """Add to a hash, once, what tells this corpus from another: checksums and a sample."""
        meta = self.metadata
        known = (self.set_name, meta.ignore_label_id, meta.relabel_ids, meta.checksums)
        digest.update(repr(known).encode())
        if meta.layout == "stream":  # padding and ignored labels are not in the arrays
            digest.update(repr((meta.pad_id, meta.eos_id)).encode())
        for name, sample in sorted(self._samples.items()):
            digest.update(f"{name} {sample.shape} {sample.dtype}".encode())
            digest.update(np.ascontiguousarray(sample.rows).tobytes())
        self._samples.clear()

    @property
    def reasoning_width(self) -> int | None:
        return None if self._reasoning is None else self._reasoning.shape[1]

    def tokens(self, rows: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> None:
        """Fill `inputs` and `labels`, (n, S) int32, with rows; ignored labels IGNORE_LABEL_ID."""
        self._tokens.read(rows, inputs, labels)

    def reasoning_labels(self, rows: np.ndarray) -> np.ndarray | None:
        """(n, R) int32, ignored positions as IGNORE_LABEL_ID; None without any."""
        if self._reasoning is None:
            return None
        return self._as_labels(self._reasoning, rows)

    def _as_labels(self, stored: RowFile, rows: np.ndarray) -> np.ndarray:
        labels = np.empty((rows.size, *stored.shape[1:]), np.int32)
        fill_labels(labels, stored.rows(rows), self.metadata.ignore_label_id)
        return labels

    def highest_reasoning_label(self) -> int:
        """Largest of all reasoning labels, ignored ones left out; -1 without any."""
        if self._reasoning is None:
            return -1
        size = max(1, CHUNK // max(1, self._reasoning.shape[1]))
        highest = -1
        for first in range(0, self.num_rows, size):
            rows = np.arange(first, min(first + size, self.num_rows))
            highest = max(highest, int(self._as_labels(self._reasoning, rows).max(initial=-1)))
        return highest

    def identifiers(self, rows: np.ndarray) -> np.ndarray:
        """Joined identifiers of rows (n,) int32, stored by row or, as TRM does, by puzzle."""
        if not self._identifiers_per_row:
            rows = np.searchsorted(self._arrays["puzzle_indices"], rows, side="right") - 1
        return self._identifier_map[self._arrays["puzzle_identifiers"][rows]]

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """Iteration targets of rows (n,) int32; 0 where there are none."""
        if not self.has_targets:
            return np.zeros(rows.size, np.int32)
        return self._arrays["iteration_targets"][rows].astype(np.int32)

    def scored_bytes(self, rows: np.ndarray) -> np.ndarray | None:
        """Return the bytes of text behind the labels of rows, (n,) int64; None without any."""
        if "scored_bytes" not in self._arrays:
            return None
        return self._arrays["scored_bytes"][rows].astype(np.int64)

    def domains(self, rows: np.ndarray) -> np.ndarray:
        """Joined domain of rows (n,) int32."""
        if "domain_ids" not in self._arrays:
            return np.full(rows.size, self._domain_map[0], np.int32)
        return self._domain_map[self._arrays["domain_ids"][rows]]

    def group_domains(self, groups: np.ndarray) -> np.ndarray:
        """Joined domain of the first row of each group, (n,)."""
        if self.one_row_a_group:
            return self.domains(groups)
        rows = self._arrays["puzzle_indices"][self._arrays["group_indices"][groups]]
        # The part's last puzzle may be empty, and then begins past the last row.
        return self.domains(np.minimum(rows.astype(np.int64), max(0, self.num_rows - 1)))

    def puzzles(self, groups: np.ndarray, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First row and number of rows of puzzle `choice mod size` of each group, (n,) each."""
        if self.one_row_a_group:
            return groups, np.ones_like(groups)
        borders, puzzle_indices = self._arrays["group_indices"], self._arrays["puzzle_indices"]
        first = borders[groups].astype(np.int64)
        count = borders[groups + 1].astype(np.int64) - first
        puzzle = first + (choice % count.astype(np.uint64)).astype(np.int64)
        start = puzzle_indices[puzzle].astype(np.int64)
        return start, puzzle_indices[puzzle + 1].astype(np.int64) - start


def _border_problem(array: np.ndarray, last: int, what: str, *, least: int) -> str | None:
    """Why `array` is not 0 = b0, b1, .. = last in steps of at least `least`; None if it is."""
    if array.ndim != 1 or array.size < 1 or array[0] != 0:
        return "must be one-dimensional and start at 0"
    for start in range(0, array.size - 1, CHUNK):
        chunk = array[start : start + CHUNK + 1].astype(np.int64)
        bad = np.flatnonzero(np.diff(chunk) < least)
        if bad.size:
            place = start + int(bad[0])
            return f"goes from {array[place]} to {array[place + 1]} at {place}: it must rise"
    return None if array[-1] == last else f"ends at {array[-1]}, but there are {last} {what}"
