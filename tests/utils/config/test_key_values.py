"""Commands with keys of their own beside those of pretrain.py."""

import pytest
from pydantic import BaseModel, ConfigDict, Field

from utils.config.key_values import CommandKeys, split_key_values
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


class Rounds(CommandKeys):
    rounds: int = 3
    width: int = 5


@pytest.mark.parametrize(
    ("word", "meant"), [("round=5", "rounds"), ("widht=64", "width"), ("Rounds=5", "rounds")]
)
def test_a_mistyped_key_of_the_command_gets_its_own_suggestion(word, meant):
    with pytest.raises(UserError, match=f"unknown key '{word.split('=')[0]}'.*'{meant}'"):
        split_key_values(Rounds, [word])


def test_keys_of_pretrain_are_passed_on():
    words = [
        "lr=1",
        "arch.num_layers=2",
        "+arch.x=1",
        "~lr",
        "arch/net=trm",
        "experiment=a",
        "odd=1",
    ]
    options, others = split_key_values(Rounds, [*words, "rounds=7"])
    assert options.rounds == 7 and others == words
