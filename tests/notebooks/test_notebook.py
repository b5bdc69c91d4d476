"""The notebook is what the repository says, and runs from top to bottom where nothing else is."""

from pathlib import Path

import pytest
from training_tools import ROOT

from scripts import build_notebook

pytestmark = pytest.mark.slow

TINY = """SECONDS = 8
MY_TEXT = None
PROMPT = "HAMLET."
EVAL_BATCHES = 2
COMPILE = False"""


def test_it_is_in_step_with_the_repository():
    build_notebook.main(["--check"])


def test_it_runs_headless_from_top_to_bottom(tmp_path, monkeypatch):
    """A kernel of its own, in an empty folder; the files that it writes are the repository's."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(ROOT / build_notebook.NOTEBOOK, as_version=4)
    nbformat.validate(book)
    [parameters] = [cell for cell in book.cells if cell.id == "parameters"]
    names = [line.partition(" = ")[0] for line in parameters.source.splitlines()]
    assert names == [line.partition(" = ")[0] for line in TINY.splitlines()]
    parameters.source = TINY
    client.NotebookClient(
        book, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for path in build_notebook.shipped():
        written, own = (folder / path for folder in (tmp_path / "athena", ROOT))
        assert written.read_text("utf-8").rstrip("\n") == own.read_text("utf-8").rstrip("\n"), path
    said = "".join(
        output.get("text", "") for cell in book.cells for output in cell.get("outputs", [])
    )
    assert "eval/text/bits_per_byte" in said and "HAMLET." in said
    pictures = [
        output
        for cell in book.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2
    assert Path(tmp_path / "athena" / "checkpoints" / "athena" / "colab").is_dir()
