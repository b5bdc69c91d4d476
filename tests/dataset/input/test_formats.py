"""A text format of one's own: one file outside the project, read as the formats in the table."""

import gzip

import pytest

from dataset.build_corpus_dataset import main as build_corpus
from dataset.input.document_reader import DocumentReader, ReadOptions
from dataset.input.text_sources import find_sources
from dataset.train_tokenizer import main as train_tokenizer
from utils.core.errors import UserError
from utils.core.plugins import use_plugins

VERSES = '''
from dataset.input.document_reader import decode_line, read_lines


class Verses:
    """Documents that end at a line of three stars."""

    extensions = [".verse"]

    def documents(self, source, progress):
        held = []
        for number, line in read_lines(source, progress):
            text = decode_line(line, number)
            if text == "***":
                yield " / ".join(held) if held else ValueError("a verse without lines")
                held = []
            else:
                held.append(text)


class Numbers:
    extensions = [".verse"]

    def documents(self, source, progress):
        yield 7


class Bare:
    extensions = ".verse"
    documents = None
'''
TEXT = "the sea\nthe tide\n***\n***\nthe shore\n***\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ideas").mkdir()
    (tmp_path / "ideas" / "verses.py").write_text(VERSES, "utf-8")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.verse").write_text(TEXT, "utf-8")
    (tmp_path / "texts" / "b.verse.gz").write_bytes(gzip.compress(TEXT.encode()))
    (tmp_path / "texts" / "c.txt").write_text("plain\n", "utf-8")
    use_plugins([tmp_path / "ideas"])
    return tmp_path


def read(folder, name="verses@Verses", skip=0, bad=9) -> dict[str, list]:
    reader = DocumentReader(ReadOptions(max_bad_lines=bad))
    (sources,) = find_sources([str(folder / "texts")], name)
    return {s.path.name: list(reader.documents(s, skip)) for s in sources}


def test_files_with_its_extension_are_its_own_and_others_stay(folder):
    verses = [(1, "the sea / the tide"), (3, "the shore")]
    assert read(folder) == {"a.verse": verses, "b.verse.gz": verses, "c.txt": [(1, "plain")]}
    assert read(folder, skip=2)["a.verse"] == verses[1:], "a build resumes in the middle"


def test_a_bad_record_is_named(folder):
    with pytest.raises(UserError, match=r"a\.verse, document 2: a verse without lines.*max-bad"):
        read(folder, bad=0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jsnl", ["--format jsnl", "'jsonl'"]),
        ("verses@Verse", ["verses@Verse", "did you mean 'Verses'"]),
        ("verses@Numbers", ["document 1", "a.verse", "int"]),
        ("verses@Bare", ["verses@Bare", "'.verse'"]),
        ("parquet@read", ["parquet@read", "class"]),
    ],
)
def test_what_is_not_a_format_is_named(folder, name, words):
    with pytest.raises(UserError) as raised:
        read(folder, name)
    assert all(word in str(raised.value) for word in words), raised.value


def test_both_builders_take_it(folder, capsys):
    given = ["--input-files", str(folder / "texts"), "--plugins", str(folder / "ideas"),
             "--format", "verses@Verses", "--max-bad-lines", "9"]  # fmt: skip
    use_plugins(())
    tokenizer, corpus = folder / "tok.json", folder / "corpus"
    train_tokenizer([*given, "--vocab-size", "270", "--output", str(tokenizer)])
    use_plugins(())
    build_corpus([*given, "--tokenizer-json", str(tokenizer), "--output-dir", str(corpus),
                  "--seq-len", "8", "--train-ratio", "1", "--dedup", "none"])  # fmt: skip
    assert "train: 5 documents" in capsys.readouterr().out
