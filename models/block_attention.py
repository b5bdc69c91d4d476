"""Attention on a CPU by matrix products over blocks of queries.

The fused CPU kernel of `scaled_dot_product_attention` takes several times as long as its products
would in bfloat16, and converts a boolean mask on each call. Here each block of queries is
multiplied only with the keys from the first start of its documents to its own end in one batched
product for all rows and heads; probabilities are recomputed in the backward pass.

Shape letters: B rows, L positions, N query heads, M key/value heads, G = N / M, K head size.
"""

import torch
from torch import Tensor

from models.common import at_least_float32

BLOCK = 64
"""Number of queries in a block."""


def first_keys(document_starts: Tensor | None, length: int, prefix: int) -> Tensor:
    """Return the first key that any query of each block may see, (ceil(length / BLOCK),) int64.

    document_starts: (B, S), not decreasing along a row, S on padding; None: all keys from 0 are
    visible.
    """
    blocks = -(-length // BLOCK)
    if document_starts is None or prefix:  # all positions see the prefix
        return torch.zeros(blocks, dtype=torch.int64)
    padding = document_starts >= length
    real = (~padding).sum(1, keepdim=True)
    return torch.where(padding, real, document_starts)[:, ::BLOCK].amin(0).to(torch.int64)


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, first: Tensor, causal: bool
) -> Tensor:
    """Attend: query (B, N, L, K), key and value (B, M, L, K) -> (B, N, L, K).

    mask: (B, 1, L, L), 0 where a query may attend to a key and -inf elsewhere; None: `causal` is
    sufficient. first: the result of `first_keys`. causal: position i sees positions 0..i only.
    """
    out: Tensor = torch.ops.athena.block_attention(query, key, value, mask, first, causal)
    return out


def _blocks(length: int, first: Tensor, causal: bool) -> list[tuple[slice, slice]]:
    """Return each block's slice of queries and slice of visible keys."""
    starts = first.numpy()
    return [
        (
            slice(s, min(s + BLOCK, length)),
            slice(int(lo), min(s + BLOCK, length) if causal else length),
        )
        for s, lo in zip(range(0, length, BLOCK), starts, strict=True)
    ]


def _grouped(x: Tensor, places: slice, heads: int) -> Tensor:
    """Return the queries of `places`, (B·M, G·q, K), next to each other by key head."""
    part = x[:, :, places]
    return part.reshape(len(x) * heads, -1, x.shape[-1])


def _probabilities(
    query: Tensor, keys: Tensor, mask: Tensor | None, places: slice, seen: slice, causal: bool
) -> Tensor:
    """Return softmax(query · keysᵀ) under the mask, (B·M, G·q, k).

    query: scaled, as `_grouped`. query, keys: at least float32; in bfloat16 large scores would lose
    what tells them apart.
    """
    scores = torch.bmm(query, keys.transpose(1, 2))
    count, width = places.stop - places.start, seen.stop - seen.start
    if mask is not None:
        scores.view(len(mask), -1, count, width).add_(mask[:, :, places, seen])
    elif causal:
        later = scores.new_full((count, count), -torch.inf).triu_(1)
        scores.view(len(scores), -1, count, width)[..., -count:].add_(later)
    return scores.softmax(-1)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, first: Tensor, causal: bool
) -> Tensor:
    rows, heads, length, size = key.shape
    scaled = at_least_float32(query) * size**-0.5
    keys, values = (x.reshape(rows * heads, length, size) for x in (key, value))
    wide_keys = at_least_float32(keys)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for places, seen in _blocks(length, first, causal):
        part = _grouped(scaled, places, heads)
        p = _probabilities(part, wide_keys[:, seen], mask, places, seen, causal)
        found = torch.bmm(p.to(value.dtype), values[:, seen])
        out[:, :, places] = found.view(rows, query.shape[1], -1, size)
    return out


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    first: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, length, size = key.shape
    scale = size**-0.5
    scaled = at_least_float32(query) * scale
    keys, values = (x.reshape(rows * heads, length, size) for x in (key, value))
    wide_keys = at_least_float32(keys)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key, grad_value = torch.zeros_like(wide_keys), torch.zeros_like(wide_keys)
    for places, seen in _blocks(length, first, causal):
        part, back = _grouped(scaled, places, heads), _grouped(grad, places, heads)
        p = _probabilities(part, wide_keys[:, seen], mask, places, seen, causal)
        grad_value[:, seen] += torch.bmm(p.to(key.dtype).transpose(1, 2), back)
        of_p = torch.bmm(back, values[:, seen].transpose(1, 2)).to(p.dtype)
        of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype).to(key.dtype)
        found = torch.bmm(of_scores, keys[:, seen]).mul_(scale)
        grad_query[:, :, places] = found.view(rows, query.shape[1], -1, size)
        grad_key[:, seen] += torch.bmm(of_scores.transpose(1, 2), part.to(key.dtype))
    shape = key.shape
    return (
        grad_query,
        grad_key.view(shape).to(key.dtype),
        grad_value.view(shape).to(value.dtype),
    )


def _fake_forward(query, key, value, mask, first, causal):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _fake_backward(grad, query, key, value, mask, first, causal):
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        torch.empty(key.shape, dtype=key.dtype, device=key.device),
        torch.empty(value.shape, dtype=value.dtype, device=value.device),
    )


def _save(ctx, inputs, output) -> None:
    query, key, value, mask, first, causal = inputs
    ctx.save_for_backward(query, key, value, mask, first)
    ctx.causal = causal


def _differentiate(ctx, grad: Tensor):
    query, key, value, mask, first = ctx.saved_tensors
    grads = torch.ops.athena.block_attention_backward(
        grad, query, key, value, mask, first, ctx.causal
    )
    return *grads, None, None, None


def _register() -> torch.library.Library:
    """Make the functions operators, which torch.compile takes as they are."""
    library = torch.library.Library("athena", "FRAGMENT")
    inputs = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor first, bool causal"
    library.define(f"block_attention({inputs}) -> Tensor")
    library.define(f"block_attention_backward(Tensor grad, {inputs}) -> (Tensor, Tensor, Tensor)")
    library.impl("block_attention", _forward, "CPU")
    library.impl("block_attention_backward", _backward, "CPU")
    name = "athena::block_attention"
    torch.library.register_fake(name, _fake_forward, lib=library)
    torch.library.register_fake(f"{name}_backward", _fake_backward, lib=library)
    torch.library.register_autograd(name, _differentiate, setup_context=_save, lib=library)
    return library


if not hasattr(torch.ops.athena, "block_attention"):  # an exported model holds a copy of this file
    _LIBRARY = _register()  # its operators end with it
