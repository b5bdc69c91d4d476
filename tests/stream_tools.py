"""Small random corpora on disk, and a loop that feeds streams: shared by the stream's tests."""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.common import IGNORE_LABEL_ID
from models.recursive_reasoning.athena_trm import AthenaTRM
from sequence_dataset import TrainStream

S, VOCAB, PAD, EOS = 12, 60, 0, 1


def write_split(folder: Path, arrays: dict, prefix: str = "", **metadata) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{prefix}{name}.npy", array)
    (folder / "dataset.json").write_text(json.dumps(metadata), "utf-8")


def write_corpus(
    root: Path, rows: int, *, split="train", seed=0, names=("one",), domains=("d",), **changes
) -> np.ndarray:
    """One row a group, in Athena's layout; row r is recognised by its first three tokens."""
    rng = np.random.default_rng(seed)
    inputs = rng.integers(2, VOCAB, (rows, S)).astype(np.uint8)
    labels = np.roll(inputs, -1, axis=1)
    labels[:, -1] = 255
    arrays = {
        "inputs": inputs,
        "labels": labels,
        "puzzle_identifiers": rng.integers(0, len(names) + 1, rows).astype(np.uint16),
        "puzzle_indices": np.arange(rows + 1),
        "group_indices": np.arange(rows + 1),
        "iteration_targets": rng.integers(4, 20, rows).astype(np.uint8),
        "domain_ids": rng.integers(0, max(1, len(domains)), rows).astype(np.uint8),
    } | changes.pop("arrays", {})
    arrays = {name: array for name, array in arrays.items() if array is not None}
    metadata = {
        "pad_id": PAD,
        "eos_id": EOS,
        "ignore_label_id": 255,
        "vocab_size": VOCAB,
        "seq_len": S,
        "num_puzzle_identifiers": len(names) + 1,
        "total_groups": len(arrays.get("group_indices", range(rows + 1))) - 1,
        "total_puzzles": len(arrays.get("puzzle_indices", range(rows + 1))) - 1,
        "mean_puzzle_examples": rows
        / max(1, len(arrays.get("puzzle_indices", range(rows + 1))) - 1),
        "domains": list(domains),
    } | changes
    write_split(root / split / "all", arrays, **metadata)
    (root / "identifiers.json").write_text(json.dumps(["<blank>", *names]), "utf-8")
    return arrays.get("inputs", inputs)


def write_trm(root: Path, group_sizes, split="train", sets=("all",), seed=0, **changes) -> dict:
    """TRM's layout; `group_sizes`: for each group the number of examples of each puzzle."""
    rng = np.random.default_rng(seed)
    puzzles = np.concatenate([[0], np.cumsum([size for group in group_sizes for size in group])])
    groups = np.concatenate([[0], np.cumsum([len(group) for group in group_sizes])])
    rows, num_puzzles = int(puzzles[-1]), len(puzzles) - 1
    arrays = {
        "inputs": rng.integers(0, 11, (rows, S)).astype(np.int32),
        "labels": rng.integers(0, 11, (rows, S)).astype(np.int32),
        "puzzle_identifiers": np.arange(1, num_puzzles + 1).astype(np.int32),
        "puzzle_indices": puzzles.astype(np.int32),
        "group_indices": groups.astype(np.int32),
    }
    metadata = {
        "pad_id": 0,
        "ignore_label_id": 0,
        "blank_identifier_id": 0,
        "vocab_size": 11,
        "seq_len": S,
        "num_puzzle_identifiers": num_puzzles + 1,
        "total_groups": len(group_sizes) * len(sets),
        "total_puzzles": num_puzzles * len(sets),
        "mean_puzzle_examples": rows / num_puzzles,
        "sets": list(sets),
    } | changes
    for name in sets:
        write_split(root / split, arrays, prefix=f"{name}__", **metadata)
    names = ["<blank>"] + [f"puzzle{i}" for i in range(num_puzzles)]
    (root / "identifiers.json").write_text(json.dumps(names), "utf-8")
    return arrays


