"""How the next token of a text is chosen, as scripts and evaluators are told."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from utils.core.console import LARGEST_SEED

PositiveInt = Annotated[int, Field(ge=1)]


class Sampling(BaseModel):
    """How the next token is chosen. Names, meanings and their order are those of `transformers`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: PositiveInt = Field(default=200, description="tokens at most; eos ends earlier")
    temperature: float = Field(
        default=0.8,
        ge=0,
        allow_inf_nan=False,
        description="below 1 plainer; 0: the likeliest token",
    )
    top_k: PositiveInt | None = Field(
        default=None, description="draw among the likeliest k; null: all"
    )
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="draw among the likeliest of this joint probability"
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="above 1: what the text has is less likely",
    )
    seed: int = Field(
        default=0, ge=0, le=LARGEST_SEED, description="the same seed gives the same text"
    )
