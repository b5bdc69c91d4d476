"""A plug-in that was edited after its checkpoint was written: noted, and named where it matters."""

from pathlib import Path

import pytest
from training_tools import make_config

from models.inference.language_model import LanguageModel
from models.inference.loading import load_language_model
from pretrain import train
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import checkpoints_of
from utils.core.errors import UserError
from utils.core.plugins import use_plugins

SOURCE = """import torch
from torch import nn
from models.layers import Block
from models.recursive_reasoning.athena_trm import AthenaTRM, AthenaTRMInner

class Mine(Block):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(1))

    def norm(self, x):
        return super().norm(x) * self.gain.to(x.dtype)

class RecursiveInner(AthenaTRMInner):
    block_type = Mine

class Recursive(AthenaTRM):
    Inner = RecursiveInner
"""


class Author:
    """Someone with a plug-in and a run that was trained with it."""

    def __init__(self, home: Path, corpus: Path):
        self.file, self.run, self.corpus = home / "ideas" / "mine.py", home / "run", corpus
        self.file.parent.mkdir()
        self.write(SOURCE)
        self.train("max_steps=1")
        self.copy = checkpoints_of(self.run)[-1] / "source" / "athena_plugins" / "mine.py"

    def write(self, source: str) -> None:
        """Write the file; later programs import it."""
        self.file.write_text(source, "utf-8")
        use_plugins(())

    def train(self, *keys: str) -> None:
        given = [f"plugins=[{self.file.parent}]", f"checkpoint_path={self.run}", *keys]
        config = make_config(self.corpus, "arch.name=mine@Recursive", *given)
        assert train(CPUBackend(), config) == 0

    def load(self) -> LanguageModel:
        use_plugins([self.file.parent])
        return load_language_model(self.run)


@pytest.fixture
def author(tmp_path, text_corpus) -> Author:
    return Author(tmp_path, text_corpus)


def notes(recorded: pytest.WarningsRecorder) -> list[str]:
    return [text for item in recorded if "differs" in (text := str(item.message))]


@pytest.mark.parametrize("program", ["generate", "resume", "eval_only"])
def test_an_edit_is_noted_and_the_program_continues(author, program, recwarn):
    author.write(SOURCE + "# a remark\n")
    recwarn.clear()
    if program == "generate":
        author.load()
    else:
        author.train(
            *{"resume": ["max_steps=2", "resume_allow=[max_steps]"]}.get(
                program, ["max_steps=1", "eval_only=true"]
            )
        )
    (note,) = set(notes(recwarn))
    assert str(author.file) in note and str(author.copy) in note


def test_no_note_without_an_edit(author, recwarn):
    author.load()
    assert not notes(recwarn)


def test_weights_that_do_not_fit_after_an_edit(author):
    author.write(SOURCE.replace("ones(1)", "ones(32)"))
    with pytest.raises(UserError) as raised:
        author.load()
    for part in ("gain", "(32,)", str(author.file), "has changed", str(author.copy)):
        assert part in str(raised.value)


def test_a_class_that_was_renamed(author):
    author.write(SOURCE.replace("class Recursive(", "class Recurrent("))
    with pytest.raises(UserError) as raised:
        author.load()
    for part in ("mine@Recursive", "trained with", str(author.copy)):
        assert part in str(raised.value)
