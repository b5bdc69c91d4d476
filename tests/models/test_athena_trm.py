"""The model: what it may see, when it halts, what a held row keeps."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from models import layers
from models.flex import block_mask
from models.losses import LOSSES, ACTLossHead
from models.recursive_reasoning.athena_trm import AthenaTRM
from models.recursive_reasoning.transformer import Transformer
from utils.corpus.order import ROW_OPTIONS, step_rng

B, S, V = 3, 14, 23
SIZES = dict(batch_size=B, seq_len=S, vocab_size=V, num_puzzle_identifiers=4)


def athena(**options) -> AthenaTRM:
    base = dict(
        hidden_size=32, num_heads=4, expansion=2, H_cycles=2, L_cycles=2, L_layers=2,
        halt_max_steps=4, halt_exploration_prob=0.0, forward_dtype="float32",
    )  # fmt: skip
    model = AthenaTRM(SIZES | base | options)
    with torch.no_grad():  # heads that start at zero would hide what they read
        model.inner.q_head.weight.normal_()
        if model.config.puzzle_emb_ndim:
            model.inner.puzzle_emb.weights.normal_()
    return model


def transformer(**options) -> Transformer:
    base = dict(hidden_size=32, num_heads=4, expansion=2, num_layers=2, forward_dtype="float32")
    return Transformer(SIZES | base | options)


def random_batch(documents: bool = False, targets: bool = False) -> dict[str, torch.Tensor]:
    batch = dict(
        inputs=torch.randint(V, (B, S), dtype=torch.int32),
        labels=torch.randint(V, (B, S), dtype=torch.int32),
        puzzle_identifiers=torch.randint(1, 4, (B,), dtype=torch.int32),
    )
    if documents:  # two documents and, from position 11 on, padding
        starts = torch.tensor([0] * 5 + [5] * 6 + [S] * 3, dtype=torch.int32)
        batch["document_starts"] = starts.repeat(B, 1)
    if targets:
        batch["iteration_targets"] = torch.randint(1, 5, (B,), dtype=torch.int32)
    return batch


@torch.no_grad()
def logits_by_step(model, batch, steps: int = 4) -> list[torch.Tensor]:
    carry, found = model.initial_carry(batch), []
    for _ in range(steps):
        carry, outputs = model(carry=carry, batch=batch)
        found.append(outputs["logits"])
    return found


# --- what a position sees ------------------------------------------------------------------


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("prefix", [0, 48])
@pytest.mark.parametrize("norm_type", ["post", "pre"])
@pytest.mark.parametrize("training", [False, True])
def test_no_logit_depends_on_a_later_token(documents, prefix, norm_type, training):
    """Bit for bit, at every ACT step, with refinement, whatever the position."""
    options = dict(puzzle_emb_ndim=prefix, norm_type=norm_type, post_refinement_steps=2)
    options["force_min_steps"] = 4  # in training q reads the whole row and may end it
    model = athena(**options).train(training)
    batch = random_batch(documents)
    before = logits_by_step(model, batch)
    for t in (0, 4, 6, 12):
        changed = copy.deepcopy(batch)
        changed["inputs"][:, t + 1 :] = torch.randint(V, (B, S - t - 1))
        for step, (old, new) in enumerate(zip(before, logits_by_step(model, changed), strict=True)):
            assert torch.equal(old[:, : t + 1], new[:, : t + 1]), f"leak at step {step + 1}, {t}"
            assert not torch.equal(old[:, t + 1 :], new[:, t + 1 :])


def test_the_baseline_does_not_leak_either():
    model, batch = transformer().eval(), random_batch(documents=True)
    (before,) = logits_by_step(model, batch, steps=1)
    changed = copy.deepcopy(batch)
    changed["inputs"][:, 7:] = (changed["inputs"][:, 7:] + 1) % V
    (after,) = logits_by_step(model, changed, steps=1)
    assert torch.equal(before[:, :7], after[:, :7])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("make", [athena, transformer])
def test_documents_neither_see_each_other_nor_padding(causal, make):
    model = make(causal=causal, puzzle_emb_ndim=40).eval()
    batch = random_batch(documents=True)
    steps = 4 if make is athena else 1
    before = logits_by_step(model, batch, steps)
    for changed_part, kept_part in (((0, 5), (5, 11)), ((5, 11), (0, 5)), ((11, 14), (0, 11))):
        changed = copy.deepcopy(batch)
        low, high = changed_part
        changed["inputs"][:, low:high] = (changed["inputs"][:, low:high] + 1) % V
        for old, new in zip(before, logits_by_step(model, changed, steps), strict=True):
            kept = slice(*kept_part)
            assert torch.equal(old[:, kept], new[:, kept])


@pytest.mark.parametrize("pos_encodings", ["rope", "learned"])
def test_a_document_reads_the_same_wherever_it_stands_in_the_row(pos_encodings):
    options = dict(puzzle_emb_ndim=40, forward_dtype="float64")  # recursion amplifies rounding
    model = athena(pos_encodings=pos_encodings, **options).eval()
    batch = random_batch(documents=True)
    alone = {k: v.clone() for k, v in batch.items()}
    alone["inputs"][:, :6] = batch["inputs"][:, 5:11]
    alone["document_starts"] = torch.tensor([0] * 6 + [S] * 8, dtype=torch.int32).repeat(B, 1)
    packed, single = logits_by_step(model, batch)[-1], logits_by_step(model, alone)[-1]
    torch.testing.assert_close(packed[:, 5:11], single[:, :6], rtol=0, atol=1e-9)


def test_the_prefix_is_seen_by_every_document():
    model, batch = athena(puzzle_emb_ndim=40).eval(), random_batch(documents=True)
    before = logits_by_step(model, batch)[0]
    batch["puzzle_identifiers"] = batch["puzzle_identifiers"] % 3 + 1
    after = logits_by_step(model, batch)[0]
    assert (before[:, :11] != after[:, :11]).any(-1).all()


def test_without_document_starts_nothing_is_masked():
    model, batch = athena(causal=False).eval(), random_batch()
    before = logits_by_step(model, batch)[0]
    batch["inputs"][:, 0] = (batch["inputs"][:, 0] + 1) % V
    assert (before != logits_by_step(model, batch)[0]).any(-1).all()


@pytest.mark.parametrize("by_lengths", [False, True])
def test_the_halting_head_ignores_padding(by_lengths):
    model, batch = athena().eval(), random_batch(documents=True)
    if by_lengths:
        del batch["document_starts"]
        batch["lengths"] = torch.full((B,), 11, dtype=torch.int32)
    _, before = model(carry=model.initial_carry(batch), batch=batch)
    batch["inputs"][:, 11:] = (batch["inputs"][:, 11:] + 1) % V
    _, after = model(carry=model.initial_carry(batch), batch=batch)
    assert torch.equal(before["q_halt_logits"], after["q_halt_logits"])
    batch["inputs"][:, 10] = (batch["inputs"][:, 10] + 1) % V
    _, after = model(carry=model.initial_carry(batch), batch=batch)
    assert not torch.equal(before["q_halt_logits"], after["q_halt_logits"])


def test_grouped_queries_equal_repeated_keys_and_values():
    grouped = athena(num_key_value_heads=2, forward_dtype="float64")
    full = athena(num_key_value_heads=4, forward_dtype="float64")
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "qkv_proj" in name:
            q, k, v = weight.unflatten(0, (8, 8)).split((4, 2, 2))
            weights[name] = torch.cat((q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)))
            weights[name] = weights[name].flatten(0, 1)
    full.load_state_dict(weights)
    batch = random_batch(documents=True)
    for one, other in zip(
        logits_by_step(grouped.eval(), batch), logits_by_step(full.eval(), batch), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("prefix", [0, 3])
def test_the_mask_for_cuda_says_the_same(causal, prefix):
    """Flex attention with the block mask, uncompiled on the CPU, against the boolean mask."""
    from torch.nn.attention.flex_attention import flex_attention

    starts = random_batch(documents=True)["document_starts"]
    length = prefix + S
    q, k, v = (torch.randn(B, heads, length, 16) for heads in (4, 2, 2))
    owner = torch.nn.functional.pad(starts, (prefix, 0), value=-1)
    flex = flex_attention(q, k, v, block_mask=block_mask(owner, prefix, causal), enable_gqa=True)
    plain = layers.attend(
        q, k, v, layers.SequenceInfo(None, None, layers.visible(starts, prefix, causal), causal)
    )
    torch.testing.assert_close(flex, plain, rtol=0, atol=1e-5)


# --- halting -------------------------------------------------------------------------------


def q_says(model: AthenaTRM, halt: bool) -> None:
    with torch.no_grad():
        model.inner.q_head.weight.zero_()
        model.inner.q_head.bias.copy_(torch.tensor([5.0, 0.0]) if halt else torch.tensor([-5.0, 0]))


def steps_until_halt(model, batch, explore=None) -> list[int]:
    carry, found = model.initial_carry(batch), torch.zeros(B, dtype=torch.int32)
    for _ in range(model.config.halt_max_steps):
        step_batch = batch if explore is None else batch | {"explore": explore}
        carry, _ = model(carry=carry, batch=step_batch)
        found = torch.where((found == 0) & carry.halted, carry.steps, found)
    return found.tolist()


@pytest.mark.parametrize("no_ACT_continue", [True, False])
def test_training_halts_by_budget_minimum_exploration_and_q(no_ACT_continue):
    model = athena(force_min_steps=2, no_ACT_continue=no_ACT_continue, halt_max_steps=4).train()
    batch = random_batch(targets=True)
    batch["iteration_targets"] = torch.tensor([1, 3, 9], dtype=torch.int32)
    q_says(model, False)
    assert steps_until_halt(model, batch) == [2, 3, 4]
    assert steps_until_halt(model, batch, torch.tensor([4, 0, 2], dtype=torch.int32)) == [4, 3, 4]
    q_says(model, True)
    assert steps_until_halt(model, batch) == [2, 2, 2]


def draws(step: int, rows: int, seed=3, chance=0.25, most=6) -> np.ndarray:
    model = athena(halt_exploration_prob=chance, halt_max_steps=most)
    return model.row_options(0.0, step_rng(seed, step, ROW_OPTIONS), rows)["explore"]


def test_exploration_depends_on_seed_step_and_slot_alone():
    many = np.stack([draws(step, 64) for step in range(400)])
    assert set(np.unique(many)) == {0, 2, 3, 4, 5, 6}
    assert abs((many > 0).mean() - 0.25) < 0.02
    counts = np.bincount(many[many > 0], minlength=7)[2:]
    assert counts.min() > 0.85 * counts.mean()
    # as ever: a run that an earlier version saved resumes with the same numbers
    assert many[7, :16].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 5, 0, 0]
    np.testing.assert_array_equal(many[7, :16], draws(7, 16))
    assert (many[0] != many[1]).any() and (many[0] != draws(0, 64, seed=4)).any()
    assert not draws(0, 64, chance=1.0, most=1).any()
    assert athena().row_options(0.0, step_rng(3, 0, ROW_OPTIONS), 64) == {}


def test_a_held_row_keeps_all_its_own_data():
    model = athena(force_min_steps=2).train()
    q_says(model, False)
    first, second = random_batch(True, True), random_batch(True, True)
    first["iteration_targets"] = torch.tensor([3, 1, 2], dtype=torch.int32)
    carry, _ = model(carry=model.initial_carry(first), batch=first)
    carry, _ = model(carry=carry, batch=second)
    assert carry.halted.tolist() == [False, True, True]
    carry, _ = model(carry=carry, batch=second)
    for key, held in carry.current_data.items():
        assert torch.equal(held[0], first[key][0]), key
        assert torch.equal(held[1:], second[key][1:]), key
    assert carry.steps.tolist() == [3, 1, 1]


def test_the_number_of_evaluation_steps_does_not_tell_the_future():
    """By default no row stops before another, whatever q or the budgets say."""
    model, batch = athena().eval(), random_batch(targets=True)
    q_says(model, True)
    assert steps_until_halt(model, batch) == [4, 4, 4]


@pytest.mark.parametrize(("rule", "expected"), [("budget", [1, 3, 4]), ("act", [1, 1, 1])])
def test_rows_that_halted_in_evaluation_keep_their_outputs(rule, expected):
    model, batch = athena(eval_halting=rule).eval(), random_batch(targets=True)
    batch["iteration_targets"] = torch.tensor([1, 3, 9], dtype=torch.int32)
    q_says(model, True)
    assert steps_until_halt(model, batch) == expected
    by_step = logits_by_step(model, batch)
    reference = logits_by_step(athena_like(model, eval_halting="max"), batch)
    for row, steps in enumerate(expected):
        for step in range(4):
            same = reference[min(step, steps - 1)][row]
            torch.testing.assert_close(by_step[step][row], same, rtol=0, atol=0)


def athena_like(model: AthenaTRM, **changes) -> AthenaTRM:
    other = AthenaTRM(model.config.model_dump() | changes)
    other.load_state_dict(model.state_dict())
    return other.eval()


def test_budget_without_targets_is_max_and_fixed_is_fixed():
    model, batch = athena(eval_halting="budget").eval(), random_batch()
    assert steps_until_halt(model, batch) == [4, 4, 4]
    fixed = athena(eval_halting="fixed", eval_steps=2).eval()
    assert steps_until_halt(fixed, batch) == [2, 2, 2]


def test_refinement_changes_the_logits_only():
    plain = athena().eval()
    refined = athena_like(plain, post_refinement_steps=2)
    batch = random_batch()
    carries, logits = [], []
    for model in (plain, refined):
        carry = model.initial_carry(batch)
        for _ in range(4):
            carry, outputs = model(carry=carry, batch=batch)
        carries.append(carry)
        logits.append(outputs)
    assert torch.equal(carries[0].latents["z_H"], carries[1].latents["z_H"])
    assert not torch.equal(logits[0]["logits"], logits[1]["logits"])
    assert torch.equal(logits[0]["logits"], logits[1]["unrefined_logits"])


def test_gradient_cycles_change_gradients_not_outputs():
    one, two = athena(), athena(H_grad_cycles=2)
    two.load_state_dict(one.state_dict())
    batch, grads = random_batch(), []
    for model in (one, two):
        head = ACTLossHead(model, "softmax_cross_entropy")
        _, loss, *_ = head(return_keys=(), carry=model.initial_carry(batch), batch=batch)
        loss.backward()
        grads.append((loss.item(), model.inner.L_level.layers[0].mlp.down_proj.weight.grad))
    assert grads[0][0] == grads[1][0]
    assert not torch.equal(grads[0][1], grads[1][1])


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, saving = athena(), athena(use_gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    batch, grads = random_batch(documents=True), []
    for model in (plain, saving):
        head = ACTLossHead(model, "softmax_cross_entropy")
        _, loss, *_ = head(return_keys=(), carry=model.initial_carry(batch), batch=batch)
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_tied_embeddings_share_one_table():
    model = athena(tie_embeddings=True).eval()
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    assert logits_by_step(model, random_batch())[0].shape == (B, S, V)


@pytest.mark.parametrize(
    "options",
    [
        dict(hidden_size=30),
        dict(num_key_value_heads=3),
        dict(force_min_steps=9),
        dict(H_grad_cycles=5),
        dict(mlp_t=True),
        dict(eval_halting="fixed"),
        dict(puzzle_emb_ndim=64, puzzle_emb_len=1),
        dict(hiden_size=32),
    ],
)
def test_inconsistent_options_are_named(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        athena(**options)


def test_no_reasoning_head_unless_asked():
    assert not hasattr(athena().inner, "reasoning_head")
    model = athena(enable_reasoning_stream=True, reasoning_seq_len=5, reasoning_vocab_size=7)
    _, outputs = model(carry=model.initial_carry(batch := random_batch()), batch=batch)
    assert outputs["reasoning_logits"].shape == (B, 5, 7)


def test_the_loss_table_has_both_losses():
    assert set(LOSSES) == {"stablemax_cross_entropy", "softmax_cross_entropy"}


def test_a_level_is_compiled_in_one_piece_unless_blocks_are_recomputed():
    model = athena()
    assert model.regions() == [(model.inner.L_level, "forward")]
    model = athena(use_gradient_checkpointing=True)
    assert model.regions() == [(block, "forward") for block in model.inner.L_level.layers]
