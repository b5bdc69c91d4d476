"""Parquet columns of text, in every encoding that other programs write."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from dataset.input.document_reader import DocumentReader, ReadOptions
from dataset.input.text_sources import find_sources
from utils.core.errors import UserError

CASES = Path(__file__).parents[1] / "cases"
TEXTS = ["aé", "a longer text than a view holds inline", None, "日本"]
DATA = [None if text is None else text.encode() for text in TEXTS]
COLUMNS = {
    "large string": pa.array(TEXTS, pa.large_string()),
    "string view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array(DATA, pa.binary()),
    "large binary": pa.array(DATA, pa.large_binary()),
    "binary view": pa.array(DATA, pa.binary_view()),
    "dictionary of strings": pa.array(TEXTS).dictionary_encode(),
    "dictionary of binary": pa.array(DATA, pa.large_binary()).dictionary_encode(),
    "extension": pa.ExtensionArray.from_storage(pa.json_(), pa.array(TEXTS)),
}


def read(path: Path, bad_lines: int = 0) -> tuple[list[str], int]:
    reader = DocumentReader(ReadOptions(max_bad_lines=bad_lines))
    return list(reader.texts(find_sources([str(path)])[0][0])), reader.bad_lines


def test_the_string_views_of_polars():
    assert read(CASES / "view.parquet") == (["sv doc"], 0)


@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_every_encoding_of_text_is_read(tmp_path, column):
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", bad_lines=1) == ([t for t in TEXTS if t], 1)
    with pytest.raises(UserError, match=r"row 3.*null.*--max-bad-lines"):
        read(tmp_path / "a.parquet")


def test_bytes_that_are_no_text_are_bad_rows(tmp_path):
    column = pa.array([b"one", b"\xff\xfe", b"two"])
    as_string = pa.Array.from_buffers(pa.string(), 3, column.buffers())  # as other programs write
    for number, values in enumerate((column, as_string)):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pa.table({"text": values}), path)
        assert read(path, bad_lines=1) == (["one", "two"], 1)
        with pytest.raises(UserError, match=r"row 2.*UTF-8"):
            read(path)


@pytest.mark.parametrize("values", [[1, 2], [True, False], [["a"]], [{"a": "b"}]])
def test_columns_of_other_things_are_named(tmp_path, values):
    parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"'text'.*not text.*--text-key"):
        read(tmp_path / "a.parquet", bad_lines=9)


def test_what_cannot_be_read_as_a_column_is_named(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="several columns 'text'"):
        read(tmp_path / "a.parquet")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
    (tmp_path / "a.parquet").write_bytes(pointer)
    with pytest.raises(UserError, match="git lfs pull"):
        read(tmp_path / "a.parquet")
