"""Reading: every format and compression gives the same documents; every fault is named."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from dataset.input.document_reader import DocumentReader, ReadOptions, read_lines
from dataset.input.text_sources import find_sources
from tests.dataset.conftest import random_text, write_jsonl
from utils.core.errors import UserError

try:
    from compression import zstd
except ImportError:
    from backports import zstd

COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def read(*arguments: Path | str, given_format: str | None = None, **options) -> list[str]:
    reader = DocumentReader(ReadOptions(**options))
    groups = find_sources([str(argument) for argument in arguments], given_format)
    texts = [text for group in groups for source in group for text in reader.texts(source)]
    reader.check_sources()
    return texts


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", "md", "text", "jsonl", "json"])
def test_formats_and_compressions_agree(tmp_path, rng, kind, ending):
    texts = [random_text(rng, rng.randrange(1, 200)) for _ in range(50)]
    is_json = kind.startswith("json")
    lines = [json.dumps({"text": text, "n": 1}) if is_json else text for text in texts]
    path = tmp_path / f"some.file.{kind}{ending}"
    path.write_bytes(COMPRESS[ending]("\n".join(lines).encode()))
    # The name decides, whatever --format says.
    assert read(path, given_format="text" if is_json else "jsonl") == texts
    assert find_sources([str(path)])[0][0].label == "some.file"


def test_a_name_that_tells_nothing_needs_a_format(tmp_path):
    path = tmp_path / "part-0001"
    path.write_text('{"text": "a"}\n', "utf-8")
    with pytest.raises(UserError, match=r"part-0001 .*--format"):
        read(path)
    assert read(path, given_format="jsonl") == ["a"]
    assert read(path, given_format="text") == ['{"text": "a"}']


def test_documents_of_plain_text(tmp_path):
    text = "\ufeffone\r\n  two\u2028\x0c\n\n \t\nthree\nfour"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert read(path) == ["one", "  two\u2028\x0c", "three", "four"]
    assert read(path, documents="paragraph") == ["one\n  two\u2028\x0c", "three\nfour"]
    assert read(path, documents="file") == [text.removeprefix("\ufeff")]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_truncated_and_corrupt_files_are_named(tmp_path, rng, ending):
    data = COMPRESS[ending]("\n".join(random_text(rng, 50) for _ in range(400)).encode())
    path = tmp_path / f"cut.txt{ending}"
    for cut in (len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=rf"cut\.txt{ending} is truncated"):
            read(path)
    path.write_bytes(b"this was never compressed\n" * 3)
    with pytest.raises(UserError, match=rf"cut\.txt{ending} is not valid"):
        read(path)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])
    with pytest.raises(UserError, match=rf"cut\.txt{ending}"):
        read(path)


def test_zstd_frames_and_long_windows(tmp_path):
    path = tmp_path / "frames.txt.zst"
    # Written as a stream, a frame declares its window: here one beyond the decoder's default.
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
    long_frame = compressor.compress(b"two\n" * 9) + compressor.flush()
    path.write_bytes(zstd.compress(b"one\n") + long_frame)
    assert read(path) == ["one"] + ["two"] * 9


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.txt.gz"])
def test_empty_files_are_named(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=r"empty.* no documents"):
        read(path)
    with pytest.raises(UserError, match=r"empty.* no documents"):
        read(path, documents="file")


def test_bad_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = ['{"text": ', "[1]", '{"body": "x", "id": 3}', '{"text": null}', '{"text": "\\ud800"}']
    expected = ["not valid JSON", "a list", "keys: body, id", "null", "surrogate"]
    for line, fault in zip(bad, expected, strict=True):
        path.write_text('{"text": "good"}\n\n' + line + "\n", "utf-8")
        with pytest.raises(UserError, match=rf"a\.jsonl, line 3: .*{fault}"):
            read(path)
        assert read(path, max_bad_lines=1) == ["good"]
    path.write_text('{"text": "good"}\n' + "\n".join(bad), "utf-8")
    with pytest.raises(UserError, match=r"line 5: .*--max-bad-lines 3"):
        read(path, max_bad_lines=3)
    assert read(path, max_bad_lines=5) == ["good"]


def test_text_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x", "id": 3}\n', "utf-8")
    assert read(path, text_key="body") == ["x"]
    with pytest.raises(UserError, match=r"no key 'text' \(keys: body, id"):
        read(path)


def test_invalid_utf8_is_placed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("é fine\n".encode() + b"not \xff fine\n")
    with pytest.raises(UserError, match=r"a\.txt, line 2: byte 0xff at position 5"):
        read(path)
    path.write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match="looks like gzip data"):
        read(path)


def test_globs_folders_and_repeats(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.md", "sub/.hidden.txt", "picture.png"):
        (tmp_path / name).write_text(name, "utf-8")
    assert read(tmp_path) == ["a.txt", "b.txt", "sub/c.md"]
    assert read(f"{tmp_path}/*.txt", f"{tmp_path}/**/*.md") == ["a.txt", "b.txt", "sub/c.md"]
    (tmp_path / "[odd].txt").write_text("odd", "utf-8")
    assert read(tmp_path / "[odd].txt") == ["odd"]
    with pytest.raises(UserError, match=r"a\.txt is given twice"):
        read(tmp_path / "a.txt", tmp_path)
    with pytest.raises(UserError, match=r"absent\.txt' does not exist"):
        read(tmp_path / "absent.txt")
    with pytest.raises(UserError, match="matches no files"):
        read(f"{tmp_path}/*.jsonl")
    with pytest.raises(UserError, match=r"x\.parquet is damaged or truncated"):
        read(write_jsonl(tmp_path / "x.parquet", ["a"]))
    with pytest.raises(UserError, match=r"cannot read Parquet .*\.gz"):
        read(write_jsonl(tmp_path / "x.parquet.gz", ["a"]))


def test_standard_input(monkeypatch):
    def pipe(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    pipe(b"one\ntwo\n")
    assert read("-", given_format="text") == ["one", "two"]
    with pytest.raises(UserError, match=r"standard input; pass --format"):
        read("-")
    pipe(b"")
    with pytest.raises(UserError, match=r"standard input .*no documents"):
        read("-", given_format="text")


def test_a_closed_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input is closed"):
        read("-", given_format="text")


@pytest.mark.parametrize("ending", COMPRESS)
def test_pipes_are_read_as_files_are(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    os.mkfifo(path)
    data = COMPRESS[ending](b'{"text": "one"}\n{"text": "two"}\n')
    writer = threading.Thread(target=path.write_bytes, args=[data])
    writer.start()
    assert read(path) == ["one", "two"]
    writer.join()


def tar(data: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.TarFile(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    "data, kind",
    [
        (tar(b"some text\n"), "tar"),
        (b"PK\x03\x04\x14\0\0\0\x08\0", "zip"),
        (bz2.compress(b"some text\n"), "bzip2"),
        ("some text\nmore".encode("utf-16-le"), "UTF-16"),
        ("some text\nmore".encode("utf-16-be"), "UTF-16"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git lfs pull"),
    ],
    ids=["tar", "zip", "bzip2", "little endian", "big endian", "pointer"],
)
def test_what_is_no_text_is_not_read_as_text(tmp_path, ending, data, kind):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(data if "lfs" in kind else COMPRESS[ending](data))
    with pytest.raises(UserError, match=rf"a\.txt.*{kind}"):
        read(path, max_bad_lines=9)


@pytest.mark.parametrize("text", ["a\0b\n", "\0" * 99, "a\0\0b c", "na\0ïve\0\0\n", "PK and BZh"])
def test_text_may_hold_nul_characters(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, "utf-8")
    assert read(tmp_path / "a.txt") == [text.removesuffix("\n")]


def test_a_file_whose_lines_end_in_carriage_returns_is_pointed_out(tmp_path, recwarn):
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\rthree\r")
    with pytest.warns(UserWarning, match=r"a\.txt.*2 carriage returns.*tr"):
        assert read(tmp_path / "a.txt") == ["one\rtwo\rthree\r"]
    recwarn.clear()
    for data in (b"one\r\ntwo", b"one\r", b"one\rtwo\n"):
        (tmp_path / "a.txt").write_bytes(data)
        read(tmp_path / "a.txt")
    assert not recwarn.list


def test_progress_ends_at_the_size_on_disk(tmp_path, rng):
    for ending, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{ending}"
        path.write_bytes(compress("\n".join(random_text(rng, 50) for _ in range(99)).encode()))
        seen = []
        reader = DocumentReader(ReadOptions(), seen.append)
        assert len(list(reader.texts(find_sources([str(path)])[0][0]))) == 99
        assert sum(seen) == path.stat().st_size


def test_folders_with_links(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    corpus.mkdir()
    elsewhere.mkdir()
    (corpus / "a.txt").write_text("one", "utf-8")
    (elsewhere / "b.txt").write_text("two", "utf-8")
    (corpus / "part").symlink_to(elsewhere)
    (corpus / "again").symlink_to(elsewhere)
    (corpus / "loop").symlink_to(corpus)
    (corpus / "z.txt").symlink_to("a.txt")
    assert read(corpus) == ["one", "two"]
    assert read(f"{corpus}/*.txt") == ["one"]
    (elsewhere / "gone.txt").symlink_to(tmp_path / "moved.txt")
    for argument in (corpus, f"{elsewhere}/*.txt"):
        with pytest.raises(UserError, match=r"gone\.txt .*moved\.txt"):
            read(argument)


def test_files_that_a_folder_does_not_give_are_named(tmp_path):
    for name in ("a.txt", "b.log", "README", ".hidden"):
        (tmp_path / name).write_text(name, "utf-8")
    with pytest.warns(UserWarning, match=r"2 file.*README.*b\.log"):
        assert read(tmp_path, given_format="text") == ["a.txt"]


@pytest.mark.parametrize("argument", ["", " ", "~no_such_user/a.txt", "x" * 300 + ".txt"])
def test_names_that_name_nothing(argument):
    with pytest.raises(UserError, match="input"):
        read(argument)


def test_a_file_that_vanishes_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("one", "utf-8")
    source = find_sources([str(tmp_path / "a.txt")])[0][0]
    (tmp_path / "a.txt").unlink()
    for use in (lambda: source.size, lambda: source.version, lambda: list(read_lines(source))):
        with pytest.raises(UserError, match=r"cannot read .*a\.txt: No such file"):
            use()


def test_a_file_of_bad_lines_alone_is_not_called_empty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}\n' * 3, "utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl .*3 lines are bad"):
        read(path, max_bad_lines=9)
