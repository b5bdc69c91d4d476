"""Training a tokenizer: any text round-trips, the same input gives the same file."""

import pytest
from tokenizers import Tokenizer

from dataset import train_tokenizer
from tests.dataset.conftest import random_text, write_jsonl


def run(path, output, options="--vocab-size 320"):
    train_tokenizer.main(["--input-files", str(path), "--output", str(output), *options.split()])
    return output


def test_any_text_round_trips(tmp_path, rng):
    texts = [random_text(rng, 60) for _ in range(80)]
    path = run(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "new" / "tok.json")
    tokenizer = Tokenizer.from_file(str(path))
    assert tokenizer.get_vocab_size() == 320
    assert [tokenizer.token_to_id(token) for token in ("<|pad|>", "<|eos|>")] == [0, 1]
    for text in ("\x00\x7f\n\t  never seen: ж 漢 🦊 \u202e", random_text(rng, 99)):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(texts[0]).ids) < len(texts[0])  # it learned something
    assert [entry.name for entry in path.parent.iterdir()] == ["tok.json"]


def test_it_is_deterministic(tmp_path, rng):
    source = write_jsonl(tmp_path / "a.jsonl", [random_text(rng, 60) for _ in range(80)])
    first, second = run(source, tmp_path / "1.json"), run(source, tmp_path / "2.json")
    assert first.read_bytes() == second.read_bytes()


def test_little_text_gives_fewer_tokens_and_says_so(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    run(path, tmp_path / "tok.json", "--vocab-size 5000")
    assert "only 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--vocab-size 257", "it must be at least 258"),
        ("--text-key body", "a.jsonl, line 1: no key 'body'"),
    ],
)
def test_mistakes_end_in_one_sentence(tmp_path, fails, options, message):
    path = write_jsonl(tmp_path / "a.jsonl", ["abc"])
    assert message in fails(lambda: run(path, tmp_path / "tok.json", options))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]
    assert "is a directory" in fails(lambda: run(path, tmp_path))
    assert "one of the inputs" in fails(lambda: run(path, path))
    assert path.read_text("utf-8").startswith('{"text"')


def test_blank_files_are_skipped(tmp_path, capsys, fails):
    (tmp_path / "blank.txt").write_text("\n", "utf-8")
    (tmp_path / "text.txt").write_text("a b", "utf-8")
    output = ("--output", str(tmp_path / "tok.json"), "--vocab-size", "258")
    files = [str(tmp_path / name) for name in ("blank.txt", "text.txt")]
    train_tokenizer.main(["--input-files", *files, *output])
    assert "blank.txt" in capsys.readouterr().out
    (tmp_path / "tok.json").unlink()
    assert "blank.txt" in fails(lambda: train_tokenizer.main(["--input-files", files[0], *output]))
    assert not (tmp_path / "tok.json").exists()
