"""Mistakes in a plug-in's own code: one sentence with its file and line, wherever it runs."""

import sys
from collections.abc import Callable

import pytest
import torch
from training_tools import TINY, finish, start

from pretrain import main
from utils.core.console import run_cli
from utils.core.plugins import import_plugin, use_plugins

HEAD = """import torch
from torch import nn
from models.layers import Block
from models.recursive_reasoning.athena_trm import AthenaTRM, AthenaTRMInner


class Mine(Block):
    def __init__(self, *sizes):
        {before}
        self.gain = nn.Parameter(torch.ones({width}))

    def norm(self, x):
        {norm}


class RecursiveInner(AthenaTRMInner):
    block_type = Mine


class Recursive(AthenaTRM):
    Inner = RecursiveInner
"""
SUPER = "super().__init__(*sizes)"
DRY, TRAIN, AUTO = "dry_run=true", "micro_batch_size=4", "micro_batch_size=auto"


@pytest.fixture
def run_mine(tmp_path, text_corpus, monkeypatch, capsys) -> Callable[..., str]:
    """Run pretrain.py with a plug-in of this source; return what it printed on stderr."""
    folder = tmp_path / "ideas"
    folder.mkdir()

    def run(source: str, *overrides: str, status: int = 2) -> str:
        (folder / "broken.py").write_text(source, "utf-8")
        words = [
            *TINY, f"data_paths=[{text_corpus}]", f"plugins=[{folder}]", "max_steps=1",
            "arch.name=broken@Recursive", f"checkpoint_path={tmp_path / 'run'}", *overrides,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
        if status == 0:
            main()
        else:
            with pytest.raises(SystemExit) as ended:
                main()
            assert ended.value.code == status
        return capsys.readouterr().err

    return run


def write(norm: str, before: str = SUPER, width: str = "1") -> str:
    return HEAD.format(norm=norm, before=before, width=width)


@pytest.mark.parametrize(
    ("source", "place", "parts", "how"),
    [
        (write("return x / x.abs().mean(-1)"), "13 (norm)", ["RuntimeError: ", "25"], DRY),
        (write("return x / x.abs().mean(-1)"), "13 (norm)", ["RuntimeError: ", "25"], TRAIN),
        (write("return x * self.gain", width="7"), "13 (norm)", ["RuntimeError: ", "7"], DRY),
        (write("return rmsnorm(x)"), "13 (norm)", ["NameError: ", "'rmsnorm'"], DRY),
        (write("return rmsnorm(x)"), "13 (norm)", ["NameError: ", "'rmsnorm'"], AUTO),
        (write("return x * self.config.p"), "13 (norm)", ["AttributeError: ", "'config'"], DRY),
        (write("return x", before="pass"), "10 (__init__)", ["AttributeError: "], DRY),
        (write("return x", before="pass"), "10 (__init__)", ["AttributeError: "], TRAIN),
        (write("x / 2"), "12 (norm)", ["Mine.norm", "None"], DRY),
        (write("x / 2"), "12 (norm)", ["Mine.norm", "None"], TRAIN),
        (write("return x.mean(-1, True)"), "12 (norm)", ["(1, 25, 1)", "(1, 25, 32)"], DRY),
        (write("return x.mean(-1, True)"), "12 (norm)", ["(1, 25, 1)", "(1, 25, 32)"], TRAIN),
    ],
    ids="shape shape-train gain typo typo-train config super super-train return return-train "
    "squeezed squeezed-train".split(),
)
def test_an_error_in_a_norm_names_its_line(run_mine, tmp_path, source, place, parts, how):
    printed = run_mine(source, how)
    (sentence,) = printed.splitlines()
    assert sentence.count(f"{tmp_path / 'ideas' / 'broken.py'}:{place}") == 1
    assert all(part in sentence for part in parts), sentence
    if parts[0].endswith("Error: "):
        assert sentence.count(parts[0]) == 1 and "ATHENA_TRACEBACK=1" in sentence


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "sentence"),
    [
        ("return rmsnorm(x)", "13 (norm): NameError: "),
        ("x / 2", "12 (norm): Mine.norm returns None"),
    ],
)
def test_an_error_on_two_ranks_is_one_sentence(tmp_path, text_corpus, norm, sentence):
    (tmp_path / "broken.py").write_text(write(norm), "utf-8")
    words = [
        *TINY, f"data_paths=[{text_corpus}]", f"plugins=[{tmp_path}]", "max_steps=1", TRAIN,
        "arch.name=broken@Recursive", f"checkpoint_path={tmp_path / 'run'}",
    ]  # fmt: skip
    status, out, err = finish(start(*words, ranks=2))
    assert status != 0 and "steps" not in out
    assert err.count(f"error: {tmp_path / 'broken.py'}:{sentence}") == 1, err
    assert "[rank" not in err, "the traceback of another rank"


def test_the_whole_traceback_on_request(run_mine, monkeypatch):
    monkeypatch.setenv("ATHENA_TRACEBACK", "1")
    printed = run_mine(write("return rmsnorm(x)"), "micro_batch_size=4")
    assert "Traceback" in printed and "models/layers.py" in printed
    assert "broken.py:13 (norm)" in printed.splitlines()[-1]


def test_an_error_under_the_compiler_names_its_line(tmp_path, capsys):
    """What torch.compile raises has no frame of the plug-in."""
    (tmp_path / "broken.py").write_text(write("return x * self.gain", width="7"), "utf-8")
    use_plugins([tmp_path])
    block = import_plugin("broken").Mine(32, 2, 1, 4.0, "post", 1e-5)
    compiled = torch.compile(block.norm, backend="eager")
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: compiled(torch.ones(2, 3, 32)), check_arguments=False)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and len(printed.splitlines()) == 1
    assert f"{tmp_path / 'broken.py'}:13 (norm): RuntimeError: " in printed and "7" in printed


def test_an_error_of_athena_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 / 0, check_arguments=False)


def test_a_tensor_s_value_that_a_trace_needs_is_placed(run_mine, tmp_path):
    printed = run_mine(write("return x[x > 0].sum() * x"), "dry_run=true")
    assert f"{tmp_path / 'ideas' / 'broken.py'}:13 (norm)" in printed and "torch.where" in printed


def test_a_block_that_calls_its_norm_otherwise_is_free(tmp_path, run_mine):
    """Only Athena's own forward pass needs a norm of the same shape."""
    own = "\n\n    def forward(self, x, info):\n        return x + self.mlp(x) * self.norm(x)\n"
    norm = "return x.mean(-1, True)"
    source = write(norm).replace(f"{norm}\n", norm + own)
    run_mine(source, DRY, status=0)
