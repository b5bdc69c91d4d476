"""Label smoothing: spread a share of the probability over all tokens, in training."""

from pydantic import Field
from torch import Tensor

from models.terms.base import TermConfig, TokenTerm
from models.token_losses import RowSums


class LabelSmoothingConfig(TermConfig):
    """Options of `LabelSmoothing`."""

    weight: float = Field(
        0.1, ge=0, lt=1, description="share of the probability spread over all tokens"
    )


class LabelSmoothing(TokenTerm):
    """The effect of smoothed labels on the loss: log p(label) − mean over tokens v of log p(v).

    With the weight ε the loss per label is that of the target (1 − ε) · one-hot + ε · uniform
    (Szegedy et al. 2016, arXiv 1512.00567).
    """

    Config = LabelSmoothingConfig
    metric = "label_smoothing_loss"
    flat_keys = {"label_smoothing": "weight"}

    def of_sums(self, sums: RowSums) -> Tensor:
        return sums.label - sums.mean  # scores are log p up to a constant
