"""Data streams: decide which example enters which slot of the global batch at which step.

Handles order, mixing, sharding and position, and yields numpy arrays independent of models and
devices. Training order is a pure function of (seed, epoch, position), so a run can resume from a
few numbers at any world size and micro-batch count, without storing a shuffled index.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from utils.config.schema import IterationCurriculumConfig, PretrainConfig
from utils.core.errors import UserError
from utils.core.functions import suggest
from utils.corpus.corpora import Corpora
from utils.corpus.curriculum import scale_budgets
from utils.corpus.order import RELABEL, ExampleOrder, Examples, Position, sample_exploration
from utils.corpus.permutation import hash64
from utils.corpus.read_ahead import InPlace, ReadAhead
from utils.corpus.row_reader import Batch, RowReader, document_starts, relabel

__all__ = [
    "Corpora",
    "EvalStream",
    "TrainStream",
    "document_starts",
    "relabel",
    "sample_exploration",
]


def _normalize_weights(weights: Mapping[str, float], corpora: Corpora) -> dict[str, float]:
    """Validate that the weights list exactly the corpora's domains, and scale them to sum to 1."""
    for name, weight in weights.items():
        if name not in corpora.domains:
            advice = suggest(name, corpora.domains)
            raise UserError(f"domain_weights lists {name!r}, which no corpus has; {advice}")
        if not weight >= 0 or weight == float("inf"):
            raise UserError(
                f"domain_weights of {name!r} is {weight}; it must be finite and at least 0."
            )
    missing = [name for name in corpora.domains if name not in weights]
    if missing:
        raise UserError(
            f"domain_weights is missing {', '.join(map(repr, missing))}; "
            "give every domain a weight, and 0 to exclude it from training."
        )
    total = sum(weights.values())
    if total <= 0:
        raise UserError("domain_weights are all 0; at least one must be positive.")
    return {name: weights[name] / total for name in corpora.domains}


def _get_rank_slots(global_batch_size: int, rank: int, world_size: int, parts: int = 1) -> slice:
    if global_batch_size < 1 or global_batch_size % (world_size * parts):
        split = f"{world_size} ranks" + (f" x {parts} micro-batches" if parts > 1 else "")
        raise UserError(
            f"global_batch_size {global_batch_size} cannot be split evenly over {split}; "
            f"use a multiple of {world_size * parts}."
        )
    assert 0 <= rank < world_size
    share = global_batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


