"""Arrays as streams, and folders that appear whole or not at all."""

import os

import numpy as np
import pytest
from seeds import draw_rng

from dataset.output.array_writer import ArrayWriter
from dataset.output.corpus_folder import create_corpus
from utils.core.errors import UserError


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("row_shape", [(), (3,)])
def test_blocks_become_one_array(tmp_path, dtype, row_shape):
    generator = draw_rng()
    blocks = [generator.integers(0, 200, (n, *row_shape)) for n in (0, 1, 700, 13)]
    writer = ArrayWriter(tmp_path / "a.npy", dtype, row_shape)
    for block in blocks:
        writer.append(block[:, ::-1] if row_shape else block)  # not contiguous
    writer.close()
    expected = np.concatenate(blocks).astype(dtype)
    loaded = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert loaded.dtype == dtype
    assert (loaded == (expected[:, ::-1] if row_shape else expected)).all()
    assert writer.rows == 714


def test_no_rows_still_make_an_array(tmp_path):
    ArrayWriter(tmp_path / "a.npy", np.uint16, (5,)).close()
    assert np.load(tmp_path / "a.npy").shape == (0, 5)


def fill(folder, content="x"):
    (folder / "train").mkdir()
    (folder / "train" / "dataset.json").write_text(content, "utf-8")
    (folder / "identifiers.json").write_text("[]", "utf-8")


def test_folder_appears_at_the_end_only(tmp_path):
    target = tmp_path / "deep" / "corpus"
    with create_corpus(target, overwrite=False) as workspace:
        fill(workspace.folder)
        assert not target.exists()
        assert workspace.folder.parent.parent == target.parent
    assert (target / "train" / "dataset.json").read_text("utf-8") == "x"
    assert os.listdir(target.parent) == ["corpus"]


def test_failure_leaves_what_was_there(tmp_path):
    target = tmp_path / "corpus"
    for _ in range(2):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(RuntimeError), create_corpus(target, overwrite=True) as workspace:
            fill(workspace.folder, "new")
            raise RuntimeError
        assert sorted(tmp_path.rglob("*")) == before
        if not target.exists():
            with create_corpus(target, overwrite=False) as workspace:
                fill(workspace.folder, "old")
    assert (target / "train" / "dataset.json").read_text("utf-8") == "old"


def test_two_builds_of_one_directory_exclude_each_other(tmp_path):
    with create_corpus(tmp_path / "corpus", overwrite=False) as workspace:
        with pytest.raises(UserError, match="another build is running"):
            create_corpus(tmp_path / "corpus", overwrite=False).__enter__()
        fill(workspace.folder)
    assert os.listdir(tmp_path) == ["corpus"]


def test_overwrite_rules(tmp_path):
    target = tmp_path / "corpus"
    target.mkdir()
    with create_corpus(target, overwrite=False) as workspace:  # an empty folder is free
        fill(workspace.folder, "first")
    with pytest.raises(UserError, match=r"finished corpus.*--overwrite"):
        create_corpus(target, overwrite=False).__enter__()
    with create_corpus(target, overwrite=True) as workspace:
        fill(workspace.folder, "second")
        assert (target / "train" / "dataset.json").read_text("utf-8") == "first"
    assert (target / "train" / "dataset.json").read_text("utf-8") == "second"
    assert os.listdir(tmp_path) == ["corpus"]

    (target / "notes.txt").write_text("mine", "utf-8")
    with pytest.raises(UserError, match=r"also contains notes\.txt"):
        create_corpus(target, overwrite=True).__enter__()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine", "utf-8")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty"):
            create_corpus(other, overwrite).__enter__()
        with pytest.raises(UserError, match="is a file"):
            create_corpus(other / "thesis.tex", overwrite).__enter__()
    assert (other / "thesis.tex").read_text("utf-8") == "mine"
