"""All evaluators in real evaluations of a real checkpoint: against naive loops, on one rank and on
two, named by the command line alone."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from seeds import rng_for
from training_tools import finish, metrics_of, next_probabilities, start

from dataset.build_text_dataset import main as build_text
from evaluators.generation import compare
from models.inference.language_model import LanguageModel
from models.inference.loading import load_language_model
from sequence_dataset import EvalStream
from utils.corpus.corpora import Corpora

pytestmark = pytest.mark.slow

pytest.importorskip("sacrebleu")
SHOTS = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A file of each kind of task, of words that the corpus knows and does not know."""
    folder, rng = tmp_path_factory.mktemp("tasks"), rng_for("tasks")

    def words(count: int) -> str:
        return " ".join("".join(rng.choice(list("abcdefgh"), 3)) for _ in range(count))

    kinds = {
        "choices": lambda: {"question": words(3), "choices": [words(1), words(2), words(3)],
                            "answer": int(rng.integers(3)), "kind": str(rng.choice(["x", "y"]))},
        "contexts": lambda: {"context_options": [words(3), words(2)], "continuation": words(2),
                             "answer": int(rng.integers(2))},
        "pairs": lambda: {"sentence_good": words(4), "sentence_bad": words(4)},
        "words": lambda: {"context": words(4), "continuation": words(1)},
        "qa": lambda: {"prompt": words(3), "response": words(2)},
    }  # fmt: skip
    found = {}
    for name, make in kinds.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(make()) + "\n" for _ in range(9)), "utf-8")
    return found


@pytest.fixture(scope="module")
def qa_corpus(files, text_run, tmp_path_factory) -> Path:
    """Prompts and responses with the tokenizer of the run."""
    folder = tmp_path_factory.mktemp("qa") / "corpus"
    tokenizer = next(text_run.glob("step_*/tokenizer.json"))
    build_text(["--tokenizer-json", str(tokenizer), "--input-files", str(files["qa"]),
                "--output-dir", str(folder), "--max-context-tokens", "12",
                "--max-response-tokens", "12", "--train-ratio", "0.4"])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def evaluated(files, qa_corpus, text_run, tmp_path_factory) -> dict[int, Path]:
    """The run folders of the same evaluation on one rank and, as FSDP, on two."""
    home = tmp_path_factory.mktemp("home")
    (home / "rewards.py").write_text(
        "def length(prompts, texts, references):\n    return [len(text) for text in texts]\n",
        "utf-8",
    )
    task = "{name: tasks@MultipleChoiceEvaluator, path: %s}"
    named = ", ".join([
        "text@PerplexityEvaluator", "halting@HaltingEvaluator",
        task % f"{files['choices']}, group_key: kind, identifier: poems",
        task % f"{files['choices']}, task: shots, num_few_shot: {SHOTS}, identifier: poems",
        *(task % f"{files[kind]}, identifier: poems" for kind in ("contexts", "pairs", "words")),
        "{name: generation@GenerationEvaluator, max_new_tokens: 8, identifier: poems, "
        f"path: {files['qa']}, score_function: 'rewards:length'}}",
    ])  # fmt: skip
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = home / f"ranks{ranks}"
        code, out, err = finish(start(
            "eval_only=true", f"load_checkpoint={text_run}", f"checkpoint_path={folders[ranks]}",
            "device_type=cpu", f"evaluators=[{named}]", "run_name=x", "parallel=fsdp",
            ranks=ranks, env={"PYTHONPATH": f"{home}"}))  # fmt: skip
        assert code == 0 and "failed" not in out, out + err
    return folders


@pytest.fixture(scope="module")
def trained(text_run) -> LanguageModel:
    return load_language_model(text_run, identifier="poems")


def figure(run: Path, name: str) -> float:
    found = metrics_of(run, f"eval/{name}")
    assert len(found) == 1, name
    return found[0]


def test_two_ranks_report_what_one_reports(evaluated):
    one, two = (
        json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
        for folder in evaluated.values()
    )
    kinds = ("text", "halting", "tasks", "generation")
    names = [name for name in one if name.split("/")[1:2] and name.split("/")[1] in kinds]
    assert len(names) > 60 and set(one) == set(two)
    for name in names:
        assert one[name] == pytest.approx(two[name], rel=1e-4, abs=1e-5), name
    samples = [
        (folder / "evaluation_step_3" / "samples.jsonl").read_text("utf-8")
        for folder in evaluated.values()
    ]
    assert samples[0] == samples[1]


