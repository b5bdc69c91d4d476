"""Every command that README and docs show can be read by the program that it names; and all are
run, in the order in which a reader meets them, in a folder that holds the project and a little
text. Sizes are made small; nothing else is changed.
"""

import argparse
import gzip
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_extending import write_files
from test_layout import LAYERS
from training_tools import ROOT

from utils.config.key_values import parse_key_values, split_key_values
from utils.config.load import compose_config, load_config

DOCUMENTS = (
    "README.md",
    "docs/data.md",
    "docs/running.md",
    "docs/evaluation.md",
    "docs/further.md",
    "docs/performance.md",
    "docs/architecture.md",
    "docs/extending.md",
)
PAGES = (*DOCUMENTS, "docs/results.md", "TPU_SETUP.md", "CHANGELOG.md")
# Sizes for seconds on a CPU: what a command says, and what it is run with.
SMALLER = {
    "--vocab-size 32000": "--vocab-size 400",
    "--output-dir data/athena_base": "--output-dir data/athena_base --train-ratio 0.9",
    "--vocab-size 4096": "--vocab-size 400",
    "--seq-len 2048 --stride 2048": "--seq-len 32 --stride 32",
    "--seq-len 256": "--seq-len 32",
    "max_seconds=120": "max_seconds=3",
    "--nproc-per-node 4": "--nproc-per-node 2",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "global_batch_size=768": "global_batch_size=8",
    "max_new_tokens=200": "max_new_tokens=8 device_type=cpu",
    "--tasks lambada_openai": "--tasks athena_words --include_path .",
    "epochs=2": "epochs=0.4",
    "max_steps=200": "max_steps=3",
    "--trials 20": "--trials 2",
    "lr_find=true": "'lr_find={steps: 10}'",
    "lr=1.0e-3,2.0e-3,4.0e-3": "lr=1.0e-3,2.0e-3",
    "global_batch_size=32": "global_batch_size=8",
}
# For every training that is not only planned: what the command leaves to its defaults.
TRAINING = (
    "arch.hidden_size=32 arch.halt_max_steps=2 arch.force_min_steps=1 arch.forward_dtype=float32 "
    "device_type=cpu eval_max_batches=1"
).split()
SHORT = "global_batch_size=8 epochs=0.2 lr_warmup_steps=1".split()
ELSEWHERE = {
    "plugins=[ideas]": "tests/test_extending.py",
    "--plugins ideas": "tests/test_extending.py",
    "data/films": "tests/test_extending.py",
    "make": "test_the_makefile_has_every_target_that_is_shown",
    "--nnodes 2": "tests/test_launchers.py runs two nodes",
    "--rdzv-id": "tests/test_launchers.py runs two nodes",
    "pip install": "an environment is there already; tests/test_layout.py compares the files",
    "scripts/report.py": "tests/scripts/test_report.py",
    "scripts/gpu_check.py": "needs a GPU; tests/scripts/test_gpu_check.py runs it on the CPU",
    "scripts/plot_run.py RUN": "tests/scripts/test_plot_run.py",
}


def commands(document: str) -> list[str]:
    """Commands of the indented blocks of a document, continued lines joined."""
    lines = (ROOT / document).read_text("utf-8").splitlines()
    found: list[str] = []
    for line in lines:
        if not line.startswith("    ") or not line.strip():
            continue
        text = line.strip()
        if re.match(r"(python|torchrun|make|pip)\b", text):
            found.append(text)
        elif found and (found[-1].endswith("\\") or found[-1].count("'") % 2):
            found[-1] = found[-1].removesuffix("\\").rstrip() + " " + text
    return found


