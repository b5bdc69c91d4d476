"""Losses, what their models' probabilities are, and the head that turns outputs into both.

A model's probabilities are those of the loss it was trained with: `LOSSES` holds, for each
`loss_type`, the loss and the one map from logits to what a softmax turns into probabilities.
Perplexity, sampling and export all go through that map.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from dataset.common import IGNORE_LABEL_ID
from models.anchor import Anchor, kl_divergence
from models.base import Carry
from models.layers import at_least_float32

# Temporaries of the loss stay below this many elements (256 MB in float32).
_CHUNK_ELEMENTS = 1 << 26


def log_stable_s(x: Tensor) -> Tensor:
    """log s(x) for s(x) = x + 1 (x ≥ 0), 1 / (1 − x) (x < 0); its softmax is stablemax.

    Prieto et al. 2025, arXiv 2501.04697. At least float32; any shape.
    """
    x = at_least_float32(x)
    # each branch is kept finite where the other is taken, or its gradient would be 0 · inf
    return torch.where(x < 0, -torch.log1p(-x.clamp(max=0)), torch.log1p(x.clamp(min=0)))


class _StablemaxNLL(torch.autograd.Function):
    """Stablemax cross-entropy of (T, V) logits at (T,) labels, all of them valid.

    With r = 1 / (1 + |x|): s = 1 + |x| or r, s' = 1 or r², (log s)' = r on both sides of 0.
    Keeps the logits and one sum per token, not the table of probabilities.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        x = at_least_float32(logits)
        grown = x.abs().add_(1)
        total = torch.where(x >= 0, grown, 1 / grown).sum(-1)
        nll = total.log() - (1 - smoothing) * log_stable_s(_pick(x, labels))
        if smoothing:
            nll -= smoothing * log_stable_s(x).mean(-1)
        ctx.save_for_backward(logits, labels, total)
        ctx.smoothing = smoothing
        return nll

    @staticmethod
    def backward(ctx, *grads: Tensor):
        logits, labels, total = ctx.saved_tensors
        x = at_least_float32(logits)
        slope = x.abs().add_(1).reciprocal_()
        grad = torch.where(x >= 0, 1, slope.square()).div_(total.unsqueeze(-1))
        if ctx.smoothing:
            grad -= slope * (ctx.smoothing / x.shape[-1])
        at = labels.unsqueeze(-1)
        gained = slope.gather(-1, at).mul_(ctx.smoothing - 1).add_(grad.gather(-1, at))
        grad.scatter_(-1, at, gained)  # scatter_add_ is not deterministic on every device
        return grad.mul_(grads[0].unsqueeze(-1)).to(logits.dtype), None, None


