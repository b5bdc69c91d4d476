"""The comparison names whoever is ahead, and counts what each run spent."""

from dataclasses import replace
from pathlib import Path

import pytest

from models import cost
from models.inference.loading import build_model
from pretrain import train
from scripts import compare
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.config.load import compose_config, load_config

RECURSIVE = """arch=athena_trm_tiny arch.halt_max_steps=4 arch.force_min_steps=3
    arch.post_refinement_steps=0"""
PLAIN = "arch=transformer arch.num_heads=2 arch.num_layers=2 arch.forward_dtype=float32"
SHARED = """arch.hidden_size=32 arch.puzzle_emb_ndim=32 device_type=cpu global_batch_size=8
    max_steps=4 log_interval=1 eval_max_batches=1"""


@pytest.fixture(scope="module")
def results(tmp_path_factory, text_corpus) -> list[compare.Result]:
    """The two architectures, trained for a few steps on one corpus."""
    root = tmp_path_factory.mktemp("compare")
    return [
        trained(root / "recursive", text_corpus, RECURSIVE),
        trained(root / "plain", text_corpus, PLAIN),
    ]


def trained(run: Path, corpus: Path, options: str) -> compare.Result:
    folders = [f"data_paths=[{corpus}]", f"checkpoint_path={run}"]
    config = load_config(compose_config([*f"{options} {SHARED}".split(), *folders]))
    assert train(CPUBackend(), config) == 0
    return compare.measure(run)


def test_costs_are_those_of_the_run(results):
    recursive, plain = results
    for result in results:
        opened = Checkpoint(checkpoints_of(result.metrics.folder)[-1])
        weights = opened.tensors("model")
        outside = ("puzzle_emb.weights", "embedding_weight", "lm_head.weight", "_init")
        core = sum(w.numel() for name, w in weights.items() if not name.endswith(outside))
        assert result.core_parameters == core
        assert result.steps == 4
        assert result.flops == pytest.approx(result.train_flops * 8 * 24 * 4)  # rows, tokens, steps
        assert result.tokens == result.metrics.last("train/tokens")
    model, _ = build_model(Checkpoint(checkpoints_of(recursive.metrics.folder)[-1]), device="meta")
    assert recursive.eval_flops == cost.evaluation_flops(model.model, depth=4)  # halt_max_steps
    assert plain.tokens == 4 * 8 * 24  # every row is new at every step
    assert recursive.tokens < plain.tokens


def test_the_base_of_a_loss_term_counts(results, text_corpus, tmp_path):
    """A run that stays near another model runs that one too at every step."""
    _, plain = results
    base = plain.metrics.folder
    near = trained(tmp_path / "near", text_corpus, f"{PLAIN} loss.kl_to={base} loss.kl_weight=1")
    assert near.parameters == plain.parameters
    assert near.eval_flops == plain.eval_flops
    forward = near.train_flops - plain.train_flops  # of the base, which gets no gradient
    assert forward == pytest.approx(plain.eval_flops, rel=0.1)
    assert near.flops == pytest.approx(near.train_flops * 8 * 24 * 4)


def test_table_shows_both_and_marks_the_better(results):
    text = compare.table(results)
    assert "| recursive |" in text.replace("  ", " ") and "plain" in text
    values = [r.metrics.last("eval/text/bits_per_byte") for r in results]
    assert f"**{min(values):.4f}**" in text and f"**{max(values):.4f}**" not in text
    assert "after ACT step 4" in text


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_verdict_does_not_depend_on_the_order(results, order):
    best = min(results, key=lambda r: r.metrics.last("eval/text/bits_per_byte"))
    assert compare.verdict([results[i] for i in order]).startswith(f"Ahead: {best.metrics.name},")


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        ("no_such_key=1", "no_such_key"),
        ("experiments=quickstart,compare_transfomer", "compare_transfomer"),
        ("experiments=quickstart compare_transformer", "compare_transformer"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(mistake, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        compare.main([f"output_dir={tmp_path / 'out'}", "seconds=1", *mistake.split()])
    error = capsys.readouterr().err
    assert end.value.code == 2 and named in error and "output_dir" not in error
    assert not (tmp_path / "out").exists()


def test_unfair_comparisons_are_noted(results):
    """One run on a busy machine, and one whose time was over before the last step."""
    _, plain = results
    assert not compare.notes([plain, plain], None)
    slower = replace(plain, seconds=1.6 * plain.seconds, steps=3)
    busy, early = compare.notes([plain, slower], max_steps=4)
    assert "1.6 times" in busy and "max_steps=3" in busy
    assert "3 of max_steps=4" in early


@pytest.mark.slow
def test_a_run_that_fails_is_named(tmp_path, capsys):
    arguments = [f"output_dir={tmp_path / 'out'}", "seconds=1", "data_paths=[nowhere]"]
    with pytest.raises(SystemExit) as end:
        compare.main(arguments)
    assert end.value.code == 2
    assert "experiment=quickstart ended with status 2" in capsys.readouterr().err
