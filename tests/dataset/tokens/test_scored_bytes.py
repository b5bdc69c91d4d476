"""Bytes behind the scored labels, where token ids do not tell them: both builders, all readers."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from dataset import build_text_dataset
from dataset.common import IGNORE_LABEL_ID, load_metadata, token_byte_lengths, verify_arrays
from evaluators.text import PerplexityEvaluator
from sequence_dataset import EvalStream
from tests.dataset.conftest import file_bytes, random_text, write_jsonl
from tests.dataset.tokenizer_variants import CASES, LOSSLESS, LOSSY, MARKED
from utils.corpus.corpora import Corpora
from utils.corpus.row_reader import RowReader

UNIGRAM, NOUNK = CASES / "unigram.json", CASES / "nounk.json"


@pytest.fixture
def build(build):
    """The builder with another tokenizer, given first."""

    def run(tokenizer: Path, *files: Path, options: str = "", out: str = "corpus") -> Path:
        return build(*files, options=f"{options} --tokenizer-json {tokenizer}", out=out)

    return run


def texts_for(tokenizer: Path, rng, count: int) -> list[str]:
    """Different texts; nothing is dropped from within a word, where the library's offsets err."""
    if tokenizer == UNIGRAM:
        return [f"{n} {random_text(rng, rng.randrange(1, 40))}" for n in range(count)]
    words = ["hello", "world", "foo", "bar", "zz", "42", "!", "日本", "lo", "hel"]
    texts = {" ".join(rng.choices(words, k=rng.randrange(6, 40))) for _ in range(2 * count)}
    return [f"hello {text}" for text in sorted(texts)[:count]]


def plain_tokens(tokenizer: Path, text: str) -> list[tuple[int, int]]:
    """Ids of a document with the bytes up to the next token, by a plain loop."""
    encoding = Tokenizer.from_file(str(tokenizer)).encode(text, add_special_tokens=False)
    if not encoding.ids:
        return [(1, 0)]
    starts = [0, *(start for start, _ in encoding.offsets[1:]), len(text)]
    sizes = [len(text[a:b].encode()) for a, b in pairwise(starts)]
    return [*zip(encoding.ids, sizes, strict=True), (1, 0)]  # 1: </s>


def sizes_of(corpus: Path, split: str = "test") -> np.ndarray:
    return np.load(corpus / split / "all" / "scored_bytes.npy")


@pytest.mark.parametrize("tokenizer", [UNIGRAM, NOUNK], ids=["unigram", "nounk"])
@pytest.mark.parametrize("stride", [16, 5, 1])
def test_each_row_has_the_bytes_of_its_scored_labels(build, tmp_path, rng, tokenizer, stride):
    texts = texts_for(tokenizer, rng, 25)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = build(tokenizer, path, options=f"--seq-len 16 --stride {stride} --train-ratio 0")
    stream = [token for text in texts for token in plain_tokens(tokenizer, text)]
    wanted, scored_to = [], 0
    for start in range(0, len(stream), stride):
        labels = range(max(start, scored_to) + 1, min(start + 17, len(stream)))
        labels = [place for place in labels if stream[place - 1][0] != 1]
        if start + 1 < len(stream) and labels:
            wanted.append(sum(stream[place][1] for place in labels))
        scored_to = min(start + 16, len(stream) - 1)
        if start + 17 > len(stream):
            break
    assert sizes_of(corpus).tolist() == wanted
    # In all: every byte of the text but those of each document's first token.
    whole = sum(len(text.encode()) - plain_tokens(tokenizer, text)[0][1] for text in texts)
    metadata = load_metadata(corpus / "test/all")
    assert sum(wanted) == whole == metadata.scored_bytes
    verify_arrays(corpus / "test/all", metadata)
    assert "scored_bytes.npy" in metadata.checksums