# --- tasks -------------------------------------------------------------------------------------


def nats(model: LanguageModel, context: str, continuation: str) -> tuple[float, bool]:
    """Token by token, each from a forward pass of its own."""
    before, after = model.encode_pair(context, continuation)
    total, greedy = 0.0, True
    for n, token in enumerate(after):
        p = next_probabilities(model, [*before, *after[:n]][-model.window :])
        total, greedy = total - math.log(p[token]), greedy and p.argmax() == token
    return total, greedy


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_choices_are_those_of_a_naive_loop(evaluated, trained, files):
    rows = records(files["choices"])
    found = np.array(
        [[nats(trained, r["question"], " " + c)[0] for c in r["choices"]] for r in rows]
    )
    size = np.array([[len(c) for c in r["choices"]] for r in rows])
    right = found.argmin(1) == [r["answer"] for r in rows]
    normed = (found / size).argmin(1) == [r["answer"] for r in rows]
    place, run = "tasks/choices", evaluated[1]
    assert figure(run, f"{place}/accuracy") == pytest.approx(right.mean())
    assert figure(run, f"{place}/accuracy_norm") == pytest.approx(normed.mean())
    assert figure(run, f"{place}/stderr") == pytest.approx(right.std(ddof=1) / 3)
    assert figure(run, f"{place}/chance") == pytest.approx(1 / 3)
    for kind in {r["kind"] for r in rows}:
        own = [bool(x) for x, r in zip(right, rows, strict=True) if r["kind"] == kind]
        assert figure(run, f"{place}/{kind}/accuracy") == pytest.approx(np.mean(own))


def test_contexts_pairs_and_last_words_are_those_of_a_naive_loop(evaluated, trained, files):
    run = evaluated[1]
    right = []
    for r in records(files["contexts"]):
        costs = [nats(trained, c, " " + r["continuation"])[0] for c in r["context_options"]]
        right.append(int(np.argmin(costs)) == r["answer"])
    assert figure(run, "tasks/contexts/accuracy") == pytest.approx(np.mean(right))
    right = [
        nats(trained, "", r["sentence_good"])[0] < nats(trained, "", r["sentence_bad"])[0]
        for r in records(files["pairs"])
    ]
    assert figure(run, "tasks/pairs/accuracy") == pytest.approx(np.mean(right))
    last = [nats(trained, r["context"], " " + r["continuation"]) for r in records(files["words"])]
    assert figure(run, "tasks/words/accuracy") == pytest.approx(np.mean([g for _, g in last]))
    expected = math.exp(np.mean([n for n, _ in last]))
    assert figure(run, "tasks/words/perplexity") == pytest.approx(expected, rel=1e-3)


# --- halting -----------------------------------------------------------------------------------


@torch.no_grad()
def test_halting_figures_are_those_of_a_naive_loop(evaluated, trained, text_corpus):
    """Of all rows and steps: loss, where the head halts, its calibration, and the latents."""
    loss, says, right, moved, budgets = [], [], [], [], []
    test, model = Corpora([str(text_corpus)], "test"), trained.model
    for _, arrays, _ in EvalStream(test, global_batch_size=1, max_iterations=4):
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        labels = batch["labels"][0].long()
        scored = labels >= 0
        carry = model.admit(model.initial_carry(batch), batch)
        budgets.append(int(batch["iteration_targets"]))
        for step in range(1, 5):
            old = carry.latents["z_H"][0, -len(labels) :]
            carry, outputs = model(carry, batch)
            x = outputs["logits"][0].double()
            s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))
            p = (s / s.sum(-1, keepdim=True))[scored, labels[scored]]
            loss.append(-p.log().mean().item())
            says.append(torch.sigmoid(outputs["q_halt_logits"][0]).item())
            right.append(step >= budgets[-1])
            change = (carry.latents["z_H"][0, -len(labels) :] - old).norm(dim=-1)
            moved.append(change[scored].mean().item())
    table, said = np.array(loss).reshape(-1, 4), np.array(says).reshape(-1, 4)
    run = evaluated[1]
    for k in range(4):
        assert figure(run, f"halting/step_{k + 1}/loss") == pytest.approx(
            table[:, k].mean(), rel=1e-4
        )
        expected = np.array(moved).reshape(-1, 4)[:, k].mean()
        assert figure(run, f"halting/step_{k + 1}/z_H_change") == pytest.approx(expected, rel=1e-3)
    halts = np.array([next((k for k in range(4) if row[k] > 0.5), 3) for row in said])
    assert figure(run, "halting/act/steps") == pytest.approx(1 + halts.mean())
    chosen = table[np.arange(len(table)), halts].mean()
    assert figure(run, "halting/act/loss") == pytest.approx(chosen, rel=1e-4)
    assert figure(run, "halting/budget/steps") == pytest.approx(np.mean(budgets))
    flat, truth = said.ravel(), np.array(right, dtype=float)
    error = sum(
        abs(flat[part].mean() - truth[part].mean()) * part.mean()
        for low in np.arange(10) / 10
        if (part := (flat >= low) & (flat < low + 0.1)).any()
    )
    assert figure(run, "halting/calibration_error") == pytest.approx(error, abs=1e-4)
    assert (run / "evaluation_step_3" / "halting.png").stat().st_size > 10_000