def _pick(x: Tensor, labels: Tensor) -> Tensor:
    return x.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _softmax_nll(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    return F.cross_entropy(
        at_least_float32(logits), labels, reduction="none", label_smoothing=smoothing
    )


def _cross_entropy(
    nll: Callable[[Tensor, Tensor, float], Tensor],
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    valid_mask: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    if valid_mask is None:
        valid_mask = labels != ignore_index
    safe = torch.where(valid_mask, labels, 0).long().flatten()
    flat = logits.flatten(0, -2)
    rows = max(1, _CHUNK_ELEMENTS // flat.shape[-1])
    parts = [
        nll(x, y, label_smoothing) for x, y in zip(flat.split(rows), safe.split(rows), strict=True)
    ]
    loss = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(labels.shape)
    return torch.where(valid_mask, loss, 0)


def stablemax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_LABEL_ID,
    valid_mask: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """−log(s(x_y) / Σ s(x)) per token in nats; 0 where the label is ignored.

    logits (..., V), labels (...) integers, valid_mask (...) bool (default: labels that are not
    `ignore_index`). Returns (...), at least float32.
    """
    return _cross_entropy(
        _StablemaxNLL.apply, logits, labels, ignore_index, valid_mask, label_smoothing
    )


def softmax_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_LABEL_ID,
    valid_mask: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """−log softmax(x)_y per token in nats; arguments and result as `stablemax_cross_entropy`."""
    return _cross_entropy(_softmax_nll, logits, labels, ignore_index, valid_mask, label_smoothing)


class LossType(NamedTuple):
    """cross_entropy: see above. softmax_logits: logits whose softmax are the probabilities."""

    cross_entropy: Callable[..., Tensor]
    softmax_logits: Callable[[Tensor], Tensor]


LOSSES = {
    "stablemax_cross_entropy": LossType(stablemax_cross_entropy, log_stable_s),
    "softmax_cross_entropy": LossType(softmax_cross_entropy, at_least_float32),
}


class ACTLossConfig(BaseModel):
    """Options of `ACTLossHead`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss_type: str = Field("stablemax_cross_entropy", description="one of " + ", ".join(LOSSES))
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="mass spread over all tokens, in training"
    )
    halt_target: Literal["exact", "budget", "plateau", "exact_or_budget"] = Field(
        "exact", description="what q_halt learns to predict"
    )
    plateau_threshold: float = Field(0.01, description="nats; a step that gains less is a plateau")
    reasoning_loss_weight: float = Field(0.0, ge=0, description="weight of the z_L decoder's loss")
    kl_to: str | None = Field(
        None, description="stay near the model of this checkpoint, see load_weights"
    )
    kl_weight: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="weight of the divergence from that model"
    )

    @field_validator("loss_type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in LOSSES:
            raise ValueError(f"loss_type={value!r} is unknown; choose one of {', '.join(LOSSES)}")
        return value

    @model_validator(mode="after")
    def _kl_is_whole(self):
        if (self.kl_to is None) != (self.kl_weight == 0):
            raise ValueError(
                f"kl_to={self.kl_to or 'null'} and kl_weight={self.kl_weight:g} clash: give both, "
                "a checkpoint and a weight above 0, or neither"
            )
        return self


class ACTLossHead(nn.Module):
    """The model with its losses.

    total = lm_loss + 0.5 · (q_halt_loss + q_continue_loss) + reasoning_loss_weight ·
    reasoning_loss + kl_weight · kl_loss, each the sum over rows of a per-row mean. Rows without a
    real label enter neither loss nor metric. kl_loss exists in training, where `anchor` is set.
    """

    Config = ACTLossConfig

    def __init__(self, model: nn.Module, loss_type: str, **options):
        super().__init__()
        self.model: Any = model
        self.config = ACTLossConfig(loss_type=loss_type, **options)
        self.loss = LOSSES[loss_type]
        self.anchor: Anchor | None = None

    def initial_carry(self, batch: dict[str, Tensor]):
        return self.remember(self.model.initial_carry(batch), steps=0)

    def remember(self, carry: Carry, steps: int | None = None) -> Carry:
        """Return a carry of the model, perhaps out of a checkpoint, with what the losses keep of
        its rows.

        steps: that no row of it has had more than; None: any number.
        """
        kept = {}
        if self.config.halt_target == "plateau":
            infinite = torch.full(carry.steps.shape, torch.inf, device=carry.steps.device)
            kept["last_loss"] = carry.memory.get("last_loss", infinite)
        carry = replace(carry, memory=kept)
        return carry if self._anchor_here is None else self._anchor_here.catch_up(carry, steps)

    @property
    def _anchor_here(self) -> Anchor | None:
        return self.anchor if self.training else None

    def forward(
        self, return_keys: Sequence[str], carry: Any, batch: dict[str, Tensor]
    ) -> tuple[Any, Tensor, dict[str, Tensor], dict[str, Tensor], Tensor]:
        """One step. Returns the new carry, the loss (summed over rows), metrics (sums over rows,
        without gradient), those of `return_keys` that the step produced, and whether all rows
        have halted.

        Besides the model's outputs, `return_keys` may name preds (B, S), token_nll (B, S) in nats
        without smoothing, unrefined_token_nll, per row (B,) valid, steps, row_loss, row_accuracy,
        row_exact, row_halt_target, and anything of the rows' own data.
        """
        base_logits = None
        if (anchor := self._anchor_here) is not None:
            carry, outputs, base_logits = anchor.step_with(self.model, carry, batch)
        else:
            carry, outputs = self.model(carry=carry, batch=batch)
        data, logits = carry.current_data, outputs["logits"]
        labels = data["labels"]
        mask = labels != IGNORE_LABEL_ID
        counts = mask.sum(-1)
        valid = counts > 0
        divisor = counts.clamp_min(1)

        with torch.no_grad():
            preds = logits.argmax(-1)
            correct = mask & (preds == labels)
            exact = correct.sum(-1) == counts
        smoothing = self.config.label_smoothing if self.training else 0.0
        token_loss = self.loss.cross_entropy(
            logits, labels, valid_mask=mask, label_smoothing=smoothing
        )
        row_loss = token_loss.sum(-1) / divisor
        losses = {"lm_loss": row_loss.sum()}
        total = losses["lm_loss"]

        halt_target = self._halt_target(exact, row_loss.detach(), carry)
        for name, logit, target in (
            ("q_halt_loss", "q_halt_logits", halt_target),
            ("q_continue_loss", "q_continue_logits", outputs.get("target_q_continue")),
        ):
            if logit in outputs and target is not None:
                losses[name] = _halting_loss(outputs[logit], target, valid)
                total = total + 0.5 * losses[name]
        if "reasoning_logits" in outputs:
            # a head that is only looked at must still take part in the backward pass of all ranks
            total = total + 0.0 * outputs["reasoning_logits"].sum()
        if self.config.reasoning_loss_weight and "reasoning_labels" in data:
            losses["reasoning_loss"] = self._reasoning_loss(
                outputs, data["reasoning_labels"], valid
            )
            total = total + self.config.reasoning_loss_weight * losses["reasoning_loss"]
        if anchor is not None and base_logits is not None:
            maps = (self.loss.softmax_logits, anchor.softmax_logits)
            token_kl = torch.where(mask, kl_divergence(logits, base_logits, *maps), 0)
            losses["kl_loss"] = (token_kl.sum(-1) / divisor).sum()
            total = total + self.config.kl_weight * losses["kl_loss"]

        with torch.no_grad():
            metrics = self._metrics(carry, outputs, valid, correct, exact, divisor, halt_target)
            metrics |= {name: loss.detach() for name, loss in losses.items()}
            found = outputs | {
                "preds": preds,
                "valid": valid,
                "steps": carry.steps,
                "row_loss": row_loss,
                "row_accuracy": correct.sum(-1) / divisor,
                "row_exact": exact,
                "row_halt_target": halt_target,
            }
            for name, source in (
                ("token_nll", "logits"),
                ("unrefined_token_nll", "unrefined_logits"),
            ):
                if name in return_keys and source in outputs:
                    found[name] = (
                        token_loss
                        if source == "logits" and not smoothing
                        else self.loss.cross_entropy(outputs[source], labels, valid_mask=mask)
                    )
        if self.config.halt_target == "plateau":
            carry = replace(carry, memory=carry.memory | {"last_loss": row_loss.detach().float()})
        kept = {k: (found | data)[k].detach() for k in return_keys if k in found or k in data}
        return carry, total, metrics, kept, carry.halted.all()

    def _halt_target(self, exact: Tensor, row_loss: Tensor, carry) -> Tensor:
        """(B,) bool: what q_halt should have said. Without budgets in the data, none is spent."""
        kind = self.config.halt_target
        if kind == "exact":
            return exact
        if kind == "plateau":
            before = carry.memory.get("last_loss", torch.full_like(row_loss, torch.inf))
            if self.training:  # of a row's example before
                before = torch.where(carry.steps == 1, torch.inf, before)
            return before - row_loss < self.config.plateau_threshold
        targets = carry.current_data.get("iteration_targets")
        spent = torch.zeros_like(exact) if targets is None else carry.steps >= targets
        return exact | spent if kind == "exact_or_budget" else spent

    def _reasoning_loss(self, outputs: dict[str, Tensor], labels: Tensor, valid: Tensor) -> Tensor:
        logits = outputs["reasoning_logits"][:, : labels.shape[1]]
        labels = labels[:, : logits.shape[1]]
        mask = (labels != IGNORE_LABEL_ID) & valid.unsqueeze(-1)
        loss = self.loss.cross_entropy(logits, labels, valid_mask=mask)
        return (loss.sum(-1) / mask.sum(-1).clamp_min(1)).sum()

    @staticmethod
    def _metrics(carry, outputs, valid, correct, exact, divisor, halt_target) -> dict[str, Tensor]:
        """Sums over the rows that have just halted; `rows` counts all rows with a real label,
        `slots` all rows, over which the norms of the latents are summed."""
        done = carry.halted & valid
        metrics = {
            "count": done.sum(),
            "rows": valid.sum(),
            "accuracy": torch.where(done, correct.sum(-1) / divisor, 0).sum(),
            "exact_accuracy": (done & exact).sum(),
            "steps": torch.where(done, carry.steps, 0).sum(),
        }
        if carry.latents:
            metrics["slots"] = torch.full((), len(valid), device=valid.device)
        for name, z in carry.latents.items():  # mean norm of a position
            metrics[f"{name}_norm"] = at_least_float32(z).norm(dim=-1).mean(1).sum()
        if "q_halt_logits" in outputs:
            says = outputs["q_halt_logits"] >= 0
            metrics["q_halt_accuracy"] = (done & (says == halt_target)).sum()
        return metrics


def _halting_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    loss = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
    return torch.where(valid, loss, 0).sum()
