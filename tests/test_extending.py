"""docs/extending.md, taken at its word: its files are written outside the project as they stand,
and its commands are run in this process, smaller.

`write_files` serves tests/test_documents.py too, which has every command read by its program.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_tools import ROOT, metrics_of

from dataset.build_corpus_dataset import main as build_corpus
from models.build import create_model
from models.layers import SequenceInfo
from pretrain import train
from scripts import compare, estimate, generate
from utils.backend.cpu import CPUBackend
from utils.config.load import compose_config, load_config
from utils.corpus.data import open_data

PAGE = ROOT / "docs" / "extending.md"
SMALL = """arch.hidden_size=32 arch.forward_dtype=float32 device_type=cpu compile=false ema=false
    global_batch_size=8 max_steps=4 max_seconds=null log_interval=1 eval_max_batches=1
    lr_warmup_steps=0 lr=1e-3""".split()


def blocks() -> list[str]:
    """Return the indented blocks of the page, without their indentation."""
    found, lines = [], []
    for line in [*PAGE.read_text("utf-8").splitlines(), "end"]:
        if line.startswith("    ") or (lines and not line.strip()):
            lines.append(line[4:])
        elif lines:
            found.append("\n".join(lines).strip() + "\n")
            lines = []
    return found


def files() -> dict[str, str]:
    """Return the text of every file that the page shows, by its path: the first line names it."""
    found = {}
    for block in blocks():
        parts = re.split(r"^# (\S+/\S+\.(?:py|yaml))\n", block, flags=re.M)
        found |= dict(zip(parts[1::2], parts[2::2], strict=True))
    return found


def commands(program: str) -> list[list[str]]:
    """Return the arguments of every command of the page that runs `program`."""
    text = re.sub(r"\\\n\s*", "", "\n".join(blocks()))
    found = [shlex.split(line) for line in text.splitlines() if line.startswith("python ")]
    return [words[words.index(program) + 1 :] for words in found if program in words]


def write_files(folder: Path) -> None:
    """Write the files of the page, and two films with subtitles."""
    for name, text in files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    (folder / "films").mkdir()
    for film in range(2):
        spoken = "".join(
            f"{i}\n00:00:{i:02},000 --> 00:00:{i + 1:02},000\nfilm {film}: the tide was {i}\n\n"
            for i in range(1, 30)
        )
        (folder / "films" / f"{film}.srt").write_text(spoken, "utf-8")


@pytest.fixture
def home(tmp_path, text_corpus, monkeypatch) -> Path:
    """The reader's directory, with the page's files and a corpus, as the current one."""
    write_files(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(text_corpus)
    (tmp_path / "tok.json").symlink_to(text_corpus / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(words: list[str]) -> list[str]:
    given = {word.partition("=")[0] for word in words}
    return [*words, *(key for key in SMALL if key.partition("=")[0] not in given)]


def test_the_page_shows_a_file_for_every_kind_of_plugin():
    assert {Path(name).stem for name in files() if name.endswith(".py")} >= set(
        "echo looped gain_norm gain_start entropy lion stairs table halves subtitles".split()
    )
    assert len(commands("pretrain.py")) >= 7 and len(commands("scripts/compare.py")) >= 6


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=pytest.mark.slow) if "experiment=looped" in words else words
        for words in commands("pretrain.py")
    ],
    ids=lambda words: shlex.join(words)[:60],
)
def test_every_training_runs(home, words):
    if "dry_run=true" in words:
        assert load_config(compose_config(words)).dry_run
        return
    config = load_config(compose_config(small([*words, "checkpoint_path=run"])))
    assert train(CPUBackend(), config) == 0
    if config.arch.name.startswith("echo@"):
        again = ["checkpoint=run", "plugins=[ideas]", "device_type=cpu", "max_new_tokens=3"]
        generate.main([*again, "prompt=abc"])
        assert metrics_of(home / "run", "train/echo_norm")
        assert metrics_of(home / "run", "eval/text/step_4/bits_per_byte")
    if config.arch.name == "looped@Looped":
        assert len(set(metrics_of(home / "run", "train/depth"))) > 1
        assert metrics_of(home / "run", "eval/all/depth_16/lm_loss")
    if "entropy@Entropy" in config.arch.loss.options["terms"]:
        assert metrics_of(home / "run", "train/negative_entropy")[0] < -1
    if config.lr_schedule.name == "stairs@stairs":
        assert len(set(metrics_of(home / "run", "train/lr"))) > 2
    if any(logger.name == "table@Table" for logger in config.logger):
        assert "train/lm_loss,1," in (home / "run" / "table.csv").read_text("utf-8")
    if any(evaluator.name.startswith("halves@") for evaluator in config.evaluators):
        assert 0 <= metrics_of(home / "run", "eval/halves/second")[-1] <= 1


@pytest.mark.parametrize(
    "words", commands("scripts/compare.py"), ids=lambda words: shlex.join(words)[:80]
)
def test_every_comparison_names_runs_that_exist(home, words):
    """Each is configured and its model built."""
    args, overrides = compare.parse(words)
    for experiment in args.experiments.split(","):
        keys = [
            key if not key.startswith("data_paths=") else "data_paths=[data/mine]"
            for key in compare.training_arguments(args, overrides, experiment, home / experiment)
        ]
        config = load_config(compose_config(keys))
        metadata = open_data(config).train.metadata
        assert create_model(config.arch, metadata, batch_size=8, device="meta").model.blocks()


def test_the_norm_is_used_in_both_architectures(home):
    for experiment in ("gain_norm", "gain_norm_plain"):
        words = ["--config-dir", "presets", f"experiment={experiment}", "plugins=[ideas]"]
        config = load_config(compose_config([*words, "data_paths=[data/mine]"]))
        metadata = open_data(config).train.metadata
        model = create_model(config.arch, metadata, batch_size=8).model
        for block in model.blocks():  # a norm that gives zeros: nothing passes but the residual
            torch.nn.init.zeros_(block.gain)
            x = torch.randn(1, 5, config.arch.options["hidden_size"])
            left = x if block.norm_type == "pre" else torch.zeros_like(x)
            info = SequenceInfo(None, None, None, causal=True)
            assert torch.equal(block(x, info), left)
        assert all(type(block).__name__ == "GainBlock" for block in model.blocks())
        assert any(name.endswith(".gain") for name, _ in model.named_parameters())


def test_an_option_reaches_the_norm(home):
    (words,) = (words for words in commands("pretrain.py") if "arch.gain_start=0.5" in words)
    config = load_config(compose_config(words))
    metadata = open_data(config).train.metadata
    model = create_model(config.arch, metadata, batch_size=8).model
    assert all((block.gain == 0.5).all() for block in model.blocks())


def test_a_block_may_take_its_sizes_by_position(home):
    """As this page had it before they were passed by keyword."""
    source = (home / "ideas" / "gain_norm.py").read_text("utf-8")
    source = source.replace("hidden_size, **sizes", "*sizes").replace(
        "ones(hidden_size)", "ones(sizes[0])"
    )
    (home / "ideas" / "gain_norm.py").write_text(source, "utf-8")
    test_the_norm_is_used_in_both_architectures(home)


@pytest.mark.parametrize("words", commands("scripts/estimate.py"), ids=shlex.join)
def test_every_estimate_is_made(home, words, capsys):
    estimate.main(words)
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("words", commands("dataset.build_corpus_dataset"), ids=shlex.join)
def test_every_corpus_is_built(home, words):
    (home / "my_text").mkdir()
    (home / "my_text" / "a.txt").write_text("the shore\nis wide\n", "utf-8")
    build_corpus([*words, "--seq-len", "16", "--train-ratio", "1"])
    report = json.loads((home / "data" / "films" / "build_report.json").read_text("utf-8"))
    assert {Path(entry["file"]).suffix for entry in report["inputs"]} == {".srt", ".txt"}


@pytest.mark.slow
def test_the_commands_of_an_architecture_run_as_printed(home):
    """In processes of their own, one after the other: what one writes, the next reads."""
    section = PAGE.read_text("utf-8").partition("## An architecture")[2].partition("\n## ")[0]
    lines = re.sub(r"\\\n\s*", "", section).splitlines()
    ran = [shlex.split(line.strip()) for line in lines if line.startswith("    python ")]
    for words in ran:
        if "pretrain.py" in words or "scripts/compare.py" in words:
            words = small([word.replace("seconds=360", "seconds=1") for word in words])
        words = [word for word in words if not word.startswith(("max_steps=", "max_seconds=null"))]
        words = [word.replace("max_new_tokens=200", "max_new_tokens=3") for word in words]
        words[1] = str(ROOT / words[1])
        done = subprocess.run(
            [sys.executable, *words[1:], *(["max_seconds=1"] if "pretrain.py" in words[1] else [])],
            capture_output=True,
            encoding="utf-8",
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    assert len(ran) == 5 and list((home / "checkpoints" / "compare").glob("*/compare.md"))