# --- texts -------------------------------------------------------------------------------------


def test_texts_are_the_models_and_scored_by_the_libraries(evaluated, trained, files):
    run = evaluated[1]
    samples = records(run / "evaluation_step_3" / "samples.jsonl")
    rows = records(files["qa"])
    assert [s["reference"] for s in samples] == [r["response"] for r in rows]
    for sample in samples:
        ids = trained.encode(sample["prompt"])
        written: list[int] = []
        for _ in range(8):  # the likeliest each time, from a forward pass of its own
            p = next_probabilities(trained, [*ids, *written][-trained.window :])
            p[trained.never_written()] = 0
            if (token := int(p.argmax())) == trained.eos_id:
                break
            written.append(token)
        whole = trained.decode([*ids, *written])[len(trained.decode(ids)) :]
        assert sample["text"] == whole
    texts = [s["text"] for s in samples]
    for name, value in compare(texts, [r["response"] for r in rows]).items():
        assert figure(run, f"generation/{name}") == pytest.approx(value)
    assert figure(run, "generation/length") == pytest.approx(np.mean([len(t) for t in texts]))


def test_prompts_come_from_the_rows_of_a_corpus_too(qa_corpus, text_run, files, tmp_path):
    """The test split of a prompt/response corpus: every response once, without its eos."""
    run = tmp_path / "run"
    code, out, err = finish(start(
        "eval_only=true", f"load_checkpoint={text_run}", f"checkpoint_path={run}", "run_name=x",
        f"data_paths=[{qa_corpus}]", "device_type=cpu",
        "evaluators=[{name: generation@GenerationEvaluator, max_new_tokens: 4}]"))  # fmt: skip
    assert code == 0, out + err
    samples = records(run / "evaluation_step_3" / "samples.jsonl")
    known = {r["prompt"]: r["response"] for r in records(files["qa"])}
    test = Corpora([str(qa_corpus)], "test").num_rows
    assert 0 < test == len(samples) == figure(run, "generation/examples")
    assert all(known[s["prompt"]] == s["reference"] for s in samples)


def test_puzzles_are_voted_on_in_a_run(puzzle_corpus, run_training):
    """The answer as it is, is what the loop counts too; renamed and flipped views are asked."""
    voting = "{name: puzzle@ExactMatchEvaluator, views: 3, geometry: flips}"
    both_ways = ("arch.causal=false", "arch.document_mask=false", "max_steps=4")
    run = run_training(puzzle_corpus, "run", *both_ways, f"evaluators=[{voting}]")
    assert figure(run, "puzzle/cell_accuracy") == pytest.approx(
        figure(run, "all/accuracy"), abs=1e-6
    )
    assert figure(run, "puzzle/exact_accuracy") == figure(run, "all/exact_accuracy")
    assert 0 < figure(run, "puzzle/voted/agreement") <= 1


def test_a_failing_request_ends_one_evaluator_and_not_the_run(text_corpus, run_training, capsys):
    """Identifiers that do not exist, told as a sentence; the others report."""
    task = text_corpus.parent / "task.jsonl"
    task.write_text(json.dumps({"text": "ab cd"}) + "\n", "utf-8")
    broken = f"{{name: tasks@MultipleChoiceEvaluator, path: {task}, identifier: poem}}"
    more = ("max_steps=2", f"evaluators=[text@PerplexityEvaluator, {broken}]")
    run = run_training(text_corpus, "run", *more, "arch.puzzle_emb_ndim=32", status=3)
    assert figure(run, "evaluators_failed") == 1 and metrics_of(run, "eval/text/perplexity")
    assert "did you mean 'poems'" in capsys.readouterr().out
