"""Write notebooks/athena_all_in_one_colab.ipynb from this repository.

    python scripts/build_notebook.py

One cell of the notebook contains the project's files as an archive, so that it runs on a machine
without a clone; the next cells do everything from text to an evaluated model. Never edit the
notebook by hand; --check reports whether it is up to date.
"""

import base64
import hashlib
import io
import json
import lzma
import sys
import tarfile
import textwrap
import tomllib
from collections.abc import Sequence
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
LEFT_OUT = ("scripts/benchmarks/", "scripts/gpu_check", "scripts/build_notebook.py")

TITLE = """# Athena, all in one

Pretrains a small recursive-reasoning language model from raw text on this machine, evaluates it,
generates text with it, and plots the curves: *Run all*. On Colab choose a GPU first
(*Runtime → Change runtime type*); a CPU works too. After the installation it takes about ten
minutes on two CPU cores, most of them the `SECONDS` of training below.

The notebook is self-contained: the cell "Archive" holds the project's files, compressed."""

PARAMETERS = """SECONDS = 300  # of training
MY_TEXT = None  # a file or folder of your own text; None: Shakespeare's plays
PROMPT = "HAMLET."
EVAL_BATCHES = None  # batches of held-out text at most; None: all of it
COMPILE = True  # faster training after a minute of compilation"""

ARCHIVE = """# The project's files: a .tar.xz archive in base85
FILES = \"\"\"
{archive}
\"\"\""""

SETUP = """# Unpack Athena {version} into athena/, and work there.
import base64
import hashlib
import io
import lzma
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path("athena").resolve()
files = lzma.decompress(base64.b85decode("".join(FILES.split())))
assert hashlib.sha256(files).hexdigest() == "{digest}", "the archive is damaged"
with tarfile.open(fileobj=io.BytesIO(files)) as archive:
    archive.extractall(HERE, filter="data")
os.chdir(HERE)


def sh(*command):
    \"\"\"Run a command, show its output, and stop the notebook if it fails.\"\"\"
    words = [sys.executable if word == "python" else str(word) for word in command]
    print("$", shlex.join(map(str, command)))
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="")
    assert process.returncode == 0, f"the command failed with status {{process.returncode}}\""""

INSTALL = """assert sys.version_info >= (3, 11), "Athena needs Python 3.11 or newer"
import torch  # the installed one; if there is none: pip install torch

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
    ("Text, tokenizer, corpus\n\nThe plays come as a package; three of them are held out.", DATA),
    ("Train\n\nFirst its cost, then the training. It saves checkpoints: run the cell again "
     "without `resume=none` to resume.", TRAIN),
    ("Evaluate\n\nBits per byte on the held-out text, for each of four ACT steps, though the model "
     "was trained with two: more compute at test time, as measured.", EVALUATE),
    ("Generate text", SAMPLE),
    ("Plot", PLOT),
]  # fmt: skip


def shipped() -> list[Path]:
    """Return the files to include in the notebook, relative to the project."""
    found = [ROOT / name for name in SINGLE]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
    names = sorted(path.relative_to(ROOT) for path in found)
    return [path for path in names if not path.as_posix().startswith(LEFT_OUT)]


def pack() -> bytes:
    """Return a reproducible tar archive of the shipped files."""
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in shipped():
            content = (ROOT / path).read_bytes()
            entry = tarfile.TarInfo(path.as_posix())
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def encode(archive: bytes) -> str:
    """Encode an archive as text; the inverse of `decode`."""
    compressed = lzma.compress(archive, preset=9 | lzma.PRESET_EXTREME)
    return "\n".join(textwrap.wrap(base64.b85encode(compressed).decode(), 500))


def decode(text: str) -> bytes:
    return lzma.decompress(base64.b85decode("".join(text.split())))


def cells(archive: bytes, text: str) -> list[dict[str, Any]]:
    """Return all cells. text: the encoded archive, whose cell is folded."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    digest = hashlib.sha256(archive).hexdigest()
    found = [
        cell("markdown", "title", TITLE),
        cell("code", "parameters", PARAMETERS),
        cell("markdown", "files", "## Archive\n\nRun it, and keep it folded."),
        cell("code", "archive", ARCHIVE.format(archive=text), hidden=True),
        cell("markdown", "unpack", "## Unpack"),
        cell("code", "setup", SETUP.format(version=project["version"], digest=digest)),
    ]
    for number, (heading, source) in enumerate(STEPS, 1):
        found.append(cell("markdown", f"step-{number}", f"## {heading}"))
        found.append(cell("code", f"run-{number}", source))
    return found


def cell(kind: str, name: str, text: str, hidden: bool = False) -> dict[str, Any]:
    folded = {"cellView": "form", "jupyter": {"source_hidden": True}} if hidden else {}
    source = {"cell_type": kind, "id": name, "metadata": folded,
              "source": text.splitlines(keepends=True)}  # fmt: skip
    return source | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook(archive: bytes, text: str) -> str:
    """Return the notebook file. text: the encoded archive."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"accelerator": "GPU", "colab": {"provenance": []}, "kernelspec": kernel,
                "language_info": {"name": "python"}}  # fmt: skip
    whole = {"cells": cells(archive, text), "metadata": metadata, "nbformat": 4,
             "nbformat_minor": 5}  # fmt: skip
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def is_current(path: Path) -> bool:
    """Return whether a notebook is up to date.

    Archives are compared unpacked, because versions of liblzma compress differently.
    """
    archive = pack()
    try:
        written = path.read_text("utf-8")
        sources = {cell["id"]: "".join(cell["source"]) for cell in json.loads(written)["cells"]}
        text = sources["archive"].split('"""')[1].strip()
        return decode(text) == archive and written == notebook(archive, text)
    except (OSError, ValueError, LookupError, lzma.LZMAError):
        return False


def run(check: bool) -> None:
    path = ROOT / NOTEBOOK
    if check:
        if not is_current(path):
            raise UserError(f"{NOTEBOOK} is out of date: run python scripts/build_notebook.py")
        return
    archive = pack()
    text = notebook(archive, encode(archive))
    with write_result(path, str(NOTEBOOK)) as part:
        part.write_text(text, "utf-8")
    print(f"wrote {NOTEBOOK}: {len(shipped())} files, {len(text) / 1e3:.0f} kB")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; see the top of this file."""
    parser = command_parser("python scripts/build_notebook.py", __doc__)
    parser.add_argument("--check", action="store_true", help="only check that it is up to date")
    args = parser.parse_args(argv)
    run_cli(lambda: run(args.check))


if __name__ == "__main__":
    main()
