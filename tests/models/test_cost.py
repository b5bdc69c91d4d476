"""The cost model against real steps: FLOPs as torch counts them, memory as it was allocated."""

import pytest
import torch
import yaml
from seeds import draw_rng
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import cost
from models.inference.loading import build_model
from models.losses import ACTLossHead
from models.recursive_reasoning.athena_trm import AthenaTRM
from models.recursive_reasoning.hier6 import Hier6
from models.recursive_reasoning.single_z import SingleZ
from models.recursive_reasoning.transformer import Transformer
from scripts.training_step import measure_step
from utils.backend.cpu import CPUBackend
from utils.checkpoint.format import Checkpoint, checkpoints_of
from utils.config.load import compose_config, load_config
from utils.training.dry_run import plan_model

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


def executed(model: torch.nn.Module, training: bool) -> int:
    """FLOPs of one ACT step of every row, as torch counts them (all pairs of attention)."""
    head = ACTLossHead(model, "softmax_cross_entropy").train(training)
    tokens = torch.randint(70, (ROWS, LENGTH))
    batch = dict(
        inputs=tokens, labels=tokens, puzzle_identifiers=torch.ones(ROWS, dtype=torch.long),
        document_starts=torch.zeros_like(tokens),
    )  # fmt: skip
    # torch's counter does not know the fused kernel of the CPU
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.set_grad_enabled(training),
    ):
        carry = model.initial_carry(batch)  # type: ignore[operator]
        _, loss, *_ = head(return_keys=(), carry=carry, batch=batch)
        if training:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
def test_flops_and_parameters_are_exact(name):
    model = build(MODELS[name])
    counted = cost.measure(model, whole_square=True)
    assert executed(model, training=True) == ROWS * counted.row_train_flops
    # halt_max_steps is 1: the one step of the evaluation is the last, which is refined
    whole = counted.row_forward_flops + counted.row_refinement_flops
    assert executed(model, training=False) == ROWS * whole
    assert counted.evaluation_flops * LENGTH == whole
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    tables = [b.numel() for n, b in model.named_buffers() if n.endswith("puzzle_emb.weights")]
    assert [counted.identifier_parameters] == tables


@pytest.mark.parametrize("causal", [True, False])
def test_attention_counts_the_pairs_that_the_mask_allows(causal):
    model = build(dict(causal=causal))
    positions = model.config.prefix_len + LENGTH
    seen = torch.ones(positions, positions)
    hidden = positions**2 - int((seen.tril() if causal else seen).sum())
    less = (
        cost.measure(model, whole_square=True).row_forward_flops
        - cost.measure(model).row_forward_flops
    )
    assert less == cost.measure(model).layer_passes * 4 * 48 * hidden


def test_expected_steps_are_those_of_the_halting_rule():
    model = build(dict(halt_max_steps=9, halt_exploration_prob=0.9, force_min_steps=2))
    budgets = torch.from_numpy(draw_rng().integers(0, 12, 40_000))
    budgets[budgets == 11] = 0  # none
    targets = torch.where(budgets == 0, 99, budgets)
    q = torch.full(budgets.shape, -5.0)
    steps = torch.zeros(len(budgets), dtype=torch.int32)
    running = torch.ones(len(budgets), dtype=torch.bool)
    model.train()
    while running.any():
        steps += running
        halts = model.halts(steps, q, q, {"iteration_targets": targets}, None)
        running &= ~halts
    expected = cost.expected_steps(model.config, budgets.tolist())
    assert expected == pytest.approx(steps.float().mean().item(), rel=0.01)


WIDE = "arch.hidden_size=192 arch.num_heads=6 arch.puzzle_emb_ndim=192 vocab_size=1000 seq_len=96"
NEAR = "arch.loss.kl_to=base arch.loss.kl_weight=0.1"
STEPS = {
    "athena, bfloat16": ("", "arch.forward_dtype=bfloat16"),
    "athena, at once": ("micro_batch_size=4",),
    "long rows": ("seq_len=384", "vocab_size=300", "global_batch_size=2 micro_batch_size=1"),
    "many tokens": ("vocab_size=9000", "arch.forward_dtype=bfloat16"),
    "softmax": ("vocab_size=9000", "arch.loss.loss_type=softmax_cross_entropy"),
    "recomputed, bfloat16": (
        "arch.use_gradient_checkpointing=true arch.forward_dtype=bfloat16", "arch.norm_type=pre",
    ),
    "tied, recomputed": ("arch.use_gradient_checkpointing=true arch.tie_embeddings=true",),
    "refinement trained": ("arch.post_refinement_train=true arch.H_grad_cycles=2",),
    "mixed by an MLP": ("arch.mlp_t=true arch.causal=false arch.document_mask=false",),
    "trm": ("arch=trm", "arch.L_cycles=2"),
    "decoder": ("arch=transformer arch.num_layers=6", "optimizer=adamw"),
    "decoder, at once": ("arch=transformer arch.num_layers=6 micro_batch_size=4", "ema=false"),
    "update": ("seq_len=4 vocab_size=9000", "optimizer=adamw global_batch_size=1"),
    "muon": ("optimizer=muon seq_len=32",),
    "near a base": (NEAR, "arch.loss.loss_type=softmax_cross_entropy micro_batch_size=4"),
    "near a base, many tokens": (NEAR, "vocab_size=9000", "arch.forward_dtype=bfloat16"),
    "near a base, a decoder": (NEAR, "arch=transformer arch.num_layers=6 vocab_size=3000"),
}  # fmt: skip


QUICK = ("athena, bfloat16", "decoder, at once", "softmax", "muon", "near a base")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STEPS],
)
def test_memory_is_what_a_step_allocates(name):
    """Part by part; what is too small to matter may be further off."""
    given = {"arch": "athena_trm_tiny", "global_batch_size": "4", "micro_batch_size": "2"}
    for override in " ".join((WIDE, *STEPS[name])).split():
        key, _, value = override.partition("=")
        given[key] = value
    given["micro_batch_size"] = min(given["micro_batch_size"], given["global_batch_size"])
    overrides = [f"{key}={value}" for key, value in given.items()]
    config = load_config(compose_config([*overrides, "dry_run=true", "device_type=cpu"]))
    micro_rows = config.micro_rows(1)
    found, _ = measure_step(config, micro_rows, CPUBackend())
    head, _ = plan_model(config, 1)
    parts = cost.memory(head.model, config, micro_rows=micro_rows, device="cpu")
    total = sum(found.values())
    assert sum(parts.values()) == pytest.approx(total, rel=0.05)
    for part, real in found.items():
        assert parts[part] == pytest.approx(real, rel=0.15, abs=0.005 * total), part


def test_a_checkpoint_takes_what_was_told(text_run):
    folder = checkpoints_of(text_run)[-1]
    saved = Checkpoint(folder)
    head, _ = build_model(saved, device="meta")
    config = load_config(yaml.safe_load(saved.text("config.yaml")))
    tensors = sum(t.nbytes for t in saved.all_tensors().values())
    assert cost.checkpoint_bytes(head.model, config) == pytest.approx(tensors, rel=0.15)
