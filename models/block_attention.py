"""Attention on a CPU by matrix products over blocks of queries.

The fused CPU kernel of `scaled_dot_product_attention` takes several times as long as its products
would in bfloat16, and converts a boolean mask on each call. Here each block of queries is
multiplied only with the keys that it sees; probabilities are recomputed in the backward pass. In
bfloat16, on a CPU with AVX-512 BF16 and where a C++ compiler is installed,
`models/cpu_kernels.cpp` does it, and otherwise PyTorch.

Shape letters: B rows, L positions, N query heads, M key/value heads, G = N / M, K head size.
"""

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.common import at_least_float32
from models.cpu_kernels import cpu_kernels

BLOCK = 64
"""Number of queries in a block."""
_ALIGNMENT = 64  # bytes of a cache line


class Spans(NamedTuple):
    """The keys that each query sees: the prefix, and one span.

    bounds: (B, L, 2) int32, the first key of the span and the key after its last; None: all keys.
    prefix: number of positions at the start that all queries see.
    """

    bounds: Tensor | None
    prefix: int

    @classmethod
    def of_documents(cls, document_starts: Tensor | None, prefix: int) -> "Spans":
        """Return the spans of packed rows, in which a query sees its document.

        document_starts: (B, S) integers, not decreasing along a row, equal for tokens of one
        document; None: one document a row.
        """
        if document_starts is None:
            return cls(None, 0)
        owner = F.pad(document_starts, (prefix, 0), value=-1)
        sides = (torch.searchsorted(owner, owner, right=r, out_int32=True) for r in (False, True))
        return cls(torch.stack(tuple(sides), dim=-1), prefix)


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Spans, causal: bool
) -> Tensor:
    """Attend: query (B, N, L, K), key and value (B, M, L, K) -> (B, N, L, K).

    causal: position i sees positions 0..i only, of those that `spans` allows.
    """
    out: Tensor = torch.ops.athena.span_attention(query, key, value, *spans, causal)
    return out


def _blocks(
    length: int, bounds: Tensor | None, prefix: int, causal: bool
) -> list[tuple[slice, slice, Tensor | None]]:
    """Return each block's slice of queries, slice of keys, and mask of both.

    The mask is (B or 1, 1, 1, q, k), true where a query does not see a key; None if each sees all.
    """
    result = []
    positions = torch.arange(length)
    for begin in range(0, length, BLOCK):
        places = slice(begin, min(begin + BLOCK, length))
        low, high = 0, places.stop if causal else length
        hidden = None
        if bounds is not None:
            span = bounds[:, places]
            low = 0 if prefix else int(span[..., 0].amin())
            high = min(high, max(prefix, int(span[..., 1].amax())))
            keys = positions[low:high]
            hidden = (keys < span[..., :1]) | (keys >= span[..., 1:])
            if prefix:
                hidden &= keys >= prefix
        if causal:
            later = (positions[low:high] > positions[places, None]).unsqueeze(0)
            hidden = later if hidden is None else hidden | later
        mask = None if hidden is None else hidden[:, None, None]
        result.append((places, slice(low, high), mask))
    return result


def _grouped(x: Tensor, places: slice, heads: int) -> Tensor:
    """Return the queries of `places`, (B·M, G·q, K), next to each other by key head."""
    part = x[:, :, places]
    return part.reshape(len(x) * heads, -1, x.shape[-1])


def _probabilities(query: Tensor, keys: Tensor, hidden: Tensor | None, heads: int) -> Tensor:
    """Return softmax(query · keysᵀ) under the mask, (B·M, G·q, k).

    query: scaled, as `_grouped`. query, keys: at least float32; in bfloat16 large scores would lose
    what tells them apart. hidden: see `_blocks`. heads: M.
    """
    scores = torch.bmm(query, keys.transpose(1, 2))
    if hidden is not None:
        count, width = hidden.shape[-2:]
        parts = scores.view(len(scores) // heads, heads, -1, count, width)
        parts.masked_fill_(hidden, -torch.inf)
    return scores.softmax(-1)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, prefix: int, causal: bool
) -> Tensor:
    if not query.numel():
        return _like(query)
    if (library := _library(query, key, value)) is not None:
        out = _like(query)
        _call(library, "block_attention", query, key, bounds, prefix, causal, (value, out))
        return out
    rows, heads, length, size = key.shape
    scaled = at_least_float32(query) * size**-0.5
    keys, values = (x.reshape(rows * heads, length, size) for x in (key, value))
    wide_keys = at_least_float32(keys)
    out = _like(query)
    for places, seen, hidden in _blocks(length, bounds, prefix, causal):
        part = _grouped(scaled, places, heads)
        p = _probabilities(part, wide_keys[:, seen], hidden, heads)
        found = torch.bmm(p.to(value.dtype), values[:, seen])
        out[:, :, places] = found.view(rows, query.shape[1], -1, size)
    return out


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor | None,
    prefix: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not query.numel():
        return _like(query), torch.zeros_like(key), torch.zeros_like(value)
    if (library := _library(grad, query, key, value)) is not None:
        grads = _like(query), _like(key), _like(value)
        more = (value, grad, *grads)
        _call(library, "block_attention_backward", query, key, bounds, prefix, causal, more)
        return grads
    rows, heads, length, size = key.shape
    scale = size**-0.5
    scaled = at_least_float32(query) * scale
    keys, values = (x.reshape(rows * heads, length, size) for x in (key, value))
    wide_keys = at_least_float32(keys)
    grad_query = _like(query)
    grad_key, grad_value = torch.zeros_like(wide_keys), torch.zeros_like(wide_keys)
    for places, seen, hidden in _blocks(length, bounds, prefix, causal):
        part, back = _grouped(scaled, places, heads), _grouped(grad, places, heads)
        p = _probabilities(part, wide_keys[:, seen], hidden, heads)
        grad_value[:, seen] += torch.bmm(p.to(key.dtype).transpose(1, 2), back)
        of_p = torch.bmm(back, values[:, seen].transpose(1, 2)).to(p.dtype)
        of_scores = torch._softmax_backward_data(of_p, p, -1, p.dtype).to(key.dtype)
        found = torch.bmm(of_scores, keys[:, seen]).mul_(scale)
        grad_query[:, :, places] = found.view(rows, query.shape[1], -1, size)
        grad_key[:, seen] += torch.bmm(of_scores.transpose(1, 2), part.to(key.dtype))
    result = _like(query), _like(key), _like(value)
    for out, found in zip(result, (grad_query, grad_key, grad_value), strict=True):
        out.copy_(found.view(out.shape))
    return result


