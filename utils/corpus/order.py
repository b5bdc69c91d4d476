"""Order of the examples that a run visits: groups, one puzzle of each, and that puzzle's rows.

A pure function of seed and position: any position can be reached without visiting earlier ones, so
a run resumes from two numbers and examples can be prefetched.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils.core.errors import UserError
from utils.corpus.corpora import Corpora
from utils.corpus.permutation import QuotaSchedule, hash64, permute

# One number per use of the seed, so that no two draws share randomness.
ORDER, PUZZLE, RELABEL, ROW_OPTIONS, STEP_OPTIONS = 1, 2, 3, 4, 5

_AT_ONCE = 1024  # places computed together, because the arithmetic is vectorized


def step_rng(seed: int, step: int, use: int) -> np.random.Generator:
    """Return the random generator for one use in an optimizer step, the same on every rank."""
    key = np.concatenate([hash64(seed, use), np.full(1, step, np.uint64)])
    return np.random.Generator(np.random.Philox(key=key))


class Position(NamedTuple):
    """Position of a run: groups entered, and rows taken of the last group's puzzle (0: all)."""

    entered: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Examples:
    """Consecutive examples of a run, (n,) int64 each.

    place: index of the group visit. offset: index of the row in its puzzle. row: global row
    number. size: number of rows of the puzzle.
    """

    place: np.ndarray
    offset: np.ndarray
    row: np.ndarray
    size: np.ndarray

    @staticmethod
    def concatenate(parts: Sequence["Examples"]) -> "Examples":
        columns = zip(*(vars(part).values() for part in parts), strict=True) if parts else _NONE
        return Examples(*map(np.concatenate, columns))

    def __len__(self) -> int:
        return self.row.size

    def pick(self, which: np.ndarray | slice) -> "Examples":
        return Examples(*(values[which] for values in vars(self).values()))

    @property
    def end(self) -> Position:
        """Position after the last example."""
        taken = int(self.offset[-1]) + 1
        return Position(int(self.place[-1]) + 1, taken if taken < self.size[-1] else 0)


_NONE = [[np.empty(0, np.int64)]] * 4


class ExampleOrder:
    """The order of a run's examples, `limit` groups long (None: endless)."""

    def __init__(
        self,
        corpora: Corpora,
        seed: int,
        weights: Mapping[str, float] | None,
        limit: int | None,
    ):
        self._corpora, self._seed, self.limit = corpora, seed, limit
        self._schedule: QuotaSchedule | None = None
        if weights is None:
            return
        self._schedule = QuotaSchedule([weights[name] for name in corpora.domains])
        for name, size in zip(corpora.domains, corpora.domain_index.sizes, strict=True):
            if weights[name] > 0 and size == 0:
                raise UserError(
                    f"domain_weights of {name!r} is {weights[name]}, but "
                    f"{', '.join(corpora.data_paths)} have no rows of that domain; set it to 0."
                )

    def find_groups(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the group at each place in the order, and its cycle, (n,) int64 each.

        A cycle is one pass over all groups or, with weights, over all groups of the domain.
        """
        if self._schedule is None:
            size = self._corpora.num_groups
            cycle, index = np.divmod(places, size)
            return permute(index, size, hash64(self._seed, ORDER, cycle)), cycle
        domain, count = self._schedule.draws(places)
        group, cycle = np.empty_like(places), np.empty_like(places)
        domain_index = self._corpora.domain_index
        for number in np.unique(domain).tolist():
            where, size = np.flatnonzero(domain == number), int(domain_index.sizes[number])
            cycle[where], place = np.divmod(count[where], size)
            key = hash64(self._seed, ORDER, cycle[where], number)
            group[where] = domain_index.select(number, permute(place, size, key))
        return group, cycle

    def _find_puzzles(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the first row and the number of rows of the puzzle visited at each place."""
        group, cycle = self.find_groups(places)
        if self._corpora.one_row_a_group:
            return group, np.ones_like(group)
        return self._corpora.puzzles(group, hash64(self._seed, PUZZLE, cycle, group))

    def at(self, place: np.ndarray, offset: np.ndarray) -> Examples:
        """Return the examples at the given places and offsets."""
        first, size = self._find_puzzles(place)
        return Examples(place, offset, first + offset, size)

    def list_from(self, position: Position, wanted: int) -> Examples:
        """Return at least `wanted` examples from a position on; fewer at the end of the run."""
        parts, found = [], 0
        mean = self._corpora.metadata.mean_puzzle_examples
        place, offset = position.entered - (position.offset > 0), position.offset
        while found < wanted and (self.limit is None or place < self.limit):
            examples = max(wanted - found, _AT_ONCE)
            last = place + math.ceil(examples / max(1.0, mean))
            last = last if self.limit is None else min(last, self.limit)
            parts.append(self._list_at(np.arange(place, last), offset))
            found += len(parts[-1])
            place, offset = last, 0
        return Examples.concatenate(parts)

    def _list_at(self, places: np.ndarray, skip: int) -> Examples:
        """Return all examples at consecutive places, except the first `skip`."""
        if self._corpora.one_row_a_group:
            return self.at(places, np.zeros_like(places))
        first, size = self._find_puzzles(places)
        owner = np.repeat(np.arange(places.size), size)
        offset = np.arange(owner.size) - (np.cumsum(size) - size)[owner]
        examples = Examples(places[owner], offset, first[owner] + offset, size[owner])
        return examples.pick(slice(skip, None))
