"""The evaluator interface and the base classes of evaluators."""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from torch import Tensor

Batch = dict[str, Tensor]


class Evaluator(Protocol):
    """A plug-in, named module@Class and constructed with (data_path, eval_metadata, **options).

    `update_batch` receives every row of the test split that this rank computes, with the outputs
    named in `required_outputs`. A name that ends in `_by_step` holds that output after each ACT
    step, stacked in the second dimension; `*_change_by_step` requests the change of every latent.
    `group.gather_objects(value)` returns every rank's value as a list, on every rank.

    Two members are optional:

    examine(model, group): called once on every rank after all rows, with the evaluated model as a
    `models.inference.language_model.LanguageModel`. Its `score`, `write_all` and `predict` are
    collectives. reads_rows = False: the evaluator needs no test split.
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


class Summing:
    """Base of evaluators whose figures are computed from sums over batches and ranks."""

    def begin_eval(self) -> None:
        self.sums: dict[str, np.ndarray] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """Add a batch's array to the sum called `name`, in float64."""
        self.sums[name] = self.sums.get(name, 0) + values.astype(np.float64)

    def result(
        self, save_path: str | None, rank: int, world_size: int, group: Any = None
    ) -> dict[str, float] | None:
        """Return the figures on rank 0, None elsewhere. A collective if `group` is given."""
        parts = [self.sums] if group is None else group.gather_objects(self.sums)
        names = dict.fromkeys(name for part in parts for name in part)
        sums = {n: np.sum([part[n] for part in parts if n in part], axis=0) for n in names}
        return self.summarize(sums, save_path) if rank == 0 else None

    def summarize(self, sums: dict[str, np.ndarray], save_path: str | None) -> dict[str, float]:
        """Compute the figures from the sums over all ranks."""
        raise NotImplementedError
