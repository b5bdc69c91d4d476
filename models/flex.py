"""Flex attention: when masked attention uses it, and its block mask.

On CUDA the fused kernels of `scaled_dot_product_attention` do not support a mask with grouped
queries. Flex attention does, and skips the blocks that no query sees. Triton compiles it, which
does not support every GPU, dtype and head size: otherwise masks are dense.

Shape letters: B rows, L = P + S positions, T blocks of positions.
"""

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kernel = Literal["flex", "blocks", "dense", "unmasked"]
"""`blocks`: see `models.block_attention`. `unmasked` ignores the borders of documents. It is used
only for tracing: it takes as much memory as the first two, and works on fake tensors.
"""

BLOCK = 128
"""Number of positions in a block."""
OLDEST = (8, 0)
"""The lowest supported compute capability."""
NARROWEST = 16
"""The smallest supported head size."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHAPES = 64  # that one function may be compiled for in a run
# Below 128 positions Inductor would choose its decoding kernel, which supports at most 128 query
# positions times query heads per key head; 97 positions of grouped heads are too many.
_KERNEL_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}


class Choice(NamedTuple):
    """A kernel for masked attention, and the reason if flex attention was considered but not
    chosen.
    """

    kernel: Kernel
    reason: str | None = None


def attention_kernel(
    device_type: str,
    dtype: torch.dtype,
    head_size: int,
    *,
    capability: tuple[int, int] = OLDEST,
    cannot_compile: str | None = None,
) -> Choice:
    """Choose the attention kernel; `flex` and `dense` apply only to document masks.

    capability: compute capability of the GPU. cannot_compile: the reason why torch.compile does not
    work on the device; None if it works.
    """
    if device_type != "cuda":
        return Choice("blocks" if device_type == "cpu" and dtype == torch.bfloat16 else "dense")
    reason = None
    if cannot_compile is not None:
        reason = cannot_compile
    elif capability < OLDEST:
        reason = "compute capability {}.{} is below {}.{}".format(*capability, *OLDEST)
    elif dtype not in DTYPES:
        reason = f"it does not support {str(dtype).removeprefix('torch.')}"
    elif head_size < NARROWEST:
        reason = f"heads of size {head_size} are narrower than {NARROWEST}"
    return Choice("flex") if reason is None else Choice("dense", reason)


def block_mask(owner: Tensor, prefix: int, causal: bool) -> Any:
    """Build the mask of `models.layers.visible` as a BlockMask for flex attention.

    owner: (B, L), equal for positions of one document, -1 on the prefix. Computed from the lowest
    and highest owner of each block, without allocating an L x L tensor.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = (owner[b, query] == owner[b, key]) | (key < prefix)
        return allowed & (query >= key) if causal else allowed

    rows, length = owner.shape
    blocks = -(-length // BLOCK)
    positions = torch.arange(blocks * BLOCK, device=owner.device)
    padded = torch.cat((owner, owner[:, -1:].expand(-1, blocks * BLOCK - length)), dim=1)
    low, high = padded.view(rows, blocks, BLOCK).aminmax(dim=-1)
    documents = torch.where(positions < prefix, torch.iinfo(owner.dtype).max, padded)
    lowest = documents.view(rows, blocks, BLOCK).amin(
        -1
    )  # without the prefix, which all positions see
    first = positions[::BLOCK]
    opens, closes = first < prefix, first + BLOCK <= prefix  # begins, ends within the prefix
    inside = first + BLOCK <= length
    seen = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None]) | opens
    whole = (
        (low == high)[:, :, None] & (lowest == high)[:, None] & (low[:, :, None] == high[:, None])
    )
    whole = (whole | closes) & inside & inside[:, None]
    if causal:
        seen, whole = seen & (first[:, None] >= first), whole & (first[:, None] > first)
    pair = torch.stack((seen & ~whole, whole)).unsqueeze(2)  # 2, B, 1, T, T: queries, keys
    both = torch.stack((pair, pair.transpose(-2, -1))).to(torch.int32)
    counts = both.sum(-1, dtype=torch.int32)
    indices = both.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=counts[0, 0],
        kv_indices=indices[0, 0],
        full_kv_num_blocks=counts[0, 1],
        full_kv_indices=indices[0, 1],
        q_num_blocks=counts[1, 0],
        q_indices=indices[1, 0],
        full_q_num_blocks=counts[1, 1],
        full_q_indices=indices[1, 1],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
    )


def raise_recompile_limit() -> None:
    """Raise torch's limit of 8 compiled shapes, beyond which it runs a function uncompiled."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _SHAPES)


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    raise_recompile_limit()
    return torch.compile(flex_attention, dynamic=False)


def flex_attend(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Attend under a block mask: query (B, N, L, K), key and value (B, M, L, K) -> (B, N, L, K)."""
    options: dict[str, Any] = dict(
        block_mask=mask,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_KERNEL_OPTIONS,
    )
    if torch.compiler.is_compiling():  # part of a larger compiled region
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, **options)
    return _compiled()(query, key, value, **options)


def failure(
    device: torch.device, dtype: torch.dtype, heads: int, key_value_heads: int, head_size: int
) -> str | None:
    """Try flex attention, forward and backward; return the reason if it fails, else None.

    It depends on compilers, drivers and hardware limits that cannot all be queried.
    """
    length = 2 * BLOCK
    owner = torch.zeros(1, length, dtype=torch.int32, device=device)
    query, key, value = (
        torch.zeros(1, n, length, head_size, dtype=dtype, device=device, requires_grad=True)
        for n in (heads, key_value_heads, key_value_heads)
    )
    try:
        with torch.enable_grad():
            flex_attend(query, key, value, block_mask(owner, 0, True)).sum().backward()
    except Exception as error:  # compilers raise any type of exception
        return describe_failure(error)
    return None


def describe_failure(error: Exception) -> str:
    """Return the first line of the error of a kernel's trial, as a reason not to use the kernel."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"a trial failed ({type(error).__name__}: {' '.join(lines[:1])[:200]})"
