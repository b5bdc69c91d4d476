"""FLOPs and parameters by tracing, against real steps as torch counts them."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from models import cost
from models.losses import ACTLossHead
from models.recursive_reasoning.athena_trm import AthenaTRM
from models.recursive_reasoning.hier6 import Hier6
from models.recursive_reasoning.single_z import SingleZ
from models.recursive_reasoning.transformer import Transformer
from utils.backend.tracing import Tracer, Untraceable

aten = torch.ops.aten

ROWS, LENGTH = 3, 16
SIZES = dict(
    batch_size=ROWS, seq_len=LENGTH, vocab_size=70, num_puzzle_identifiers=3, hidden_size=48,
    num_heads=4, puzzle_emb_ndim=60, forward_dtype="float32",
)  # fmt: skip
RECURSION = dict(H_cycles=3, L_cycles=2, L_layers=2, halt_max_steps=1, halt_exploration_prob=0.0)
MODELS = {
    "athena": {},
    "pre-norm, recomputed": dict(norm_type="pre", use_gradient_checkpointing=True),
    "post-norm, recomputed": dict(use_gradient_checkpointing=True),
    "several cycles with gradient": dict(H_grad_cycles=2, num_key_value_heads=4),
    "tied, not causal": dict(tie_embeddings=True, causal=False, document_mask=False),
    "mixed by an MLP": dict(mlp_t=True, causal=False, document_mask=False),
    "refined": dict(post_refinement_steps=2),
    "refinement trained": dict(
        post_refinement_steps=2, post_refinement_train=True, use_gradient_checkpointing=True
    ),
    "continue target": dict(no_ACT_continue=False, pos_encodings="learned"),
    "reasoning head": dict(
        enable_reasoning_stream=True, reasoning_seq_len=5, reasoning_vocab_size=40
    ),
    "one stream": dict(kind=SingleZ),
    "six streams": dict(kind=Hier6, L_cycles=6, H_cycles=2),
    "decoder": dict(num_layers=3),
    "decoder, recomputed": dict(num_layers=3, norm_type="pre", use_gradient_checkpointing=True),
}


def build(options: dict) -> torch.nn.Module:
    if "num_layers" in options:
        return Transformer(SIZES | options)
    kind = options.get("kind", AthenaTRM)
    return kind(SIZES | RECURSION | {k: v for k, v in options.items() if k != "kind"})


def executed(
    model: torch.nn.Module, forward: Callable[[], torch.Tensor], backward: bool = False
) -> tuple[int, int]:
    """Return the FLOPs of real code as torch counts them: what is computed once, and what the
    backward pass repeats of the forward pass.

    Attention runs unfused here. Against that, a causal kernel leaves out the pairs that are hidden,
    and the backward pass of a fused kernel makes five products of all scores, not four.
    """
    config, totals, in_backward = model.config, [0, 0], False
    length, mixed = config.prefix_len + LENGTH, getattr(config, "mlp_t", False)

    def count(operation):
        def flops(*shapes, out_shape=None, **kwargs) -> int:
            found = flop_registry[operation](*shapes, out_val=out_shape, **kwargs)
            again = in_backward and torch.is_grad_enabled()
            if operation is aten.bmm and not mixed:
                found = found * (length + 1) // (2 * length) if config.causal else found
                found = found * 5 // 4 if in_backward and not again else found
            totals[again] += found
            return found

        return flops

    known = {operation: count(operation) for operation in (aten.mm, aten.addmm, aten.bmm)}
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with sdpa_kernel(SDPBackend.MATH), counter, torch.set_grad_enabled(backward):
        loss = forward()
        in_backward = True
        if backward:
            loss.backward()
    assert counter.get_total_flops() == sum(totals)  # nothing else is a product
    return totals[0], totals[1]


def draw_batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(70, (ROWS, LENGTH))
    return dict(
        inputs=tokens, labels=tokens, puzzle_identifiers=torch.ones(ROWS, dtype=torch.long),
        document_starts=torch.zeros_like(tokens),
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_training_flops_are_those_of_a_real_step(name):
    model, batch = build(MODELS[name]), draw_batch()
    head = ACTLossHead(model, "softmax_cross_entropy").train()
    carry = head.initial_carry(batch)
    once, again = executed(model, lambda: head((), carry, batch)[1], backward=True)
    counted = cost.measure_mean(ACTLossHead(build(MODELS[name]), "softmax_cross_entropy"))
    assert counted.row_train_flops * ROWS == once
    assert counted.row_recomputed_flops * ROWS == again
    assert (again > 0) is model.config.use_gradient_checkpointing


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_flops_are_those_of_a_real_answer(name):
    model, batch, depth = build(MODELS[name]).eval(), draw_batch(), 2
    inner = model.inner

    def answer() -> torch.Tensor:
        return inner.logits(inner.answer(inner.embed(batch), inner.sequence_info(batch), depth))

    once, _ = executed(model, answer)
    assert cost.evaluation_flops(build(MODELS[name]), depth) * ROWS * LENGTH == once


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_once(name):
    model = build(MODELS[name])
    counted = cost.count_parameters(model)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.embeddings >= 70 * 48  # tokens, and perhaps positions
    assert counted.head == (0 if model.config.tie_embeddings else 70 * 48)
    tables = [b.numel() for n, b in model.named_buffers() if n.endswith("puzzle_emb.weights")]
    assert [counted.identifiers] == tables
    assert counted.identifiers + counted.buffers == sum(b.numel() for b in model.buffers())


def test_passes_are_calls_of_blocks():
    counted = cost.measure_mean(ACTLossHead(build({}), "softmax_cross_entropy"))
    assert (counted.passes, counted.gradient_passes) == (3 * 3 * 2, 3 * 2)
    recomputed = build(dict(use_gradient_checkpointing=True))
    counted = cost.measure_mean(ACTLossHead(recomputed, "softmax_cross_entropy"))
    assert counted.gradient_passes == 3 * 2


def test_tracing_takes_no_memory_and_draws_nothing():
    """A table of 4 TB, on the meta device as a plan builds it."""
    torch.manual_seed(7)
    with torch.device("meta"):
        model = AthenaTRM(SIZES | RECURSION | dict(vocab_size=1 << 34))
    state = torch.get_rng_state()
    counted = cost.measure_mean(ACTLossHead(model, "softmax_cross_entropy"))
    assert counted.parameters.embeddings == 48 << 34
    assert torch.equal(torch.get_rng_state(), state)


def test_a_question_about_a_value_is_answered_and_one_about_a_shape_is_not():
    with Tracer(causal=True) as tracer:
        x = torch.zeros(4, 4)
        assert bool((x > 0).any())
        x @ x
    assert tracer.flops == 2 * 4**3
    with pytest.raises(Untraceable, match="nonzero"), tracer:
        torch.zeros(4).nonzero()
