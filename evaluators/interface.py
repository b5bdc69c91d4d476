"""What an evaluator is, and what it may ask."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from models.inference.sampling import Sampling

Batch = dict[str, Tensor]


class Evaluator(Protocol):
    """A plug-in: constructed with (data_path, eval_metadata, **options) and named module@Class.

    `update_batch` sees every row of the test split that this rank computes, with the outputs named
    in `required_outputs`; a name that ends in `_by_step` holds that output after each ACT step,
    stacked in the second dimension. `group.gather_objects(value)` gives every rank's value as a
    list, on every rank.

    Two things may be added:

    examine(model, group): called once on every rank, after the rows, with an `Examined`.
    reads_rows = False: it needs no test split.
    """

    required_outputs: Iterable[str]

    def begin_eval(self) -> None: ...

    def update_batch(self, batch: Batch, preds: Batch) -> None: ...

    def result(
        self, save_path: str | None, rank: int, world_size: int, group: Any
    ) -> dict[str, float] | None: ...


class Scored(Protocol):
    """nats: the negative sum of log-probabilities; greedy: every token was the likeliest."""

    @property
    def nats(self) -> float: ...

    @property
    def greedy(self) -> bool: ...


class Continued(Protocol):
    """Text of a continuation, and whether the model or a stop string ended it."""

    @property
    def text(self) -> str: ...

    @property
    def ended(self) -> bool: ...


class Examined(Protocol):
    """The model under evaluation, for evaluators that bring inputs of their own.

    Each method that computes is a collective: all ranks give the same requests in the same order,
    share the work, and get all results. `identifier` names a row of the identifier embedding; None
    is the only one, else the blank one.
    """

    steps: int
    """ACT steps of every token."""
    window: int
    """Tokens that the model sees at most."""

    @property
    def eos_id(self) -> int | None: ...

    def flops_per_token(self, steps: int) -> float:
        """Return the FLOPs of this many ACT steps and of the output head after the last of them."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, never empty, and of what continues it."""
        ...

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        identifier: str | None = None,
    ) -> Sequence[Scored]:
        """How likely each (context, continuation) is, ids of at least one token each."""
        ...

    def write_all(
        self,
        prompts: Sequence[Sequence[int]],
        how: Sampling,
        stop: Sequence[str] = (),
        identifier: str | None = None,
    ) -> Sequence[Continued]:
        """Continues each prompt, ids of at least one token; `how` is a `Sampling`."""
        ...

    def predict(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """For rows (N, S) of `inputs`, with the corpus' other entries by row, the likeliest ids
        (N, S), and how sure the halting head is of each row, (N,)."""
        ...
