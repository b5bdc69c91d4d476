"""Attention in blocks on a CPU: against plain attention, in float64 and in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import can_run_kernels

from models import block_attention as module
from models import layers
from models.block_attention import BLOCK, Spans, block_attention
from models.layers import SequenceInfo, attend

NO_DOCUMENTS = Spans(None, 0)


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


def heads_of_a_layer(rows, length, heads, key_heads, size, dtype) -> list[torch.Tensor]:
    """Query, key, value as slices of one projection, and a gradient of the output."""
    joint = torch.randn(rows, length, heads + 2 * key_heads, size).to(dtype)
    parts = joint.split((heads, key_heads, key_heads), dim=2)
    back = torch.randn(rows, length, heads, size).to(dtype)
    return [x.transpose(1, 2) for x in (*parts, back)]


def gradients(query, key, value, attend_with, back):
    tensors = [x.detach().requires_grad_() for x in (query, key, value)]
    out = attend_with(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, back)]


def plain(causal: bool, mask: torch.Tensor | None = None):
    causal = causal and mask is None
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
    )


def in_blocks(causal: bool, spans: Spans = NO_DOCUMENTS):
    return lambda q, k, v: block_attention(q, k, v, spans, causal)


@pytest.fixture(params=["C++", "PyTorch"])
def kernel(request, monkeypatch):
    """Each implementation; C++ only on CPUs that can run it."""
    if request.param == "PyTorch":
        monkeypatch.setattr(module, "cpu_kernels", lambda: None)
    elif not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 9])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
def test_it_is_plain_attention(length, causal, heads):
    query, key, value, back = heads_of_a_layer(3, length, *heads, 8, torch.float64)
    found = gradients(query, key, value, in_blocks(causal), back)
    right = gradients(query, key, value, plain(causal), back)
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_see_themselves_alone(prefix, causal):
    """Blocks skip keys before their documents; padding and the prefix are as under a dense mask."""
    length, rows = 3 * BLOCK + 17, 3
    starts = packed_rows(rows, length)
    tensors = heads_of_a_layer(rows, length + prefix, 4, 2, 8, torch.float64)
    dense = layers.visible(starts, prefix, causal, "dense")
    spans = Spans.of_documents(starts, prefix)
    if prefix == 0:
        assert spans.bounds[:, BLOCK:, 0].amin() > 0, "some keys should be skipped"
    infos = [
        SequenceInfo(None, None, dense, causal, spans=spans),
        SequenceInfo(None, None, dense, causal),
    ]
    found, right = (
        gradients(*tensors[:3], lambda q, k, v, info=info: attend(q, k, v, info), tensors[3])
        for info in infos
    )
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("length", [1, 31, BLOCK, 2 * BLOCK, 3 * BLOCK + 17])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16_is_as_exact_as_torchs_kernel(kernel, size, length, documents, causal):
    """Against float64: the error of outputs and gradients is at most 1.2 times that of torch's."""
    rows, prefix = 2, 2
    tensors = heads_of_a_layer(rows, length + prefix * documents, 4, 2, size, torch.bfloat16)
    spans, mask = NO_DOCUMENTS, None
    if documents:
        starts = packed_rows(rows, length) if length > 3 else torch.zeros(rows, length).int()
        spans = Spans.of_documents(starts, prefix)
        mask = layers.visible(starts, prefix, causal, "dense")
    right = gradients(*(x.double() for x in tensors[:3]), plain(causal, mask), tensors[3].double())
    mine = gradients(*tensors[:3], in_blocks(causal, spans), tensors[3])
    torchs = gradients(*tensors[:3], plain(causal, mask), tensors[3])
    for own, other, exact in zip(mine, torchs, right, strict=True):
        assert own.dtype == torch.bfloat16 and own.shape == exact.shape
        allowed = 1.2 * (other - exact).norm() + 3e-3 * exact.norm() + 1e-6
        assert (own - exact).norm() <= allowed