def _like(x: Tensor) -> Tensor:
    """Return an empty tensor (B, N, L, K) like `x`, laid out as (B, L, N, K), as layers need it."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


# --- C++


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("rows", "heads", "key_heads", "length", "size", "prefix")),
        ("bounds", ctypes.c_void_p),
        ("causal", ctypes.c_bool),
    ]


class _Heads(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("row", "head", "position")),
    ]


def _library(*heads: Tensor) -> ctypes.CDLL | None:
    """Return the C++ kernels, if they support these heads, each (B, N or M, L, K)."""
    supported = all(
        x.dtype == torch.bfloat16
        and x.shape[-1] % 32 == 0
        and x.stride(-1) == 1
        and all(stride % 2 == 0 for stride in x.stride()[:-1])  # pairs are read as 32-bit words
        and x.storage_offset() % 2 == 0
        for x in heads
    )
    return cpu_kernels() if supported else None


def _call(
    library: ctypes.CDLL,
    name: str,
    query: Tensor,
    key: Tensor,
    bounds: Tensor | None,
    prefix: int,
    causal: bool,
    more: tuple[Tensor, ...],
) -> None:
    rows, count, length, size = query.shape
    expected = (rows, key.shape[1], length, size)
    if key.shape != expected or more[0].shape != expected or count % key.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, more[0]))
        raise ValueError(f"query, key and value do not fit together: {shapes}")
    if bounds is not None and (bounds.shape, bounds.dtype) != ((rows, length, 2), torch.int32):
        raise ValueError(f"bounds are {bounds.dtype} {tuple(bounds.shape)}")
    bounds = None if bounds is None else bounds.contiguous()
    address = None if bounds is None else bounds.data_ptr()
    sizes = _Sizes(rows, count, key.shape[1], length, size, prefix, address, causal)
    parts = [_Heads(x.data_ptr(), *x.stride()[:-1]) for x in (query, key, *more)]
    threads = min(torch.get_num_threads(), rows * key.shape[1])
    need = library.scratch_bytes(ctypes.byref(sizes))
    scratch = torch.empty(need * threads + _ALIGNMENT, dtype=torch.uint8)
    start = scratch.data_ptr() + -scratch.data_ptr() % _ALIGNMENT
    pointers = map(ctypes.byref, (sizes, *parts))
    library[name](*pointers, ctypes.c_void_p(start), ctypes.c_int64(need), threads)


# --- the operators


def _fake_forward(query, key, value, bounds, prefix, causal):
    return _like(query)


def _fake_backward(grad, query, key, value, bounds, prefix, causal):
    return _like(query), _like(key), _like(value)


def _save(ctx, inputs, output) -> None:
    query, key, value, bounds, ctx.prefix, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, bounds)


def _differentiate(ctx, grad: Tensor):
    grads = torch.ops.athena.span_attention_backward(
        grad, *ctx.saved_tensors, ctx.prefix, ctx.causal
    )
    return *grads, None, None, None


def _refuse(ctx, *grads: Tensor):
    raise RuntimeError("attention in blocks has no second derivative; set fast=false")


def _register() -> torch.library.Library:
    """Make the functions operators, which torch.compile takes as they are."""
    library = torch.library.Library("athena", "FRAGMENT")
    inputs = "Tensor query, Tensor key, Tensor value, Tensor? bounds, int prefix, bool causal"
    library.define(f"span_attention({inputs}) -> Tensor")
    library.define(f"span_attention_backward(Tensor grad, {inputs}) -> (Tensor, Tensor, Tensor)")
    library.impl("span_attention", _forward, "CPU")
    library.impl("span_attention_backward", _backward, "CPU")
    name = "athena::span_attention"
    torch.library.register_fake(name, _fake_forward, lib=library)
    torch.library.register_fake(f"{name}_backward", _fake_backward, lib=library)
    torch.library.register_autograd(name, _differentiate, setup_context=_save, lib=library)
    torch.library.register_autograd(f"{name}_backward", _refuse, lib=library)
    return library


if not hasattr(torch.ops.athena, "span_attention"):  # an exported model holds a copy of this file
    _LIBRARY = _register()  # its operators end with it
