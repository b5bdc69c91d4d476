"""Halting: teach the halting head when a row is done."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from models.base import Carry
from models.terms.base import Result, Seen, Term, TermConfig


class HaltingConfig(TermConfig):
    """Options of `Halting`."""

    target: Literal["exact", "budget", "plateau", "exact_or_budget"] = Field(
        "exact", description="what q_halt predicts"
    )
    plateau_threshold: float = Field(0.01, description="nats; a step that gains less is a plateau")


class Halting(Term):
    """0.5 · (q_halt_loss + q_continue_loss), as in TRM; no loss without a halting head.

    q_halt predicts whether the row should halt after this step because every label is right
    (`exact`), its iteration budget is used up (`budget`), or its loss no longer decreases
    (`plateau`). q_continue predicts the architecture's `target_q_continue`.
    """

    Config = HaltingConfig
    flat_keys = {"halt_target": "target", "plateau_threshold": "plateau_threshold"}

    def begin(self, carry: Carry, most_steps: int) -> dict[str, Tensor]:
        if self.config.target != "plateau":
            return {}
        return {"last_loss": torch.full(carry.steps.shape, torch.inf, device=carry.steps.device)}

    def __call__(self, seen: Seen) -> Result:
        memory, target = {}, self.target(seen)
        if self.config.target == "plateau":
            memory = {"last_loss": seen.row_loss.detach().float()}
        halt = seen.outputs.get("q_halt_logits")
        if halt is None:
            return Result(memory=memory, outputs={"row_halt_target": target})
        loss = _bce(halt, target)
        metrics = {
            "q_halt_accuracy": seen.over_rows(((halt >= 0) == target).float(), seen.carry.halted),
            "q_halt_loss": seen.over_rows(loss),
        }
        if (wanted := seen.outputs.get("target_q_continue")) is not None:
            proceed = _bce(seen.outputs["q_continue_logits"], wanted)
            metrics["q_continue_loss"] = seen.over_rows(proceed)
            loss = loss + proceed
        return Result(0.5 * loss, metrics, memory, {"row_halt_target": target})

    @torch.no_grad()
    def target(self, seen: Seen) -> Tensor:
        """Return the target of q_halt, (B,) bool. Rows without a budget never use it up."""
        kind, carry = self.config.target, seen.carry
        if kind == "exact":
            return seen.exact
        if kind == "plateau":
            before = seen.memory["last_loss"]
            if seen.training:  # of the row's previous example
                before = torch.where(carry.steps == 1, torch.inf, before)
            return before - seen.row_loss < self.config.plateau_threshold
        budgets = seen.data.get("iteration_targets")
        spent = torch.zeros_like(seen.exact) if budgets is None else carry.steps >= budgets
        return seen.exact | spent if kind == "exact_or_budget" else spent


def _bce(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