def small(command: str) -> list[str]:
    """The words of a command, made small, for this machine."""
    for said, run in SMALLER.items():
        command = command.replace(said, run)
    words = shlex.split(command.partition(" > ")[0])
    planned = "dry_run=true" in command
    trains = not planned and {"pretrain.py", "scripts/sweep_optuna.py"} & {*words}
    if trains:
        words = ["arch=athena_trm_tiny" if w == "arch=athena_trm_large" else w for w in words]
    if trains and "eval_only=true" not in words:
        given = {word.lstrip("+").partition("=")[0] for word in words}
        words += [] if given & {"arch", "load_checkpoint"} else ["arch=athena_trm_tiny"]
        words += [key for key in TRAINING + SHORT if key.partition("=")[0] not in given]
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    if words[0] == "python":
        return [sys.executable, *words[1:]]
    return words


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A folder as a reader has it: the project, texts, and files that commands name."""
    home = tmp_path_factory.mktemp("reader")
    for path in ROOT.iterdir():
        if path.name not in ("data", "checkpoints", ".git", ".venv"):
            (home / path.name).symlink_to(path)
    words = " ".join(
        path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))
    ).split()
    (home / "my_text").mkdir()
    # without overlap: duplicates are left out
    pieces = [" ".join(words[i : i + 12]) for i in range(0, len(words) - 12, 12)]
    for number in range(200):  # so that 5 % of them hold out some, whatever the pages say
        text = "\n".join(pieces[number::200])
        (home / "my_text" / f"{number}.txt").write_text(text, "utf-8")
    zstd = pytest.importorskip("backports.zstd")
    lines = "".join(json.dumps({"text": piece}) + "\n" for piece in pieces)
    with zstd.open(home / "c4.jsonl.zst", "wb") as file:
        file.write(lines.encode())
    with gzip.open(home / "github.txt.gz", "wb") as file:
        file.write("\n".join(pieces[::2]).encode())
    pairs = [{"question": piece[:20], "answer": piece[20:]} for piece in pieces]
    with zstd.open(home / "gsm8k.jsonl.zst", "wb") as file:
        file.write("".join(json.dumps(pair) + "\n" for pair in pairs).encode())
    (home / "prompts.txt").write_text("It was\nThe\n", "utf-8")
    pair = {"sentence_good": "The run goes on.", "sentence_bad": "Run the on goes.", "field": "x"}
    with zstd.open(home / "blimp.jsonl.zst", "wb") as file:
        file.write((json.dumps(pair) + "\n").encode() * 3)
    task = {"context": "The run goes", "word": "on"}
    (home / "words.jsonl").write_text((json.dumps(task) + "\n") * 3, "utf-8")
    (home / "words.yaml").write_text(
        "task: athena_words\ndataset_path: json\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {home / 'words.jsonl'}}}\noutput_type: loglikelihood\n"
        'doc_to_text: "{{context}}"\ndoc_to_target: " {{word}}"\nmetric_list: [{metric: acc}]\n',
        "utf-8",
    )
    return home


class Parsed(BaseException):
    """Ends a command that has read its arguments; nothing catches it on the way."""


def read_config(words: list[str]) -> None:
    """Compose and check what pretrain.py would; of a sweep the first value of each key."""
    if "-m" in words:
        words = [w if "[" in w else w.split(",")[0] for w in words if w != "-m"]
    config = compose_config(words)
    if config.load_checkpoint is None:  # else the checkpoint decides what is allowed
        load_config(config)


def read_arguments(program: str, words: list[str], monkeypatch) -> None:
    """Have a program read its arguments and do nothing else."""
    if program == "pretrain.py":
        return read_config(words)
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    options = getattr(module, "Options", None)
    if hasattr(module, "split_key_values"):
        own, overrides = split_key_values(options, words)
        if (presets := getattr(own, "config_dir", None)) is not None:
            overrides = ["--config-dir", str(presets), *overrides]
        if program == "scripts/sweep_optuna.py":
            _, overrides = module.sweeps_and_fixed(overrides)
        return read_config(["data_paths=[x]", *overrides])
    if options is not None:
        parse_key_values(options, words)
        return None

    def parse(self, arguments=None, namespace=None):
        _, rest = self.parse_known_args(arguments, namespace)
        raise Parsed(rest)

    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, parse)
    with pytest.raises(Parsed) as parsed:
        module.main(words)
    assert parsed.value.args == ([],), "arguments that it does not know"


def shown() -> list[tuple[str, str]]:
    """(document, command), each command once."""
    found = {
        command: document for document in reversed(DOCUMENTS) for command in commands(document)
    }
    return [(document, command) for command, document in found.items()]


@pytest.mark.parametrize(("document", "command"), shown(), ids=lambda text: text[:60])
def test_every_command_can_be_read(document, command, monkeypatch, tmp_path):
    write_files(tmp_path)  # presets and plug-ins that commands name
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.partition(" > ")[0])
    if words[0] in ("make", "pip"):
        return  # the tests of targets and of requirements look at these
    if "-m" in words[:2]:
        return read_arguments(words[2].replace(".", "/"), words[3:], monkeypatch)
    program = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[program]).is_file(), words[program]
    if words[program] != "scripts/lm_eval_athena.py":  # reads them by lm-evaluation-harness
        read_arguments(words[program], words[program + 1 :], monkeypatch)


@pytest.mark.slow
def test_every_command_runs_as_printed(reader):
    """One after the other: what one writes, the next reads."""
    ran = 0
    for document in DOCUMENTS:
        for command in commands(document):
            if any(sign in command for sign in ELSEWHERE):
                continue
            words = small(command)
            if "build_corpus_dataset" in command:
                words.append("--overwrite")
            done = subprocess.run(
                words, cwd=reader, capture_output=True, encoding="utf-8", timeout=200, input="",
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            assert done.returncode == 0, f"{document}: {command}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran > 15


def test_the_makefile_has_every_target_that_is_shown():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    shown = {
        target
        for document in PAGES
        for target in re.findall(r"\bmake ([a-z-]+)", (ROOT / document).read_text("utf-8"))
        if target != "it"
    }
    assert {"quickstart", "test", "sudoku"} <= shown
    for target in shown & set(re.findall(r"^([a-z-]+):", makefile, re.M)) ^ shown:
        raise AssertionError(f"there is no target {target}")


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and GitLab name them."""
    found = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document):
    page = ROOT / document
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(target)
    assert not broken, f"{document} links to {broken}"


@pytest.mark.parametrize("document", [page for page in PAGES if page != "CHANGELOG.md"])
def test_files_that_are_named_exist(document):
    text = (ROOT / document).read_text("utf-8")
    text = re.sub(r"^ +# \S+$", "", text, flags=re.M)  # a file that the reader writes
    named = re.findall(r"(?<![\w/.-])(?:[a-z_]+/)+[a-z0-9_]+\.(?:py|sh|yaml|ipynb)\b", text)
    missing = sorted({path for path in named if not (ROOT / path).is_file()})
    assert not missing, f"{document} names {missing}"


def test_architecture_lists_every_layer():
    """From top to bottom: a reader of the page knows which package may import which."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    tree = text.partition("## The tree")[2].partition("## ")[0]
    rows = re.findall(r"^    (\S+(?:  ?\S+)*)   ", tree, re.M)
    assert [tuple(row.split()) for row in rows] == list(LAYERS)