@pytest.mark.parametrize("tokenizer", [UNIGRAM, NOUNK], ids=["unigram", "nounk"])
@pytest.mark.parametrize(
    "options",
    ["", "--layout stream", "--pack bestfit", "--pack bestfit --layout stream --workers 1",
     "--dedup near", "--min-chars 60", "--stride 7 --layout stream --dedup near"],
)  # fmt: skip
def test_no_option_loses_a_byte(build, tmp_path, rng, tokenizer, options, monkeypatch):
    monkeypatch.setattr("dataset.input.documents.BATCH_BYTES", 900)
    texts = texts_for(tokenizer, rng, 60)
    files = [write_jsonl(tmp_path / f"{n}.jsonl", texts[n::3]) for n in range(3)]
    common = f"--seq-len 24 --train-ratio 0 --domain-labels x y x {options}"
    corpus = build(tokenizer, *files, options=common)
    report = json.loads((corpus / "build_report.json").read_bytes())["splits"]["test"]
    if "min" not in options and "near" not in options:
        for domain, own in (("x", texts[0::3] + texts[2::3]), ("y", texts[1::3])):
            whole = sum(len(text.encode()) - plain_tokens(tokenizer, text)[0][1] for text in own)
            assert report["domains"][domain]["scored_bytes"] == whole
            assert report["domains"][domain]["text_bytes"] == sum(len(t.encode()) for t in own)
    corpora = Corpora([str(corpus)], "test")
    rows = corpora.rows(np.arange(corpora.num_rows))
    for number, name in enumerate(corpora.domains):
        own = rows["scored_bytes"][rows["domain_ids"] == number]
        assert own.sum() == report["domains"][name]["scored_bytes"] > 0
    assert rows["scored_bytes"].sum() == corpora.metadata.scored_bytes


def test_layouts_and_batches_change_nothing(build, tmp_path, rng, monkeypatch):
    texts = texts_for(UNIGRAM, rng, 60)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    found = []
    for number, (size, layout) in enumerate([(1 << 20, "npy"), (500, "npy"), (500, "stream")]):
        monkeypatch.setattr("dataset.input.documents.BATCH_BYTES", size)
        options = f"--seq-len 16 --stride 9 --train-ratio 0.5 --layout {layout}"
        corpus = build(UNIGRAM, path, options=options, out=str(number))
        found.append([sizes_of(corpus, split).tolist() for split in ("train", "test")])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("options", ["", "--pack bestfit --layout stream", "--dedup near"])
def test_a_build_that_stopped_is_resumed(build, tmp_path, rng, options, monkeypatch, capsys):
    monkeypatch.setattr("dataset.input.documents.BATCH_BYTES", 3000)
    first = write_jsonl(tmp_path / "a.jsonl", texts_for(UNIGRAM, rng, 60))
    second = write_jsonl(tmp_path / "b.jsonl", texts_for(UNIGRAM, rng, 40)[::-1])
    second.write_text(second.read_text("utf-8") + "no json\n" + second.read_text("utf-8"), "utf-8")
    common = f"--seq-len 24 --train-ratio 0.5 --save-every 0 {options}"
    with pytest.raises(SystemExit):  # at the bad line, after much of it was saved
        build(UNIGRAM, first, second, options=common, out="cut")
    allowed = f"{common} --max-bad-lines 1"
    cut = build(UNIGRAM, first, second, options=f"{allowed} --resume", out="cut")
    whole = build(UNIGRAM, first, second, options=allowed, out="whole")
    assert file_bytes(cut) == file_bytes(whole)
    counts = [json.loads((c / "build_report.json").read_bytes())["splits"] for c in (cut, whole)]
    assert counts[0] == counts[1]


def test_what_is_unknown_or_lost_is_counted_and_named(build, tmp_path, capsys):
    text = "hello 42 wozrld"
    corpus = build(
        NOUNK, write_jsonl(tmp_path / "a.jsonl", [text]), options="--seq-len 8 --train-ratio 1"
    )
    total = json.loads((corpus / "build_report.json").read_bytes())["splits"]["train"]["total"]
    assert (total["unknown_tokens"], total["lost_bytes"]) == (0, 5)
    assert (total["text_bytes"], total["scored_bytes"]) == (15, 6)
    assert "15 bytes, 5 bytes are not" in capsys.readouterr().out
    path = write_jsonl(tmp_path / "b.jsonl", ["a 犬犬 </s>"])
    corpus = build(UNIGRAM, path, options="--seq-len 8 --train-ratio 1", out="b")
    total = json.loads((corpus / "build_report.json").read_bytes())["splits"]["train"]["total"]
    assert (total["unknown_tokens"], total["unknown_bytes"], total["lost_bytes"]) == (3, 9, 0)
    assert "3 unknown tokens replace 9 bytes" in capsys.readouterr().out


def test_three_documents_have_three_ends(build, tmp_path):
    lines = ["The text says </s> and <pad> here", "and [PAD] [SEP] also <unk> there", "plain"]
    (tmp_path / "lit.txt").write_text("\n".join(lines), encoding="utf-8")
    corpus = build(UNIGRAM, tmp_path / "lit.txt", options="--seq-len 128 --train-ratio 1")
    inputs = np.load(corpus / "train/all/inputs.npy")
    assert (inputs == 1).sum() == 3  # </s>
    real = inputs[inputs != 0]
    assert len(real) == np.flatnonzero(inputs[0] == 1)[-1] + 1  # padding stands at the end alone


