"""Prompts and responses: what is scored, what is cut, which budget a row gets."""

import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer

from dataset import build_text_dataset
from dataset.common import token_byte_lengths, verify_arrays
from tests.dataset.conftest import file_bytes, random_text, read_split


def write_examples(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


@pytest.fixture
def build_text(tokenizer_json, tmp_path):
    def run(path, options="", out="corpus"):
        folder = tmp_path / out
        build_text_dataset.main(
            [
                *("--tokenizer-json", str(tokenizer_json), "--output-dir", str(folder)),
                *("--input-files", str(path), *options.split()),
            ]
        )
        return folder

    return run


@pytest.mark.parametrize("keys", [("prompt", "response"), ("question", "answer")])
def test_rows_score_the_response_alone(build_text, tmp_path, rng, tokenizer_json, keys):
    asked, answered = keys
    examples = [
        {asked: random_text(rng, rng.randrange(1, 9)), answered: random_text(rng, 5)}
        for _ in range(30)
    ]
    path = write_examples(tmp_path / "qa.jsonl", examples)
    options = "--max-context-tokens 60 --max-response-tokens 70 --train-ratio 1"
    options += f" --prompt-key {asked} --response-key {answered}"
    corpus = build_text(path, f"{options} --dedup none")
    data = read_split(corpus, "train")
    verify_arrays(corpus / "train" / "all", data.metadata)
    assert data.inputs.shape == (30, 130)
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    lengths = token_byte_lengths(tokenizer_json)
    eos, ignored = data.metadata.eos_id, data.metadata.ignore_label_id
    for example, inputs, labels in zip(examples, data.inputs, data.labels, strict=True):
        prompt = tokenizer.encode(example[asked], add_special_tokens=False).ids
        response = tokenizer.encode(example[answered], add_special_tokens=False).ids
        row = prompt + response + [eos]
        assert inputs[: len(row)].tolist() == row
        assert (inputs[len(row) :] == data.metadata.pad_id).all()
        assert np.flatnonzero(labels != ignored).tolist() == [*range(len(prompt) - 1, len(row) - 1)]
        assert labels[labels != ignored].tolist() == [*response, eos]
        assert lengths[labels[labels != ignored]].sum() == len(example[answered].encode())
    expected = sum(len(example[answered].encode()) for example in examples)
    assert data.metadata.scored_bytes == expected
    assert data.metadata.documents == 30


def test_long_texts_are_cut_and_counted(build_text, tmp_path, tokenizer_json, capsys):
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    text = "the quick brown fox jumps over 1984 lazy dogs"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(ids) > 6
    path = write_examples(tmp_path / "qa.jsonl", [{"prompt": text, "response": text}])
    corpus = build_text(
        path, "--max-context-tokens 3 --max-response-tokens 4 --train-ratio 1", out="cut"
    )
    data = read_split(corpus, "train")
    assert data.inputs[0].tolist() == [*ids[-3:], *ids[:4]]
    ignored = data.metadata.ignore_label_id
    # A response that is cut does not end, so no eos is scored.
    assert data.labels[0].tolist() == [ignored, ignored, *ids[:4], ignored]
    report = json.loads((corpus / "build_report.json").read_text("utf-8"))
    assert (report["truncated_prompts"], report["truncated_responses"]) == (1, 1)
    assert "1 truncated prompts" in capsys.readouterr().out

    exact = f"--max-context-tokens {len(ids)} --max-response-tokens {len(ids)} --train-ratio 1"
    data = read_split(build_text(path, exact, out="exact"), "train")
    assert data.inputs[0].tolist() == ids + ids
    assert data.labels[0, -1] == data.metadata.eos_id


def test_budgets_domains_and_weights(build_text, tmp_path):
    metas = [
        ({"iteration_budget": 9}, 9),
        ({"iteration_budget": 9, "complexity": 3}, 9),
        ({"complexity": 3}, 7),
        ({"complexity": 2.9}, 6),
        ({"complexity": 99}, 20),
        ({"iteration_budget": 1}, 4),
        ({}, 4),
        (None, 4),
    ]
    records = [
        {"prompt": f"p{i}", "response": "r", "meta": meta} for i, (meta, _) in enumerate(metas)
    ]
    for record in records[:3]:
        record["meta"]["domain"] = "maths"
    path = write_examples(tmp_path / "qa.jsonl", records)
    options = "--train-ratio 1 --max-iterations 20 --max-context-tokens 8 --max-response-tokens 8"
    corpus = build_text(path, f"{options} --domain-weights maths=2")
    data = read_split(corpus, "train")
    assert data.iteration_targets.tolist() == [budget for _, budget in metas]
    assert data.domain_ids.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert data.metadata.domains == ["maths", "qa"]
    assert data.puzzle_identifiers.tolist() == (data.domain_ids + 1).tolist()
    assert data.metadata.domain_weights == {"maths": 2.0}
    assert json.loads((corpus / "identifiers.json").read_text("utf-8")) == [
        "<blank>",
        "maths",
        "qa",
    ]
    assert json.loads((corpus / "build_report.json").read_text("utf-8"))["clipped_budgets"] == 2


def test_blank_files_are_skipped(build_text, tmp_path, capsys, fails):
    (tmp_path / "texts").mkdir()
    write_examples(tmp_path / "texts/qa.jsonl", [{"prompt": "p", "response": "r"}])
    (tmp_path / "texts/blank.jsonl").write_text("\n \n", "utf-8")
    corpus = build_text(tmp_path / "texts", "--train-ratio 1")
    assert read_split(corpus, "train").metadata.documents == 1
    assert "blank.jsonl" in capsys.readouterr().out
    blank = tmp_path / "texts/blank.jsonl"
    assert "blank.jsonl" in fails(lambda: build_text(blank, "", out="none"))


def test_one_prompt_lands_in_one_split(build_text, tmp_path, monkeypatch):
    records = [
        {"prompt": f"prompt {i % 40}", "response": f"answer {i}", "meta": {"domain": "xy"[i % 2]}}
        for i in range(120)
    ]
    path = write_examples(tmp_path / "qa.jsonl", [*records, records[0]])
    options = "--train-ratio 0.5 --max-context-tokens 30 --max-response-tokens 30"
    corpus = build_text(path, options)
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    prompts = {}
    for split in ("train", "test"):
        data = read_split(corpus, split)
        texts = [tokenizer.decode(row.tolist()) for row in data.inputs]
        prompts[split] = {text.split("answer")[0] for text in texts}
    assert not prompts["train"] & prompts["test"]
    assert len(prompts["train"] | prompts["test"]) == 40
    report = json.loads((corpus / "build_report.json").read_text("utf-8"))
    assert report["skipped"]["duplicates"] == 1

    monkeypatch.setattr(build_text_dataset, "BATCH_CHARS", 50)
    assert file_bytes(build_text(path, options, out="parts")) == file_bytes(corpus)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"question": "q", "response": "r"},
            "no key 'prompt' (keys: question, response; see --prompt-key)",
        ),
        ({"prompt": "p", "response": ""}, "key 'response' is an empty"),
        ({"prompt": "p", "response": 3}, "key 'response' is not a string"),
        ({"prompt": "p", "response": "r", "meta": 3}, "key 'meta' is not an object"),
        ({"prompt": "p", "response": "r", "meta": {"domain": 3}}, "meta.domain is 3"),
        (
            {"prompt": "p", "response": "r", "meta": {"domain": "<blank>"}},
            "meta.domain is '<blank>'",
        ),
        ({"prompt": "p", "response": "r", "meta": {"complexity": "x"}}, "meta.complexity is 'x'"),
        (
            {"prompt": "p", "response": "r", "meta": {"complexity": 10**400}},
            "meta.complexity is 10",
        ),
        (
            {"prompt": "p", "response": "r", "meta": {"complexity": math.nan}},
            "meta.complexity is n",
        ),
    ],
)
def test_bad_examples_are_named_or_skipped(build_text, tmp_path, fails, record, message):
    good = {"prompt": "p", "response": "r"}
    path = write_examples(tmp_path / "qa.jsonl", [good, record])
    options = "--train-ratio 1 --max-context-tokens 8 --max-response-tokens 8"
    line = fails(lambda: build_text(path, options))
    assert f"qa.jsonl, line 2: {message}" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["qa.jsonl"]
    assert len(read_split(build_text(path, f"{options} --max-bad-lines 1"), "train").inputs) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--domain-weights maths=1", "maths; the domains are qa"),
        ("--domain-weights qa=1 qa=2", "'qa' twice"),
        ("--domain-weights qa", "'qa' is not of the form NAME=WEIGHT"),
        ("--domain-weights qa=-1", "'qa=-1' is not of the form NAME=WEIGHT"),
        ("--max-context-tokens 0", "--max-context-tokens is 0"),
        ("--train-ratio 2", "--train-ratio is 2.0"),
        ("--prompt-key x --response-key x", "--prompt-key and --response-key are both 'x'"),
    ],
)
def test_mistakes_end_in_one_sentence(build_text, tmp_path, fails, options, message):
    path = write_examples(tmp_path / "qa.jsonl", [{"prompt": "p", "response": "r"}])
    assert message in fails(lambda: build_text(path, options))
