"""z-loss: keep the logits' normalizer near 1."""

from pydantic import Field
from torch import Tensor

from models.terms.base import TermConfig, TokenTerm
from models.token_losses import RowSums


class ZLossConfig(TermConfig):
    """Options of `ZLoss`."""

    weight: float = Field(1e-4, ge=0, allow_inf_nan=False, description="factor on log² Z")


class ZLoss(TokenTerm):
    """log² Z per label, Z the sum that the softmax divides by (PaLM, arXiv 2204.02311)."""

    Config = ZLossConfig
    metric = "z_loss"

    def of_sums(self, sums: RowSums) -> Tensor:
        return sums.log_z.square()
