"""Figures on held-out text, computed again from the weights with nothing of the evaluator's."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from training_tools import finish, make_config, metrics_of, start, write_texts

from dataset.build_corpus_dataset import main as build_corpus
from dataset.common import load_metadata
from models.build import create_model, load_into
from models.inference.loading import load_language_model
from sequence_dataset import EvalStream
from utils.checkpoint.format import load_weights
from utils.corpus.corpora import Corpora


def probabilities(logits: torch.Tensor, loss_type: str) -> torch.Tensor:
    x = logits.double()
    if loss_type == "softmax_cross_entropy":
        return x.softmax(-1)
    s = torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))
    return s / s.sum(-1, keepdim=True)


@pytest.mark.parametrize("loss_type", ["stablemax_cross_entropy", "softmax_cross_entropy"])
def test_perplexity_is_that_of_the_models_own_loss(text_corpus, run_training, loss_type):
    """Averaged weights, all rows, four steps; bytes counted by decoding each scored token."""
    options = ["max_steps=30", "epochs=9", f"arch.loss.loss_type={loss_type}", "lr=1e-2"]
    run = run_training(text_corpus, "run", *options, "ema_rate=0.9")
    test = Corpora([str(text_corpus)], "test")
    model = create_model(make_config(text_corpus, *options).arch, test.metadata, batch_size=1).model
    load_into(model, load_weights(run, "ema")[0])
    model.eval()
    tokenizer = Tokenizer.from_file(str(text_corpus / "tokenizer.json"))
    nats, size, count = np.zeros(4), 0, 0
    for _, arrays, _ in EvalStream(test, global_batch_size=1):
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        labels = batch["labels"][0].tolist()
        carry = model.initial_carry(batch)
        for step in range(4):
            with torch.no_grad():
                carry, outputs = model(carry=carry, batch=batch)
            p = probabilities(outputs["logits"][0], loss_type)
            nats[step] -= sum(math.log(p[t, y]) for t, y in enumerate(labels) if y >= 0)
        count += sum(y >= 0 for y in labels)
        size += sum(len(tokenizer.decode([y]).encode()) for y in labels if y >= 0)
    logged = {name: metrics_of(run, f"eval/text/{name}")[-1] for name in (
        "nats_per_token", "perplexity", "bits_per_byte", "step_1/nats_per_token")}  # fmt: skip
    assert logged["nats_per_token"] == pytest.approx(nats[-1] / count, rel=1e-4)
    assert logged["perplexity"] == pytest.approx(math.exp(nats[-1] / count), rel=1e-3)
    assert logged["bits_per_byte"] == pytest.approx(nats[-1] / math.log(2) / size, rel=1e-4)
    assert logged["step_1/nats_per_token"] == pytest.approx(nats[0] / count, rel=1e-4)


@pytest.mark.slow
def test_figures_are_those_of_all_ranks(text_corpus, run_training, tmp_path):
    """Two ranks see half the rows each and report what one rank reports, whatever the rest row."""
    run = run_training(text_corpus, "run", "max_steps=3")
    shared = [f"data_paths=[{text_corpus}]", f"load_checkpoint={run}", "eval_only=true"]
    arch = ["arch=athena_trm_tiny", "arch.hidden_size=32", "arch.halt_max_steps=4",
            "arch.force_min_steps=1", "arch.post_refinement_steps=0", "device_type=cpu",
            "arch.loss.loss_type=softmax_cross_entropy", "global_batch_size=8"]  # fmt: skip
    folders = {ranks: tmp_path / f"ranks{ranks}" for ranks in (1, 2)}
    for ranks, folder in folders.items():
        code, out, err = finish(
            start(*shared, *arch, f"checkpoint_path={folder}", "run_name=x", ranks=ranks)
        )
        assert code == 0, out + err
    for name in (
        "text/perplexity", "text/bits_per_byte", "text/domain_poems/perplexity",
        "text/step_1/nats_per_token", "all/accuracy", "all/rows", "all/lm_loss",
    ):  # fmt: skip
        one, two = (metrics_of(folder, f"eval/{name}") for folder in folders.values())
        assert one == pytest.approx(two, rel=1e-5), name
        assert one, name


def test_a_tokenizer_with_unknown_text(tmp_path, run_training):
    """Bits per byte divide by the bytes of the text, and no prompt spells a special token."""
    tokenizer = Path(__file__).parents[1] / "dataset" / "cases" / "unigram.json"
    files = write_texts(tmp_path, seed=1, documents=20)
    for file in files:
        file.write_text(file.read_text("utf-8").replace("a", "♠"), "utf-8")  # not in the vocabulary
    corpus = tmp_path / "corpus"
    build_corpus(
        ["--tokenizer-json", str(tokenizer), "--output-dir", str(corpus)]
        + ["--input-files", *map(str, files), *"--seq-len 24 --train-ratio 0.7".split()]
    )
    run = run_training(corpus, "run", "max_steps=1")
    size = load_metadata(corpus / "test/all").scored_bytes
    assert size == np.load(corpus / "test/all/scored_bytes.npy").sum()
    counts = json.loads((corpus / "build_report.json").read_bytes())["splits"]["test"]["total"]
    assert counts["unknown_bytes"] >= 3 * counts["unknown_tokens"] > 0
    nats = metrics_of(run, "eval/text/nats_per_token")[-1] * counts["scored_tokens"]
    assert metrics_of(run, "eval/text/bits_per_byte")[-1] == pytest.approx(
        nats / math.log(2) / size
    )
    model = load_language_model(run)
    for text in ("</s>", "a </s> b", "a<pad></s>", "</s></s>"):
        ids = model.encode(text)
        assert ids and not {model.eos_id, model.metadata.pad_id} & set(ids)
        assert model.encode_pair(text, " c")[0] == ids


def test_rules_that_read_the_whole_row_are_named(text_corpus, run_training):
    run = run_training(text_corpus, "run", "max_steps=2", "arch.eval_halting=budget")
    assert metrics_of(run, "eval/budget/text/perplexity")
    assert not metrics_of(run, "eval/text/perplexity")


def test_untrained_refinement_is_reported_with_and_without(text_corpus, run_training):
    run = run_training(text_corpus, "run", "max_steps=2", "arch.post_refinement_steps=2")
    with_passes, without = (
        metrics_of(run, f"eval/text/{name}nats_per_token") for name in ("", "unrefined/")
    )
    assert with_passes != without
    assert without == pytest.approx(metrics_of(run, "eval/text/step_4/nats_per_token"))
