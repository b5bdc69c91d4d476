"""The sampling options of scripts and evaluators."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from utils.core.console import LARGEST_SEED

PositiveInt = Annotated[int, Field(ge=1)]


class Sampling(BaseModel):
    """Sampling options, with the names, meanings and order of application used by
    `transformers`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: PositiveInt = Field(
        default=200, description="maximum number of tokens; eos ends the text earlier"
    )
    temperature: float = Field(
        default=0.8,
        ge=0,
        allow_inf_nan=False,
        description="below 1: less random; 0: always the most likely token",
    )
    top_k: PositiveInt | None = Field(
        default=None, description="sample from the k most likely tokens; null: all"
    )
    top_p: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="sample from the most likely tokens with this total probability",
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="above 1: tokens already in the text become less likely",
    )
    seed: int = Field(
        default=0, ge=0, le=LARGEST_SEED, description="the same seed gives the same text"
    )
