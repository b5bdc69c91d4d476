"""Both layouts hold the same rows, and every reader sees them alike."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dataset import build_corpus_dataset, build_text_dataset
from dataset.common import find_split, load_metadata, verify_arrays
from tests.dataset.conftest import random_text, write_jsonl
from utils.corpus.corpora import Corpora


def rows_of(corpus, split: str) -> dict[str, np.ndarray]:
    corpora = Corpora([str(corpus)], split)
    return corpora.rows(np.arange(corpora.num_rows))


def assert_same_rows(one, other) -> None:
    for split in ("train", "test"):
        first, second = rows_of(one, split), rows_of(other, split)
        assert first.keys() == second.keys() and len(first["inputs"])
        for name, values in first.items():
            assert (values == second[name]).all(), name
        mine, theirs = (load_metadata(find_split(corpus, split)) for corpus in (one, other))
        assert (mine.layout, theirs.layout) == ("npy", "stream")
        assert theirs.ignore_label_id == -100
        changing = {"checksums", "layout", "ignore_label_id"}
        assert mine.model_dump(exclude=changing) == theirs.model_dump(exclude=changing)
        verify_arrays(find_split(other, split), theirs)


@pytest.mark.parametrize(
    "options", ["", "--stride 9", "--stride 1", "--pack bestfit", "--identifiers sequence"]
)
def test_the_layouts_hold_the_same_rows(build, tmp_path, rng, options):
    texts = [random_text(rng, rng.randrange(1, 90)) for _ in range(120)]
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name}{text}" for text in texts[k::3]])
        for k, name in enumerate("abc")
    ]
    # Domains change back and forth, so that a row's neighbours in the file are of other streams.
    common = f"--seq-len 24 --train-ratio 0.7 --domain-labels x y x {options}"
    npy = build(*files, options=common, out="npy")
    stream = build(*files, options=f"{common} --layout stream", out="stream")
    assert_same_rows(npy, stream)
    reports = [json.loads((c / "build_report.json").read_bytes())["splits"] for c in (npy, stream)]
    assert reports[0] == reports[1]


def test_prompts_and_responses_in_both_layouts(tmp_path, tokenizer_json, rng):
    lines = [
        {"prompt": random_text(rng, 9), "response": random_text(rng, rng.randrange(1, 30)),
         "meta": {"domain": rng.choice("pq"), "complexity": rng.randrange(9)}}
        for _ in range(80)
    ]  # fmt: skip
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    for layout in ("npy", "stream"):
        build_text_dataset.main(
            [
                *("--tokenizer-json", str(tokenizer_json), "--input-files", str(path)),
                *("--output-dir", str(tmp_path / layout), "--layout", layout),
                *"--max-context-tokens 20 --max-response-tokens 24 --train-ratio 0.6".split(),
            ]
        )
    assert_same_rows(tmp_path / "npy", tmp_path / "stream")


def test_a_token_is_stored_once(build, tmp_path, rng):
    path = write_jsonl(tmp_path / "a.jsonl", [random_text(rng, 300) for _ in range(60)])
    corpus = build(path, options="--seq-len 256 --layout stream --train-ratio 1")
    report = json.loads((corpus / "build_report.json").read_bytes())
    tokens = np.load(corpus / "train/all/tokens.npy", mmap_mode="r")
    assert tokens.dtype == np.uint16
    assert len(tokens) == report["splits"]["train"]["total"]["tokens"]


@pytest.mark.slow
def test_more_domains_than_16_bits_tell_apart(build, tmp_path, monkeypatch):
    """A folder of files makes a domain of each."""
    path = write_jsonl(tmp_path / "a.jsonl", ["some text"])
    plan = build_corpus_dataset.plan_inputs

    def numbered(args):
        inputs, _ = plan(args)
        return [replace(i, domain=70_000) for i in inputs], [str(n) for n in range(70_001)]

    monkeypatch.setattr(build_corpus_dataset, "plan_inputs", numbered)
    corpus = build(path, options="--seq-len 8 --layout stream --train-ratio 1")
    assert set(np.load(corpus / "train/all/domain_ids.npy")) == {70_000}
    assert Corpora([corpus]).domains[70_000] == "70000"
