"""Parity with TRM's reference implementation, number by number (SPEC: golden files)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.losses import ACTLossHead
from models.recursive_reasoning.athena_trm import AthenaTRM
from models.sparse_embedding import SparseEmbeddingSignSGD

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


class Golden:
    """One file: `get` gives an array, `model` the reference's initial state in our model."""

    def __init__(self, path: Path):
        self.arrays = np.load(path)
        self.options = json.loads(str(self.arrays["config_json"]))

    def get(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        names = [name for name in self.arrays.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.get(name) for name in names}

    def model(self, forward_dtype: str) -> ACTLossHead:
        options = self.options | dict(
            forward_dtype=forward_dtype,
            causal=False,
            document_mask=False,
            num_key_value_heads=self.options["num_heads"],
        )
        head = ACTLossHead(AthenaTRM(options), loss_type="stablemax_cross_entropy")
        head.model.load_state_dict(self.group("init/"))
        return head


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request) -> Golden:
    return Golden(request.param)


def assert_matches(ours: torch.Tensor, reference: torch.Tensor, tolerance: float, name: str):
    ours, reference = ours.detach().double(), reference.double()
    scale = reference.abs().max().clamp_min(1e-12)
    error = ((ours - reference).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: off by {error:.2e} of its maximum"


def assert_step_matches(golden: Golden, i: int, carry, loss, metrics, outputs, tolerance: float):
    ours = dict(
        loss=loss,
        z_H=carry.latents["z_H"],
        z_L=carry.latents["z_L"],
        **outputs,
        **{f"metrics/{name}": total for name, (total, _) in metrics.items()},
    )
    ours["metrics/count"] = metrics["accuracy"][1]
    for name, reference in golden.group(f"step/{i}/").items():
        if name in ("halted", "steps"):
            assert torch.equal(getattr(carry, name), reference), name
        else:
            assert_matches(ours[name], reference, tolerance, f"step {i}, {name}")


KEYS = ("logits", "q_halt_logits", "q_continue_logits")


def test_eight_training_steps_and_evaluation_in_float64(golden):
    head = golden.model("float64").train()
    model = head.model
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ]
    if golden.options["puzzle_emb_ndim"]:
        embedding = model.inner.puzzle_emb
        optimizers.append(SparseEmbeddingSignSGD(embedding, lr=1e-2, weight_decay=0.1))
    carry = head.initial_carry(golden.group("batch/0/"))
    for i in range(8):
        batch = golden.group(f"batch/{i}/")
        carry, loss, metrics, outputs, _ = head(return_keys=KEYS, carry=carry, batch=batch)
        assert_step_matches(golden, i, carry, loss, metrics, outputs, 1e-6)
        (loss / len(batch["inputs"])).backward()
        if i == 0:
            assert_gradients_match(golden, model, 1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    state = model.state_dict()
    for name, reference in golden.group("final/").items():
        assert_matches(state[name], reference, 1e-6, f"final {name}")

    head.eval()
    batch = golden.group("batch/7/")
    carry, done, steps = head.initial_carry(batch), False, 0
    while not done:
        carry, loss, _, outputs, done = head(return_keys=KEYS, carry=carry, batch=batch)
        steps += 1
    assert steps == golden.get("eval/num_steps")
    assert_matches(loss, golden.get("eval/loss"), 1e-6, "eval loss")
    for name in ("logits", "q_halt_logits"):
        assert_matches(outputs[name], golden.get(f"eval/{name}"), 1e-6, f"eval {name}")


def assert_gradients_match(golden: Golden, model: AthenaTRM, tolerance: float):
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    if golden.options["puzzle_emb_ndim"]:
        gradients["inner.puzzle_emb.local_weights"] = model.inner.puzzle_emb.used[0][1].grad
    references = golden.group("grad0/")
    assert set(references) == set(gradients)
    for name, reference in references.items():
        assert_matches(gradients[name], reference, tolerance, f"gradient of {name}")


def test_first_step_in_float32(golden):
    head = golden.model("float32").train()
    batch = golden.group("batch/0/")
    carry = head.initial_carry(batch)
    carry, loss, metrics, outputs, _ = head(return_keys=KEYS, carry=carry, batch=batch)
    assert_step_matches(golden, 0, carry, loss, metrics, outputs, 1e-5)
