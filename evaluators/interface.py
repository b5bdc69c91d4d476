"""What an evaluator is, and what it may use."""

from collections.abc import Iterable
from typing import Any, Protocol

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
