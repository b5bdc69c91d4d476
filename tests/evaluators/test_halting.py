"""Latents have any names."""

import pytest
from training_tools import metrics_of

SIZES = "arch.hidden_size=32 arch.num_heads=2 arch.H_cycles=1 arch.puzzle_emb_len=1".split()


@pytest.mark.parametrize(
    ("arch", "latents"),
    [("single_z", ["z_L"]), ("hier6", ["z_H", *(f"z_L{i}" for i in range(1, 7))])],
)
def test_the_change_of_every_latent_is_reported_and_drawn(
    puzzle_corpus, run_training, arch, latents
):
    run = run_training(
        puzzle_corpus, arch, f"arch={arch}", *SIZES, "arch.halt_max_steps=2", "max_steps=1",
        "arch.forward_dtype=float32", "eval_max_batches=1", "evaluators=[halting@HaltingEvaluator]",
    )  # fmt: skip
    for latent in latents:
        for step in (1, 2):
            (change,) = metrics_of(run, f"eval/halting/step_{step}/{latent}_change")
            assert change > 0, latent
    assert list(run.glob("*/halting.png"))
