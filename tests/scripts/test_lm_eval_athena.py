"""The harness' own command on task files of our own, without a network: its figures are those of
naive loops over forward passes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from seeds import rng_for
from training_tools import ROOT, next_probabilities

from models.inference.language_model import LanguageModel
from models.inference.loading import load_language_model
from utils.core.errors import UserError

pytestmark = pytest.mark.slow

pytest.importorskip("lm_eval")

TASKS = {
    "words": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: " {{word}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "choices": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list: [{metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{word}}"
generation_kwargs: {until: ["zz"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def lm_eval(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "lm_eval_athena.py"), *arguments],
        capture_output=True, encoding="utf-8", timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def harness_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def harness(text_run, harness_folder) -> tuple[list[dict], dict, dict[str, list[dict]]]:
    """Documents, the results by task, and the harness' record of every request."""
    folder, rng = harness_folder, rng_for("harness")

    def words(count: int) -> str:
        return " ".join("".join(rng.choice(list("abcdefgh"), 3)) for _ in range(count))

    documents = [
        {"context": words(3), "word": words(1), "choices": [words(1), words(2), words(3)],
         "answer": int(rng.integers(3)), "long": words(14)}
        for _ in range(5)
    ]  # fmt: skip
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), "utf-8")
    for name, rest in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: athena_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\n"
            f"test_split: train\n{rest}",
            "utf-8",
        )
    done = lm_eval(
        "--model", "athena", "--model_args", f"checkpoint={text_run},identifier=poems",
        "--tasks", ",".join(f"athena_{name}" for name in TASKS), "--include_path", str(folder),
        "--output_path", str(folder / "out"), "--log_samples", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(next((folder / "out").rglob("results_*.json")).read_text("utf-8"))
    samples = {
        name: [
            json.loads(line)
            for line in next((folder / "out").rglob(f"samples_athena_{name}_*.jsonl"))
            .read_text("utf-8")
            .splitlines()
        ]
        for name in TASKS
    }
    return documents, results, samples


@pytest.fixture(scope="module")
def model(text_run) -> LanguageModel:
    return load_language_model(text_run, identifier="poems")


def log_probability(model: LanguageModel, before: list[int], after: list[int]) -> float:
    ids = [*before, *after]
    return sum(
        math.log(next_probabilities(model, ids[:n][-model.window :])[ids[n]])
        for n in range(len(before), len(ids))
    )


def test_log_probabilities_are_those_of_a_naive_loop(harness, model):
    documents, results, samples = harness
    logs = []
    for document, sample in zip(documents, samples["words"], strict=True):
        pair = model.encode_pair(document["context"], " " + document["word"])
        logs.append(log_probability(model, *pair))
        assert float(sample["filtered_resps"][0][0]) == pytest.approx(logs[-1], rel=1e-4)
    found = results["results"]["athena_words"]
    assert found["perplexity,none"] == pytest.approx(math.exp(-np.mean(logs)), rel=1e-3)
    right = []
    for document in documents:
        pairs = [model.encode_pair(document["context"], " " + c) for c in document["choices"]]
        best = int(np.argmax([log_probability(model, *pair) for pair in pairs]))
        right.append(best == document["answer"])
    assert results["results"]["athena_choices"]["acc,none"] == pytest.approx(np.mean(right))


def test_whole_texts_are_scored_in_the_harness_windows(harness, model):
    """Each longer than the window of 24 tokens; after a window comes the next, with one token
    before it, and the last reaches back for a whole window."""
    documents, results, _ = harness
    bits, size = 0.0, 0
    for document in documents:
        ids = [*model.opening()[-1:], *model.encode(document["long"])]
        assert len(ids) > model.window + 1
        for n in range(1, len(ids)):
            begin = min((n - 1) // model.window * model.window, len(ids) - 1 - model.window)
            p = next_probabilities(model, ids[begin:n])
            bits -= math.log2(p[ids[n]])
        size += len(document["long"].encode())
    found = results["results"]["athena_texts"]["bits_per_byte,none"]
    assert found == pytest.approx(bits / size, rel=1e-4)


def test_texts_are_the_likeliest_and_end_before_a_stop(harness, model):
    documents, _, samples = harness
    for document, sample in zip(documents, samples["written"], strict=True):
        ids = model.encode(document["context"])
        written: list[int] = []
        while len(written) < 6:
            p = next_probabilities(model, [*ids, *written][-model.window :])
            p[model.never_written()] = 0
            if int(p.argmax()) == model.eos_id:
                break
            written.append(int(p.argmax()))
        whole = model.decode([*ids, *written])[len(model.decode(ids)) :].partition("zz")[0]
        assert sample["resps"][0][0] == whole


def test_results_say_which_model_it_was(harness, model):
    config = harness[1]["config"]
    assert config["act_steps"] == model.steps and config["window"] == model.window
    assert config["checkpoint"].endswith("step_3") and config["checkpoint_step"] == 3


@pytest.mark.parametrize("end", ["", " ", "\n", " \n\n", "\n "])
def test_pairs_are_split_where_the_harness_splits_them(model, text_run, end):
    """Against the harness' own rule, which its models for other libraries inherit. Where the
    tokenizer joins the last letter and the first, that rule loses letters: there each side is a
    text of its own."""
    from lm_eval.api.model import TemplateLM

    from scripts.lm_eval_athena import AthenaLM

    class Reference(AthenaLM, TemplateLM):
        def tok_encode(self, string, **kwargs):
            return self.model.encode(string)

        eot_token_id = _loglikelihood_tokens = None

    reference = Reference(checkpoint=str(text_run), device="cpu")
    for after in ("abc", " abc", "fgh ab cd"):
        expected = TemplateLM._encode_pair(reference, f"ab cde{end}", after)
        whole = model.encode(f"ab cde{end}{after}")
        if whole != expected[0] + expected[1]:
            expected = model.encode("ab cde"), model.encode(end + after)
        assert reference._pair(f"ab cde{end}", after) == expected


def test_options_of_continuations_are_known_or_named():
    from scripts.lm_eval_athena import _sampling

    stop, how = _sampling({"until": "\n", "num_beams": 1, "max_gen_toks": 3}, 9)
    assert (stop, how.max_new_tokens, how.temperature) == (["\n"], 3, 0)
    stop, how = _sampling({"until": [], "do_sample": True, "temperature": 0.5, "top_p": 0.9}, 9)
    assert (stop, how.max_new_tokens, how.temperature, how.top_p) == ([], 9, 0.5, 0.9)
    for options, says in (
        ({"num_beams": 4}, "num_beams must be 1"),
        ({"min_p": 0.1}, "min_p"),
        ({"until": [3]}, "must be strings"),
        ({"max_gen_toks": "many"}, "many"),
        ({"max_gen_toks": 0}, "max_new_tokens .*0"),
        ({"do_sample": True, "temperature": -1}, "temperature .*-1"),
    ):
        with pytest.raises(UserError, match=f"generation_kwargs.*{says}"):
            _sampling(options, 9)


def test_mistakes_are_named(text_run, tmp_path, monkeypatch):
    from scripts.lm_eval_athena import AthenaLM

    for arguments, says in (
        ({"checkpont": str(text_run)}, "did you mean 'checkpoint'"),
        ({"checkpoint": str(tmp_path)}, "is not a checkpoint"),
        ({"checkpoint": str(text_run), "identifier": "poem"}, "did you mean 'poems'"),
        ({"checkpoint": str(text_run), "weights": "both"}, "weights: .*ema, raw.*'both'"),
        ({"checkpoint": str(text_run), "batch_size": "0"}, "--batch_size 0"),
        ({"checkpoint": str(text_run), "batch_size": "many"}, "--batch_size many"),
        ({"checkpoint": str(text_run), "max_gen_toks": "x"}, "max_gen_toks: .*'x'"),
        ({"checkpoint": str(text_run), "max_gen_toks": "0"}, "max_gen_toks must be at least 1"),
        ({"checkpoint": str(text_run), "device": "gpu"}, "--device gpu is unknown"),
        ({}, "model_args: checkpoint is missing"),
    ):
        with pytest.raises(UserError, match=says):
            AthenaLM(**{"device": "cpu"} | arguments)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        AthenaLM(checkpoint=str(text_run))


def test_a_mistake_ends_the_command_in_a_sentence(harness, harness_folder):
    named = ("--tasks", "athena_words", "--include_path", str(harness_folder), "--device", "cpu")
    done = lm_eval("--model", "athena", "--model_args", "checkpoint=nowhere", *named)
    *_, last = done.stderr.strip().splitlines()
    assert done.returncode == 2 and last.startswith("error: checkpoint=nowhere"), done.stderr
