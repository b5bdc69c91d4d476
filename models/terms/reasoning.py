"""Reasoning labels: train the head that decodes the working state."""

from collections.abc import Mapping
from typing import Any

from dataset.common import IGNORE_LABEL_ID
from models.terms.base import Result, Seen, Term
from utils.core.errors import UserError


class Reasoning(Term):
    """Token loss of `reasoning_logits` (B, R, W) against the corpus' `reasoning_labels` (B, R)."""

    needs = frozenset({"reasoning_logits"})
    needs_data = frozenset({"reasoning_labels"})
    training_only = True
    arch_options = {"enable_reasoning_stream": True}
    flat_keys = {"reasoning_loss_weight": "weight"}

    def check(self, arch: Any, highest: Mapping[str, int]) -> None:
        found, known = highest["reasoning_labels"], arch.reasoning_vocab_size
        if found >= known:
            raise UserError(
                f"reasoning_labels.npy holds the label {found}, but arch.reasoning_vocab_size is "
                f"{known}; it must be at least {found + 1}"
            )

    def __call__(self, seen: Seen) -> Result:
        logits, labels = seen.outputs["reasoning_logits"], seen.data["reasoning_labels"]
        logits = logits[:, : labels.shape[1]]
        labels = labels[:, : logits.shape[1]]
        mask = (labels != IGNORE_LABEL_ID) & seen.valid.unsqueeze(-1)
        loss = seen.loss_type.cross_entropy(logits, labels, valid_mask=mask)
        loss = loss.sum(-1) / mask.sum(-1).clamp_min(1)
        return Result(loss, {"reasoning_loss": seen.over_rows(loss)})
