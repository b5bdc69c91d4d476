"""The loss head: an architecture with its token loss and the other terms of its objective."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from dataset.common import IGNORE_LABEL_ID
from models.base import Architecture, Batch, Carry, OptionsKey, Outputs, options_key
from models.layers import at_least_float32, cast_once
from models.linear_loss import LinearLoss, LossKernel, WeightedTerm, linear_loss
from models.terms.base import LoadBase, Seen, Term, TokenTerm
from models.token_losses import LOSSES
from utils.config.plugins import load_plugin, read_options
from utils.config.schema import LossTermConfig
from utils.core.errors import UserError
from utils.monitoring.metrics import Metric


class ACTLossConfig(BaseModel):
    """Options of `ACTLossHead`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss_type: str = Field("stablemax_cross_entropy", description="one of " + ", ".join(LOSSES))
    terms: dict[str, dict[str, Any] | None] = Field(
        {"halting": {}}, description="{name: {weight, option: value}}, null removes a term"
    )

    @field_validator("loss_type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in LOSSES:
            raise ValueError(f"loss_type={value!r} is unknown; choose one of {', '.join(LOSSES)}")
        return value


class ACTLossHead(nn.Module):
    """The model with its loss: the token loss, averaged over each row's labels and summed over
    rows, plus weight × the sum over valid rows of each term.

    The default is TRM's loss, because the halting term is included unless it is null. Rows without
    a label do not count in loss or metrics.
    """

    Config = ACTLossConfig
    fused = True
    """Whether output head and token loss are fused, without materialising the logits of a whole
    batch, if nothing else needs the logits.
    """
    casts_once = True
    """Whether a step casts the weights of the blocks once for all uses."""
    device_type: str | None = None
    """Device whose memory decides how many logits exist at once; None: that of the tensors."""
    compiled = False
    """Whether the fused loss runs through torch.compile."""
    kernel: LossKernel | None = None
    """What computes the fused loss, which then is not compiled: a Triton or C++ kernel."""

    def __init__(self, model: Architecture, loss_type: str, **options: Any):
        super().__init__()
        self.model = model
        self.config = ACTLossConfig(loss_type=loss_type, **options)
        self.loss_type = LOSSES[loss_type]
        self.terms = create_terms(
            self.config.terms
        )  # not modules, because they have no trained weights
        self._unused: dict[tuple[OptionsKey, frozenset[str]], list[str]] = {}

    @property
    def active_terms(self) -> list[Term]:
        """Return the terms of this mode, training or evaluation."""
        return [t for t in self.terms if t.ready and (self.training or not t.training_only)]

    def prepare(self, load_base: LoadBase) -> None:
        """Load the models that the terms need, before training."""
        for term in self.terms:
            term.prepare(load_base, self.model.config)

    def frozen_models(self) -> list[nn.Module]:
        """Return the models that the terms run, such as the base of a divergence."""
        return [model for term in self.terms for model in term.models()]

    def initial_carry(self, batch: Batch) -> Carry:
        """Return a carry with only free rows, for batches with the shapes of `batch`."""
        return self.begin(self.model.initial_carry(batch), most_steps=0)

    def begin(self, carry: Carry, most_steps: int) -> Carry:
        """Return the carry with the memory of the terms, restored from the checkpoint that the
        carry comes from, if any, and otherwise recomputed.

        most_steps: upper limit of the steps taken by its rows.
        """
        memory: Batch = {}
        for term in self.active_terms:
            for name, value in term.begin(carry, most_steps).items():
                key = f"{term.name}/{name}"
                memory[key] = carry.memory.get(key, value)
        return replace(carry, memory=memory)

    def saved_memory(self, carry: Carry) -> Batch:
        """Return the memory that a checkpoint stores."""
        kept = {term.name for term in self.terms if term.saves_memory}
        return {k: v for k, v in carry.memory.items() if k.partition("/")[0] in kept}

    def forward(
        self, return_keys: Sequence[str], carry: Carry, batch: Batch, **options: int
    ) -> tuple[Carry, Tensor, dict[str, Metric], Batch, Tensor]:
        """Take one step.

        options: of the architecture's `step_options`.
        Returns the new carry, the loss (summed over rows), metrics (without gradient), those of
        `return_keys` that the step produced, and whether all rows have halted.

        Besides the model's outputs, `return_keys` may name preds (B, S), token_nll (B, S) in nats,
        unrefined_token_nll, per row (B,) valid, steps, row_loss, row_accuracy, row_exact, outputs
        of terms (row_halt_target), and any of the rows' batch entries.
        """
        with self._cast_weights():
            carry, outputs = self.model(carry=carry, batch=batch, **options)
        data = carry.current_data
        labels = data["labels"]
        scored, total, token_values = self._score(outputs, labels, return_keys)
        seen = Seen(
            outputs=outputs,
            data=data,
            carry=carry,
            memory={},
            mask=scored["mask"],
            valid=scored["valid"],
            row_loss=scored["row_loss"].detach(),
            exact=scored["row_exact"],
            loss_type=self.loss_type,
            training=self.training,
            token_values=token_values,
        )
        found = dict(outputs) | scored | {"steps": carry.steps}
        metrics = _metrics(seen, found["row_accuracy"])
        memory: Batch = {}
        for term in self.active_terms:
            result = self._ask(term, seen)
            if result.loss is not None:
                rows = torch.where(seen.valid, result.loss, 0)
                total = total + term.config.weight * rows.sum()
            for name, metric in result.metrics.items():  # the same term may occur twice
                metrics[name if name not in metrics else f"{term.name}_{name}"] = metric
            memory |= {f"{term.name}/{name}": v.detach() for name, v in result.memory.items()}
            found |= result.outputs
        if "unrefined_token_nll" in return_keys and "unrefined_logits" in outputs:
            found["unrefined_token_nll"] = self.loss_type.cross_entropy(
                outputs["unrefined_logits"], labels, valid_mask=seen.mask
            )
        kept = {k: (found | data)[k].detach() for k in return_keys if k in found or k in data}
        carry = replace(carry, memory=memory)
        return carry, self._use_all(total, options), metrics, kept, carry.halted.all()

    def _cast_weights(self) -> AbstractContextManager[None]:
        # A recomputation in the backward pass comes after the context.
        model = self.model
        if (
            not (self.casts_once and model.repeats_blocks)
            or model.config.use_gradient_checkpointing
        ):
            return nullcontext()
        return cast_once(self.model.blocks(), self.model.config.dtype)

    def _score(
        self, outputs: Batch, labels: Tensor, return_keys: Sequence[str]
    ) -> tuple[Batch, Tensor, dict[str, Tensor]]:
        """Compare a step's outputs with labels (B, S).

        Returns the metrics of `score`, the token loss summed over rows, and the values of the terms
        included in it, (B, S) by name.
        """
        terms = [term for term in self.active_terms if isinstance(term, TokenTerm)]
        others = [term for term in self.active_terms if term not in terms]
        asked = set(return_keys).union(*(term.needs for term in others))
        fusible = (
            self.fused
            and isinstance(outputs, Outputs)
            and "readout" in outputs
            and "logits" not in asked
            and outputs.predict == self.model.inner.predict
            and type(self).score is ACTLossHead.score
        )
        weight = self.model.inner.output_weight if fusible else None
        if weight is None:
            scored = self.score(outputs["logits"], labels)
            return scored, scored["row_loss"].sum(), {}
        found = self._score_readout(outputs["readout"], weight, labels, terms)
        values = {
            term.name: value.view_as(labels) for term, value in zip(terms, found.terms, strict=True)
        }
        return self._rows(found.preds, found.nll, labels), found.total, values

    def _score_readout(
        self, readout: Tensor, weight: Tensor, labels: Tensor, terms: Sequence[TokenTerm]
    ) -> LinearLoss:
        """Compare the predictions from the output head's input, (B, S, D), with labels (B, S)."""
        mask = labels != IGNORE_LABEL_ID
        wide = torch.promote_types(readout.dtype, torch.float32)
        scale = mask.to(wide) / mask.sum(-1, keepdim=True).clamp_min(1)
        return linear_loss(
            readout.flatten(0, 1),
            weight,
            torch.where(mask, labels, 0).long().flatten(),
            scale.flatten(),
            self.loss_type,
            terms=[
                WeightedTerm(
                    term.config.weight,
                    partial(term.of_tokens, loss_type=self.loss_type),
                    term.of_sums if term.needs_only_sums else None,
                )
                for term in terms
            ],
            compiled=self.compiled,
            kernel=self.kernel,
            device_type=self.device_type,
        )

    def score(self, logits: Tensor, labels: Tensor) -> Batch:
        """Compare logits (B, S, V) with labels (B, S): preds and token_nll (B, S), and per row (B,)
        valid, row_loss, row_accuracy, row_exact."""
        mask = labels != IGNORE_LABEL_ID
        token_nll = self.loss_type.cross_entropy(logits, labels, valid_mask=mask)
        return self._rows(logits.argmax(-1), token_nll, labels)

    def _rows(self, preds: Tensor, token_nll: Tensor, labels: Tensor) -> Batch:
        """Return the metrics per row. preds, token_nll: aligned with labels (B, S)."""
        mask = labels != IGNORE_LABEL_ID
        counts = mask.sum(-1)
        divisor = counts.clamp_min(1)
        preds = preds.view_as(labels)
        token_nll = torch.where(mask, token_nll.view_as(labels), 0)
        correct = (mask & (preds == labels)).sum(-1)
        return {
            "mask": mask,
            "preds": preds,
            "token_nll": token_nll,
            "valid": counts > 0,
            "row_loss": token_nll.sum(-1) / divisor,
            "row_accuracy": correct / divisor,
            "row_exact": correct == counts,
        }

    @torch.no_grad()
    def score_at(self, batch: Batch, depth: int) -> Batch:
        """Compare a batch's labels with the answer at this depth, computed from the start; see
        `score`.
        """
        inner = self.model.inner
        answer = inner.answer(inner.embed(batch), inner.sequence_info(batch), depth)
        readout = answer[:, self.model.config.prefix_len :]
        outputs = Outputs(inner.predict, readout=readout)
        return self._score(outputs, batch["labels"], ())[0]

    def _use_all(self, total: Tensor, options: Mapping[str, int]) -> Tensor:
        """Return the loss with 0 times every trained parameter that the step does not use.

        Its gradient is then 0; without a gradient DDP would raise an error, and weight decay would
        skip the parameter. The unused parameters are determined once for each set of options.
        """
        if not (self.training and total.requires_grad):
            return total
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        key = options_key(options), frozenset(trained)
        if key not in self._unused:
            used = _leaves(total)
            self._unused[key] = [name for name, p in trained.items() if id(p) not in used]
        for name in self._unused[key]:
            total = total + 0.0 * trained[name].sum()
        return total

    def _ask(self, term: Term, seen: Seen) -> Any:
        given = {"logits", *seen.outputs} if "readout" in seen.outputs else set(seen.outputs)
        if lacking := sorted(term.needs - given):
            raise UserError(
                f"arch.loss.terms.{term.name} reads {', '.join(lacking)}, which "
                f"{type(self.model).__name__} does not return; it returns {', '.join(seen.outputs)}"
            )
        start = f"{term.name}/"
        own = {
            k.removeprefix(start): v for k, v in seen.carry.memory.items() if k.startswith(start)
        }
        return term(replace(seen, memory=own))


def _leaves(loss: Tensor) -> set[int]:
    """Return the ids of all tensors that receive a gradient in the backward pass of `loss`."""
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        todo += [following for following, _ in node.next_functions]
    return found


def create_terms(configured: Mapping[str, Mapping[str, Any] | None]) -> list[Term]:
    """Create the terms in `arch.loss.terms`, including the halting term unless it is null."""
    terms = []
    named_terms: dict[str, Any] = {"halting": {}} | dict(configured)
    for name, options in named_terms.items():
        if options is not None:
            named = LossTermConfig.model_validate({"name": name} | dict(options))
            terms.append(load_plugin(named)(read_options(named), name=name))
    return terms


@torch.no_grad()
def _metrics(seen: Seen, accuracy: Tensor) -> dict[str, Metric]:
    """Return the metrics of rows that halted in this step, the token loss of all rows, and the mean
    norm per position of each latent.
    """
    carry = seen.carry
    metrics = {
        "accuracy": seen.over_rows(accuracy, carry.halted),
        "exact_accuracy": seen.over_rows(seen.exact.float(), carry.halted),
        "steps": seen.over_rows(carry.steps.float(), carry.halted),
        "lm_loss": seen.over_rows(seen.row_loss),
    }
    slots = torch.full((), len(seen.valid), device=seen.valid.device)
    for name, z in carry.latents.items():
        metrics[f"{name}_norm"] = at_least_float32(z).norm(dim=-1).mean(1).sum(), slots
    return metrics
