"""What an evaluator is, what it may use, and what several of them share."""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from torch import Tensor

Batch = dict[str, Tensor]


class Evaluator(Protocol):
    """A plug-in: constructed with (data_path, eval_metadata, **options) and named module@Class.

    `update_batch` receives every row of the test split that this rank computes, with the outputs
    named in `required_outputs`. A name that ends in `_by_step` holds that output after each ACT
    step, stacked in the second dimension; `*_change_by_step` requests the change of every latent.
    `group.gather_objects(value)` returns every rank's value as a list, on every rank.

    Two members are optional:

    examine(model, group): called once on every rank, after the rows, with the model under
    evaluation as a `models.inference.language_model.LanguageModel`. Its `score`, `write_all` and
    `predict` are collectives.
    reads_rows = False: the evaluator needs no test split.
    """

    required_outputs: Iterable[str]

    def begin_eval(self) -> None: ...

    def update_batch(self, batch: Batch, preds: Batch) -> None: ...

    def result(
        self, save_path: str | None, rank: int, world_size: int, group: Any
    ) -> dict[str, float] | None: ...


class Examiner:
    """Base of evaluators whose `examine` sets `figures`, which are reported below <prefix>/."""

    required_outputs: Iterable[str] = frozenset()
    prefix: str

    def begin_eval(self) -> None:
        self.figures: dict[str, float] = {}

    def update_batch(self, batch: Batch, preds: Batch) -> None:
        """Ignore the rows of the corpus."""

    def result(
        self, save_path: str | None, rank: int, world_size: int, group: Any = None
    ) -> dict[str, float] | None:
        """Return the figures on rank 0, None elsewhere."""
        if rank != 0:
            return None
        return {f"{self.prefix}/{name}": value for name, value in self.figures.items()}


class Sums:
    """Arrays by name, added up over batches and ranks in float64."""

    def __init__(self) -> None:
        self.own: dict[str, np.ndarray] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        self.own[name] = self.own.get(name, 0) + values.astype(np.float64)

    def over_ranks(self, group: Any) -> dict[str, np.ndarray]:
        """Return the sums of all ranks. A collective unless `group` is None: this rank alone."""
        parts = [self.own] if group is None else group.gather_objects(self.own)
        names = dict.fromkeys(name for part in parts for name in part)
        return {n: np.sum([part[n] for part in parts if n in part], axis=0) for n in names}
