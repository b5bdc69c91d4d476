"""What a plug-in defines and nothing uses: a note, and the run continues."""

import warnings

import pytest
from training_tools import make_config

from models.build import create_model
from utils.corpus.data import open_data

SOURCE = """import torch
from torch import nn
from models.layers import Block, rms_norm
from models.recursive_reasoning.athena_trm import AthenaTRM, AthenaTRMInner

class Mine(Block):
    def __init__(self, hidden_size, **sizes):
        super().__init__(hidden_size, **sizes)
        self.gain = nn.Parameter(torch.ones(hidden_size))

    def norm(self, x):
        return self.scale(x)

    def scale(self, x):
        return x * self.gain.to(x.dtype)

class RecursiveInner(AthenaTRMInner):
    block_type = Mine

class Recursive(AthenaTRM):
    Inner = RecursiveInner
"""
EMPTY = "class Mine(Block):\n    pass\n\n"


@pytest.fixture
def notes(tmp_path, text_corpus):
    """Build the model of a plug-in of this source; return the notes on it."""

    def build(source: str) -> list[str]:
        (tmp_path / "mine.py").write_text(source, "utf-8")
        config = make_config(text_corpus, f"plugins=[{tmp_path}]", "arch.name=mine@Recursive")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            create_model(config.arch, open_data(config).train.metadata, batch_size=1, device="meta")
        return [str(warning.message) for warning in caught if "mine.py" in str(warning.message)]

    return build


@pytest.mark.parametrize(
    ("right", "wrong", "parts"),
    [
        ("def norm(", "def Norm(", ["Mine.Norm", "norm", "mine.py:11"]),
        ("def norm(", "def foward(", ["Mine.foward", "forward", "mine.py:11"]),
        ("block_type =", "block_typ =", ["RecursiveInner.block_typ", "block_type"]),
        ("    Inner =", "    Iner =", ["Recursive.Iner", "Inner"]),
        ("self.gain =", "self.norm = nn.LayerNorm(4); self.gain =", ["Mine", "self.norm"]),
    ],
)
def test_a_misspelt_name_is_noted(notes, right, wrong, parts):
    (note,) = notes(SOURCE.replace(right, wrong))
    assert all(part in note for part in parts), note


def test_a_block_that_changes_nothing_is_noted(notes):
    head, _, rest = SOURCE.partition("class Mine")
    (note,) = notes(head + EMPTY + rest[rest.index("class RecursiveInner") :])
    assert "Mine" in note and "block_type" in note and "norm" in note


def test_no_note_on_what_is_right(notes):
    assert notes(SOURCE) == []
    assert notes(SOURCE.replace("    def norm(", "    def forward(")) == []
    helper = "    def norm2(self, x):\n        return x\n\n    def norm("
    assert notes(SOURCE.replace("    def norm(", helper)) == []