class TrainStream:
    """Feeds `global_batch_size` slots, of which this rank owns a fixed range.

    With `feed="consume"`, a slot takes the next example of the stream once its current one has
    halted; occupied slots get ignored rows, and slots drain after the last example. With
    `feed="present"`, every step is a full new batch and the run has TRM's number of steps
    (`total_steps`).

    A visit to a group yields one of its puzzles and all rows of that puzzle. Position is counted
    in groups entered; a partially entered puzzle is resumed at an offset.

    Args:
        epochs: passes over all groups; may be a fraction.
        domain_weights: share of each domain in the draws; None draws every group once per epoch.
        min_iterations, max_iterations: lower and upper bounds of budgets (`halt_max_steps`).
        rank, world_size, micro_batches: select the slots that `next` returns.
        explore_prob, explore_max: see `sample_exploration`.
        document_starts: add `document_starts` to batches (if the corpora have an eos).
        max_draws: end after this many groups, if that is earlier.
        curriculum: reduces the budgets of rows that enter early, to no less than
            `least_iterations`; depends on `progress`, or on the step over `max_steps` if larger.
        num_workers: threads that prefetch examples; 0 reads them in `next`. Neither the output of
            `next` nor the position depends on it.
    """

    def __init__(
        self,
        corpora: Corpora,
        *,
        global_batch_size: int,
        seed: int,
        epochs: float,
        feed: str = "consume",
        domain_weights: Mapping[str, float] | None = None,
        min_iterations: int | None = None,
        max_iterations: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        explore_prob: float = 0.0,
        explore_max: int = 1,
        document_starts: bool = True,
        max_draws: int | None = None,
        curriculum: IterationCurriculumConfig | None = None,
        least_iterations: int = 1,
        max_steps: int | None = None,
        num_workers: int = 0,
    ):
        if feed not in ("consume", "present"):
            raise UserError(f"feed is {feed!r}; it must be 'consume' or 'present'.")
        self._slots = _get_rank_slots(global_batch_size, rank, world_size, micro_batches)
        self._weights = _normalize_weights(domain_weights, corpora) if domain_weights else None
        self._reader = RowReader(corpora, min_iterations, max_iterations, document_starts)
        self._corpora, self._seed, self._feed = corpora, seed, feed
        self._size, self._micro_batches = global_batch_size, micro_batches
        self._explore = (explore_prob, explore_max)
        self._curriculum, self._max_steps = curriculum, max_steps
        self._least = max(1, least_iterations, min_iterations or 1)
        if curriculum is not None and not corpora.has_targets:
            raise UserError(
                "iteration_curriculum scales iteration budgets, but no corpus in data_paths has "
                "iteration_targets.npy; build a corpus with budgets, or set it to null."
            )

        self._other_sizes = (0, 0)  # steps, and their rows, before global_batch_size changed
        self.total_groups, self._draws = self._totals(epochs, max_draws)
        self.total_steps = self._total_steps()
        if self.total_steps is not None and self.total_steps < 1:
            raise UserError(
                f"{epochs} epochs of {corpora.num_groups} groups do not fill one batch of "
                f"{global_batch_size} (feed=present); raise epochs or lower global_batch_size."
            )
        limit = self.total_groups if feed == "consume" else None
        self._order = ExampleOrder(corpora, seed, self._weights, limit)
        self._source = self._make_row_source(num_workers)
        self._position = Position()
        self.examples_entered = 0
        """Number of examples that have entered slots so far."""
        self._steps = 0  # batches drawn so far
        # The example in each slot, as its place in the stream; -1 for none.
        self._held_place = np.full(global_batch_size, -1, np.int64)
        self._held_offset = np.zeros(global_batch_size, np.int64)
        # Examples to enter again before any new one, as (place, offset).
        self._again: list[tuple[int, int]] = []

    def _totals(self, epochs: float, max_draws: int | None) -> tuple[int, float]:
        """Return the number of groups that the run enters, rounded and exact."""
        if not 0 < epochs < float("inf"):
            raise UserError(f"epochs is {epochs}; it must be positive and finite.")
        groups = self._corpora.num_groups
        draws = min(epochs * groups, float("inf") if max_draws is None else max_draws)
        if round(draws) < 1:
            raise UserError(
                f"{epochs} epochs of {groups} groups amount to less than one group; raise epochs."
            )
        return round(draws), draws

    def _total_steps(self) -> int | None:
        """Return TRM's number of steps under `present`, else None."""
        if self._feed == "consume":
            return None
        steps, rows = self._other_sizes
        left = self._draws * self._corpora.metadata.mean_puzzle_examples - rows
        return steps + max(0, int(left / self._size))

    def _make_row_source(self, workers: int) -> InPlace | ReadAhead:
        if workers == 0:
            return InPlace(self._order, self._read)
        size = self._size
        if self._feed == "present":  # example i enters slot i, so only this rank's are read
            chunk, ahead, keep = size, size * workers, self._slots
        else:  # an example may enter a slot of any rank
            chunk, ahead, keep = -(-size // max(4, 2 * workers)), size, slice(None)
        return ReadAhead(
            self._order, self._read, workers=workers, chunk=chunk, ahead=ahead, keep=keep
        )

    @classmethod
    def from_config(
        cls, corpora: Corpora, config: PretrainConfig, arch: Any, **options: Any
    ) -> "TrainStream":
        """Build a run's stream from its config; `arch` is the model config, `options` the rest."""
        steps = getattr(arch, "halt_max_steps", None)  # plain decoders have no budgets
        weights = config.domain_weights
        return cls(
            corpora,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            epochs=config.epochs or 1e9,
            feed=config.feed,
            domain_weights=corpora.recorded_weights() if weights is None else weights,
            min_iterations=config.min_iterations,
            max_iterations=steps,
            explore_prob=getattr(arch, "halt_exploration_prob", 0.0),
            explore_max=steps or 1,
            curriculum=config.iteration_curriculum,
            least_iterations=getattr(arch, "force_min_steps", 1),
            max_steps=config.max_steps,
            **options,
        )

    @property
    def position(self) -> int:
        """Groups entered so far."""
        return self._position.entered

    @property
    def epoch(self) -> float:
        """Epochs entered so far, as a fraction."""
        return self.position / self._corpora.num_groups

    @property
    def progress(self) -> float:
        """Progress of the run in 0..1: groups entered (under `present`: steps) over their total."""
        if self.total_steps is not None:
            return min(1.0, self._steps / self.total_steps)
        return min(1.0, self.position / self.total_groups)

    @property
    def occupied(self) -> np.ndarray:
        """Which slots contain an example (under `consume`), (G,) bool."""
        return self._held_place >= 0

    def next(self, step: int, halted: np.ndarray) -> list[Batch] | None:
        """Return this rank's micro-batches for optimizer step `step`; None at the end of the run.

        Args:
            step: optimizer step, from 1; seeds the exploration.
            halted: (G,) bool, halted flags of all slots of all ranks; all True at the start.
        """
        halted = np.asarray(halted, dtype=bool)
        assert halted.shape == (self._size,), f"halted is {halted.shape}, not ({self._size},)"
        done = max(self.progress, (step - 1) / self._max_steps if self._max_steps else 0.0)
        parts = self._feed_all(halted) if self._feed == "present" else self._feed_freed(halted)
        if parts is None:
            return None
        if self._curriculum is not None:
            for _, rows in parts:
                whole = rows["iteration_targets"]
                rows["iteration_targets"] = scale_budgets(
                    whole, self._curriculum, done, self._least
                )
        batch = self._reader.scatter(parts, self._slots.stop - self._slots.start)
        if self._explore[0] > 0:
            batch["explore"] = sample_exploration(self._seed, step, self._size, *self._explore)[
                self._slots
            ]
        size = len(batch["inputs"]) // self._micro_batches
        return [
            {name: values[start : start + size] for name, values in batch.items()}
            for start in range(0, size * self._micro_batches, size)
        ]

    def skip_batch(self, halted: np.ndarray) -> bool:
        """Advance like `next` under `present`, without reading; return False at the end."""
        assert self._feed == "present", self._feed
        return self._enter_all(np.asarray(halted, dtype=bool)) is not None

    def close(self) -> None:
        """Drop prefetched examples and stop the prefetching threads."""
        self._source.close()
        self._source.restart(self._position)

    def _feed_all(self, halted: np.ndarray) -> list[tuple[np.ndarray, Batch]] | None:
        """Under `present`: return the rows of this rank and their slots; None at the end."""
        taken = self._enter_all(halted)
        return None if taken is None else [self._select_rank_rows(taken)]

    def _enter_all(self, halted: np.ndarray) -> np.ndarray | None:
        """Under `present`: fill all slots with the next examples and return the slots, or None."""
        if self.total_steps is None or self._steps >= self.total_steps:
            return None
        self._steps += 1
        self.examples_entered += int(halted.sum())
        return self._enter(np.arange(self._size))

    def _feed_freed(self, halted: np.ndarray) -> list[tuple[np.ndarray, Batch]] | None:
        """Under `consume`: return the rows for this rank's freed slots; None at the end."""
        parts, freed = [], np.flatnonzero(halted)
        self._held_place[freed] = -1
        if self._again:
            slots, freed = np.split(freed, [len(self._again)])
            again, self._again = self._again[: slots.size], self._again[slots.size :]
            self._held_place[slots], self._held_offset[slots] = np.array(again).reshape(-1, 2).T
            own = slots[self._is_own(slots)]
            examples = self._order.at(self._held_place[own], self._held_offset[own])
            parts.append((own - self._slots.start, self._read(examples)))
        parts.append(self._select_rank_rows(self._enter(freed)))
        self._steps += 1
        return parts if self.occupied.any() else None

    def _enter(self, slots: np.ndarray) -> np.ndarray:
        """Fill `slots` with the next examples, in order, and return the slots that got one."""
        examples = self._source.take(slots.size)
        taken = slots[: len(examples)]
        self._held_place[taken], self._held_offset[taken] = examples.place, examples.offset
        if len(examples):
            self._position = examples.end
        if len(examples) < slots.size:  # only puzzles without rows can remain
            self._position = Position(max(self.position, self.total_groups))
        if self._feed == "consume":
            self.examples_entered += taken.size
        return taken

    def _select_rank_rows(self, taken: np.ndarray) -> tuple[np.ndarray, Batch]:
        """Return the local indices (n,) and the rows (n, ..) of this rank's slots in `taken`."""
        mine = np.flatnonzero(self._is_own(taken))
        return taken[mine] - self._slots.start, self._source.rows(mine)

    def _is_own(self, slots: np.ndarray) -> np.ndarray:
        return (slots >= self._slots.start) & (slots < self._slots.stop)

    def _read(self, examples: Examples) -> Batch:
        """Read the rows of examples; a pure function, called from several threads."""
        keys = None
        if self._corpora.relabels:
            keys = hash64(self._seed, RELABEL, examples.place, examples.offset)
        return self._reader.read(examples.row, keys)

    def _identity(self) -> dict[str, Any]:
        """Return the settings that must not change between saving and loading."""
        return {
            "fingerprint": self._corpora.fingerprint,
            "seed": self._seed,
            "feed": self._feed,
            "domain_weights": self._weights,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume, as JSON values; the same on all ranks."""
        return self._identity() | {
            "global_batch_size": self._size,
            "other_sizes": list(self._other_sizes),
            "again": [list(example) for example in self._again],
            "position": self.position,
            "offset": self._position.offset,
            "steps": self._steps,
            "examples_entered": self.examples_entered,
            "held_places": self._held_place.tolist(),
            "held_offsets": self._held_offset.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, restart_held: bool = False) -> None:
        """Resume from `state`, at any world size and micro-batch count.

        `restart_held`: the model's carry was not saved, so the flags of the next call of `next`
        are all True. Under `consume` the examples in the saved slots then enter again, from their
        beginning, before any new ones; likewise if the number of slots has changed.
        """
        for name, now in self._identity().items():
            if name not in state:
                raise UserError(
                    f"the saved stream state has no {name!r}; it was not written by Athena."
                )
            if state[name] != now:
                if name == "fingerprint":
                    raise UserError(
                        f"{', '.join(self._corpora.data_paths)}: these are not the corpora that "
                        "the run was saved with, or they have changed; restore them, or start a "
                        "new run from its weights with load_checkpoint=<run directory>."
                    )
                raise UserError(
                    f"{name} has changed since the run was saved: it was {state[name]}, now it is "
                    f"{now}; change it back, or start a new run from the weights with "
                    "load_checkpoint=<run directory>."
                )
        self._position = Position(int(state["position"]), int(state["offset"]))
        self._source.restart(self._position)
        self._steps = int(state["steps"])
        self.examples_entered = int(state["examples_entered"])
        self._again = [(place, offset) for place, offset in state.get("again", ())]
        steps, rows = state.get("other_sizes", (0, 0))
        size = state["global_batch_size"]
        if size != self._size:
            steps, rows = self._steps, rows + (self._steps - steps) * size
        self._other_sizes = (steps, rows)
        self.total_steps = self._total_steps()
        if size == self._size and not (restart_held and self._feed == "consume"):
            self._held_place = np.array(state["held_places"], np.int64)
            self._held_offset = np.array(state["held_offsets"], np.int64)
            return
        self._held_place = np.full(self._size, -1, np.int64)
        self._held_offset = np.zeros(self._size, np.int64)
        if self._feed == "consume":
            held = zip(state["held_places"], state["held_offsets"], strict=True)
            self._again = [example for example in held if example[0] >= 0] + self._again


class EvalStream:
    """Iterates once over every row of a split, in order; yields (set name, batch, count).

    Every batch has `global_batch_size // world_size` rows per rank: the last batch of a set is
    padded with ignored rows, and all ranks get the same number of batches. `count` is the number
    of real rows over all ranks.
    """

    def __init__(
        self,
        corpora: Corpora,
        *,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        document_starts: bool = True,
        max_batches: int | None = None,
        min_iterations: int | None = None,
        max_iterations: int | None = None,
    ):
        self._slots = _get_rank_slots(global_batch_size, rank, world_size)
        self._reader = RowReader(corpora, min_iterations, max_iterations, document_starts, True)
        self._sets = corpora.set_rows()
        self._size, self._max_batches = global_batch_size, max_batches

    @classmethod
    def from_config(
        cls, corpora: Corpora, config: PretrainConfig, arch: Any, rows: int, **options: Any
    ) -> "EvalStream":
        """Build a run's evaluation stream, in batches of `rows` over all ranks.

        `arch` is the model config.
        """
        most = config.eval_max_batches
        if most is not None:  # keep the number of rows, whatever the actual batch size
            most = -(-most * (config.eval_batch_size or config.global_batch_size) // rows)
        return cls(
            corpora,
            global_batch_size=rows,
            max_batches=most,
            min_iterations=config.min_iterations,
            max_iterations=getattr(arch, "halt_max_steps", None),
            **options,
        )

    def __len__(self) -> int:
        batches = sum(-(-sum(map(len, rows)) // self._size) for rows in self._sets.values())
        return batches if self._max_batches is None else min(batches, self._max_batches)

    def __iter__(self) -> Iterator[tuple[str, Batch, int]]:
        left = len(self)
        for name, ranges in self._sets.items():
            total = sum(map(len, ranges))
            for start in range(0, total, self._size):
                if left == 0:
                    return
                left -= 1
                count = min(self._size, total - start)
                first, last = (start + slot for slot in (self._slots.start, self._slots.stop))
                index = np.arange(first, min(last, total))
                data = self._reader.read(_index_ranges(ranges, index))
                share = self._slots.stop - self._slots.start
                yield name, self._reader.scatter([(index - first, data)], share), count


def _index_ranges(ranges: list[range], index: np.ndarray) -> np.ndarray:
    """Return elements `index` of several concatenated ranges."""
    before = np.cumsum([0, *map(len, ranges)])
    owner = np.searchsorted(before, index, side="right") - 1
    return np.array([rows.start for rows in ranges])[owner] + index - before[owner]
