"""Write notebooks/athena_all_in_one_colab.ipynb from this repository.

    python scripts/build_notebook.py

The notebook holds the project's own files, a cell each, so that a machine without a clone of it can
rebuild them; then it goes the whole way from text to an evaluated model. It is never edited by
hand, and --check says whether it is in step.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.core.atomic import write_result
from utils.core.console import command_parser, run_cli
from utils.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = Path("notebooks/athena_all_in_one_colab.ipynb")
KINDS = (".py", ".yaml", ".sh", ".html", ".css", ".js")
FOLDERS = ("config", "dataset", "evaluators", "models", "scripts", "utils")
SINGLE = ("pretrain.py", "sequence_dataset.py", "requirements-common.txt", "requirements-demo.txt",
          "requirements-eval.txt", "LICENSE")  # fmt: skip

TITLE = """# Athena, all in one

Pretrains a small recursive-reasoning language model from raw text on this machine, evaluates it,
lets it write, and plots what happened: *Run all*. On Colab choose a GPU first
(*Runtime → Change runtime type*); a CPU will do. After the installation it takes about ten minutes
on two CPU cores, most of them the `SECONDS` of training below.

The notebook is self-contained: the hidden cells write the project's files to `athena/`."""

PARAMETERS = """SECONDS = 300  # of training
MY_TEXT = None  # a file or folder of your own text; None: Shakespeare's plays
PROMPT = "HAMLET."
EVAL_BATCHES = None  # batches of held-out text at most; None: all of it
COMPILE = True  # faster training after a minute of compilation"""

SETUP = """import os
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path("athena").resolve()
for folder in {folders}:
    (HERE / folder).mkdir(parents=True, exist_ok=True)
for empty in {empty}:
    (HERE / empty).touch()
os.chdir(HERE)


def sh(*command):
    \"\"\"Runs a command, shows what it says, and stops the notebook where it fails.\"\"\"
    words = [sys.executable if word == "python" else str(word) for word in command]
    print("$", shlex.join(map(str, command)))
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="")
    assert process.returncode == 0, f"it ended with status {{process.returncode}}\""""

INSTALL = """assert sys.version_info >= (3, 11), "Athena needs Python 3.11 or newer"
import torch  # the one that is here; otherwise: pip install torch

sh("python", "-m", "pip", "install", "-q", "-r", "requirements-common.txt")
sh("python", "-m", "pip", "install", "-q", "--no-deps", "-r", "requirements-demo.txt")
print("torch", torch.__version__, "on", "a GPU" if torch.cuda.is_available() else "the CPU")"""

DATA = """if MY_TEXT is None:
    sh("python", "scripts/demo_corpus.py", "--output-dir", "data/demo")
    TEXT, HELD_OUT = "data/demo/train", ["--test-files", "data/demo/test/*.txt"]
else:
    TEXT, HELD_OUT = str(MY_TEXT), ["--train-ratio", "0.95"]
sh("python", "-m", "dataset.train_tokenizer", "--input-files", TEXT, "--documents", "file",
   "--vocab-size", "2048", "--output", "data/tokenizer.json")
sh("python", "-m", "dataset.build_corpus_dataset", "--tokenizer-json", "data/tokenizer.json",
   "--input-files", TEXT, *HELD_OUT, "--documents", "file", "--domain-labels", "text",
   "--identifiers", "none", "--seq-len", "256", "--min-iterations", "2", "--max-iterations", "2",
   "--output-dir", "data/quickstart", "--overwrite")"""

TRAIN = """options = ["experiment=quickstart", f"max_seconds={SECONDS}", f"compile={COMPILE}",
           f"eval_max_batches={EVAL_BATCHES or 'null'}"]
sh("python", "pretrain.py", *options, "dry_run=true")  # what it will cost
sh("python", "pretrain.py", *options, "run_name=colab", "resume=none")"""

EVALUATE = """sh("python", "pretrain.py", "eval_only=true",
   "load_checkpoint=checkpoints/athena/colab", "run_name=colab_evaluation",
   "arch.eval_halting=fixed", "arch.eval_steps=4",
   f"eval_max_batches={EVAL_BATCHES or 'null'}",
   "evaluators=[text@PerplexityEvaluator,halting@HaltingEvaluator]")"""

