"""What inspect_corpus says of a corpus is what was put into it."""

import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import random_text, write_jsonl
from seeds import draw_rng
from tokenizers import Tokenizer

from dataset import build_text_dataset
from dataset.common import IGNORE_LABEL_ID, DatasetMetadata, token_byte_lengths
from dataset.inspect_corpus import main
from dataset.output import corpus_statistics
from dataset.output.corpus_statistics import measure, quantiles
from dataset.output.corpus_views import END, format_row
from tests.stream_tools import EOS, PAD, S, write_corpus, write_trm
from utils.corpus.corpora import Corpora


@pytest.fixture
def shows(capsys: pytest.CaptureFixture[str]):
    """Run the command; gives what it prints."""

    def run(*arguments: object) -> str:
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def corpus(build, rng, tmp_path: Path) -> Path:
    """Two domains, both splits, rows of 16 tokens."""
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [random_text(rng, 30) for _ in range(40)])
        for name in ("poems", "lists")
    ]
    return build(*files, options="--seq-len 16 --train-ratio 0.7 --min-iterations 2")


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [16, 11, 3])
@pytest.mark.parametrize("chunk", [16, 48, 1 << 20])
def test_documents_are_found_again_in_the_rows(
    stride: int, chunk: int, build, rng, tokenizer_json: Path, tmp_path: Path, monkeypatch
):
    """Documents go on from row to row and from chunk to chunk; windows may overlap."""
    texts = {
        name: [random_text(rng, rng.randrange(1, 60)) for _ in range(30)] for name in ("a", "b")
    }
    texts = {name: list(dict.fromkeys(each)) for name, each in texts.items()}
    files = [write_jsonl(tmp_path / f"{name}.jsonl", each) for name, each in texts.items()]
    folder = build(*files, options=f"--seq-len 16 --stride {stride} --train-ratio 1 --dedup none")
    monkeypatch.setattr(corpus_statistics, "CHUNK_TOKENS", chunk)
    byte_lengths = token_byte_lengths(folder / "tokenizer.json")
    found = measure(Corpora([str(folder)], "train"), byte_lengths, overlap=16 - stride)
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    lengths = {
        name: Counter(len(tokenizer.encode(text).ids) + 1 for text in each)
        for name, each in texts.items()
    }
    assert found.lengths == lengths["a"] + lengths["b"] and found.unended == 0
    assert {name: figures.documents for name, figures in found.domains.items()} == {
        name: len(each) for name, each in texts.items()
    }
    if stride == 16:
        assert found.total.text_bytes == sum(len(t.encode()) for t in texts["a"] + texts["b"])


def test_figures_are_those_of_the_arrays(corpus: Path):
    opened = Corpora([str(corpus)], "train")
    found = measure(opened)
    rows = opened.rows(np.arange(opened.num_rows))
    meta = opened.metadata
    assert found.total.rows == len(rows["inputs"])
    assert found.total.tokens == meta.tokens
    assert found.scored == (rows["labels"] != IGNORE_LABEL_ID).sum()
    assert found.budgets == Counter(rows["iteration_targets"].tolist())
    assert found.filled.sum() == found.total.rows
    assert found.filled @ np.arange(17) == meta.tokens
    assert found.token_ids[meta.pad_id] == rows["inputs"].size - meta.tokens
    for index, name in enumerate(opened.domains):
        assert found.domains[name].rows == (rows["domain_ids"] == index).sum()


def test_answers_that_were_cut_off_are_not_documents(tokenizer_json: Path, tmp_path: Path):
    examples = [{"prompt": "the fox", "response": "jumps " * n} for n in (1, 2, 3, 80, 90)]
    file = tmp_path / "qa.jsonl"
    file.write_text("".join(json.dumps(example) + "\n" for example in examples), "utf-8")
    build_text_dataset.main(
        [
            *("--tokenizer-json", str(tokenizer_json), "--input-files", str(file)),
            *("--output-dir", str(tmp_path / "qa"), "--train-ratio", "1", "--dedup", "none"),
            *("--max-context-tokens", "16", "--max-response-tokens", "20"),
        ]
    )
    found = measure(Corpora([str(tmp_path / "qa")], "train"))
    assert (found.total.documents, found.unended) == (3, 2)
    assert found.lengths.total() == 3


