"""One set of one corpus: its files, validated on opening, and access to its rows.

`token_rows` handles the storage of token rows; this module handles puzzles, groups and the arrays
with one number per row.
"""

import hashlib

import numpy as np

from dataset.common import DatasetMetadata
from utils.corpus.row_file import CHUNK, ArrayFolder, RowFile, maximum, take_sample
from utils.corpus.token_rows import fill_labels, open_token_rows

LARGE_CORPUS = 2 << 30
"""Size in bytes above which a corpus is not read completely when opened."""

_NUMBERS = ("puzzle_identifiers", "iteration_targets", "domain_ids", "scored_bytes")


class CorpusPart:
    """One set of one corpus, with local indices.

    Validated on construction: a `UserError` reports the file, the problem and the fix.

    Args:
        identifier_map, domain_map: map stored numbers to joined ones.
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
        """Whether groups, puzzles and rows coincide, so that no lookups are needed."""
        self._open_numbers()
        self._reasoning = self._open_reasoning()
        stored = self._arrays["puzzle_identifiers"].size
        # If sizes match but some puzzles are empty, this is TRM's layout, stored by puzzle.
        self._identifiers_per_row = stored == self.num_rows and (
            no_puzzle_empty or stored != self.num_puzzles
        )
        targets = self._arrays.get("iteration_targets")
        self.has_targets = targets is not None
        self.has_scored_bytes = "scored_bytes" in self._arrays
        self.max_target = 0 if targets is None else maximum(targets)
        self._samples = self._tokens.samples | {
            name: take_sample(array) for name, array in self._arrays.items()
        }
        self.nbytes = self._tokens.nbytes + sum(array.nbytes for array in self._arrays.values())
        """Total size of all arrays."""
        if self._reasoning is not None:
            self._samples["reasoning_labels"] = take_sample(self._reasoning)
            self.nbytes += self._reasoning.nbytes
        if self.one_row_a_group:  # the borders of puzzles and groups are no longer needed
            self._arrays = {name: a for name, a in self._arrays.items() if name in _NUMBERS}
        self._arrays = {name: files.prepare_lookup(a) for name, a in self._arrays.items()}

    def _open_indices(self) -> bool:
        """Open the puzzle and group boundaries; return whether every puzzle has a row."""
        for name in ("puzzle_indices", "group_indices"):
            self._arrays[name] = self._files.map(name)
        puzzles, groups = self._arrays["puzzle_indices"], self._arrays["group_indices"]
        self.num_puzzles, self.num_groups = puzzles.size - 1, groups.size - 1
        no_puzzle_empty = _find_border_problem(puzzles, self.num_rows, "rows", least=1) is None
        if not no_puzzle_empty:
            problem = _find_border_problem(puzzles, self.num_rows, "rows", least=0)
            if problem:
                self._files.fail("puzzle_indices", problem)
        problem = _find_border_problem(groups, self.num_puzzles, "puzzles", least=1)
        if problem:
            self._files.fail("group_indices", problem)
        return no_puzzle_empty

    def _open_numbers(self) -> None:
        """Open the arrays with one number per row, and check that the numbers have names."""
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
                problem = f"contains {maximum(array)}, but there are {len(names[name])} names"
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

    def update_fingerprint(self, digest: "hashlib._Hash") -> None:
        """Add what identifies this corpus, checksums and a sample, to a hash; call once."""
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

    def read(
        self, rows: np.ndarray, inputs: np.ndarray, labels: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Read rows (n,) int64 into `inputs` and `labels`, (n, S) int32, and return their arrays.

        See `Corpora.rows`; `reasoning_labels` and `scored_bytes` only if this corpus has them.
        """
        self._tokens.read(rows, inputs, labels)
        out = {"inputs": inputs, "labels": labels}
        owners = rows
        if not self._identifiers_per_row:
            owners = np.searchsorted(self._arrays["puzzle_indices"], rows, side="right") - 1
        identifiers = self._arrays["puzzle_identifiers"][owners]
        out["puzzle_identifiers"] = self._identifier_map[identifiers]
        out["iteration_targets"] = (
            self._arrays["iteration_targets"][rows].astype(np.int32)
            if self.has_targets
            else np.zeros(rows.size, np.int32)
        )
        out["domain_ids"] = self.domains(rows)
        if self._reasoning is not None:
            out["reasoning_labels"] = self._read_labels(self._reasoning, rows)
        if self.has_scored_bytes:
            out["scored_bytes"] = self._arrays["scored_bytes"][rows].astype(np.int64)
        return out

    def _read_labels(self, stored: RowFile, rows: np.ndarray) -> np.ndarray:
        labels = np.empty((rows.size, *stored.shape[1:]), np.int32)
        fill_labels(labels, stored.rows(rows), self.metadata.ignore_label_id)
        return labels

    def highest_reasoning_label(self) -> int:
        """Return the largest reasoning label that is not ignored; -1 without any."""
        if self._reasoning is None:
            return -1
        size = max(1, CHUNK // max(1, self._reasoning.shape[1]))
        highest = -1
        for first in range(0, self.num_rows, size):
            rows = np.arange(first, min(first + size, self.num_rows))
            highest = max(highest, int(self._read_labels(self._reasoning, rows).max(initial=-1)))
        return highest

    def domains(self, rows: np.ndarray) -> np.ndarray:
        """Return the joined domains of rows (n,) int32."""
        if "domain_ids" not in self._arrays:
            return np.full(rows.size, self._domain_map[0], np.int32)
        return self._domain_map[self._arrays["domain_ids"][rows]]

    def group_domains(self, groups: np.ndarray) -> np.ndarray:
        """Return the joined domain of the first row of each group, (n,)."""
        if self.one_row_a_group:
            return self.domains(groups)
        rows = self._arrays["puzzle_indices"][self._arrays["group_indices"][groups]]
        # If the part's last puzzle is empty, it starts past the last row.
        return self.domains(np.minimum(rows.astype(np.int64), max(0, self.num_rows - 1)))

    def puzzles(self, groups: np.ndarray, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return first row and row count of puzzle `choice mod size` of each group, (n,) each."""
        if self.one_row_a_group:
            return groups, np.ones_like(groups)
        borders, puzzle_indices = self._arrays["group_indices"], self._arrays["puzzle_indices"]
        first = borders[groups].astype(np.int64)
        count = borders[groups + 1].astype(np.int64) - first
        puzzle = first + (choice % count.astype(np.uint64)).astype(np.int64)
        start = puzzle_indices[puzzle].astype(np.int64)
        return start, puzzle_indices[puzzle + 1].astype(np.int64) - start


def _find_border_problem(array: np.ndarray, last: int, what: str, *, least: int) -> str | None:
    """Check that `array` goes from 0 to `last` in steps of >= `least`; return the problem or
    None.
    """
    if array.ndim != 1 or array.size < 1 or array[0] != 0:
        return "must be one-dimensional and start at 0"
    for start in range(0, array.size - 1, CHUNK):
        chunk = array[start : start + CHUNK + 1].astype(np.int64)
        bad = np.flatnonzero(np.diff(chunk) < least)
        if bad.size:
            place = start + int(bad[0])
            return f"goes from {array[place]} to {array[place + 1]} at {place}, but must increase"
    return None if array[-1] == last else f"ends at {array[-1]}, but there are {last} {what}"
