"""Masked attention: which kernel runs it, and the block mask against the dense one."""

import pytest
import torch
import torch.nn.functional as F
from dispatch_tools import Shapes
from seeds import draw_rng
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from evaluators.loop import SetFigures, run_batch
from models import layers
from models.flex import attention_kernel, block_mask, failure, flex_attend
from models.losses import ACTLossHead
from models.recursive_reasoning.athena_trm import AthenaTRM
from utils.backend.cpu import CPUBackend


def packed_rows(rows: int, length: int) -> torch.Tensor:
    """Document starts (rows, length), the end of the first row padding."""
    rng = draw_rng()
    starts = torch.zeros(rows, length, dtype=torch.int32)
    for row in starts:
        for begin in sorted(rng.integers(1, length, rng.integers(0, 6)).tolist()):
            row[begin:] = begin
    starts[0, length - length // 4 :] = length
    return starts


def blocks_of(mask, kind: str) -> list[list[list[int]]]:
    """Blocks listed for each block of queries (or keys), as sets, because their order is free."""
    counts, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
    return [
        [sorted(index[:n].tolist()) for n, index in zip(*pair, strict=True)]
        for pair in zip(counts[:, 0], indices[:, 0], strict=True)
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("prefix", "length"), [(0, 256), (0, 300), (1, 383), (128, 200), (140, 150), (1, 20)]
)
def test_the_block_mask_is_that_of_all_pairs(prefix, length, causal):
    """Block by block as torch finds them from the whole mask, and with the same attention."""
    starts = packed_rows(2, length)
    dense = layers.visible(starts, prefix, causal, "dense")
    mask = block_mask(F.pad(starts, (prefix, 0), value=-1), prefix, causal)
    total = prefix + length
    whole = create_block_mask(lambda b, h, q, k: dense[b, 0, q, k], 2, None, total, total, "cpu")
    assert mask.shape == whole.shape
    assert torch.equal(mask.to_dense(), whole.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert blocks_of(mask, kind) == blocks_of(whole, kind), kind
    q, k, v = (torch.randn(2, heads, total, 8, dtype=torch.float64) for heads in (2, 1, 1))
    found = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)


def test_the_block_mask_is_made_without_the_square_of_a_length():
    """16 rows of 2,049 positions would take 67 MB, and several times that on the way."""
    starts = torch.zeros(2, 700, dtype=torch.int32)
    with Shapes() as shapes:
        layers.visible(starts, 1, True, "flex")
    assert (2, 701) in shapes.seen
    assert shapes.squares(128, 700, 701, 768) == []


H100, T4 = (9, 0), (7, 5)


@pytest.mark.parametrize(
    ("device", "dtype", "head_size", "card", "kernel", "word"),
    [
        ("cuda", torch.bfloat16, 64, {"capability": H100}, "flex", None),
        ("cuda", torch.float32, 16, {"capability": (8, 0)}, "flex", None),
        ("cuda", torch.float64, 64, {"capability": H100}, "dense", "float64"),
        ("cuda", torch.bfloat16, 8, {"capability": H100}, "dense", "8"),
        ("cuda", torch.float32, 64, {"capability": T4}, "dense", "7.5"),
        ("cuda", torch.bfloat16, 64, {"cannot_compile": "no gcc"}, "dense", "no gcc"),
        ("cpu", torch.float32, 64, {}, "dense", None),
        ("xla", torch.bfloat16, 64, {"cannot_compile": "it compiles itself"}, "dense", None),
    ],
)
def test_the_kernel_is_one_that_the_card_can_run(device, dtype, head_size, card, kernel, word):
    choice = attention_kernel(device, dtype, head_size, **card)
    assert choice.kernel == kernel
    assert (choice.reason is None) if word is None else (word in choice.reason)


class Card(CPUBackend):
    """A GPU as far as the choice goes: it is asked, and nothing runs on it."""

    capability = H100
    fault: str | None = None

    def __init__(self):
        super().__init__()
        self.device = torch.device("cuda")

    def cannot_compile(self) -> str | None:
        return self.fault


OPTIONS = dict(
    batch_size=2, seq_len=40, vocab_size=30, hidden_size=32, num_heads=2, H_cycles=2, L_cycles=2,
    L_layers=1, halt_max_steps=3, halt_exploration_prob=0.0, forward_dtype="float32",
)  # fmt: skip


def test_a_model_takes_a_dense_mask_where_flex_attention_does_not_run():
    card = Card()
    card.fault = "neither gcc nor clang"
    model = AthenaTRM(OPTIONS)
    assert "gcc" in model.inner.choose_attention(card)
    info = model.inner.sequence_info({"inputs": (x := packed_rows(2, 40)), "document_starts": x})
    assert isinstance(info.mask, torch.Tensor)
    assert Card().fault is None
    model.inner.choose_attention(Card(), trial=False)
    info = model.inner.sequence_info({"inputs": x, "document_starts": x})
    assert not isinstance(info.mask, torch.Tensor)
    unmasked = AthenaTRM(OPTIONS | {"document_mask": False})
    assert unmasked.inner.choose_attention(card) is None


@pytest.mark.slow
def test_a_trial_that_fails_says_why():
    """Flex attention has no backward pass on the CPU: a real failure, as a card may have others."""
    reason = failure(torch.device("cpu"), torch.float32, 2, 1, 32)
    assert reason is not None and "backward" in reason


@pytest.mark.slow
def test_flex_attention_is_part_of_a_compiled_block():
    """As a whole: a break in the graph would compile each half for itself."""
    block = layers.Block(32, 2, 1, 2.0, "post", 1e-5)
    starts = packed_rows(2, 40)
    x = torch.randn(2, 40, 32)
    results = []
    for kernel in ("dense", "flex"):
        mask = layers.visible(starts, 0, True, kernel)
        info = layers.SequenceInfo(None, None, mask, True)
        with torch.no_grad():
            results.append(block(x, info))
            if kernel == "flex":
                whole = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)
                results.append(whole(x, info))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_short_rows_take_the_kernel_that_compiles_for_any_length():
    """Inductor's decoding kernel does not compile for 97 positions of grouped queries."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    mask = layers.visible(packed_rows(2, 97), 0, True, "flex")
    query, key = torch.randn(2, 4, 97, 32), torch.randn(2, 2, 97, 32)
    with torch.no_grad():
        torch.compile(flex_attend, backend=keep, fullgraph=True)(query, key, key, mask)
    calls = [node for graph in graphs for node in graph.graph.nodes if "flex" in str(node.target)]
    given = [argument for argument in calls[0].args if isinstance(argument, dict)]
    assert given[0]["FORCE_USE_FLEX_ATTENTION"] is True


def test_an_evaluation_makes_its_mask_once_for_all_steps():
    model = AthenaTRM(OPTIONS)
    head = ACTLossHead(model, "softmax_cross_entropy").eval()
    starts = packed_rows(2, 40)
    tokens = torch.randint(30, (2, 40), dtype=torch.int32)
    batch = dict(
        inputs=tokens, labels=tokens, document_starts=starts,
        puzzle_identifiers=torch.zeros(2, dtype=torch.int32),
    )  # fmt: skip
    figures = SetFigures(3, torch.device("cpu"), torch.float32)
    with Shapes() as shapes:
        run_batch(head, batch, set(), 3, figures, lambda: None)
    with Shapes() as once:
        layers.visible(starts, 0, True)
    assert shapes.seen.count((2, 40, 40)) == once.seen.count((2, 40, 40)) > 0


def test_in_training_the_mask_follows_the_rows():
    """A carry that has served an evaluation holds the mask of its rows then."""
    model = AthenaTRM(OPTIONS)
    batch = dict(
        inputs=torch.randint(30, (2, 40)), document_starts=packed_rows(2, 40),
        puzzle_identifiers=torch.zeros(2, dtype=torch.int32),
    )  # fmt: skip
    carry, _ = model.eval()(model.initial_carry(batch), batch)
    assert carry.info is not None
    carry.halted[:] = True
    other = batch | {"document_starts": torch.zeros(2, 40, dtype=torch.int32)}
    _, outputs = model.train()(carry, other)
    _, fresh = model(model.initial_carry(other), other)
    torch.testing.assert_close(outputs["logits"], fresh["logits"], rtol=0, atol=0)