@pytest.mark.parametrize("chunk", [S, 2 * S, 3 * S])
def test_an_eos_that_is_only_a_label_ends_its_document(chunk: int, tmp_path: Path, monkeypatch):
    inputs = np.arange(2, 2 + 3 * S, dtype=np.uint8).reshape(3, S)  # the second goes on as third
    labels = np.append(inputs.ravel()[1:], EOS).reshape(3, S)
    labels[0, -1] = EOS
    write_corpus(tmp_path / "c", rows=3, arrays={"inputs": inputs, "labels": labels})
    monkeypatch.setattr(corpus_statistics, "CHUNK_TOKENS", chunk)
    found = measure(Corpora([str(tmp_path / "c")], "train"))
    assert found.lengths == Counter([S + 1, 2 * S + 1]) and found.unended == 0


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch):
    rows, width = 4000, 12
    write_corpus(tmp_path / "c", rows=rows)
    opened = Corpora([str(tmp_path / "c")], "train")
    monkeypatch.setattr(corpus_statistics, "CHUNK_TOKENS", 50 * width)
    measure(opened)  # imports and caches
    tracemalloc.start()
    measure(opened)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < rows * width * 4  # inputs alone, as the reader gives them


def test_quantiles_are_values_that_occur():
    values = draw_rng().integers(1, 500, 997)
    shares = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    expected = np.quantile(values, shares, method="inverted_cdf").tolist()
    assert quantiles(Counter(values.tolist()), shares) == expected


# --- what is printed ------------------------------------------------------------------------------


def test_both_splits_are_shown_within_a_hundred_columns(corpus: Path, shows):
    output = shows(corpus, "--rows", 2)
    assert max(map(len, output.splitlines())) <= 100
    for split in ("train", "test"):
        meta = DatasetMetadata.model_validate_json(
            (corpus / split / "all" / "dataset.json").read_bytes()
        )
        assert f"{split}: {meta.total_puzzles:,} rows, {meta.tokens:,} tokens" in output
    assert "poems" in output and "14 files verified" in output
    assert output.count("  row ") == 4


def test_one_split(corpus: Path, shows):
    output = shows(corpus, "--split", "test")
    assert "\ntest: " in output and "\ntrain: " not in output


def test_the_seed_decides_which_rows(corpus: Path, shows):
    def rows(seed: int) -> list[str]:
        lines = shows(corpus, "--seed", seed, "--split", "train").splitlines()
        return [line for line in lines if line.startswith("  row ")]

    assert rows(1) == rows(1)
    assert len({tuple(rows(seed)) for seed in range(6)}) > 1


def test_no_rows_are_wanted(corpus: Path, shows, fails):
    assert "  row " not in shows(corpus, "--rows", 0)
    assert "--rows is -1" in fails(lambda: main([str(corpus), "--rows", "-1"]))


def test_puzzles_in_the_layout_of_trm(tmp_path: Path, shows):
    write_trm(tmp_path / "p", [[2, 3], [4]], sets=("all", "hard"))
    (tmp_path / "p" / "identifiers.json").write_text(
        json.dumps(["<blank>", "x", "y", "z"]), "utf-8"
    )
    output = shows(tmp_path / "p", "--png", tmp_path / "p.png")
    assert "no eos" in output and "all 9, hard 9" in output and "labels" in output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_builder_noted(corpus: Path, shows):
    path = corpus / "build_report.json"
    report = json.loads(path.read_bytes())
    report["skipped"] = {"duplicates": 1234, "filters": {"too_short": 5}, "none": 0, "x": "y"}
    report["seconds"] = {"reading": 1.25, "parts": {"tokenizing": 2}}
    report["options"]["something_new"] = [1, 2]
    path.write_text(json.dumps(report), "utf-8")
    output = shows(corpus)
    assert "1,234 duplicates, 5 filters.too short" in output
    assert "reading 1.2" in output and "parts.tokenizing 2.0" in output
    assert "something_new=[1, 2]" in output


@pytest.mark.parametrize(
    "report",
    [None, {}, [], {"options": None, "skipped": 3, "inputs": "x", "seconds": "long", "more": {}}],
)
def test_any_report_will_do(corpus: Path, shows, report):
    path = corpus / "build_report.json"
    path.unlink()
    if report is not None:
        path.write_text(json.dumps(report), "utf-8")
    assert "\ntrain: " in shows(corpus)


def test_an_empty_split_is_named(build, rng, tmp_path: Path, shows):
    texts = write_jsonl(tmp_path / "x.jsonl", [random_text(rng, 30) for _ in range(5)])
    folder = build(texts, options="--seq-len 16 --train-ratio 1")
    assert "test: no rows" in shows(folder)


