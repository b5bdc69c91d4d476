"""Data streams: decide which example enters which slot of the global batch at which step.

Handles order, mixing, sharding and position, and yields numpy arrays independent of models and
devices. Training order is a pure function of (seed, epoch, position), so a run can resume from a
few numbers at any world size and micro-batch count, without storing a shuffled index.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from utils.config.schema import IterationCurriculumConfig, PretrainConfig
from utils.core.errors import UserError
from utils.core.functions import suggest
from utils.corpus.corpora import Corpora
from utils.corpus.curriculum import scale_budgets
from utils.corpus.order import RELABEL, ROW_OPTIONS, ExampleOrder, Examples, Position, step_rng
from utils.corpus.permutation import hash64
from utils.corpus.read_ahead import InPlace, Read, ReadAhead
from utils.corpus.row_reader import Batch, RowReader

Part = tuple[np.ndarray, Batch]  # ascending slots (n,) within a rank, the rows (n, ...) for them
RowOptions = Callable[[float, np.random.Generator, int], dict[str, np.ndarray]]


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


def _count_draws(corpora: Corpora, epochs: float, max_draws: int | None) -> float:
    """Return the number of groups visited in a run, before rounding."""
    if not 0 < epochs < float("inf"):
        raise UserError(f"epochs is {epochs}; it must be positive and finite.")
    draws = min(epochs * corpora.num_groups, float("inf") if max_draws is None else max_draws)
    if round(draws) < 1:
        raise UserError(
            f"{epochs} epochs of {corpora.num_groups} groups amount to less than one group; "
            "raise epochs."
        )
    return draws


class _Feed:
    """Base of both feeds.

    `size` counts the slots of all ranks; `slots` are this rank's. A feed has `progress` (0..1), and
    `next(halted)`, which takes a step and returns the new examples for this rank's slots; None at
    the end of the run. halted: (G,) bool, flags of all slots. ahead: arguments of `ReadAhead` if
    there are workers.
    """

    total_steps: int | None = None

    def __init__(
        self, order: ExampleOrder, read: Read, size: int, slots: slice, workers: int, **ahead: Any
    ):
        self.source: InPlace | ReadAhead = InPlace(order, read)
        if workers:
            self.source = ReadAhead(order, read, workers=workers, **ahead)
        self._size, self._slots = size, slots
        self.position, self.examples_entered = Position(), 0
        self._steps = 0
        self._other_sizes = (0, 0)  # steps and rows before global_batch_size changed

    def state_dict(self) -> dict[str, Any]:
        return {
            "global_batch_size": self._size,
            "steps": self._steps,
            "other_sizes": list(self._other_sizes),
            "position": self.position.entered,
            "offset": self.position.offset,
            "examples_entered": self.examples_entered,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, restart_held: bool) -> None:
        self.position = Position(int(state["position"]), int(state["offset"]))
        self.source.restart(self.position)
        self.examples_entered = int(state["examples_entered"])
        self._steps = int(state.get("steps", 0))
        steps, rows = state.get("other_sizes", (0, 0))
        if (size := state["global_batch_size"]) != self._size:
            steps, rows = self._steps, rows + (self._steps - steps) * size
        self._other_sizes = (steps, rows)

    def _take(self, count: int) -> Examples:
        """Take the next examples; fewer than `count` only at the end of the order."""
        examples = self.source.take(count)
        if len(examples):
            self.position = examples.end
        return examples

    def _select_rank_rows(self, slots: np.ndarray) -> Part:
        """Return this rank's part of the last examples taken, which go into `slots`."""
        own = np.flatnonzero(self._is_own(slots))
        return slots[own] - self._slots.start, self.source.rows(own)

    def _is_own(self, slots: np.ndarray) -> np.ndarray:
        return (slots >= self._slots.start) & (slots < self._slots.stop)


