"""Commands with keys of their own beside those of pretrain.py."""

import pytest
from pydantic import BaseModel, ConfigDict, Field

from utils.config.key_values import split_key_values
from utils.core.errors import UserError


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    trials: int = Field(20, ge=0)
    output_dir: str | None = None
    updates: str = "0"


@pytest.mark.parametrize(
    "words",
    [
        "lr=1 trials=3 output_dir=a=b updates=0,25 seed=2",
        "lr=1 --trials 3 --output-dir a=b --updates 0 25 seed=2",
        "--updates 0 25 --trials=3 --output-dir=a=b lr=1 seed=2",
    ],
)
def test_published_flags_are_the_same_as_keys(words):
    options, others = split_key_values(Options, words.split())
    assert options == Options(trials=3, output_dir="a=b", updates="0,25")
    assert others == ["lr=1", "seed=2"]


@pytest.mark.parametrize("words", ["--trails 3", "trials=three", "trials=-1", "--trials"])
def test_mistakes_are_named(words):
    with pytest.raises(UserError, match=words.split("=")[0].split()[0]):
        split_key_values(Options, words.split())
