"""Sudokus: valid, uniquely solvable, split so that no test solution is known from training."""

import json
import random

import numpy as np
import pytest

from dataset import build_sudoku_dataset
from dataset.build_sudoku_dataset import canonicalize
from dataset.common import find_split, load_metadata, verify_arrays

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}


def build(tmp_path, size, blanks, train, test, out="sudoku", more=""):
    folder = tmp_path / out
    build_sudoku_dataset.main(
        f"--size {size} --blanks {blanks} --num-train {train} --num-test {test} "
        f"--output-dir {folder} {more}".split()
    )
    return folder


def load(folder, split, name):
    return np.load(folder / split / f"all__{name}.npy")


def allowed(grid: np.ndarray, row: int, column: int, digit: int) -> bool:
    height, width = BOXES[len(grid)]
    top, left = row - row % height, column - column % width
    return not (
        (grid[row] == digit).any()
        or (grid[:, column] == digit).any()
        or (grid[top : top + height, left : left + width] == digit).any()
    )


def count_solutions(grid: np.ndarray) -> int:
    """Plain backtracking over cells in order, counting everything."""
    empty = np.argwhere(grid == 0)
    if not len(empty):
        return 1
    row, column = empty[0]
    total = 0
    for digit in range(1, len(grid) + 1):
        if allowed(grid, row, column, digit):
            grid[row, column] = digit
            total += count_solutions(grid)
            grid[row, column] = 0
    return total


@pytest.mark.parametrize(("size", "blanks", "count"), [(4, 9, 20), (6, 20, 15), (9, 38, 4)])
def test_puzzles_have_exactly_one_solution(tmp_path, size, blanks, count):
    folder = build(tmp_path, size, blanks, count, 3, more=f"--seed {random.randrange(10**6)}")
    for split, rows in (("train", count), ("test", 3)):
        inputs, labels = load(folder, split, "inputs"), load(folder, split, "labels")
        assert inputs.shape == labels.shape == (rows, size * size)
        assert ((inputs == 1).sum(axis=1) == blanks).all()
        assert (inputs[inputs != 1] == labels[inputs != 1]).all()
        height, width = BOXES[size]
        for puzzle, solution in zip(inputs, labels, strict=True):
            grid = solution.reshape(size, size) - 1
            boxes = grid.reshape(size // height, height, size // width, width).swapaxes(1, 2)
            for units in (grid, grid.T, boxes.reshape(size, size)):
                assert (np.sort(units, axis=1) == np.arange(1, size + 1)).all()
            assert count_solutions(puzzle.reshape(size, size).astype(int) - 1) == 1


def test_the_forced_cell_check_is_exact():
    """Digging stops only at cells that truly open a second solution."""
    sudoku, rng = build_sudoku_dataset.Sudoku(4), random.Random(random.getrandbits(32))
    for _ in range(20):
        puzzle, dug = sudoku.dig(sudoku.random_solution(rng), 16, rng)
        grid = np.array([bit.bit_length() for bit in puzzle]).reshape(4, 4)
        assert count_solutions(grid) == 1 and dug == (grid == 0).sum()
        for row, column in np.argwhere(grid):
            fewer = grid.copy()
            fewer[row, column] = 0
            assert count_solutions(fewer) > 1


def test_test_solutions_are_no_relabelled_training_solutions(tmp_path):
    # 4x4 has 12 grids up to relabelling, so that only a split by them can pass.
    folder = build(tmp_path, 4, 6, 150, 40)
    keys = {
        split: {canonicalize(grid) for grid in load(folder, split, "labels").tolist()}
        for split in ("train", "test")
    }
    assert keys["train"] and keys["test"] and not keys["train"] & keys["test"]
    assert len(np.unique(load(folder, "train", "inputs"), axis=0)) == 150
    digits = random.sample(range(2, 6), 4)
    grid = load(folder, "test", "labels")[0]
    renamed = [digits[token - 2] for token in grid]
    assert canonicalize(renamed) == canonicalize(grid.tolist())
    assert canonicalize([grid[1], grid[0], *grid[2:]]) != canonicalize(grid.tolist())


def test_files_are_trms(tmp_path):
    folder = build(tmp_path, 6, 12, 7, 2)
    for split, rows in (("train", 7), ("test", 2)):
        split_dir = find_split(folder, split)
        assert split_dir == folder / split
        metadata = load_metadata(split_dir)
        verify_arrays(split_dir, metadata)
        assert len(metadata.checksums) == 5
        assert (metadata.pad_id, metadata.ignore_label_id, metadata.vocab_size) == (0, 0, 8)
        assert (metadata.seq_len, metadata.total_puzzles) == (36, rows)
        assert metadata.relabel_ids == (2, 8)
        labels = load(folder, split, "labels")
        assert labels.dtype == np.uint8 and set(np.unique(labels)) == set(range(2, 8))
        assert load(folder, split, "puzzle_identifiers").tolist() == [0] * rows
        for name in ("puzzle_indices", "group_indices"):
            assert load(folder, split, name).tolist() == list(range(rows + 1))
    assert json.loads((folder / "identifiers.json").read_text("utf-8")) == ["<blank>"]


def test_the_seed_decides(tmp_path):
    first = build(tmp_path, 6, 16, 12, 4, out="one")
    second = build(tmp_path, 6, 16, 12, 4, out="two")
    third = build(tmp_path, 6, 16, 12, 4, out="three", more="--seed 1")
    assert (load(first, "train", "inputs") == load(second, "train", "inputs")).all()
    assert (load(first, "train", "inputs") != load(third, "train", "inputs")).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 13, 5, 1), "--blanks 13 is too many for size 4"),
        ((4, 16, 5, 1), "1..15"),
        ((4, 1, 9999, 1), "distinct puzzles of size 4 with 1 blanks"),
        ((6, 9, 0, 1), "--num-train is 0"),
    ],
)
def test_hopeless_wishes_end_in_one_sentence(tmp_path, fails, arguments, message):
    assert message in fails(lambda: build(tmp_path, *arguments))
    assert not list(tmp_path.iterdir())
