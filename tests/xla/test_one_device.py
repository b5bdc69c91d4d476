"""The real training on one XLA device, in this process, against the plain CPU of the same torch."""

import json
from pathlib import Path

import pytest
import torch
from training_tools import PUZZLES, contents, metrics_of
from xla_tools import REPLICA, TEXT, apart, compiled, differences, fallbacks, run_on, unequal

import pretrain
from models.inference.loading import load_language_model
from models.inference.sampling import Sampling
from models.sparse_embedding import CastedSparseEmbedding, SparseEmbeddingSignSGD
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import Checkpoint
from utils.core.errors import UserError

CASES = {
    "text, float32": ("text_corpus", 1e-5, ["optimizer=adamw"]),
    "text, float64, two micro-batches": (
        "text_corpus",
        1e-7,
        ["optimizer=adam_atan2", "arch.forward_dtype=float64", "grad_accum_steps=2"],
    ),
    "puzzles, float64, present": (
        "puzzle_corpus",
        1e-7,
        [*PUZZLES, "optimizer=adamw", "arch.forward_dtype=float64", "feed=present"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_the_cpu(case, request, tmp_path):
    """20 steps at lr 1e-3 without warm-up, identifiers training, rows halting at their own time."""
    corpus, limit, options = CASES[case]
    corpus = request.getfixturevalue(corpus)
    overrides = [*TEXT, *options, "max_steps=20", "eval_interval=null"]
    one, other = (
        run_on(backend, corpus, tmp_path / backend.name, *overrides)
        for backend in (CPUBackend(), REPLICA)
    )
    found = differences(one, other, 20)
    print(f"\n{case}: {found}")
    own = dict.fromkeys(found, 0.0)
    if (
        "float32" in case
    ):  # Adam magnifies the rounding of gradients near 0: see float64 for weights
        found = {
            k: v for k, v in found.items() if k.endswith("_loss") or k in ("steps", "examples")
        }
        # The carry magnifies it too, on few corpora to more than the limit: by how much, the CPU
        # tells that adds the same rows in another order.
        halves = run_on(CPUBackend(), corpus, tmp_path / "halves", *overrides, "grad_accum_steps=2")
        own = differences(one, halves, 20)
        print(f"the CPU in another order: {own}")
        assert own["steps"] == own["examples"] == 0
    assert {k: v for k, v in found.items() if not v <= limit + 10 * own[k]} == {}
    assert len(set(metrics_of(one, "train/steps"))) > 2, "rows should halt at different steps"
    table = contents(other / "step_20")["model/model.inner.puzzle_emb.weights"]
    assert table.any(), "the identifier embedding was never trained"
    figures = [metrics_of(run, "eval/all/lm_loss") for run in (one, other)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)
    assert fallbacks() == []


def questions(folder: Path) -> Path:
    """Of very different length, and not a whole number of batches."""
    lines = [
        {"question": "ab cde " * (1 + i % 4), "choices": ["fgh", "ab " * i, "c"], "answer": i % 3}
        for i in range(1, 12)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_texts_are_scored_as_on_the_cpu_by_one_program(text_corpus, tmp_path):
    run = run_on(
        CPUBackend(), text_corpus, tmp_path, *TEXT, "max_steps=2", "arch.forward_dtype=float64",
        "evaluators=[]", "arch.hidden_size=48",
    )  # fmt: skip
    one, other = (
        load_language_model(run, backend=backend, rows=3) for backend in (CPUBackend(), REPLICA)
    )
    words = [torch.randint(300, (n,)).tolist() for n in torch.randint(1, 60, (20,))]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    found, programs = other.score(pairs[:2]), compiled()
    found += other.score(pairs[2:])
    assert compiled() == programs > 0
    expected = one.score(pairs)
    assert [s.greedy for s in found] == [s.greedy for s in expected]
    assert [s.nats for s in found] == pytest.approx([s.nats for s in expected], rel=1e-9)
    with pytest.raises(UserError, match="on XLA"):
        other.write_all([words[0]], Sampling())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_nothing_is_compiled_after_the_second_step(
    micro_batches, text_corpus, tmp_path, monkeypatch
):
    """Nor in a second evaluation. On a TPU one program of a real model takes minutes."""
    steps: list[int] = []  # programs compiled when each step begins
    evaluations: list[int] = []  # programs that each evaluation compiled

    real_batch, real_evaluation = pretrain.train_batch, pretrain.run_evaluation

    def train_batch(*args):
        steps.append(compiled() - sum(evaluations))
        return real_batch(*args)

    def run_evaluation(*args):
        before = compiled()
        result = real_evaluation(*args)
        evaluations.append(compiled() - before)
        return result

    monkeypatch.setattr(pretrain, "train_batch", train_batch)
    monkeypatch.setattr(pretrain, "run_evaluation", run_evaluation)
    tasks = f"{{name: tasks@MultipleChoiceEvaluator, path: {questions(tmp_path)}}}"
    run_on(
        REPLICA, text_corpus, tmp_path, *TEXT, f"grad_accum_steps={micro_batches}", "max_steps=12",
        "log_interval=5", "eval_interval=0.1", f"evaluators=[text@PerplexityEvaluator, {tasks}]",
        "eval_max_batches=2", "arch.post_refinement_steps=1",
        f"arch.hidden_size={64 * micro_batches}",  # no program of another test fits
    )  # fmt: skip
    print(f"\nprograms before each step {steps}, in each evaluation {evaluations}")
    assert len(steps) == 12 and len(evaluations) >= 2
    assert steps[0] < steps[1] < steps[2], "compiled programs are not counted"
    assert steps[2:] == [steps[2]] * 10
    assert evaluations[0] > 0 and evaluations[1:] == [0] * len(evaluations[1:])


def test_a_run_near_a_base_needs_no_more_programs_and_goes_on(text_corpus, tmp_path, monkeypatch):
    """The base takes its steps inside the same programs; numbers are those of the CPU."""
    base = run_on(CPUBackend(), text_corpus, tmp_path / "base", *TEXT, "max_steps=2", "epochs=1")
    options = [*TEXT, f"loss.kl_to={base}", "loss.kl_weight=0.5", "max_steps=8", "seed=1",
               "arch.forward_dtype=float64", "checkpoint_interval=4"]  # fmt: skip
    on_cpu = run_on(CPUBackend(), text_corpus, tmp_path / "cpu", *options)
    steps: list[int] = []
    real_batch = pretrain.train_batch

    def train_batch(*args):
        steps.append(compiled())
        return real_batch(*args)

    monkeypatch.setattr(pretrain, "train_batch", train_batch)
    whole = run_on(REPLICA, text_corpus, tmp_path / "xla", *options)
    assert steps[0] < steps[2] and steps[2:] == [steps[2]] * 6
    parts = run_on(REPLICA, text_corpus, tmp_path / "parts", *options, f"resume={whole / 'step_4'}")
    assert unequal(whole / "step_8", parts / "step_8") == []
    losses = [metrics_of(run, "train/kl_loss") for run in (on_cpu, whole)]
    # logged in float32
    assert losses[1] == pytest.approx(losses[0], rel=1e-6, abs=1e-7) and losses[0][-1] > 0


@pytest.mark.parametrize("feed", ["consume", "present"])
def test_n_plus_n_steps_equal_2n_steps_bit_for_bit(feed, text_corpus, tmp_path):
    options = [*TEXT, f"feed={feed}", "max_steps=8", "checkpoint_interval=4"]
    whole = run_on(REPLICA, text_corpus, tmp_path / "whole", *options)
    parts = run_on(REPLICA, text_corpus, tmp_path / "parts", *options, f"resume={whole / 'step_4'}")
    assert unequal(whole / "step_8", parts / "step_8") == []
    saved = [Checkpoint(run / "step_8").json("state.json")["stream"] for run in (whole, parts)]
    assert saved[0] == saved[1] and saved[0]["position"] > 0
    assert not contents(whole / "step_4")["carry_0/carry/halted"].all(), "no carry is in flight"
    on_cpu = run_on(CPUBackend(), text_corpus, tmp_path / "cpu", *options)
    assert (
        Checkpoint(on_cpu / "step_4").json("state.json")["stream"]
        == (Checkpoint(whole / "step_4").json("state.json")["stream"])
    ), "what was moved ahead was saved as used"


def test_a_run_goes_on_from_xla_to_the_cpu_and_back(text_corpus, tmp_path):
    options = [*TEXT, "arch.forward_dtype=float64", "max_steps=8", "checkpoint_interval=4"]
    ways = {"cpu": CPUBackend(), "xla": REPLICA}
    whole = {
        name: run_on(backend, text_corpus, tmp_path / name, *options)
        for name, backend in ways.items()
    }
    for start, end in (("cpu", "xla"), ("xla", "cpu")):
        run = run_on(
            ways[end], text_corpus, tmp_path / f"{start}_{end}", *options,
            f"resume={whole[start] / 'step_4'}",
        )  # fmt: skip
        found = apart(whole[start] / "step_8", run / "step_8")
        assert max(found.values()) <= 1e-7, found


def test_identifiers_that_occur_twice_get_one_update_of_the_sum():
    """As on the CPU."""
    tables = []
    start, pull = torch.randn(6, 3), torch.randn(2, 4, 3)
    for device in (torch.device("cpu"), REPLICA.device):
        embedding = CastedSparseEmbedding(6, 3, init_std=1.0, dtype=torch.float32).train()
        embedding.weights.copy_(start)
        embedding.to(device)
        optimizer = SparseEmbeddingSignSGD(embedding, lr=0.1, weight_decay=0.5)
        for ids, factor in zip(([1, 4, 1, 2], [4, 5, 1, 2]), pull, strict=True):
            factor = factor.clone()
            factor[3] = 0  # row 2 is used by ignored rows only
            looked_up = embedding(torch.tensor(ids).to(device))
            (looked_up * factor.to(device)).sum().backward()
        optimizer.step()
        tables.append(embedding.weights.cpu())
    torch.testing.assert_close(tables[1], tables[0])
    assert (tables[0] != start).any(1).tolist() == [False, True, False, False, True, True]


def test_an_error_of_the_stream_ends_the_evaluation():
    """The loader reads in a thread and would take an error for the end of the data."""

    def damaged():
        yield "all", {"inputs": torch.zeros(1, 2).numpy()}, 1
        raise ValueError("row 7 is damaged")

    seen = []
    with pytest.raises(ValueError, match="row 7"):
        for name, batch, count in REPLICA.batches(damaged()):
            seen.append((name, batch["inputs"].device.type, count))
    assert seen == [("all", "xla", 1)]


def test_float32_products_are_not_made_in_bfloat16():
    import torch_xla.backends

    assert torch_xla.backends.get_mat_mul_precision() == "highest"