def test_lossless_tokenizers_write_nothing_more(build, tmp_path, rng, capsys):
    LOSSLESS["byte level"]().save(str(tmp_path / "tok.json"))
    path = write_jsonl(tmp_path / "a.jsonl", [random_text(rng, 40) for _ in range(30)])
    corpus = build(tmp_path / "tok.json", path, options="--seq-len 16 --train-ratio 0.5")
    assert not list(corpus.rglob("scored_bytes*"))
    assert "cannot represent" not in capsys.readouterr().out
    lengths = np.append(token_byte_lengths(corpus / "tokenizer.json"), 0)
    labels = np.load(corpus / "test/all/labels.npy")
    scored = load_metadata(corpus / "test/all").scored_bytes
    assert scored == lengths.take(labels, mode="clip").sum()


@pytest.mark.parametrize("name", ["byte fallback, prefix", "unigram, byte fallback, prefix"])
def test_marks_of_spaces_are_counted_as_the_bytes_they_are(build, tmp_path, rng, name, capsys):
    MARKED[name]().save(str(tmp_path / "tok.json"))
    texts = [f"fox {random_text(rng, 20)} fox▁fox ▁" for _ in range(20)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = build(tmp_path / "tok.json", path, options="--seq-len 16 --train-ratio 0")
    assert "cannot represent" not in capsys.readouterr().out
    report = json.loads((corpus / "build_report.json").read_bytes())["splits"]["test"]["total"]
    size = sum(len(text.encode()) for text in set(texts))
    firsts = size - report["scored_bytes"]  # nothing predicts the first token of a document
    assert report["text_bytes"] == size and 0 <= firsts <= len("fox") * len(set(texts))
    assert sizes_of(corpus).sum() == report["scored_bytes"]


def test_texts_without_any_token_are_lost(build, tmp_path, capsys):
    """Of both builders, and by the split that they fell to."""
    path = write_jsonl(tmp_path / "a.jsonl", ["hello world", "zz 犬!"])
    corpus = build(NOUNK, path, options="--seq-len 8 --train-ratio 1")
    total = json.loads((corpus / "build_report.json").read_bytes())["splits"]["train"]["total"]
    assert (total["documents"], total["text_bytes"], total["lost_bytes"]) == (1, 18, 8)
    assert "of 18 bytes, 8 bytes are not" in capsys.readouterr().out
    examples = [("hello", "world"), ("zz!", "foo"), ("zzz", "犬")]
    lines = (json.dumps({"prompt": a, "response": b}) for a, b in examples)
    (tmp_path / "qa.jsonl").write_text("\n".join(lines), encoding="utf-8")
    build_text_dataset.main(
        [
            *("--tokenizer-json", str(NOUNK), "--input-files", str(tmp_path / "qa.jsonl")),
            *("--output-dir", str(tmp_path / "qa"), "--train-ratio", "1"),
        ]
    )
    report = json.loads((tmp_path / "qa/build_report.json").read_bytes())
    total = report["splits"]["train"]["total"]
    assert report["skipped"]["examples_without_tokens"] == 1
    assert (total["text_bytes"], total["lost_bytes"]) == (22, 9)


@pytest.mark.parametrize("layout", ["npy", "stream"])
@pytest.mark.parametrize("tokenizer", [UNIGRAM, NOUNK], ids=["unigram", "nounk"])
def test_prompts_and_responses(tmp_path, rng, tokenizer, layout):
    texts = texts_for(tokenizer, rng, 40)
    examples = [
        {"prompt": a, "response": b, "meta": {"domain": rng.choice("pq")}}
        for a, b in zip(texts[::2], texts[1::2], strict=True)
    ]
    examples.append({"prompt": "zz ! 🙂", "response": "♠ ♣"})  # NOUNK has no token for them
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in examples), encoding="utf-8")
    build_text_dataset.main(
        [
            *("--tokenizer-json", str(tokenizer), "--input-files", str(path)),
            *("--output-dir", str(tmp_path / "qa"), "--layout", layout, "--train-ratio", "0"),
            *"--max-context-tokens 20 --max-response-tokens 24".split(),
        ]
    )
    wanted = []
    for example in examples:
        response = plain_tokens(tokenizer, example["response"])[:24]
        prompt = plain_tokens(tokenizer, example["prompt"])[:-1]
        first = 0 if prompt else 1
        if len(prompt) + len(response) > 1:
            wanted.append(sum(size for _, size in response[first:]))
    report = json.loads((tmp_path / "qa/build_report.json").read_bytes())
    assert report["skipped"]["examples_without_tokens"] == len(examples) - len(wanted)
    assert sorted(sizes_of(tmp_path / "qa").tolist()) == sorted(wanted)
    assert load_metadata(tmp_path / "qa/test/all").scored_bytes == sum(wanted)