class ConsumeFeed(_Feed):
    """Freed slots take the next examples, in ascending order; the run ends when all have drained.

    order: order of the run's examples, limited to the groups of the run. read: returns the rows of
    examples. workers: threads that prefetch them.
    """

    def __init__(self, order: ExampleOrder, read: Read, size: int, slots: slice, workers: int):
        # An example may enter a slot of any rank, so every rank reads ahead for all of them.
        chunk = -(-size // max(4, 2 * workers))
        super().__init__(order, read, size, slots, workers, chunk=chunk, ahead=size)
        assert order.limit is not None
        self._order, self._read, self._total_groups = order, read, order.limit
        # Examples as (place in the order, row of the puzzle); place -1 for an empty slot.
        self._held = np.tile(np.array([-1, 0]), (size, 1))
        self._again = np.empty((0, 2), np.int64)  # to restart before any new example

    @property
    def progress(self) -> float:
        """Groups entered over their total."""
        return min(1.0, self.position.entered / self._total_groups)

    def next(self, halted: np.ndarray) -> list[Part] | None:
        self._steps += 1
        parts, freed = [], np.flatnonzero(halted)
        self._held[freed, 0] = -1
        if len(self._again):
            slots, freed = np.split(freed, [len(self._again)])
            self._held[slots], self._again = np.split(self._again, [slots.size])
            own = slots[self._is_own(slots)]
            rows = self._read(self._order.at(*self._held[own].T))
            parts.append((own - self._slots.start, rows))
        examples = self._take(freed.size)
        slots = freed[: len(examples)]
        self._held[slots] = np.stack([examples.place, examples.offset], axis=1)
        self.examples_entered += slots.size
        if slots.size < freed.size:  # only puzzles without rows can remain
            self.position = Position(max(self.position.entered, self._total_groups))
        parts.append(self._select_rank_rows(slots))
        return parts if (self._held[:, 0] >= 0).any() else None

    def state_dict(self) -> dict[str, Any]:
        places, offsets = self._held.T.tolist()
        again = self._again.tolist()
        return super().state_dict() | dict(again=again, held_places=places, held_offsets=offsets)

    def load_state_dict(self, state: Mapping[str, Any], *, restart_held: bool) -> None:
        super().load_state_dict(state, restart_held=restart_held)
        held = np.array([state["held_places"], state["held_offsets"]], np.int64).T
        self._again = np.array(state.get("again", ()), np.int64).reshape(-1, 2)
        if len(held) != self._size or restart_held:
            self._again = np.concatenate([held[held[:, 0] >= 0], self._again])
            held = np.tile(np.array([-1, 0]), (self._size, 1))
        self._held = held.copy()


class PresentFeed(_Feed):
    """Every step gets a full batch of the next examples, as in TRM; occupied slots ignore theirs.

    order: order of the run's examples, without a limit. rows: rows of the whole run, whose
    full batches are its steps. read, workers: see `ConsumeFeed`.
    """

    def __init__(
        self, order: ExampleOrder, read: Read, size: int, slots: slice, workers: int, rows: float
    ):
        # Example i enters slot i, so only this rank's rows are read.
        ahead = size * workers
        super().__init__(order, read, size, slots, workers, chunk=size, ahead=ahead, keep=slots)
        self._rows = rows

    @property
    def total_steps(self) -> int:  # type: ignore[override]
        steps, rows = self._other_sizes
        return steps + max(0, int((self._rows - rows) / self._size))

    @property
    def progress(self) -> float:
        """Steps taken over their total."""
        return min(1.0, self._steps / self.total_steps)

    def next(self, halted: np.ndarray) -> list[Part] | None:
        if self._steps >= self.total_steps:
            return None
        self._steps += 1
        self.examples_entered += int(halted.sum())
        self._take(self._size)
        return [self._select_rank_rows(np.arange(self._size))]


class TrainStream:
    """Yields this rank's rows of the training batches, which a feed fills slot by slot.

    `feed="consume"` is a `ConsumeFeed`, `feed="present"` a `PresentFeed`. All rows without an
    example are ignored rows, so that shapes are static.

    A visit to a group yields one of its puzzles and all rows of that puzzle. Position is counted
    in groups entered; a partially entered puzzle is resumed at an offset.

    Args:
        epochs: passes over all groups; may be a fraction.
        domain_weights: share of each domain in the draws; None draws every group once per epoch.
        min_iterations, max_iterations: lower and upper bounds of budgets.
        rank, world_size, micro_batches: select the slots that `next` returns.
        row_options: `(progress, rng, slots of all ranks)` -> arrays (slots,) for each step's batch.
        document_starts: add `document_starts` to batches (if the corpora have an eos).
        max_draws: end after this many groups, if that is earlier.
        curriculum: reduces the budgets of rows that enter early, to no less than
            `least_iterations`.
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
        row_options: RowOptions | None = None,
        document_starts: bool = True,
        max_draws: int | None = None,
        curriculum: IterationCurriculumConfig | None = None,
        least_iterations: int = 1,
        num_workers: int = 0,
    ):
        if feed not in ("consume", "present"):
            raise UserError(f"feed is {feed!r}; it must be 'consume' or 'present'.")
        slots = _get_rank_slots(global_batch_size, rank, world_size, micro_batches)
        self._weights = _normalize_weights(domain_weights, corpora) if domain_weights else None
        self._reader = RowReader(corpora, min_iterations, max_iterations, document_starts)
        self._corpora, self._seed, self._feed_name = corpora, seed, feed
        self._size, self._slots, self._micro_batches = global_batch_size, slots, micro_batches
        self._row_options, self._curriculum = row_options, curriculum
        self._least = max(1, least_iterations, min_iterations or 1)
        if curriculum is not None and not corpora.has_targets:
            raise UserError(
                "iteration_curriculum scales iteration budgets, but no corpus in data_paths has "
                "iteration_targets.npy; build a corpus with budgets, or set it to null."
            )
        draws = _count_draws(corpora, epochs, max_draws)
        limit = round(draws) if feed == "consume" else None
        order = ExampleOrder(corpora, seed, self._weights, limit)
        self._feed: ConsumeFeed | PresentFeed
        if feed == "consume":
            self._feed = ConsumeFeed(order, self._read, global_batch_size, slots, num_workers)
            return
        rows = draws * corpora.metadata.mean_puzzle_examples
        self._feed = PresentFeed(order, self._read, global_batch_size, slots, num_workers, rows)
        if self._feed.total_steps < 1:
            raise UserError(
                f"{epochs} epochs of {corpora.num_groups} groups do not fill one batch of "
                f"{global_batch_size} (feed=present); raise epochs or lower global_batch_size."
            )

    @classmethod
    def from_config(
        cls, corpora: Corpora, config: PretrainConfig, max_iterations: int, **options: Any
    ) -> "TrainStream":
        """Build a run's stream from its config; `options` are the other arguments."""
        weights = config.domain_weights
        return cls(
            corpora,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            epochs=config.epochs or 1e9,
            feed=config.feed,
            domain_weights=corpora.recorded_weights() if weights is None else weights,
            min_iterations=config.min_iterations,
            max_iterations=max_iterations,
            curriculum=config.iteration_curriculum,
            num_workers=config.num_workers,
            **options,
        )

    @property
    def position(self) -> int:
        """Groups entered so far."""
        return self._feed.position.entered

    @property
    def epoch(self) -> float:
        """Epochs entered so far, as a fraction."""
        return self.position / self._corpora.num_groups

    @property
    def progress(self) -> float:
        """Progress of the run in 0..1: groups entered (under `present`: steps) over their total."""
        return self._feed.progress

    @property
    def total_steps(self) -> int | None:
        """TRM's number of steps under `present`, else None."""
        return self._feed.total_steps

    @property
    def examples_entered(self) -> int:
        """Number of examples that have entered slots so far."""
        return self._feed.examples_entered

    def next(self, step: int, halted: np.ndarray, progress: float = 0.0) -> list[Batch] | None:
        """Return this rank's micro-batches for optimizer step `step`; None at the end of the run.

        Args:
            step: optimizer step, from 1; seeds the row options.
            halted: (G,) bool, halted flags of all slots of all ranks; all True at the start.
            progress: progress of the run by limits other than this stream's, before the step.
        """
        halted = np.asarray(halted, dtype=bool)
        assert halted.shape == (self._size,), f"halted is {halted.shape}, not ({self._size},)"
        progress = max(self.progress, progress)
        parts = self._feed.next(halted)
        if parts is None:
            return None
        if self._curriculum is not None:
            for _, rows in parts:
                whole = rows["iteration_targets"]
                rows["iteration_targets"] = scale_budgets(
                    whole, self._curriculum, progress, self._least
                )
        batch = self._reader.scatter(parts, self._slots.stop - self._slots.start)
        if self._row_options is not None:
            rng = step_rng(self._seed, step, ROW_OPTIONS)
            drawn = self._row_options(progress, rng, self._size)
            batch |= {name: values[self._slots] for name, values in drawn.items()}
        size = len(batch["inputs"]) // self._micro_batches
        return [
            {name: values[start : start + size] for name, values in batch.items()}
            for start in range(0, size * self._micro_batches, size)
        ]

    def close(self) -> None:
        """Drop prefetched examples and stop the prefetching threads."""
        self._feed.source.close()
        self._feed.source.restart(self._feed.position)

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
            "feed": self._feed_name,
            "domain_weights": self._weights,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume, as JSON values; the same on all ranks."""
        return self._identity() | self._feed.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, restart_held: bool = False) -> None:
        """Resume from `state`, at any world size and micro-batch count.

        `restart_held`: the model's carry was not saved, so the flags of the next call of `next`
        are all True. Under `consume` the examples in the saved slots then restart from the
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
        self._feed.load_state_dict(state, restart_held=restart_held)


def drop_halted(state: dict[str, Any], halted: Sequence[bool]) -> dict[str, Any]:
    """Return a stream's `state_dict` without the examples in halted slots, which are finished.

    halted: (G,) flags. Needed if examples in progress restart; `present` stores none.
    """
    if "held_places" not in state:
        return state
    places = zip(state["held_places"], halted, strict=True)
    return state | {"held_places": [-1 if free else place for place, free in places]}


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
        cls,
        corpora: Corpora,
        config: PretrainConfig,
        max_iterations: int,
        rows: int,
        **options: Any,
    ) -> "EvalStream":
        """Build a run's evaluation stream, in batches of `rows` over all ranks.

        `options` are the other arguments.
        """
        most = config.eval_max_batches
        if most is not None:  # keep the number of rows, whatever the actual batch size
            most = -(-most * (config.eval_batch_size or config.global_batch_size) // rows)
        return cls(
            corpora,
            global_batch_size=rows,
            max_batches=most,
            min_iterations=config.min_iterations,
            max_iterations=max_iterations,
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
