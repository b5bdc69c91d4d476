"""What `transformers` has to know of an exported model: config.json."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig


class AthenaConfig(PreTrainedConfig):
    """Config of `AthenaForCausalLM`.

    arch: options of the architecture, as the model was trained with them. loss_type: the loss whose
    probabilities the model has. steps: ACT steps of every token. identifiers: names of the rows of
    the identifier embedding; default_identifier: the row for texts without one of their own.
    """

    model_type = "athena"

    def __init__(
        self,
        arch: dict[str, Any] | None = None,
        loss_type: str = "stablemax_cross_entropy",
        steps: int = 1,
        identifiers: Sequence[str] = (),
        default_identifier: int = 0,
        **kwargs: Any,
    ):
        self.arch = dict(arch or {})
        self.loss_type, self.steps = loss_type, steps
        self.identifiers, self.default_identifier = list(identifiers), default_identifier
        super().__init__(**kwargs)

    # None for a config without a model, which transformers makes to compare others with

    @property
    def vocab_size(self) -> int | None:
        return self.arch.get("vocab_size")

    @property
    def hidden_size(self) -> int | None:
        return self.arch.get("hidden_size")

    @property
    def num_attention_heads(self) -> int | None:
        return self.arch.get("num_heads")

    @property
    def max_position_embeddings(self) -> int | None:
        """The window: tokens of a text at most."""
        return self.arch.get("seq_len")
