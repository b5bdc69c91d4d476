"""Inputs as they come from the world: each ends in a correct corpus or in one clear sentence."""

import gzip
import io
import json
import lzma
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset import build_corpus_dataset
from dataset.common import token_byte_lengths
from dataset.input import document_reader
from dataset.input.document_reader import DocumentReader, ReadOptions
from dataset.input.text_sources import find_sources
from tests.dataset.conftest import random_text, write_jsonl
from tests.dataset.test_build_corpus_dataset import documents_of
from utils.core.errors import UserError

try:
    from compression import zstd
except ImportError:
    from backports import zstd

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def with_checksum(data: bytes) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": with_checksum}
DECOMPRESS = {"": bytes, ".gz": gzip.decompress, ".xz": lzma.decompress, ".zst": zstd.decompress}


def reference(data: bytes, ending: str) -> list[str] | None:
    """Texts by the plainest way there is, or None where that way meets a fault."""
    try:
        if ending == ".parquet":
            table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
            texts = table["text"].to_pylist()
        else:
            lines = DECOMPRESS[ending](data).removeprefix(b"\xef\xbb\xbf").split(b"\n")
            # A record may be any JSON, but must be an object with a text.
            texts = [json.loads(line.decode())["text"] for line in lines if line.strip()]
    except Exception:
        return None
    if not all(isinstance(text, str) for text in texts):
        return None
    try:
        return [text for text in texts if text.encode() and not text.isspace()] or None
    except UnicodeEncodeError:
        return None


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 5))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def patched(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    junk = rng.choice((b"\x00" * 9, b"\xff\xfe", "äö".encode("latin-1"), b"\n", b"{}", b'"', b"\r"))
    return data[:place] + junk + data[place + rng.choice((0, len(junk))) :]


def doubled(data: bytes, rng: random.Random) -> bytes:
    return data + data[rng.randrange(len(data)) :]


@pytest.mark.parametrize("damage", [truncated, flipped, patched, doubled])
@pytest.mark.parametrize("ending", [*COMPRESS, ".parquet"])
def test_damaged_files_are_read_rightly_or_refused(
    tmp_path: Path, rng: random.Random, ending: str, damage: Callable
):
    texts = [random_text(rng, rng.randrange(1, 30)) + f"\n{n}" for n in range(40)]
    if ending == ".parquet":
        pq.write_table(
            pa.table({"text": texts}), tmp_path / "whole", write_page_checksum=True,
            row_group_size=16,
        )  # fmt: skip
        whole = (tmp_path / "whole").read_bytes()
        path = tmp_path / "a.parquet"
    else:
        lines = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
        whole = COMPRESS[ending](lines.encode())
        path = tmp_path / f"a.jsonl{ending}"
    refused = 0
    for _ in range(60):
        data = damage(whole, rng)
        path.write_bytes(data)
        wanted = reference(data, ending)
        try:
            found = list(DocumentReader(ReadOptions()).texts(find_sources([str(path)])[0][0]))
        except UserError as error:
            refused += 1
            assert path.name in str(error) and "\n" not in str(error)
            # Nothing readable may be refused; but lzma calls junk behind a stream readable.
            assert wanted is None or (ending == ".xz" and damage is doubled), error
        else:
            assert found == wanted
    assert refused


@pytest.mark.parametrize(
    "content, expected",
    [
        (b'{"text": 3}\n', "a number, not a string"),
        ('{"text": "ä"}\n'.encode("latin-1"), "is not valid UTF-8"),
        ('{"text": "x"}\n'.encode("utf-16"), "looks like UTF-16"),
        (b'{"text": "x"}\x00\n', "not valid JSON"),
        (b'[{"text": "x"}, {"text": "y"}]', "one JSON array"),
        (b'[\n {"text": "x"}\n]\n', "one JSON array"),
        (b'{\n "text": "x"\n}\n', "several lines"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
        (b'{"text": "' + b"x" * 5000 + b'"}\n', "longer than 1,000 bytes"),
    ],
)
def test_each_fault_has_its_sentence(tmp_path, build, fails, monkeypatch, content, expected):
    if b"xxx" in content:
        monkeypatch.setattr(document_reader, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    line = fails(lambda: build(path))
    assert expected in line and "a.jsonl" in line
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("vocab.json", b'{"a": 0, "b": 1}', "vocab.json"),
        ("tokenizer_config.json", b'{"tokenizer_class": "Llama"}', "no key 'model'"),
        ("a.json", b'["a", "b"]', "a list"),
        ("model.pt", b"PK\x03\x04\x80\xff", "not JSON"),
        ("cut.json", b'{"model": {"type": "BPE"', "not JSON"),
        ("other.json", b'{"model": {"type": "Markov"}}', "tokenizer.json"),
        ("folder", None, "tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_named(tmp_path, fails, name, content, expected):
    path = tmp_path / name
    if content is None:
        path.mkdir()
        (path / "tokenizer.json").write_text("{}", "utf-8")
        expected = f"pass {path / 'tokenizer.json'}"
    else:
        path.write_bytes(content)
    text = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    command = ["--tokenizer-json", str(path), "--input-files", str(text), "--seq-len", "8"]
    message = fails(
        lambda: build_corpus_dataset.main([*command, "--output-dir", str(tmp_path / "corpus")])
    )
    assert name in message and expected in message and "'model')" not in message
    if content is not None:
        with pytest.raises(UserError, match=re.escape(name)) as error:
            token_byte_lengths(path)
        assert expected in str(error.value)


def test_only_line_feeds_end_a_line_of_text(tmp_path):
    documents = ["a\u2028b\u2029c\x85d", "e\x0cf\x0bg\x1ch", "i\rj\r"]
    path = tmp_path / "a.txt"
    for end in ("\n", "\r\n"):
        path.write_bytes(b"\xef\xbb\xbf" + end.join(documents).encode())
        found = DocumentReader(ReadOptions()).texts(find_sources([str(path)])[0][0])
        assert list(found) == documents


@pytest.mark.parametrize("ending", COMPRESS)
def test_files_that_were_appended_to(tmp_path, ending):
    lines = [json.dumps({"text": f"text {n}"}).encode() + b"\n" for n in range(3)]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"".join(COMPRESS[ending](line) for line in lines))
    source = find_sources([str(path)])[0][0]
    assert list(DocumentReader(ReadOptions()).texts(source)) == ["text 0", "text 1", "text 2"]


def test_bad_lines_are_skipped_up_to_the_limit(tmp_path, build, fails):
    good, bad = b'{"text": "fine %d"}\n', [b"{\n", b'{"text": null}\n', b'{"text": "\xff"}\n']
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(good % n + bad[n % 3] for n in range(6)))
    line = fails(lambda: build(path, options="--max-bad-lines 5"))
    assert "line 12" in line and "--max-bad-lines 5" in line
    corpus = build(path, options="--max-bad-lines 6 --train-ratio 1 --seq-len 8", out="c")
    assert documents_of(corpus, "train")["a"] == [f"fine {n}" for n in range(6)]
    assert json.loads((corpus / "build_report.json").read_bytes())["skipped"]["bad_lines"] == 6


def test_parquet_gives_what_json_lines_give(tmp_path, build, rng, fails):
    texts = [random_text(rng, rng.randrange(1, 60)) for _ in range(700)]
    table = pa.table({"n": range(700), "text": texts, "t": pa.array(texts).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300, compression="zstd")
    write_jsonl(tmp_path / "b.jsonl", texts)
    options = "--train-ratio 0.8 --seq-len 16 --domain-labels x"
    wanted = documents_of(build(tmp_path / "b.jsonl", options=options, out="one"), "train")
    for key in ("text", "t"):
        more = f"{options} --text-key {key}"
        corpus = build(tmp_path / "a.parquet", options=more, out=key)
        assert documents_of(corpus, "train") == wanted
    reader = DocumentReader(ReadOptions())
    source = find_sources([str(tmp_path / "a.parquet")])[0][0]
    for skip in (0, 1, 299, 300, 301, 650, 699):
        assert [text for _, text in reader.documents(source, skip)] == texts[skip:]
    assert "columns: n, text, t" in fails(
        lambda: build(tmp_path / "a.parquet", options="--text-key body", out="no")
    )
    assert "int64, not text" in fails(
        lambda: build(tmp_path / "a.parquet", options="--text-key n", out="no")
    )
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "n.parquet")
    assert "row 2: key 'text' is null" in fails(lambda: build(tmp_path / "n.parquet", out="no"))


def test_a_folder_without_readable_files(tmp_path, build, fails):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "picture.png").write_bytes(b"x")
    message = fails(lambda: build(tmp_path / "in"))
    assert str(tmp_path / "in") in message and ".jsonl" in message


@pytest.mark.parametrize("kind", ["line", "paragraph", "file"])
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_reading_goes_on_anywhere(tmp_path, rng, kind, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "txt":
        parts = (rng.choice(("\n", "\r\n", "\n\n", "\n \n", " ")) for _ in range(60))
        path.write_text(
            "".join(random_text(rng, 3) + part for part in parts), newline="", encoding="utf-8"
        )
    else:
        write_jsonl(path, [rng.choice(("", " ", random_text(rng, 4))) + str(n) for n in range(40)])
    source = find_sources([str(path)])[0][0]

    def read(skip: int) -> list[tuple[int, str]]:
        return list(DocumentReader(ReadOptions(documents=kind)).documents(source, skip))

    whole = read(0)
    for place, (records, _) in enumerate(whole):
        assert read(records) == whole[place + 1 :]