def test_a_corpus_behind_a_url(corpus: Path, shows, tmp_path: Path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setenv("ATHENA_CACHE", str(tmp_path / "cache"))
    output = shows(f"file://{corpus}")
    assert output.startswith(f"file://{corpus}\n") and str(tmp_path / "cache") in output


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(corpus: Path):
    command = f"{sys.executable} -m dataset.inspect_corpus {corpus} --rows 500"
    done = subprocess.run(
        f"set -o pipefail; {command} | head -1",
        shell=True,
        executable="/bin/bash",
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{corpus}\n", "")


def test_what_is_no_corpus(tmp_path: Path, fails):
    assert "directory" in fails(lambda: main([str(tmp_path / "none")]))
    assert "no split" in fails(lambda: main([str(tmp_path)]))


# --- rows as text --------------------------------------------------------------------------------


def lines_of(tokens: list[int], ignored: set[int] = frozenset(), seq_len: int = 8, width: int = 80):
    """Lines of a causal row; positions `ignored` are not scored. Token n is the n-th letter."""
    real = len(tokens)
    inputs = np.array([*tokens, *[PAD] * (seq_len - real)], np.int32)
    labels = np.append(inputs[1:], PAD)
    labels[real - 1 :] = IGNORE_LABEL_ID
    labels[inputs == EOS] = IGNORE_LABEL_ID  # as the builders do: nothing predicts what follows
    labels[[position - 1 for position in ignored]] = IGNORE_LABEL_ID
    metadata = DatasetMetadata.model_construct(pad_id=PAD, eos_id=EOS, seq_len=seq_len)
    letters = " ?abcdefghijklmnop\x1b\n"
    return format_row(inputs, labels, metadata, lambda ids: "".join(letters[i] for i in ids), width)


def test_document_borders_and_padding_are_shown():
    assert lines_of([2, 3, EOS, 4, 5]) == ["ab", END, "cd", "(3 positions of padding)"]
    assert lines_of([2, 3, 4, 5, 6, 7, 8, EOS]) == ["abcdefg", END]


def test_an_eos_that_is_only_a_label_ends_the_document():
    metadata = DatasetMetadata.model_construct(pad_id=PAD, eos_id=EOS, seq_len=2)
    lines = format_row(np.array([2, 3]), np.array([3, EOS]), metadata, lambda ids: str(ids), 80)
    assert lines == ["[2, 3]", END]


def test_what_no_label_scores_is_marked():
    assert lines_of([2, 3, 4, 5, EOS], ignored={1, 2}) == [
        "⟦abc⟧d",
        END,
        "(3 positions of padding)",
    ]


def test_what_a_terminal_would_act_on_is_replaced():
    assert lines_of([2, 18, 3, 19, 4])[:2] == ["a�b", "c"]


def test_long_rows_lose_their_middle():
    tokens = [*([2, EOS] * 20), *[3] * 8]
    lines = lines_of(tokens, seq_len=48)
    assert lines[0] == "a" and lines[-1] == "bbbbbbbb"
    assert any("more lines" in line and "document ends" in line for line in lines)
    assert len(lines) < 20


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train/all/labels.npy", "test/all/inputs.npy", "tokenizer.json"])
def test_damage_is_named_and_ends_with_code_1(corpus: Path, name: str, capsys, shows):
    path = corpus / name
    data = bytearray(path.read_bytes())
    if name == "tokenizer.json":
        data += b"\n"
    else:
        data[128] ^= 1  # the first token's lowest bit: a valid file still
    path.write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        main([str(corpus)])
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert str(path) in captured.err and captured.err.count("error:") == 1
    assert "\ntrain: " in shows(corpus, "--no-verify")


def test_all_wrong_files_are_named(corpus: Path, capsys):
    for name in ("inputs.npy", "labels.npy"):
        (corpus / "train" / "all" / name).unlink()
    with pytest.raises(SystemExit) as stop:
        main([str(corpus)])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "inputs.npy" in error and "labels.npy" in error


def test_the_figure(corpus: Path, shows, tmp_path: Path, fails):
    assert "wrote" in shows(corpus, "--png", tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(b"\x89PNG")
    wrong = tmp_path / "x.nothing"
    with pytest.raises(SystemExit):
        main([str(corpus), "--png", str(wrong)])
    assert not wrong.exists()
