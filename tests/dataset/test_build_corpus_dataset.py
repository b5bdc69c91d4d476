"""The corpus builder end to end, on real files."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dataset import build_corpus_dataset, pipeline
from dataset.common import token_byte_lengths, verify_arrays
from dataset.tokens.tokenization import TextTokenizer
from dataset.train_tokenizer import train_tokenizer
from tests.dataset.conftest import (
    file_bytes,
    iteration_target,
    random_text,
    read_split,
    write_jsonl,
)


def documents_of(corpus, split) -> dict[str, list[str]]:
    """Documents by domain, decoded again from rows that do not overlap."""
    data = read_split(corpus, split)
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    found = {}
    for index, domain in enumerate(data.metadata.domains):
        rows = np.flatnonzero(data.domain_ids == index)
        tokens: list[int] = []
        for row in rows:
            tokens += [int(t) for t in data.inputs[row] if t != data.metadata.pad_id]
        if len(rows) and tokens[-1] != data.metadata.eos_id:
            tokens.append(int(data.labels[rows[-1]][-1]))  # the last eos may be a label only
        texts, start = [], 0
        for place, token in enumerate(tokens):
            if token == data.metadata.eos_id:
                texts.append(tokenizer.decode(tokens[start:place], skip_special_tokens=False))
                start = place + 1
        assert start == len(tokens)
        if texts:
            found[domain] = texts
    return found


def distinct_texts(rng, count, words=30) -> list[str]:
    return [f"{index} {random_text(rng, rng.randrange(1, words))}" for index in range(count)]


def test_rows_give_the_documents_back(build, tmp_path, rng):
    a, b = distinct_texts(rng, 60), [f"b{text}" for text in distinct_texts(rng, 40)]
    files = write_jsonl(tmp_path / "a.jsonl", a), write_jsonl(tmp_path / "b.jsonl", b)
    corpus = build(*files, options="--seq-len 23 --train-ratio 0.7")
    train, test = documents_of(corpus, "train"), documents_of(corpus, "test")
    for name, texts in (("a", a), ("b", b)):
        assert sorted(train[name] + test[name]) == sorted(texts)
        assert train[name] == [text for text in texts if text in set(train[name])]  # their order
        assert 5 < len(test[name]) < 35


def test_files_and_metadata(build, tmp_path, rng, tokenizer_json):
    corpus = build(
        write_jsonl(tmp_path / "a.jsonl", distinct_texts(rng, 80)),
        options="--seq-len 20 --train-ratio 0.6 --min-iterations 3 --max-iterations 31",
    )
    lengths = token_byte_lengths(corpus / "tokenizer.json")
    report = json.loads((corpus / "build_report.json").read_text("utf-8"))
    assert json.loads((corpus / "identifiers.json").read_text("utf-8")) == ["<blank>", "a"]
    for split in ("train", "test"):
        data = read_split(corpus, split)
        metadata, rows = data.metadata, len(data.inputs)
        verify_arrays(corpus / split / "all", metadata)
        assert data.inputs.shape == data.labels.shape == (rows, 20)
        assert data.inputs.dtype == data.labels.dtype == np.uint16
        assert (metadata.ignore_label_id, metadata.vocab_size) == (65535, 300)
        assert (metadata.total_groups, metadata.total_puzzles) == (rows, rows)
        assert data.puzzle_indices.tolist() == data.group_indices.tolist() == [*range(rows + 1)]
        assert set(data.puzzle_identifiers) == {1} and metadata.num_puzzle_identifiers == 2
        real = data.inputs != metadata.pad_id
        assert metadata.tokens == real.sum()
        scored = data.labels[data.labels != 65535]
        assert metadata.scored_bytes == lengths[scored].sum()
        counts = report["splits"][split]["domains"]["a"]
        assert counts["scored_tokens"] == len(scored)
        assert counts["documents"] == metadata.documents
        assert (data.labels[data.inputs == metadata.eos_id] == 65535).all()
        for row, target in zip(data.inputs, data.iteration_targets, strict=True):
            tokens = row[row != metadata.pad_id]
            assert target == iteration_target(len(np.unique(tokens)) / len(tokens), 3, 31)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_every_test_token_is_scored_once(build, tmp_path, rng, stride, tokenizer_json):
    texts = distinct_texts(rng, 25)
    corpus = build(
        write_jsonl(tmp_path / "a.jsonl", texts),
        options=f"--seq-len 16 --stride {stride} --train-ratio 0",
    )
    data = read_split(corpus, "test")
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    stream = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        stream.append([*ids, data.metadata.eos_id])
    expected = stream[0][1:] + [token for document in stream[1:] for token in document[1:]]
    assert data.labels[data.labels != data.metadata.ignore_label_id].tolist() == expected


def test_split_is_by_document_and_by_seed_alone(build, tmp_path, rng):
    texts = distinct_texts(rng, 200, words=8)
    options = "--seq-len 16 --train-ratio 0.5 --dedup none"
    doubled = texts + texts
    rng.shuffle(doubled)
    first = build(write_jsonl(tmp_path / "a.jsonl", doubled), options=options, out="one")
    train, test = (set(documents_of(first, split)["a"]) for split in ("train", "test"))
    assert not train & test and train | test == set(texts)
    assert sum(map(len, documents_of(first, "train").values())) == 2 * len(train)

    alone = write_jsonl(tmp_path / "a.jsonl", texts[:50])
    second = build(alone, options=f"{options} --workers 1", out="two")
    assert set(documents_of(second, "train")["a"]) == train & set(texts[:50])
    third = build(alone, options=f"{options} --seed 1", out="three")
    assert documents_of(third, "train") != documents_of(second, "train")


def test_batch_size_changes_nothing(build, tmp_path, rng, monkeypatch):
    a = write_jsonl(tmp_path / "a.jsonl", distinct_texts(rng, 50))
    b = write_jsonl(tmp_path / "b.jsonl", distinct_texts(rng, 50))
    c = write_jsonl(tmp_path / "c.jsonl", [random_text(rng, 500) for _ in range(5)])
    options = "--seq-len 16 --stride 12 --train-ratio 0.8 --domain-labels x y x"
    whole = file_bytes(build(a, b, c, options=options, out="whole"))
    for size in (1, 700):
        monkeypatch.setattr("dataset.input.documents.BATCH_BYTES", size)
        monkeypatch.setattr("dataset.input.documents.BATCH_DOCUMENTS", 3)
        monkeypatch.setattr("dataset.packing.windows.BLOCK_TOKENS", size)
        monkeypatch.setattr("dataset.tokens.encoders.PIECE_CHARS", size)
        monkeypatch.setattr("dataset.tokens.encoders.PART_CHARS", 7 * size)
        assert file_bytes(build(a, b, c, options=options, out=f"parts{size}")) == whole


def test_cutting_long_texts_keeps_their_tokens(tmp_path, monkeypatch, rng):
    odd = ["\n\n  a\n b  \tc\r\nd's 'll \u00a0e\u2003 f\x1c\ng 12 34...\n?! \n"] * 40
    text = " ".join([random_text(rng, 400), *odd])
    # Trained on this text, so that runs of white space are tokens which a cut could break.
    train_tokenizer(iter([text] * 3), 400).save(str(tmp_path / "tok.json"))
    tokenizer = TextTokenizer(tmp_path / "tok.json")
    whole = tokenizer.encode([text])[0]
    for size in (1, 2, 3, 50):
        monkeypatch.setattr("dataset.tokens.encoders.PIECE_CHARS", size)
        monkeypatch.setattr("dataset.tokens.encoders.PART_CHARS", 7 * size)
        assert tokenizer.encode([text])[0].tolist() == whole.tolist()
        assert size > 3 or len(tokenizer.encoder._cut(text)) > 100


def test_text_that_spells_a_special_token(build, tmp_path):
    texts = ["<|eos|>", "before <|eos|> after <|pad|><|eos|>", "plain"]
    corpus = build(write_jsonl(tmp_path / "a.jsonl", texts), options="--seq-len 64 --train-ratio 1")
    assert documents_of(corpus, "train") == {"a": texts}
    data = read_split(corpus, "train")
    assert (data.inputs == data.metadata.eos_id).sum() == 3


def test_domains_and_splits_never_share_a_row(build, tmp_path, rng):
    files = []
    for name in "abc":  # each domain writes one letter only
        texts = [name * rng.randrange(1, 9) for _ in range(300)]
        files.append(write_jsonl(tmp_path / f"{name}.jsonl", texts))
    corpus = build(*files, options="--seq-len 6 --train-ratio 0.5 --dedup none")
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    for split in ("train", "test"):
        data = read_split(corpus, split)
        assert set(data.domain_ids) == {0, 1, 2}
        assert (data.puzzle_identifiers == data.domain_ids + 1).all()
        for row, domain in zip(data.inputs, data.domain_ids, strict=True):
            assert set(tokenizer.decode(row.tolist())) <= {"abc"[domain]}


@pytest.mark.parametrize("kind", ["none", "sequence"])
def test_identifiers(build, tmp_path, rng, kind):
    path = write_jsonl(tmp_path / "a.jsonl", distinct_texts(rng, 60))
    corpus = build(path, options=f"--seq-len 16 --train-ratio 0.6 --identifiers {kind}")
    train, test = read_split(corpus, "train"), read_split(corpus, "test")
    names = json.loads((corpus / "identifiers.json").read_text("utf-8"))
    assert set(test.puzzle_identifiers) == {0}
    rows = len(train.inputs)
    expected = [0] * rows if kind == "none" else list(range(1, rows + 1))
    assert train.puzzle_identifiers.tolist() == expected
    assert train.metadata.num_puzzle_identifiers == test.metadata.num_puzzle_identifiers
    assert (
        len(names)
        == len(set(names))
        == train.metadata.num_puzzle_identifiers
        == (1 if kind == "none" else rows + 1)
    )


def test_duplicates_are_left_out_and_counted(build, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["one two", "three", "one two", " ", "one two"])
    corpus = build(path, options="--seq-len 8 --train-ratio 1")
    assert documents_of(corpus, "train") == {"a": ["one two", "three"]}
    skipped = json.loads((corpus / "build_report.json").read_text("utf-8"))["skipped"]
    assert (skipped["duplicates"], skipped["blank_documents"]) == (2, 1)


def test_lines_taken_for_documents_are_pointed_out(build, tmp_path, capsys):
    """The default cuts a text file into lines and drops the repeated ones: one must be told."""
    for ending, text in ((".txt", "one\ntwo\n"), (".jsonl", '{"text": "one two"}\n')):
        path = tmp_path / f"a{ending}"
        path.write_text(text, "utf-8")
        for documents in ("line", "file"):
            options = f"--seq-len 8 --train-ratio 1 --documents {documents} --overwrite"
            build(path, options=options)
            told = "--documents file keeps files whole" in capsys.readouterr().out
            assert told == (ending == ".txt" and documents == "line")


@pytest.mark.parametrize("more", ["", "--dedup near"])
def test_blank_files_are_skipped_with_one_note(build, tmp_path, capsys, fails, more):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("one\n\ntwo", "utf-8")
    for number, content in enumerate(["", "\n", " \t\n\n", "\ufeff\n"]):
        (texts / f"blank{number}.txt").write_text(content, "utf-8")
    (texts / "z.jsonl").write_text('{"text": "three"}\n', "utf-8")
    corpus = build(texts, options=f"--train-ratio 1 --seq-len 16 {more}")
    (note,) = (line for line in capsys.readouterr().out.splitlines() if "blank0.txt" in line)
    assert " 4 " in note and "blank0.txt" in note and "blank3.txt" not in note
    report = json.loads((corpus / "build_report.json").read_bytes())
    assert report["splits"]["train"]["total"]["documents"] == 3
    blank = list(texts.glob("blank*"))
    message = fails(lambda: build(*blank, out="none"))
    assert "no document" in message and "blank1.txt" in message
    assert not (tmp_path / "none").exists()


def test_documents_are_filtered_by_length(build, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "bb", "ccc", "dddd"])
    corpus = build(path, options="--seq-len 8 --train-ratio 1 --min-chars 2 --max-chars 3")
    assert documents_of(corpus, "train") == {"a": ["bb", "ccc"]}
    report = json.loads((corpus / "build_report.json").read_text("utf-8"))
    assert report["skipped"]["documents_by_length"] == 2


@pytest.mark.parametrize("dedup", ["exact", "none"])
def test_test_files_are_wholly_test(build, tmp_path, dedup):
    a = write_jsonl(tmp_path / "a.jsonl", ["shared", "only a"])
    b = write_jsonl(tmp_path / "b.jsonl", ["only b", "shared"])
    extra = write_jsonl(tmp_path / "extra.jsonl", ["only extra"])
    options = f"--seq-len 8 --dedup {dedup} --test-files b.jsonl {extra}"
    corpus = build(a, b, options=options)
    # The held-out copy wins, and without --train-ratio nothing else is test.
    assert documents_of(corpus, "train") == {"a": ["only a"]}
    assert documents_of(corpus, "test") == {"b": ["only b", "shared"], "extra": ["only extra"]}
    # No training row carries b's or extra's identifier, so their rows carry none.
    assert set(read_split(corpus, "test").puzzle_identifiers) == {0}
    assert set(read_split(corpus, "train").puzzle_identifiers) == {1}


def test_a_path_holds_out_that_file_and_a_pattern_all_of_its_name(build, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    for name in ("x/data.jsonl", "data.jsonl", "c.jsonl"):
        write_jsonl(Path(name), [f"in {name}"])
    files = ("x/data.jsonl", "data.jsonl", "c.jsonl")
    labels = "--seq-len 8 --domain-labels one two three"
    corpus = build(*files, options=f"{labels} --test-files data.jsonl", out="path")
    assert documents_of(corpus, "test") == {"two": ["in data.jsonl"]}
    corpus = build(*files, options=f"{labels} --test-files dat?.jsonl", out="pattern")
    assert documents_of(corpus, "test").keys() == {"one", "two"}


def test_a_name_that_is_also_a_pattern_holds_out_the_file_of_that_name(build, tmp_path):
    for name in ("data[1].jsonl", "data1.jsonl"):
        write_jsonl(tmp_path / name, [f"text of {name}"])
    corpus = build(tmp_path, options="--test-files data[1].jsonl")
    assert documents_of(corpus, "test") == {"data[1]": ["text of data[1].jsonl"]}


def test_an_option_that_is_given_twice_adds_to_the_first(build, tmp_path):
    a, b, c = (write_jsonl(tmp_path / f"{name}.jsonl", [f"in {name}"]) for name in "abc")
    options = f"--input-files {b} --input-files {c} --domain-labels x --domain-labels y z"
    corpus = build(a, options=f"{options} --train-ratio 1 --test-files {b} --test-files {c}")
    assert documents_of(corpus, "train") == {"x": ["in a"]}
    assert documents_of(corpus, "test") == {"y": ["in b"], "z": ["in c"]}


def test_domain_labels(build, tmp_path, rng, fails):
    (tmp_path / "many").mkdir()
    for name in ("a", "b"):
        write_jsonl(tmp_path / "many" / f"{name}.jsonl", [f"in {name}"])
    c = write_jsonl(tmp_path / "c.jsonl", ["in c"])
    many, base = tmp_path / "many", "--seq-len 8 --train-ratio 1 --domain-labels"
    corpus = build(many, c, options=f"{base} x y", out="one")
    assert documents_of(corpus, "train") == {"x": ["in a", "in b"], "y": ["in c"]}
    corpus = build(many, c, options=f"{base} x y z", out="two")
    assert documents_of(corpus, "train") == {"x": ["in a"], "y": ["in b"], "z": ["in c"]}
    corpus = build(many, options=f"{base} x --test-files {c}", out="three")
    assert documents_of(corpus, "test") == {"x": ["in c"]}
    message = fails(lambda: build(many, c, options=f"{base} x y z w", out="four"))
    assert "--domain-labels has 4" in message
    # With the name of the blank identifier a model would be asked under one that was not trained.
    assert "<blank>" in fails(lambda: build(c, options=f"{base} <blank>", out="four"))


def test_an_empty_test_split_says_so(build, tmp_path, capsys):
    corpus = build(
        write_jsonl(tmp_path / "a.jsonl", ["one two"]), options="--seq-len 8 --train-ratio 1"
    )
    assert "the test split is empty" in capsys.readouterr().out
    data = read_split(corpus, "test")
    assert data.inputs.shape == (0, 8)
    assert data.puzzle_indices.tolist() == data.group_indices.tolist() == [0]
    assert (data.metadata.total_groups, data.metadata.documents) == (0, 0)


def test_what_may_not_be_meant_is_said(build, tmp_path, capsys):
    a, b = (write_jsonl(tmp_path / f"{name}.jsonl", ["one two"]) for name in "ab")
    build(a, b, options="--seq-len 1000 --train-ratio 1")
    said = capsys.readouterr().out
    assert "no training rows are of domain b" in said and "99% of the training data is" in said
    build(a, options="--seq-len 4 --train-ratio 0", out="none")
    assert "the training split is empty" in capsys.readouterr().out
    (tmp_path / "books").mkdir()
    for number in range(20):
        write_jsonl(tmp_path / "books" / f"{number}.jsonl", [f"book {number}"])
    build(tmp_path / "books", options="--seq-len 64 --train-ratio 1", out="books_apart")
    said = capsys.readouterr().out
    assert "20 domains" in said and "--domain-labels" in said and "--seq-len" not in said
    build(tmp_path / "books", options="--seq-len 8 --domain-labels books", out="one")
    assert "--domain-labels" not in capsys.readouterr().out


def test_a_last_window_is_padded_not_dropped(build, tmp_path):
    corpus = build(write_jsonl(tmp_path / "a.jsonl", ["a"]), options="--seq-len 8 --train-ratio 1")
    data = read_split(corpus, "train")
    assert data.inputs.shape == (1, 8)
    assert (data.inputs[0, 2:] == data.metadata.pad_id).all()
    assert data.labels[0, 0] == data.metadata.eos_id
    assert (data.labels[0, 1:] == data.metadata.ignore_label_id).all()


def test_other_tokenizers_get_eos_and_pad(tmp_path, build, fails):
    tokenizer = Tokenizer(models.BPE(dropout=0.5))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    tokenizer.train_from_iterator(["the quick the quick brown"] * 9, trainer)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    size = tokenizer.get_vocab_size()
    tokenizer.save(str(tmp_path / "own.json"))
    texts = ["the quick brown <|endoftext|> fox", "the the the"]
    options = f"--seq-len 64 --train-ratio 1 --tokenizer-json {tmp_path}/own.json"
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = build(path, options=options, out="one")
    metadata = read_split(corpus, "train").metadata
    assert (metadata.eos_id, metadata.pad_id, metadata.vocab_size) == (0, size, size + 1)
    saved = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    assert saved.token_to_id("<|pad|>") == size and saved.get_vocab_size() == size + 1
    assert documents_of(corpus, "train") == {"a": texts}  # neither truncated nor padded
    again = file_bytes(build(path, options=options, out="two"))
    assert again == file_bytes(corpus)  # no dropout

    named = build(path, options=f"{options} --pad-token <|endoftext|>", out="three")
    metadata = read_split(named, "train").metadata
    assert (metadata.pad_id, metadata.eos_id) == (0, size)
    both = f"{options} --pad-token <|endoftext|> --eos-token <|endoftext|>"
    assert "--pad-token are both" in fails(lambda: build(path, options=both, out="four"))
    typo = f"{options} --eos-token <|eof|>"
    assert "'<|eof|>' is not in the vocabulary" in fails(
        lambda: build(path, options=typo, out="four")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seq-len 8 --stride 9", "--stride is 9"),
        ("--seq-len 0", "--seq-len is 0"),
        ("--train-ratio 1.5", "--train-ratio is 1.5"),
        ("--min-iterations 9 --max-iterations 8", "--min-iterations 9 and --max-iterations 8"),
        (
            "--pack bestfit --stride 4 --seq-len 8",
            "--stride 4 cannot be combined with --pack bestfit",
        ),
        ("--quality gophr", "gophr"),
        ("--max-bad-lines -1", "--max-bad-lines is -1"),
        ("--min-chars 9 --max-chars 8", "--min-chars 9 and --max-chars 8"),
        ("--test-files absent.txt", "'absent.txt' does not exist"),
        ("--test-files a.jsonl", "training split"),
        ("--text-key body", "a.jsonl, line 1: no key 'body'"),
        ("--tokenizer-json absent.json", "cannot read --tokenizer-json absent.json"),
        ("--workers 0", "--workers is 0"),
        ("--min-chars -1", "--min-chars is -1"),
        ("--save-every -1", "--save-every is -1"),
        ("--output-dir ~no_such_user/corpus", "~no_such_user/corpus"),
        ("--save-every nan", "--save-every is nan"),
        ("--seq-len 1e3", "argument --seq-len: invalid int value: '1e3'"),
        ("--format csv", "--format csv is unknown"),
    ],
)
def test_mistakes_end_in_one_sentence(build, tmp_path, fails, options, message):
    path = write_jsonl(tmp_path / "a.jsonl", ["one two"])
    before = sorted(tmp_path.iterdir())
    assert message in fails(lambda: build(path, options=options))
    assert sorted(tmp_path.iterdir()) == before


def test_a_bad_last_line_leaves_nothing_behind(build, tmp_path, fails, rng):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": text}) + "\n" for text in distinct_texts(rng, 100)]
    path.write_text("".join(good), "utf-8")
    corpus = build(path, options="--seq-len 8")
    before = file_bytes(tmp_path / "corpus")
    path.write_text("".join([*good, "{"]), "utf-8")
    fails(lambda: build(path, options="--seq-len 8 --overwrite"))
    assert file_bytes(corpus) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.jsonl", "corpus"]


def test_a_crash_midway_leaves_nothing_behind(build, tmp_path, rng, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", distinct_texts(rng, 100))
    monkeypatch.setattr("dataset.input.documents.BATCH_BYTES", 100)
    calls = iter(range(5))
    original = pipeline.iteration_targets

    def break_down(*arguments):
        if next(calls) == 4:
            raise MemoryError
        return original(*arguments)

    monkeypatch.setattr(pipeline, "iteration_targets", break_down)
    with pytest.raises(MemoryError):
        build(path, options="--seq-len 8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_second_run_refuses_unless_told(build, tmp_path, fails):
    path = write_jsonl(tmp_path / "a.jsonl", ["one two"])
    first = file_bytes(build(path, options="--seq-len 8"))
    write_jsonl(path, ["three four five"])
    assert "--overwrite" in fails(lambda: build(path, options="--seq-len 8"))
    assert file_bytes(tmp_path / "corpus") == first
    build(path, options="--seq-len 8 --overwrite")
    assert documents_of(tmp_path / "corpus", "train") == {"a": ["three four five"]}


@pytest.mark.slow
def test_the_documented_command(tmp_path, tokenizer_json, rng):
    from backports import zstd

    texts = distinct_texts(rng, 20)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "c4.jsonl.zst").write_bytes(zstd.compress(lines.encode()))
    (tmp_path / "github.txt.gz").write_bytes(gzip.compress(b"import os\nimport sys\n"))
    shutil.copy(tokenizer_json, tmp_path / "tok.json")
    command = (
        "-m dataset.build_corpus_dataset --tokenizer-json tok.json --input-files c4.jsonl.zst "
        "github.txt.gz --output-dir data/athena_base --seq-len 2048 --stride 2048 --format jsonl "
        "--text-key text"
    )
    repository = build_corpus_dataset.__file__.rsplit("/dataset/", 1)[0]
    environment = {"PYTHONPATH": repository, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, *command.split()], cwd=tmp_path, env=environment, check=True)
    corpus = tmp_path / "data" / "athena_base"
    assert documents_of(corpus, "train")["github"] == ["import os", "import sys"]
    failed = subprocess.run(
        [sys.executable, *command.split()],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
