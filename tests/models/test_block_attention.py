"""Attention in blocks on a CPU: against plain attention, in float64 and in bfloat16."""

import pytest
import torch
import torch.nn.functional as F

from models import layers
from models.block_attention import BLOCK, block_attention, first_keys
from models.layers import SequenceInfo, attend


def packed_rows(rows: int, length: int, mean: float = 40.0) -> torch.Tensor:
    """Document starts of rows that hold several documents and end in padding."""
    starts = torch.zeros(rows, length, dtype=torch.int32)
    for row in starts:
        place = 0
        while place < length:
            row[place:] = place
            place += 1 + int(torch.rand(()) * 2 * mean)
        end = length - int(torch.randint(length // 3, ()))
        row[end:] = length
    return starts


def gradients(query, key, value, attend_with, back):
    tensors = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    out = attend_with(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, back)]


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 9])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_it_is_plain_attention(length, causal, heads):
    query, back = torch.randn(2, 3, heads[0], length, 8, dtype=torch.float64)[:, :2]
    query, back = (torch.randn(3, heads[0], length, 8, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(3, heads[1], length, 8, dtype=torch.float64) for _ in range(2))
    found = gradients(
        query, key, value,
        lambda q, k, v: block_attention(q, k, v, None, first_keys(None, length, 0), causal), back,
    )  # fmt: skip
    right = gradients(
        query, key, value,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True),
        back,
    )  # fmt: skip
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_see_themselves_alone(prefix, causal):
    """Blocks skip keys before their documents; padding and the prefix are as under a dense mask."""
    length, rows = 3 * BLOCK + 17, 3
    starts = packed_rows(rows, length)
    whole = length + prefix
    query, back = (torch.randn(rows, 4, whole, 8, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(rows, 2, whole, 8, dtype=torch.float64) for _ in range(2))
    dense = layers.visible(starts, prefix, causal, "dense")
    numbers = layers.visible(starts, prefix, causal, "blocks")
    first = first_keys(starts, whole, prefix)
    if prefix == 0 and causal:
        assert first.max() > BLOCK, "some keys should be skipped"
    infos = [
        SequenceInfo(None, None, numbers.double(), causal, first_keys=first),
        SequenceInfo(None, None, dense, causal),
    ]
    found, right = (
        gradients(query, key, value, lambda q, k, v, info=info: attend(q, k, v, info), back)
        for info in infos
    )
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_bfloat16_is_as_exact_as_the_fused_kernel():
    """Against float64: the error of outputs and gradients is at most 1.5 times that of torch's."""
    length = 2 * BLOCK
    query, back = (torch.randn(4, 4, length, 16) for _ in range(2))
    key, value = (torch.randn(4, 2, length, 16) for _ in range(2))
    plain = lambda q, k, v: F.scaled_dot_product_attention(  # noqa: E731
        q, k, v, is_causal=True, enable_gqa=True
    )
    blocks = lambda q, k, v: block_attention(  # noqa: E731
        q, k, v, None, first_keys(None, length, 0), True
    )
    narrow = [x.bfloat16() for x in (query, key, value, back)]
    right = gradients(*(x.double() for x in narrow[:3]), plain, narrow[3].double())
    mine, torchs = (
        gradients(*narrow[:3], blocks, narrow[3]),
        gradients(*narrow[:3], plain, narrow[3]),
    )
    for own, other, exact in zip(mine, torchs, right, strict=True):
        assert (own - exact).norm() <= 1.5 * (other - exact).norm() + 1e-3 * exact.norm()


def test_the_operator_keeps_torchs_rules():
    """Its fake and its autograd registration agree with what it does."""
    query = torch.randn(2, 4, BLOCK + 3, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, BLOCK + 3, 8, requires_grad=True) for _ in range(2))
    arguments = (query, key, value, None, first_keys(None, BLOCK + 3, 0), True)
    torch.library.opcheck(torch.ops.athena.block_attention.default, arguments)


def test_keys_of_another_length_are_attended_to():
    """As in a plug-in's block that pools them: not in blocks, whose keys are those of the rows."""
    query, key, value = (torch.randn(2, 4, n, 8) for n in (60, 40, 40))
    info = SequenceInfo(None, None, None, False, first_keys=first_keys(None, 60, 0))
    right = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attend(query, key, value, info), right)