def test_large_scores_and_nan(kernel):
    """Scores beyond exp's range give a one-hot row, and NaN stays in the rows that saw it."""
    query, key, value, back = heads_of_a_layer(1, 70, 2, 2, 32, torch.bfloat16)
    query = query * 100
    exact = gradients(*(x.double() for x in (query, key, value)), plain(True), back.double())
    for own, right in zip(gradients(query, key, value, in_blocks(True), back), exact, strict=True):
        assert (own - right).norm() <= 0.05 * right.norm() + 0.05
    key = key.clone()
    key[0, 0, 40, 3] = torch.nan
    out = block_attention(query, key, value, NO_DOCUMENTS, True)
    assert out[0, 0, :40].isfinite().all() and out[0, 1].isfinite().all()
    assert out[0, 0, 40:].isnan().all()


def test_huge_scores_are_finite(kernel):
    """The largest score of a row is subtracted before the scale rounds it."""
    query, key, value, _ = heads_of_a_layer(1, 70, 2, 2, 96, torch.bfloat16)
    out = block_attention(query * 3e4, key * 3e4, value, NO_DOCUMENTS, True)
    assert out.isfinite().all()


def test_what_does_not_fit_is_an_error():
    if not can_run_kernels():
        pytest.skip("this CPU has no AVX-512 BF16, or there is no C++ compiler")
    query, key, value, _ = heads_of_a_layer(3, 40, 4, 2, 32, torch.bfloat16)
    spans = Spans.of_documents(torch.zeros(3, 40).int(), 0)
    for one in (spans.bounds[:1], spans.bounds.long(), spans.bounds[:, :39]):
        with pytest.raises(ValueError, match="bounds"):
            block_attention(query, key, value, Spans(one, 0), True)
    with pytest.raises(ValueError, match="value"):
        block_attention(query, key, value[:, :, :39], spans, True)


def test_an_empty_batch_has_empty_gradients(kernel):
    query, key, value, _ = heads_of_a_layer(0, 40, 4, 2, 32, torch.bfloat16)
    tensors = [x.requires_grad_() for x in (query, key, value)]
    grads = torch.autograd.grad(block_attention(*tensors, NO_DOCUMENTS, True).sum(), tensors)
    assert [g.shape for g in grads] == [x.shape for x in tensors]


def test_a_second_derivative_is_an_error():
    tensors = heads_of_a_layer(1, 8, 2, 1, 32, torch.bfloat16)[:3]
    tensors = [x.requires_grad_() for x in tensors]
    out = block_attention(*tensors, NO_DOCUMENTS, True).float().square().sum()
    (grad,) = torch.autograd.grad(out, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="fast=false"):
        grad.float().square().sum().backward()


def test_threads_agree(kernel, set_threads):
    """Each thread works on rows and heads of its own: the bits are the same."""
    tensors = heads_of_a_layer(3, 2 * BLOCK + 5, 4, 2, 32, torch.bfloat16)
    found = []
    for count in (1, 3):
        set_threads(count)
        found.append(gradients(*tensors[:3], in_blocks(True), tensors[3]))
    for one, many in zip(*found, strict=True):
        assert torch.equal(one, many)


def test_the_operator_keeps_torchs_rules():
    """Its fake and its autograd registration agree with what it does."""
    query = torch.randn(2, 4, BLOCK + 3, 8, requires_grad=True)
    key, value = (torch.randn(2, 2, BLOCK + 3, 8, requires_grad=True) for _ in range(2))
    arguments = (query, key, value, None, 0, True)
    torch.library.opcheck(torch.ops.athena.span_attention.default, arguments)


def test_keys_of_another_length_are_attended_to():
    """As in a plug-in's block that pools them: not in blocks, whose keys are those of the rows."""
    query, key, value = (torch.randn(2, 4, n, 8) for n in (60, 40, 40))
    info = SequenceInfo(None, None, None, False, spans=NO_DOCUMENTS)
    right = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(attend(query, key, value, info), right)
