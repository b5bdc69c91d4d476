"""On noise nothing can be learnt: a loss below the entropy is a leak."""

import math

import pytest
import torch

from models.losses import ACTLossHead
from models.recursive_reasoning.athena_trm import AthenaTRM
from utils.config.load import compose_config, load_config

SYMBOLS, ROWS, LENGTH, STEPS = 32, 16, 32, 3


def noise_batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(SYMBOLS, (ROWS, LENGTH + 1), dtype=torch.int32)
    return dict(
        inputs=tokens[:, :-1],
        labels=tokens[:, 1:].contiguous(),
        puzzle_identifiers=torch.zeros(ROWS, dtype=torch.int32),
        iteration_targets=torch.randint(1, STEPS + 1, (ROWS,), dtype=torch.int32),
        document_starts=torch.zeros(ROWS, LENGTH, dtype=torch.int32),
    )


def head_of(loss_type: str, **changes) -> ACTLossHead:
    """The text preset athena_trm_tiny as the config gives it, with few steps."""
    config = load_config(
        compose_config(["arch=athena_trm_tiny", "dry_run=true", "seq_len=32", "vocab_size=32"])
    )
    options = config.arch.options | dict(
        batch_size=ROWS, seq_len=LENGTH, vocab_size=SYMBOLS, num_puzzle_identifiers=1,
        halt_max_steps=STEPS, force_min_steps=STEPS, enable_reasoning_stream=False,
        halt_exploration_prob=0.0,
    )  # fmt: skip
    return ACTLossHead(AthenaTRM(options | changes), **config.arch.loss.options | dict(
        loss_type=loss_type))  # fmt: skip


def train_on_noise(head: ACTLossHead, updates: int) -> list[float]:
    """Losses of the first ACT step on rows never seen before, in nats."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    head.train()
    first, carry = [], None
    for step in range(updates):
        if step % STEPS == 0:
            batch = noise_batch()
            carry = carry or head.initial_carry(batch)
        carry, loss, metrics, *_ = head(return_keys=(), carry=carry, batch=batch)
        if step % STEPS == 0:
            first.append(metrics["lm_loss"][0].item() / ROWS)
        (loss / ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return first


@torch.no_grad()
def held_out(head: ACTLossHead, batches: int) -> list[list[float]]:
    """By ACT step, the mean loss of each fresh batch, in nats."""
    head.eval()
    found: list[list[float]] = [[] for _ in range(STEPS)]
    for _ in range(batches):
        batch = noise_batch()
        carry = head.initial_carry(batch)
        for losses in found:
            carry, _, metrics, *_ = head(return_keys=(), carry=carry, batch=batch)
            losses.append(metrics["lm_loss"][0].item() / ROWS)
    return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.mean().item(), (tensor.std() / math.sqrt(len(values))).item()


SHALLOW = dict(H_cycles=1, L_cycles=1, L_layers=1)  # finds a leak soonest, if there is one


@pytest.mark.parametrize(
    "depth",
    [pytest.param({}, id="preset", marks=pytest.mark.slow), pytest.param(SHALLOW, id="shallow")],
)
@pytest.mark.parametrize("loss_type", ["stablemax_cross_entropy", "softmax_cross_entropy"])
def test_a_text_preset_learns_nothing_from_noise(loss_type, depth):
    head = head_of(loss_type, **depth)
    curves = [train_on_noise(head, updates=180)[20:], *held_out(head, batches=20)]
    for name, losses in zip(("fresh rows, step 1", *range(1, STEPS + 1)), curves, strict=True):
        mean, error = mean_and_error(losses)
        assert mean >= math.log(SYMBOLS) - 3 * error, f"{name}: {mean:.3f} nats"


@pytest.mark.parametrize(
    "loss_type",
    [pytest.param("stablemax_cross_entropy", marks=pytest.mark.slow), "softmax_cross_entropy"],
)
def test_this_test_sees_a_model_that_looks_ahead(loss_type):
    changes = dict(causal=False, document_mask=False, puzzle_emb_ndim=0, rope_theta=100.0)
    means = []
    for round_ in range(12):
        if round_ % 3 == 0:  # one of fifty initial weights takes thousands of updates to find it
            head = head_of(loss_type, **SHALLOW, **changes)
        train_on_noise(head, updates=300)
        means.append(mean_and_error(held_out(head, batches=5)[-1])[0])
        if means[-1] < math.log(SYMBOLS) - 1:
            return
    pytest.fail(f"means of {means} nats")