class Windows(NamedTuple):
    """A token stream and rows as views of it: what both layouts of a corpus are written from."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    label_starts: np.ndarray


def random_windows(rng: np.random.Generator, rows: int, *, eos: int = EOS) -> Windows:
    """Rows that overlap or lie apart, of any length; some begin, end or consist of eos."""
    lengths = rng.integers(2, S + 2, rows)
    lengths[rng.random(rows) < 0.5] = S + 1
    starts = np.cumsum(lengths - rng.integers(0, 3, rows)) - lengths + 2
    tokens = rng.integers(2, VOCAB, int((starts + lengths).max(initial=2)) + 3)
    tokens[rng.random(tokens.size) < 0.1] = eos
    for row in np.flatnonzero(rng.random(rows) < 0.05):
        tokens[starts[row] : starts[row] + lengths[row]] = eos
    label_starts = np.where(rng.random(rows) < 0.3, rng.integers(0, S + 1, rows), 0)
    order = rng.permutation(rows)
    return Windows(
        tokens.astype(np.uint8), starts[order], lengths[order].astype(np.uint16), label_starts
    )


def rows_of(windows: Windows, *, pad: int, eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of all rows by a plain loop, (N, S) int32 each."""
    all_inputs = np.full((len(windows.starts), S), pad, np.int32)
    all_labels = np.full_like(all_inputs, IGNORE_LABEL_ID)
    for row, (start, length, first) in enumerate(zip(*windows[1:], strict=True)):
        window = windows.tokens[start : start + length].tolist()
        for i, token in enumerate(window[:S]):
            all_inputs[row, i] = token
            if i + 1 < length and i >= first and token != eos:
                all_labels[row, i] = window[i + 1]
    return all_inputs, all_labels


def write_windows(
    root: Path, windows: Windows, layout: str, *, pad: int = PAD, eos: int = EOS, seed=0, **changes
) -> None:
    """The same rows in either layout, with random targets and domains."""
    inputs, labels = rows_of(windows, pad=pad, eos=eos)
    stored = {
        "inputs": inputs.astype(np.uint8),
        "labels": np.where(labels == IGNORE_LABEL_ID, 255, labels).astype(np.uint8),
    }
    options = {"pad_id": pad, "eos_id": eos} | changes
    if layout == "stream":
        stored = {
            "inputs": None,
            "labels": None,
            "puzzle_indices": None,
            "group_indices": None,
            "tokens": windows.tokens,
            "row_starts": windows.starts,
            "row_lengths": windows.lengths,
            "label_starts": windows.label_starts.astype(np.uint8),
        }
        options |= {"layout": "stream", "ignore_label_id": IGNORE_LABEL_ID}
    stored |= options.pop("arrays", {})
    write_corpus(root, len(windows.starts), seed=seed, arrays=stored, **options)


def stream_of(corpora, **options) -> TrainStream:
    options = {"global_batch_size": 8, "seed": 5, "epochs": 2} | options
    return TrainStream(corpora, **options)


def exploration(chance: float, most: int):
    """Return `row_options` of an AthenaTRM that explores."""
    options = dict(hidden_size=8, num_heads=1, expansion=1, H_cycles=1, L_cycles=1)
    sizes = dict(batch_size=1, seq_len=S, vocab_size=VOCAB, num_puzzle_identifiers=1)
    halting = dict(halt_exploration_prob=chance, halt_max_steps=most)
    return AthenaTRM(options | sizes | halting).row_options


def joined(parts: list[dict]) -> dict:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def real_rows(batch: dict) -> np.ndarray:
    return (batch["labels"] != IGNORE_LABEL_ID).any(axis=1)


def halting(seed: int, size: int):
    """A model that halts slots at random; a pure function of the step."""

    def flags(step: int) -> np.ndarray:
        if step == 0:
            return np.ones(size, bool)
        return np.random.default_rng([seed, step]).random(size) < 0.4

    return flags


def run(streams: list[TrainStream], flags, first=0, steps=10_000) -> list[dict]:
    """Global batches over all ranks, until the end or for a number of steps."""
    batches = []
    for step in range(first, first + steps):
        parts = [stream.next(step, flags(step)) for stream in streams]
        assert len({part is None for part in parts}) == 1
        if parts[0] is None:
            return batches
        batches.append(joined([micro for part in parts for micro in part]))
    return batches


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def ids_of(batches: list[dict], inputs: np.ndarray) -> Counter:
    """How often each row of `inputs` was entered."""
    number = {row.tobytes(): i for i, row in enumerate(inputs.astype(np.int32))}
    assert len(number) == len(inputs)
    return Counter(
        number[row.tobytes()] for batch in batches for row in batch["inputs"][real_rows(batch)]
    )


def saved(name: str, change):
    """Damage an array of a corpus: `change` returns what is stored in its place."""

    def apply(root: Path) -> None:
        path = root / f"train/all/{name}.npy"
        np.save(path, change(np.load(path)))

    return apply


def putting(value: int):
    """A change of an array: another number in row 3."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.int64)
        array[3] = value
        return array

    return change