SAMPLE = """sh("python", "scripts/generate.py", "checkpoint=checkpoints/athena/colab",
   f"prompt={PROMPT}", "max_new_tokens=200", "temperature=0.8", "top_k=50")"""

PLOT = """from IPython.display import Image, display

sh("python", "scripts/plot_run.py", "checkpoints/athena/colab")
display(Image("checkpoints/athena/colab/curves.png"))
for picture in Path("checkpoints/athena/colab_evaluation").glob("*/halting.png"):
    display(Image(str(picture)))"""

STEPS = [
    ("Install", INSTALL),
    ("Text, tokenizer, corpus\n\nThe plays come as a package, three of them are held out.", DATA),
    ("Train\n\nFirst what it costs, then the training. It saves as it goes: run the cell again "
     "without `resume=none` and it goes on.", TRAIN),
    ("Evaluate\n\nBits per byte on the held-out text, for each of four ACT steps, though the model "
     "was trained with two: more compute at test time, as measured.", EVALUATE),
    ("Let it write", SAMPLE),
    ("Look", PLOT),
]  # fmt: skip


def shipped() -> list[Path]:
    """Files that the notebook holds, relative to the project."""
    found = [ROOT / name for name in SINGLE]
    for folder in FOLDERS:
        found += [p for p in (ROOT / folder).rglob("*") if p.suffix in KINDS]
    return sorted(path.relative_to(ROOT) for path in found if path.name != Path(__file__).name)


def cells() -> Iterator[dict[str, Any]]:
    """All cells; those that write files are folded."""
    files = shipped()
    folders = sorted({str(path.parent) for path in files})
    empty = [str(path) for path in files if not (ROOT / path).read_text("utf-8").strip()]
    yield markdown("title", TITLE)
    yield code("parameters", PARAMETERS)
    yield markdown("files", "## The project's files\n\nRun, and leave them folded.")
    yield code("setup", SETUP.format(folders=folders, empty=empty), hidden=True)
    for path in files:
        if str(path) not in empty:
            text = (ROOT / path).read_text("utf-8")
            yield code(f"file-{path}", f"%%writefile {path}\n{text}".rstrip("\n"), hidden=True)
    for number, (heading, source) in enumerate(STEPS, 1):
        yield markdown(f"step-{number}", f"## {heading}")
        yield code(f"run-{number}", source)


def identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)[-64:]


def markdown(name: str, text: str) -> dict[str, Any]:
    return {
        "cell_type": "markdown", "id": identifier(name), "metadata": {},
        "source": text.splitlines(keepends=True),
    }  # fmt: skip


def code(name: str, text: str, hidden: bool = False) -> dict[str, Any]:
    folded = {"cellView": "form", "jupyter": {"source_hidden": True}} if hidden else {}
    return {
        "cell_type": "code", "execution_count": None, "id": identifier(name), "metadata": folded,
        "outputs": [], "source": text.splitlines(keepends=True),
    }  # fmt: skip


def notebook() -> str:
    """The whole file."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"accelerator": "GPU", "colab": {"provenance": []}, "kernelspec": kernel,
                "language_info": {"name": "python"}}  # fmt: skip
    whole = {"cells": list(cells()), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def run(check: bool) -> None:
    path, text = ROOT / NOTEBOOK, notebook()
    if check:
        if not path.is_file() or path.read_text("utf-8") != text:
            raise UserError(f"{NOTEBOOK} is not in step: python scripts/build_notebook.py")
        return
    with write_result(path, str(NOTEBOOK)) as part:
        part.write_text(text, "utf-8")
    print(f"wrote {NOTEBOOK}: {len(shipped())} files, {len(text) / 1e6:.1f} MB")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see the top of this file."""
    parser = command_parser("python scripts/build_notebook.py", __doc__)
    parser.add_argument("--check", action="store_true", help="only tell whether it is in step")
    args = parser.parse_args(argv)
    run_cli(lambda: run(args.check))


if __name__ == "__main__":
    main()
