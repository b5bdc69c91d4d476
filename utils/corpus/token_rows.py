"""The two storage layouts of token rows: one entry per position, or one stream with views.

The only module that knows how tokens are stored. Both layouts yield the same rows: S inputs, the
labels shifted by one position, and IGNORE_LABEL_ID for labels that are not scored.
"""

import numpy as np

from dataset.common import IGNORE_LABEL_ID, DatasetMetadata
from utils.core.errors import UserError
from utils.corpus.row_file import CHUNK, ArrayFolder, Sample, sample_numbers, take_sample


class StoredRows:
    """Layout `npy`: inputs.npy and labels.npy, (N, S) each."""

    def __init__(self, files: ArrayFolder, metadata: DatasetMetadata):
        self._ignore_label_id = metadata.ignore_label_id
        self._inputs, self._labels = files.rows("inputs"), files.rows("labels")
        shape = self._inputs.shape
        if len(shape) != 2 or shape[1] != metadata.seq_len:
            problem = f"has shape {shape}, but its metadata says seq_len {metadata.seq_len}"
            files.fail("inputs", problem)
        if self._labels.shape != shape:
            files.fail("labels", f"has shape {self._labels.shape}, but inputs have {shape}")
        self.num_rows = shape[0]
        self.nbytes = self._inputs.nbytes + self._labels.nbytes
        self.samples = {"inputs": take_sample(self._inputs), "labels": take_sample(self._labels)}
        for name, sample in self.samples.items():
            _check_ids(files, name, sample.rows, metadata)

    def read(self, rows: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> None:
        """Fill `inputs` and `labels`, (n, S) int32, with rows (n,) int64."""
        inputs[...] = self._inputs.rows(rows)
        fill_labels(labels, self._labels.rows(rows), self._ignore_label_id)


class StreamRows:
    """Layout `stream`: tokens.npy (T,), and the location of each row in it.

    Row r consists of `row_lengths[r]` tokens from `row_starts[r]` on, at most S + 1; the last may
    be a label only. Labels are ignored where the input is eos, because the next document begins
    there, and before position `label_starts[r]`, because an earlier row contains them.
    """

    def __init__(self, files: ArrayFolder, metadata: DatasetMetadata):
        self._metadata, self._tokens = metadata, files.rows("tokens")
        names = ["row_starts", "row_lengths"]
        if files.has("label_starts"):
            names.append("label_starts")
        arrays: dict[str, np.ndarray] = {name: files.map(name) for name in names}
        if len(self._tokens.shape) != 1:
            problem = f"has shape {self._tokens.shape}, but a stream has one dimension"
            files.fail("tokens", problem)
        if arrays["row_starts"].ndim != 1:
            problem = f"has shape {arrays['row_starts'].shape}, but must be one-dimensional"
            files.fail("row_starts", problem)
        self.num_rows = len(arrays["row_starts"])
        for name, array in arrays.items():
            if array.shape != (self.num_rows,):
                files.fail(name, f"has shape {array.shape}, but there are {self.num_rows} rows")
        self.nbytes = self._tokens.nbytes + sum(array.nbytes for array in arrays.values())
        self._set_arrays(arrays)
        for first in range(0, self.num_rows, CHUNK):
            self._check_rows(files, first)
        self.samples = {name: take_sample(array) for name, array in arrays.items()}
        tokens = self._sample_tokens()
        self.samples["tokens"] = Sample(self._tokens.shape, self._tokens.dtype, tokens)
        _check_ids(files, "tokens", tokens, metadata)
        self._set_arrays({name: files.prepare_lookup(array) for name, array in arrays.items()})

    def _set_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        self._starts, self._lengths = arrays["row_starts"], arrays["row_lengths"]
        self._label_starts = arrays.get("label_starts")

    def _check_rows(self, files: ArrayFolder, first: int) -> None:
        """Check that `CHUNK` rows from `first` on lie within the tokens and are not too long."""
        here, total = slice(first, first + CHUNK), len(self._tokens)
        starts, lengths = (a[here].astype(np.int64) for a in (self._starts, self._lengths))
        longest = self._metadata.seq_len + 1
        bad = np.flatnonzero((lengths < 2) | (lengths > longest))
        if bad.size:
            problem = f"contains {lengths[bad[0]]} at row {first + bad[0]}, not 2 to {longest}"
            files.fail("row_lengths", f"{problem} (seq_len + 1)")
        bad = np.flatnonzero((starts < 0) | (starts > total - lengths))
        if bad.size:
            row, start = first + bad[0], starts[bad[0]]
            problem = f"places row {row} of {lengths[bad[0]]} tokens at token {start}"
            files.fail("row_starts", f"{problem}, but tokens.npy has {total}")
        if self._label_starts is not None:
            begins = self._label_starts[here].astype(np.int64)
            bad = np.flatnonzero((begins < 0) | (begins >= longest))
            if bad.size:
                row, begin = first + bad[0], begins[bad[0]]
                problem = f"contains {begin} at row {row}, not 0 to {longest - 1}"
                files.fail("label_starts", f"{problem} (seq_len)")

    def _sample_tokens(self) -> np.ndarray:
        """Return the concatenated tokens of a sample of rows, (n,) in the stored dtype."""
        stored, lengths = self._read_windows(sample_numbers(self.num_rows))
        return stored[np.arange(stored.shape[1]) < lengths[:, None]]

    def _read_windows(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stored tokens of rows, (n, S + 1), and their lengths, (n,) int64."""
        starts, lengths = self._starts[rows].astype(np.int64), self._lengths[rows].astype(np.int64)
        return self._tokens.spans(starts, lengths, self._metadata.seq_len + 1), lengths

    def read(self, rows: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> None:
        """Fill `inputs` and `labels`, (n, S) int32, with rows (n,) int64."""
        meta = self._metadata
        stored, lengths = self._read_windows(rows)
        inputs[...], labels[...] = stored[:, :-1], stored[:, 1:]
        for row in np.flatnonzero(lengths <= meta.seq_len).tolist():
            inputs[row, lengths[row] :] = meta.pad_id
            labels[row, lengths[row] - 1 :] = IGNORE_LABEL_ID
        if meta.eos_id is not None:
            np.copyto(labels, IGNORE_LABEL_ID, where=inputs == meta.eos_id)
        if self._label_starts is not None:
            begins = self._label_starts[rows]
            for row in np.flatnonzero(begins).tolist():
                labels[row, : begins[row]] = IGNORE_LABEL_ID


def open_token_rows(files: ArrayFolder, metadata: DatasetMetadata) -> StoredRows | StreamRows:
    """Open and check the rows of a set, in the layout given by its metadata."""
    if metadata.layout == "npy":
        return StoredRows(files, metadata)
    if metadata.layout == "stream":
        return StreamRows(files, metadata)
    raise UserError(
        f"{files.folder} has layout {metadata.layout!r}, which is neither 'npy' nor 'stream'; "
        "rebuild the corpus with --layout npy or stream."
    )


def fill_labels(labels: np.ndarray, stored: np.ndarray, ignore_label_id: int | None) -> None:
    """Copy stored labels to `labels` (n, ..) int32, with IGNORE_LABEL_ID at ignored positions."""
    labels[...] = stored
    if ignore_label_id is not None:
        # Compare in the stored dtype: its largest value may not fit into int32.
        np.copyto(labels, IGNORE_LABEL_ID, where=stored == ignore_label_id)


def _check_ids(
    files: ArrayFolder, name: str, sample: np.ndarray, metadata: DatasetMetadata
) -> None:
    """Check that sampled tokens or labels are ids of the vocabulary."""
    if name == "labels":
        sample = sample[(sample != metadata.ignore_label_id) & (sample != IGNORE_LABEL_ID)]
    wrong = sample[(sample < 0) | (sample >= metadata.vocab_size)]
    if wrong.size:
        files.fail(name, f"contains token id {wrong[0]}, but vocab_size is {metadata.vocab_size}")
