"""The notebook holds the present sources, and runs from top to bottom without a clone."""

import json

import pytest
from training_tools import ROOT

from scripts import build_notebook

pytestmark = pytest.mark.slow

TINY = """SECONDS = 8
MY_TEXT = None
PROMPT = "HAMLET."
EVAL_BATCHES = 2
COMPILE = False"""


def test_it_holds_the_present_sources():
    build_notebook.main(["--check"])


def test_it_is_small():
    """Browsers and reviews stay usable."""
    path = ROOT / build_notebook.NOTEBOOK
    assert path.stat().st_size <= 400_000
    assert len(json.loads(path.read_text("utf-8"))["cells"]) < 30


def test_a_changed_source_or_cell_is_noticed(tmp_path, monkeypatch):
    archive = build_notebook.pack()
    book = tmp_path / "book.ipynb"

    def current(text: str) -> bool:
        book.write_text(text, "utf-8")
        return build_notebook.is_current(book)

    written = build_notebook.notebook(archive, build_notebook.encode(archive))
    assert current(written)
    assert not current(written.replace("SECONDS = 300", "SECONDS = 301"))
    monkeypatch.setattr(build_notebook, "SINGLE", ("pretrain.py",))
    assert not current(written)


def test_it_runs_headless_from_top_to_bottom(tmp_path, monkeypatch):
    """In a kernel of its own, in an empty folder."""
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
        assert written.read_bytes() == own.read_bytes(), path
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
    assert (tmp_path / "athena/checkpoints/athena/colab").is_dir()
