"""A class of another kind than its key needs: one sentence that names those of the right kind."""

import pytest

from utils.config.load import compose_config, load_config
from utils.core.errors import UserError

SOURCE = """
from evaluators.text import PerplexityEvaluator
from models.layers import Block
from models.recursive_reasoning.athena_trm import AthenaTRM, AthenaTRMInner
from models.terms.base import Term
from utils.training.optimizers.adamw import AdamW

class GainBlock(Block): ...
class RecursiveInner(AthenaTRMInner): ...
class Recursive(AthenaTRM): ...
class MyTerm(Term): ...
class MyEvaluator(PerplexityEvaluator): ...
class MyOptimizer(AdamW): ...
class MyLogger:
    def log(self, values, step): ...
    def close(self): ...
"""


@pytest.mark.parametrize(
    ("key", "kind", "right"),
    [
        ("arch.name={}", "Architecture", "Recursive"),
        ("arch.loss.name={}", "loss head", "none"),
        ("arch.loss.terms.mine={{name: {}}}", "loss term", "MyTerm"),
        ("evaluators=[{}]", "evaluator", "MyEvaluator"),
        ("evaluators=[{{name: {}}}]", "evaluator", "MyEvaluator"),
        ("optimizer={}", "optimizer", "MyOptimizer"),
        ("logger=[{}]", "logger", "MyLogger"),
    ],
)
@pytest.mark.parametrize("wrong", ["GainBlock", "RecursiveInner"])
def test_a_class_of_another_kind(tmp_path, key, kind, right, wrong):
    (tmp_path / "kinds.py").write_text(SOURCE, "utf-8")

    def load(name: str) -> None:
        given = key.format(f"kinds@{name}")
        load_config(compose_config([given, f"plugins=[{tmp_path}]", "data_paths=[x]"]))

    with pytest.raises(UserError) as raised:
        load(wrong)
    sentence = str(raised.value)
    assert f"kinds@{wrong}" in sentence and kind in sentence and "\n" not in sentence
    assert ("Block" if wrong == "GainBlock" else "AthenaTRMInner") in sentence
    assert sentence.endswith(f"kinds has: {right}")
    if right != "none":
        load(right)
