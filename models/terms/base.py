"""The interface of loss terms, and the view of a step that they get.

A term imports nothing from outside `models/` and has no trained weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.base import Carry
from models.token_losses import LossType, RowSums, by_tokens, sum_rows
from utils.monitoring.metrics import Metric


class TermConfig(BaseModel):
    """Options of all terms; a subclass adds its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor on the term's loss")


@dataclass(frozen=True)
class Seen:
    """A step as a term sees it, for B rows of S tokens.

    Args:
        outputs: outputs of the architecture, by name.
        data: the batch entries of the rows' current examples.
        carry: the carry after the step; a row with `carry.steps == 1` has started its example in
            this step.
        memory: the memory that this term returned for these rows in the previous step, or from
            `begin`.
        mask: (B, S) bool, positions with a label.
        valid: (B,) bool, rows with a label; others do not count in loss or metrics.
        row_loss: (B,) nats per label of the row, without gradient; use the logits if you need one.
        exact: (B,) bool, whether every label of the row is predicted.
        loss_type: the token loss, and its map from logits to probabilities.
        training: False in evaluation.
        token_values: (B, S) by name of the term, for each `TokenTerm` whose loss is already
            counted.
    """

    outputs: Mapping[str, Tensor]
    data: Mapping[str, Tensor]
    carry: Carry
    memory: Mapping[str, Tensor]
    mask: Tensor
    valid: Tensor
    row_loss: Tensor
    exact: Tensor
    loss_type: LossType
    training: bool
    token_values: Mapping[str, Tensor] = field(default_factory=dict)

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """Return the mean of (B, S) values over each row's labels, (B,); 0 without a label."""
        masked = torch.where(self.mask, values, 0)
        return masked.sum(-1) / self.mask.sum(-1).clamp_min(1)

    def over_rows(self, values: Tensor, rows: Tensor | None = None) -> Metric:
        """Return the metric that is the mean of (B,) values over valid rows.

        rows: (B,) bool, the valid rows to include; None: all.
        """
        counted = self.valid if rows is None else self.valid & rows
        return torch.where(counted, values.detach(), 0).sum(), counted.sum()


class Result(NamedTuple):
    """The result of a term for one step.

    loss: (B,) per row, or None. metrics: by logged name. memory: (B, ...) each, passed to the next
    step. outputs: additional outputs, for evaluators.
    """

    loss: Tensor | None = None
    metrics: Mapping[str, Metric] = {}
    memory: Mapping[str, Tensor] = {}
    outputs: Mapping[str, Tensor] = {}


LoadBase = Callable[[str, str, str], Any]
"""(key of the config, path of a checkpoint, "ema" or "raw") -> its loss head, on the device of the
run."""


@dataclass
class Term:
    """One term of the loss, in its own file.

    A subclass declares its requirements and defines `__call__`. The head adds `config.weight` times
    the sum of the returned loss over valid rows.

    Args:
        config: an instance of the class' `Config`.
    """

    config: Any

    Config: ClassVar[type[TermConfig]] = TermConfig
    needs: ClassVar[frozenset[str]] = frozenset()
    """Names of the architecture's outputs that the term requires."""
    needs_data: ClassVar[frozenset[str]] = frozenset()
    """Per-token arrays that the corpus must have; only `reasoning_labels` exists."""
    arch_options: ClassVar[Mapping[str, Any]] = {}
    """Options of the architecture that the term requires; they replace `auto`."""
    training_only: ClassVar[bool] = False
    """Whether the term is skipped in evaluation."""
    saves_memory: ClassVar[bool] = True
    """Whether checkpoints store the term's memory; False if `begin` can recompute it."""
    flat_keys: ClassVar[Mapping[str, str]] = {}
    """The term's options by their former names as keys of `arch.loss`."""
    name: str = field(default="", kw_only=True)
    """Name of the term in `arch.loss.terms`."""

    def check(self, arch: Any, highest: Mapping[str, int]) -> None:
        """Raise UserError if the term does not fit the architecture or the data. Default: do
        nothing.

        arch: the architecture's config. highest: the highest value of each array in `needs_data`.
        """

    def prepare(self, load_base: LoadBase, arch: Any) -> None:
        """Load the models that the term needs, once before training. Default: do nothing."""

    @property
    def ready(self) -> bool:
        """Return whether the term is prepared; the head skips it until then. Default: True."""
        return True

    def models(self) -> list[nn.Module]:
        """Return the frozen models that the term runs. Default: none."""
        return []

    def begin(self, carry: Carry, most_steps: int) -> dict[str, Tensor]:
        """Return the initial memory of rows when a run starts or resumes. Default: none.

        most_steps: upper limit of the steps taken by the rows of `carry`.
        """
        return {}

    def __call__(self, seen: Seen) -> Result:
        """Compute the loss, metrics and memory of a step."""
        raise NotImplementedError


class TokenTerm(Term):
    """A term that is a function of a token's logits and label, averaged over a row's labels.

    A subclass names its `metric` and defines `of_sums` if it depends on nothing but those sums,
    which the kernel of the token loss computes on CUDA, and `of_tokens` otherwise. The head can
    compute it together with the token loss, without the logits of the whole batch.
    """

    needs = frozenset({"logits"})
    training_only = True
    metric: ClassVar[str]

    def of_sums(self, sums: RowSums) -> Tensor:
        """Return the loss of tokens (T,), a differentiable function of their sums alone."""
        raise NotImplementedError

    def of_tokens(self, logits: Tensor, labels: Tensor, loss_type: LossType) -> Tensor:
        """Return the loss of tokens (T,). logits: (T, V). labels: (T,), arbitrary for tokens
        without a label.
        """
        return self.of_sums(sum_rows(loss_type.softmax_logits(logits), labels))

    @property
    def needs_only_sums(self) -> bool:
        """Return whether the loss is `of_sums`."""
        return type(self).of_tokens is TokenTerm.of_tokens

    def __call__(self, seen: Seen) -> Result:
        values = seen.token_values.get(self.name)
        if values is not None:
            mean = seen.mean_over_tokens(values)
            return Result(None, {self.metric: seen.over_rows(mean)})
        labels = seen.data["labels"].long().where(seen.mask, 0)
        of_tokens = partial(self.of_tokens, loss_type=seen.loss_type)
        loss = seen.mean_over_tokens(by_tokens(of_tokens, seen.outputs["logits"], labels))
        return Result(loss, {self.metric: seen.over_rows(loss)})
