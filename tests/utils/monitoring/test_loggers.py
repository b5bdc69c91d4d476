"""A logger of one's own: one file, named module@Class."""

import json

import pytest
from training_tools import make_config, metrics_of

from utils.config.saved import dump_config
from utils.core.errors import UserError

PACKAGE = "utils.monitoring.loggers"
OWN = """
import json

import pydantic


class Lines:
    def __init__(self, run, config, step, file="lines.txt"):
        self.file = (run / file).open("a", encoding="utf-8")
        self.file.write(f"{config['run_name']} from {step}\\n")

    def log(self, values, step):
        self.file.write(json.dumps([step, values]) + "\\n")

    def close(self):
        self.file.write("closed")
        self.file.close()


class Declared(Lines):
    class Config(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid", strict=True)
        file: str = "declared.txt"
"""


@pytest.fixture
def own(write_plugin):
    write_plugin(PACKAGE, "own", OWN)


def test_those_of_one_s_own_write_beside_the_others(text_corpus, run_training, own):
    several = "own@Lines,{name: own@Lines, file: other.txt},own@Declared,own@Lines"
    run = run_training(
        text_corpus, "run", "max_steps=2", "eval_max_batches=1", f"logger=[jsonl,{several}]"
    )
    for name in ("lines.txt", "other.txt", "declared.txt"):
        first, *lines, last = (run / name).read_text("utf-8").splitlines()
        assert (first, last) == ("test from 0", "closed")
        logged = [json.loads(line)[1] for line in lines]
        losses = [values["train/lm_loss"] for values in logged if "train/lm_loss" in values]
        assert losses == metrics_of(run, "train/lm_loss")


def test_a_name_stays_a_name_in_the_saved_config(own):
    config = make_config("x", "logger=[jsonl,{name: own@Lines, file: a}]")
    assert dump_config(config)["logger"] == ["jsonl", {"name": "own@Lines", "file": "a"}]


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("tensorbord", ["logger[0]", "'tensorbord'", "did you mean 'tensorboard'?"]),
        ("Lines", ["logger[0]", "did you mean 'own@Lines'?"]),
        ("own@Line", ["logger[0]", "did you mean 'Lines'?"]),
        ("{name: own@Lines, fil: a}", ["'logger[0].fil'", "did you mean 'logger[0].file'?"]),
        ("{name: own@Declared, fil: a}", ["'logger[0].fil'", "did you mean 'logger[0].file'?"]),
        ("{name: jsonl, file: a}", ["'logger[0].file'"]),
    ],
)
def test_mistakes_are_answered_with_the_nearest(own, given, needed):
    with pytest.raises(UserError) as error:
        make_config("unused", f"logger=[{given}]")
    line = str(error.value)
    assert "\n" not in line and all(part in line for part in needed), line


def test_a_name_alone_is_no_list():
    with pytest.raises(UserError, match=r"write logger=\[wandb\]"):
        make_config("unused", "logger=wandb")
