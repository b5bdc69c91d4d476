"""z-loss: keep the logits' normalizer near 1."""

from pydantic import Field
from torch import Tensor

from models.terms.base import Result, Seen, Term, TermConfig
from models.token_losses import by_tokens


class ZLossConfig(TermConfig):
    """Options of `ZLoss`."""

    weight: float = Field(1e-4, ge=0, allow_inf_nan=False, description="factor on log² Z")


class ZLoss(Term):
    """log² Z per label, Z the sum that the softmax divides by (PaLM, arXiv 2204.02311)."""

    Config = ZLossConfig
    needs = frozenset({"logits"})
    training_only = True

    def __call__(self, seen: Seen) -> Result:
        def squared(logits: Tensor) -> Tensor:
            return seen.loss_type.softmax_logits(logits).logsumexp(-1).square()

        loss = seen.mean_over_tokens(by_tokens(squared, seen.outputs["logits"]))
        return Result(loss, {"z_loss": seen.over_rows(loss)})
