r"""Build a sudoku dataset in the file format of Tiny Recursive Models (TRM).

    python -m dataset.build_sudoku_dataset --size 6 --num-train 1000 --num-test 200 --blanks 20 \
        --output-dir data/sudoku6

Every puzzle has exactly one solution. Splits are by solution: no test solution equals a training
solution, not even with its digits renamed. Tokens are those of TRM: pad 0, blank 1, digit d is
d + 1.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from dataset.common import BLANK_IDENTIFIER, FORMAT_VERSION
from dataset.output.array_writer import SplitWriter, write_json
from dataset.output.corpus_folder import add_output_options, create_corpus
from utils.core.console import command_parser, run_cli, seed_number
from utils.core.errors import UserError

BOX_SHAPES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
FRUITLESS_GRIDS = 300
"""Number of consecutive grids without a new puzzle after which the search stops."""

Grid = list[int]
"""Cells in row-major order; each is a mask with one bit set, or 0 for a blank."""


class Sudoku:
    """The geometry of one grid size, and a bit-mask solver for it."""

    def __init__(self, size: int) -> None:
        box_rows, box_columns = BOX_SHAPES[size]
        self.size = size
        self.cells = size * size
        self.all_digits = (1 << size) - 1
        boxes_across = size // box_columns
        # Units are numbered consecutively: rows, then columns, then boxes.
        self.units_of = [
            (
                cell // size,
                size + cell % size,
                2 * size + cell // size // box_rows * boxes_across + cell % size // box_columns,
            )
            for cell in range(self.cells)
        ]

    def find_used(self, grid: Grid) -> list[int]:
        """Return the digits already placed in each unit, as masks."""
        used = [0] * (3 * self.size)
        for cell, bit in enumerate(grid):
            for unit in self.units_of[cell]:
                used[unit] |= bit
        return used

    def fill(
        self, grid: Grid, used: list[int], blanks: list[int], rng: random.Random | None
    ) -> bool:
        """Complete the grid in place; return False, with all arguments restored, if impossible.

        Always picks the blank with the fewest candidates; `rng` shuffles candidates and ties.
        """
        if not blanks:
            return True
        best, fewest, choices = 0, self.size + 1, 0
        for index, cell in enumerate(blanks):
            row, column, box = self.units_of[cell]
            candidates = self.all_digits & ~(used[row] | used[column] | used[box])
            count = candidates.bit_count()
            if count < fewest:
                best, fewest, choices = index, count, candidates
                if count <= 1:
                    break
        if not fewest:
            return False
        cell = blanks[best]
        blanks[best] = blanks[-1]
        blanks.pop()
        row, column, box = self.units_of[cell]
        for bit in _bits(choices, rng):
            grid[cell] = bit
            used[row] |= bit
            used[column] |= bit
            used[box] |= bit
            if self.fill(grid, used, blanks, rng):
                return True
            used[row] ^= bit
            used[column] ^= bit
            used[box] ^= bit
        grid[cell] = 0
        blanks.append(cell)
        return False

    def random_solution(self, rng: random.Random) -> Grid:
        """Return a full grid, choosing randomly among equally constrained cells."""
        grid, blanks = [0] * self.cells, list(range(self.cells))
        rng.shuffle(blanks)
        success = self.fill(grid, self.find_used(grid), blanks, rng)
        assert success, "an empty grid always has a solution"
        return grid

    def dig(self, solution: Grid, blanks: int, rng: random.Random) -> tuple[Grid, int]:
        """Blank up to `blanks` cells while keeping the solution unique.

        A cell that cannot be blanked now cannot be blanked later, so one pass is enough.

        Returns:
            The puzzle and the number of blanked cells.
        """
        puzzle, used, dug = list(solution), self.find_used(solution), 0
        for cell in rng.sample(range(self.cells), self.cells):
            if dug == blanks:
                break
            bit = puzzle[cell]
            puzzle[cell] = 0
            for unit in self.units_of[cell]:
                used[unit] ^= bit
            if self._is_forced(puzzle, used, cell, bit):
                dug += 1
                continue
            puzzle[cell] = bit
            for unit in self.units_of[cell]:
                used[unit] |= bit
        return puzzle, dug

    def _is_forced(self, puzzle: Grid, used: list[int], cell: int, bit: int) -> bool:
        """Return whether every solution has `bit` in the blank `cell`; search only if needed."""
        row, column, box = self.units_of[cell]
        others = self.all_digits & ~(used[row] | used[column] | used[box] | bit)
        if not others:
            return True
        blanks = [other for other, digit in enumerate(puzzle) if not digit and other != cell]
        for other_bit in _bits(others, None):
            trial, trial_used = list(puzzle), list(used)
            trial[cell] = other_bit
            for unit in (row, column, box):
                trial_used[unit] |= other_bit
            if self.fill(trial, trial_used, list(blanks), None):
                return False
        return True


def _bits(mask: int, rng: random.Random | None) -> list[int]:
    bits = []
    while mask:
        bits.append(mask & -mask)
        mask &= mask - 1
    if rng is not None and len(bits) > 1:
        rng.shuffle(bits)
    return bits


def canonicalize(solution: Sequence[int]) -> tuple[int, ...]:
    """Renumber a full grid's digits by first appearance, so that relabelled grids are equal."""
    names: dict[int, int] = {}
    return tuple(names.setdefault(digit, len(names)) for digit in solution)


