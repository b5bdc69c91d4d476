"""The config.json of an exported model, for `transformers`."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig


class AthenaConfig(PreTrainedConfig):
    """Config of `AthenaForCausalLM`.

    arch: options of the architecture that the model was trained with. loss_type: the loss that
    defines its probabilities. steps: ACT steps of every token. identifiers: names of the rows of
    the identifier embedding; default_identifier: the row for texts without an identifier.
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

    # None for the default config that transformers creates for comparisons

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
        """The window: the maximum number of tokens in a text."""
        return self.arch.get("seq_len")
