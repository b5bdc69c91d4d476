"""What a loss term is, and what it sees of a step.

A term imports nothing above `models/`. It has no trained weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.base import Carry
from models.token_losses import LossType, by_tokens
from utils.monitoring.metrics import Metric


class TermConfig(BaseModel):
    """Options of a term; a subclass declares more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor on the term's loss")


@dataclass(frozen=True)
class Seen:
    """A step as a term sees it, for B rows of S tokens.

    Args:
        outputs: of the architecture, by name.
        data: the batch entries of the examples that the rows hold.
        carry: after the step; a row with `carry.steps == 1` has begun its example in this step.
        memory: what this term returned of these rows in the step before, or made by `begin`.
        mask: (B, S) bool, positions with a label.
        valid: (B,) bool, rows with a label; others enter neither loss nor metric.
        row_loss: (B,) nats per label of the row, without gradient; a term that needs one reads
            logits.
        exact: (B,) bool, whether every label of the row is predicted.
        loss_type: the token loss, and the map from logits to probabilities that goes with it.
        training: False in evaluation.
        token_values: (B, S) by name of the term, of each `TokenTerm` whose loss is counted already.
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

        rows: (B,) bool, only over those of them.
        """
        counted = self.valid if rows is None else self.valid & rows
        return torch.where(counted, values.detach(), 0).sum(), counted.sum()


class Result(NamedTuple):
    """What a term returns of a step.

    loss: (B,) per row, None for no loss. metrics: by the name that they are logged as.
    memory: (B, ...) each, for the rows' next step. outputs: further outputs, for evaluators.
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
    """One term of the loss: a part of the training objective in a file of its own.

    A subclass names what it needs and defines `__call__`. The head adds `config.weight` times the
    sum of the returned loss over valid rows.

    Args:
        config: a value of the class' `Config`.
    """

    config: Any

    Config: ClassVar[type[TermConfig]] = TermConfig
    needs: ClassVar[frozenset[str]] = frozenset()
    """Outputs of the architecture that it reads, without which it cannot work."""
    needs_data: ClassVar[frozenset[str]] = frozenset()
    """Arrays per token that the corpus must have; the one that a corpus can have is
    `reasoning_labels`."""
    arch_options: ClassVar[Mapping[str, Any]] = {}
    """Options that the architecture must have for it; they take the place of `auto`."""
    training_only: ClassVar[bool] = False
    """Whether evaluations leave it out."""
    saves_memory: ClassVar[bool] = True
    """Whether checkpoints store its memory; False where `begin` can make it again."""
    flat_keys: ClassVar[Mapping[str, str]] = {}
    """Its options by the name that they had as keys of `arch.loss` itself."""
    name: str = field(default="", kw_only=True)
    """What it is called in `arch.loss.terms`."""

    def check(self, arch: Any, highest: Mapping[str, int]) -> None:
        """Raise UserError if it does not fit the architecture or the data. Default: it fits.

        arch: the architecture's config. highest: of each array in `needs_data`, its highest value.
        """

    def prepare(self, load_base: LoadBase, arch: Any) -> None:
        """Load what it needs, once, before training. Default: nothing."""

    @property
    def ready(self) -> bool:
        """Whether it has what it needs; the head skips it until then. Default: always."""
        return True

    def models(self) -> list[nn.Module]:
        """Return the frozen models that it runs. Default: none."""
        return []

    def begin(self, carry: Carry, most_steps: int) -> dict[str, Tensor]:
        """Return the memory of rows that a run starts or resumes with. Default: none.

        most_steps: no row of `carry` has had more steps.
        """
        return {}

    def __call__(self, seen: Seen) -> Result:
        """Return loss, metrics and memory of a step."""
        raise NotImplementedError


class TokenTerm(Term):
    """A term that is a function of a token's logits and label, averaged over a row's labels.

    A subclass defines `of_tokens` and names its `metric`. The head can compute it together with
    the token loss, without the logits of the whole batch.
    """

    needs = frozenset({"logits"})
    training_only = True
    metric: ClassVar[str]

    def of_tokens(self, logits: Tensor, labels: Tensor, loss_type: LossType) -> Tensor:
        """Return the loss of tokens (T,). logits: (T, V). labels: (T,), any where there is none."""
        raise NotImplementedError

    def __call__(self, seen: Seen) -> Result:
        values = seen.token_values.get(self.name)
        if values is not None:
            mean = seen.mean_over_tokens(values)
            return Result(None, {self.metric: seen.over_rows(mean)})
        labels = seen.data["labels"].long().where(seen.mask, 0)
        of_tokens = partial(self.of_tokens, loss_type=seen.loss_type)
        loss = seen.mean_over_tokens(by_tokens(of_tokens, seen.outputs["logits"], labels))
        return Result(loss, {self.metric: seen.over_rows(loss)})