def figures(corpora: Corpora, rows: int = 3) -> dict[str, float]:
    """What the evaluator reports of a model that gives every token one nat."""
    evaluator = PerplexityEvaluator(corpora.data_paths[0], corpora.metadata)
    for _, arrays, _ in EvalStream(corpora, global_batch_size=rows):
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        nll = (batch["labels"] != IGNORE_LABEL_ID).float()
        evaluator.update_batch(batch, {"token_nll": nll, "row_nll_by_step": nll.sum(1)[:, None]})
    result = evaluator.result(None, 0, 1)
    assert result is not None
    return result


@pytest.mark.parametrize("options", ["", "--stride 5", "--layout stream --pack bestfit"])
def test_bits_per_byte_are_those_of_the_text(build, tmp_path, rng, options):
    texts = texts_for(NOUNK, rng, 40)
    files = [write_jsonl(tmp_path / f"{n}.jsonl", texts[n::2]) for n in range(2)]
    corpus = build(NOUNK, *files, options=f"--seq-len 16 --train-ratio 0 {options}")
    found = figures(Corpora([str(corpus)], "test"))
    parts = {"": texts, "domain_0/": texts[0::2], "domain_1/": texts[1::2]}
    for place, own in parts.items():
        tokens = [plain_tokens(NOUNK, text)[1:] for text in own]
        size = sum(size for document in tokens for _, size in document)
        nats = sum(map(len, tokens))
        assert found[f"text/{place}nats_per_token"] == 1
        assert found[f"text/{place}bits_per_byte"] == pytest.approx(nats / math.log(2) / size)
    assert found["text/step_1/bits_per_byte"] == found["text/bits_per_byte"]


def test_corpora_with_and_without_the_array_are_joined(build, tmp_path, rng):
    """An older corpus has none: its rows are counted by their tokens, as before."""
    texts = texts_for(UNIGRAM, rng, 40)
    options = "--seq-len 16 --train-ratio 0 --domain-labels"
    one, two = (
        build(UNIGRAM, write_jsonl(tmp_path / f"{n}.jsonl", texts[n::2]), out=f"c{n}",
              options=f"{options} d{n}")
        for n in range(2)
    )  # fmt: skip
    alone = [figures(Corpora([str(corpus)], "test")) for corpus in (one, two)]
    metadata = two / "test/all/dataset.json"
    (two / "test/all/scored_bytes.npy").unlink()
    metadata.write_text(
        json.dumps(json.loads(metadata.read_text("utf-8")) | {"checksums": {}}), "utf-8"
    )
    older = figures(Corpora([str(two)], "test"))
    for paths in ([one, two], [two, one]):
        joined = Corpora([str(path) for path in paths], "test")
        found = figures(joined)
        assert found["text/domain_d0/bits_per_byte"] == pytest.approx(
            alone[0]["text/bits_per_byte"]
        )
        assert found["text/domain_d1/bits_per_byte"] == pytest.approx(older["text/bits_per_byte"])
        batch = RowReader(joined, None, None, with_starts=True).read(np.arange(2))
        assert "scored_bytes" not in batch  # training has no use for it


def test_a_damaged_array_is_named(build, tmp_path, rng, fails):
    path = write_jsonl(tmp_path / "a.jsonl", texts_for(UNIGRAM, rng, 9))
    corpus = build(UNIGRAM, path, options="--seq-len 16 --train-ratio 0")
    array = corpus / "test/all/scored_bytes.npy"
    np.save(array, np.load(array)[:-1])
    with pytest.raises(ValueError, match=r"scored_bytes\.npy.*rows"):
        Corpora([str(corpus)], "test")


@pytest.mark.parametrize("name", LOSSY)
def test_every_lossy_tokenizer_builds(build, tmp_path, rng, name):
    LOSSY[name]().save(str(tmp_path / "tok.json"))
    texts = [f"{random_text(rng, 30)} </s> <pad> {n}" for n in range(12)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = build(tmp_path / "tok.json", path, options="--seq-len 32 --train-ratio 0")
    report = json.loads((corpus / "build_report.json").read_bytes())["splits"]["test"]["total"]
    metadata = load_metadata(corpus / "test/all")
    assert report["documents"] == len(texts)
    assert report["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert 0.9 * report["text_bytes"] < metadata.scored_bytes <= report["text_bytes"]
    inputs = np.load(corpus / "test/all/inputs.npy")
    ends = (inputs == metadata.eos_id).sum()
    assert ends in (len(texts), len(texts) - 1)  # the last one may be a label only