def generate(
    size: int, blanks: int, wanted: dict[str, int], seed: int
) -> Iterator[tuple[str, Grid, Grid]]:
    """Yield distinct (split, puzzle, solution) tuples until each split has its wanted number."""
    sudoku, rng = Sudoku(size), random.Random(seed)
    missing = dict(wanted)
    split_of: dict[tuple[int, ...], str] = {}
    puzzles: set[tuple[int, ...]] = set()
    fruitless = deepest = 0
    while any(missing.values()):
        solution = sudoku.random_solution(rng)
        key = canonicalize(solution)
        if key not in split_of:
            split_of[key] = _choose_split(missing, set(split_of.values()), rng)
        split = split_of[key]
        fruitless += 1
        if missing[split]:
            puzzle, dug = sudoku.dig(solution, blanks, rng)
            deepest = max(deepest, dug)
            if dug == blanks and tuple(puzzle) not in puzzles:
                puzzles.add(tuple(puzzle))
                missing[split] -= 1
                fruitless = 0
                yield split, puzzle, solution
        if fruitless == FRUITLESS_GRIDS:
            _fail(size, blanks, deepest, len(puzzles), sum(wanted.values()))


def _choose_split(missing: dict[str, int], present: set[str], rng: random.Random) -> str:
    """Choose the split of a new solution.

    Each split gets one before any gets more (4x4 has only twelve solutions), then splits are drawn
    in proportion to the numbers that they still need.
    """
    needed = [split for split, count in missing.items() if count]
    without = [split for split in needed if split not in present]
    if without:
        return without[-1]
    return rng.choices(needed, [missing[split] for split in needed])[0]


def _fail(size: int, blanks: int, deepest: int, found: int, wanted: int) -> None:
    if deepest < blanks:
        raise UserError(
            f"--blanks {blanks} is too many for size {size}: none of {FRUITLESS_GRIDS} consecutive "
            f"grids had a unique solution with more than {deepest} blanks; use fewer."
        )
    raise UserError(
        f"found only {found} of {wanted} distinct puzzles of size {size} with {blanks} blanks; "
        "lower --num-train or --num-test, or change --blanks."
    )


def to_tokens(grids: list[Grid]) -> np.ndarray:
    """Convert grids to tokens (n, cells) uint8: blank is 1, digit d is d + 1."""
    return np.array([[bit.bit_length() + 1 for bit in grid] for grid in grids], dtype=np.uint8)


def check_options(args: argparse.Namespace) -> None:
    """Check the options, before any work is done."""
    if not 1 <= args.blanks < args.size**2:
        raise UserError(
            f"--blanks is {args.blanks}; for size {args.size} it must be in 1..{args.size**2 - 1}."
        )
    if args.num_train < 1 or args.num_test < 0:
        raise UserError(
            f"--num-train is {args.num_train} and --num-test is {args.num_test}; they must be at "
            "least 1 and 0."
        )


def build(args: argparse.Namespace) -> None:
    """Generate the puzzles and write both splits, atomically."""
    started = time.perf_counter()
    check_options(args)
    wanted = {"train": args.num_train, "test": args.num_test}
    with (
        create_corpus(args.output_dir, args.overwrite) as workspace,
        tqdm(total=sum(wanted.values()), unit=" puzzles", disable=None) as bar,
    ):
        folder = workspace.folder
        cells = (np.uint8, (args.size**2,))
        arrays = {"inputs": cells, "labels": cells, "puzzle_identifiers": (np.int32, ())}
        writers = {split: SplitWriter(folder / split, arrays, prefix="all__") for split in wanted}
        for split, puzzle, solution in generate(args.size, args.blanks, wanted, args.seed):
            writers[split].append(
                inputs=to_tokens([puzzle]),
                labels=to_tokens([solution]),
                puzzle_identifiers=np.zeros(1, np.int32),
            )
            bar.update(1)
        for writer in writers.values():
            writer.finish(
                pad_id=0,
                ignore_label_id=0,
                vocab_size=args.size + 2,
                seq_len=args.size**2,
                num_puzzle_identifiers=1,
                format_version=FORMAT_VERSION,
                relabel_ids=(2, args.size + 2),
            )
        write_json(folder / "identifiers.json", [BLANK_IDENTIFIER])
    seconds = time.perf_counter() - started
    print(f"train: {args.num_train:,} puzzles, test: {args.num_test:,} puzzles")
    print(f"built {args.output_dir} in {seconds:.1f} s")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("python -m dataset.build_sudoku_dataset", __doc__)
    add_output_options(parser)
    add = parser.add_argument
    add("--size", type=int, choices=tuple(BOX_SHAPES), default=6, help="(default: 6)")
    add("--num-train", type=int, default=1000, help="(default: 1000)")
    add("--num-test", type=int, default=200, help="(default: 200)")
    add("--blanks", type=int, default=20, help="empty cells per puzzle (default: 20)")
    add("--seed", type=seed_number, default=0, help="(default: 0)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the module docstring."""
    run_cli(lambda: build(parse_args(argv)))


if __name__ == "__main__":
    main()
