"""Optimizers against their formulas; which weights decay."""

import math

import pytest
import torch

from models.recursive_reasoning.athena_trm import AthenaTRM
from utils.config.schema import OptimizerConfig
from utils.training.optimizers import create_optimizers, parameter_groups
from utils.training.optimizers.adam_atan2 import AdamATan2


@pytest.mark.parametrize("shape", [(4, 3), (700, 750)], ids=["small", "in pieces"])
@pytest.mark.parametrize("turned", [False, True], ids=["", "not contiguous"])
def test_adam_atan2_follows_its_formula(shape, turned):
    drawn = torch.randn(shape, dtype=torch.float64)
    weight = torch.nn.Parameter(drawn.T if turned else drawn)
    beta1, beta2, lr, decay = 0.9, 0.95, 0.01, 0.1
    optimizer = AdamATan2([weight], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    p, m, v = (
        weight.detach().clone(),
        torch.zeros_like(weight.detach()),
        torch.zeros_like(weight.detach()),
    )
    for t in range(1, 6):
        grad = torch.randn_like(p)
        weight.grad = grad.clone()
        optimizer.step()
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * grad**2
        root = v.sqrt() / math.sqrt(1 - beta2**t)
        p = p * (1 - lr * decay) - lr / (1 - beta1**t) * torch.atan2(m, root)
    torch.testing.assert_close(weight.detach(), p)


def tiny_model() -> AthenaTRM:
    return AthenaTRM(
        dict(batch_size=1, seq_len=4, vocab_size=7, num_puzzle_identifiers=1, hidden_size=16,
             num_heads=2, L_layers=1, pos_encodings="learned", forward_dtype="float32")
    )  # fmt: skip


def test_embeddings_and_biases_do_not_decay_unless_asked():
    model = tiny_model()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = parameter_groups(model, 0.1, decay_all=False)
    assert kept["weight_decay"] == 0
    assert {names[id(p)] for p in kept["params"]} == {
        "inner.embed_tokens.embedding_weight",
        "inner.embed_pos.embedding_weight",
        "inner.q_head.bias",
    }
    (everything,) = parameter_groups(model, 0.1, decay_all=True)
    assert len(everything["params"]) == len(names) == len(decayed["params"]) + 3


@pytest.mark.parametrize("name", ["adam_atan2", "adamw", "muon"])
def test_every_weight_is_trained_by_one_optimizer(name):
    model = tiny_model()
    optimizers = create_optimizers(
        OptimizerConfig(name=name), model, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1,
        decay_all=False,
    )  # fmt: skip
    owned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert all((a != b).any() for a, b in zip(before, model.parameters(), strict=True))
