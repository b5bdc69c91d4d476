"""A checkpoint of an earlier version is evaluated and resumed to the same figures."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain import train
from utils.backend.cpu import CPUBackend
from utils.checkpoint.run_config import apply_trained_config
from utils.config.load import compose_config, load_config

KEPT = Path(__file__).parent / "checkpoints" / "format_2"
# As the run was started.
COMMAND = """
    arch=athena_trm_tiny arch.hidden_size=6 arch.num_heads=1 arch.puzzle_emb_ndim=6
    arch.puzzle_emb_len=1 arch.L_layers=1 arch.H_cycles=2 arch.L_cycles=2 arch.halt_max_steps=5
    arch.force_min_steps=1 arch.halt_exploration_prob=0.3 arch.post_refinement_steps=1
    arch.forward_dtype=float64 arch.loss.halt_target=plateau puzzle_emb_lr=1e-2 optimizer=adamw
    grad_clip_norm=0.5 device_type=cpu lr=3e-3 lr_warmup_steps=2 ema_rate=0.9 global_batch_size=4
    epochs=40 log_interval=1 seed=5 max_steps=24 checkpoint_interval=20 keep_checkpoints=null
    run_name=run evaluators=[text@PerplexityEvaluator]
""".split()
TOLERANCE = 1e-9


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the checkpoint, in the folder of a run; the corpus lies beside the run."""
    shutil.copytree(KEPT / "corpus", tmp_path / "corpus")
    shutil.copytree(KEPT / "step_20", tmp_path / "run" / "step_20")
    return tmp_path / "run" / "step_20"


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((KEPT / "expected.json").read_text("utf-8"))


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_it_is_evaluated_to_the_same_figures(checkpoint, expected, tmp_path):
    run = tmp_path / "evaluation"
    given = ["eval_only=true", f"load_checkpoint={checkpoint}", "device_type=cpu"]
    given += [f"data_paths=[{tmp_path / 'corpus'}]", f"checkpoint_path={run}"]
    config = load_config(apply_trained_config(compose_config(given), given))
    assert train(CPUBackend(), config) == 0
    found = logged(run)[-1]
    known = expected["evaluation"]
    assert {name: found.get(name) for name in known} == pytest.approx(known, rel=0, abs=TOLERANCE)


def test_it_is_resumed_to_the_same_losses(checkpoint, expected, tmp_path):
    run = checkpoint.parent
    config = load_config(
        compose_config([*COMMAND, f"data_paths=[{tmp_path / 'corpus'}]", f"checkpoint_path={run}"])
    )
    assert train(CPUBackend(), config) == 0
    steps = {line["step"]: line for line in logged(run) if "train/lm_loss" in line}
    assert sorted(steps) == [21, 22, 23, 24]
    for known in expected["training"]:
        found = {name: steps[known["step"]].get(name) for name in known}
        assert found == pytest.approx(known, rel=0, abs=TOLERANCE)
