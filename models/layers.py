"""The building blocks: linear layers, norm, rotary positions, attention, SwiGLU.

Shape letters: B rows, L = P + S positions, D hidden, N query heads, M key/value heads, K head size.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.block_attention import Spans, block_attention
from models.common import at_least_float32, trunc_normal_init_
from models.flex import Kernel, block_mask, flex_attend
from models.position_swiglu import is_preferred as is_preferred_over_positions
from models.position_swiglu import position_swiglu
from models.swiglu import is_preferred, pack, swiglu


class SequenceInfo(NamedTuple):
    """The position information that every block of a forward pass needs.

    cos, sin: (B or 1, L, 1, K) rotary factors, or None without rotary positions.
    mask:     which keys a query may see (`visible`); None if `causal` is sufficient.
    causal:   position i sees only positions 0..i.
    cache:    keys and values of earlier forward passes, in generation
              (`models/inference/key_value_cache.py`); each attention calls its `extend` once.
    spans:    the same as `mask`, if attention runs in blocks (`models/block_attention.py`).
    """

    cos: Tensor | None
    sin: Tensor | None
    mask: Any
    causal: bool
    cache: Any = None
    spans: Spans | None = None

    def begin_cycle(self) -> None:
        """Mark the start of an outer cycle, so that a cache can keep only the last ones."""
        if self.cache is not None:
            self.cache.begin_cycle()

    def end_cycles(self) -> None:
        """Mark the end of the last outer cycle; what follows is not part of the recursion."""
        if self.cache is not None:
            self.cache.end_cycles()


def maybe_any(mask: Tensor) -> bool:
    """Return whether any element is true; on XLA always return True.

    Reading the value on XLA would execute the pending graph, and its programs must not depend on
    data.
    """
    return mask.device.type == "xla" or bool(mask.any())


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Normalise x (..., D) by its root mean square (Zhang & Sennrich 2019, arXiv 1910.07467).

    Has no weights; computed in at least float32. eps: added to the mean square.
    """
    return F.rms_norm(at_least_float32(x), (x.shape[-1],), eps=eps).to(x.dtype)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `value`."""
    return -(value // -multiple) * multiple


class CastedLinear(nn.Module):
    """Apply a linear map to (..., in_features), casting the weights to the dtype of the input.

    The parameters keep their own precision. cast: the weight cast by `cast_once`.
    """

    cast: Tensor | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        weight = torch.empty(out_features, in_features)
        self.weight = nn.Parameter(trunc_normal_init_(weight, std=in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight_as(x.dtype), bias)

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in this dtype."""
        if self.cast is None or self.cast.dtype != dtype:
            return self.weight.to(dtype)
        return self.cast


@contextmanager
def cast_once(blocks: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Cast the weights of all `CastedLinear` in `blocks` once for all uses within the context.

    The gradients of those uses are summed in `dtype` and added to the parameter together.
    """
    # in the order of the modules: autograd reaches the casts in it, on every rank and restart
    modules = dict.fromkeys(m for block in blocks for m in block.modules())
    linears = [m for m in modules if isinstance(m, CastedLinear)]
    gated = [m for m in modules if isinstance(m, SwiGLU) and m.fused]
    try:
        for linear in linears:
            if linear.weight.dtype != dtype:
                linear.cast = linear.weight.to(dtype)
        for layer in gated:
            layer.pack(dtype)
        yield
    finally:
        for linear in linears:
            linear.cast = None
        for layer in gated:
            layer.packed = None


class CastedEmbedding(nn.Module):
    """Look up rows of an embedding table, and cast them to `dtype`."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, init_std: float, dtype: torch.dtype
    ):
        super().__init__()
        self.dtype = dtype
        table = torch.empty(num_embeddings, embedding_dim)
        self.embedding_weight = nn.Parameter(trunc_normal_init_(table, std=init_std))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding_weight).to(self.dtype)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021, arXiv 2104.09864), (positions, K)."""

    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(self, dim: int, max_positions: int, base: float, dtype: torch.dtype):
        super().__init__()
        inverse = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float64), inverse)
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos_cached", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin_cached", angles.sin().to(dtype), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, (B or 1, L, 1, K) each, of integer positions (B or 1, L)."""
        return self.cos_cached[positions].unsqueeze(-2), self.sin_cached[positions].unsqueeze(-2)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, L, N, K) by the angles of its positions, in the precision of `cos`.

    cos, sin: (B or 1, L, 1, K).
    """
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.addcmul(wide * cos, torch.cat((-second, first), dim=-1), sin).to(x.dtype)


def visible(
    document_starts: Tensor, prefix: int, causal: bool, kernel: Kernel | None = None
) -> Any:
    """Return the attention mask of rows that hold several documents.

    document_starts: (B, S) integers, equal for tokens of one document. All positions see the
    prefix, which sees only itself, so that it passes no information between documents. kernel: the
    attention that uses the mask; None: flex attention on CUDA. Returns (B, 1, P+S, P+S) bool, True
    where a query (third axis) may attend to a key (last axis); for flex attention an equivalent
    BlockMask, which skips blocks that no query sees.
    """
    if kernel == "unmasked":
        return None
    owner = F.pad(document_starts, (prefix, 0), value=-1)
    if kernel == "flex" or (kernel is None and owner.is_cuda):
        return block_mask(owner, prefix, causal)
    positions = torch.arange(owner.shape[1], device=owner.device)
    mask = (owner[:, :, None] == owner[:, None, :]) | (positions < prefix)
    if causal:
        mask = mask & (positions[:, None] >= positions)
    return mask.unsqueeze(1)


def attend(query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
    """Attend: query (B, N, L, K), key and value (B, M, L, K) -> (B, N, L, K); N is a multiple of M.

    Keys and values are repeated in memory for each query of a group only on CUDA with a dense mask:
    the fused kernels require it, and without them all scores would be materialised.
    """
    if info.mask is not None and not isinstance(info.mask, Tensor):
        return flex_attend(query, key, value, info.mask)
    alike = query.shape[2] == key.shape[2]
    if info.spans is not None and info.cache is None and alike:
        return block_attention(query, key, value, info.spans, info.causal)
    grouped = query.shape[1] // key.shape[1]
    if grouped > 1 and info.mask is not None and query.is_cuda:
        key, value = (x.repeat_interleave(grouped, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=info.mask,
        is_causal=info.causal and info.mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )


class Attention(nn.Module):
    """Multi-head attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int):
        super().__init__()
        self.num_heads, self.num_key_value_heads = num_heads, num_key_value_heads
        self.head_dim = hidden_size // num_heads
        heads = num_heads + 2 * num_key_value_heads
        self.qkv_proj = CastedLinear(hidden_size, heads * self.head_dim)
        self.o_proj = CastedLinear(num_heads * self.head_dim, hidden_size)

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:
        """Attend over positions. x: (B, L, D). Returns (B, L, D)."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))  # B, L, N + 2M, K
        rotated = self.num_heads + self.num_key_value_heads
        query_key, value = heads.split((rotated, self.num_key_value_heads), dim=2)
        if info.cos is not None and info.sin is not None:
            query_key = apply_rotary(query_key, info.cos, info.sin)
        query, key = query_key.split((self.num_heads, self.num_key_value_heads), dim=2)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        if info.cache is not None:
            key, value = info.cache.extend(key, value)
        out = attend(query.transpose(1, 2), key, value, info)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer 2020, arXiv 2002.05202).

    fused: the layer is computed by `models.swiglu`. packed: its weights, packed by `cast_once`.
    """

    fused = False
    packed: Tensor | None = None

    def __init__(self, hidden_size: int, expansion: float):
        super().__init__()
        inner = self.inner_size(hidden_size, expansion)
        self.gate_up_proj = CastedLinear(hidden_size, 2 * inner)
        self.down_proj = CastedLinear(inner, hidden_size)

    @staticmethod
    def inner_size(hidden_size: int, expansion: float) -> int:
        return round_up(round(expansion * hidden_size * 2 / 3), 256)

    def can_fuse(self) -> bool:
        """Return whether `models.swiglu` may compute this layer in bfloat16."""
        linears = (self.gate_up_proj, self.down_proj)
        plain = all(type(m) is CastedLinear and m.bias is None for m in linears)
        return plain and self.is_preferred()

    def is_preferred(self) -> bool:
        return is_preferred(*self.down_proj.weight.shape)

    def weights_as(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return both weights in this dtype."""
        return self.gate_up_proj.weight_as(dtype), self.down_proj.weight_as(dtype)

    def pack(self, dtype: torch.dtype) -> None:
        """Pack the weights in this dtype for several uses, until `packed` is None again."""
        self.packed = pack(*self.weights_as(dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return swiglu(x, *self.weights_as(x.dtype), self.packed)
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


def transposed(x: Tensor) -> Tensor:
    """Transpose (B, L, D) to (B, D, L).

    In bfloat16 the result is a contiguous copy, because each product with a transposed operand
    would copy it anyway.
    """
    x = x.transpose(1, 2)
    return x.contiguous() if x.dtype == torch.bfloat16 else x


class PositionSwiGLU(SwiGLU):
    """The same layer over the positions of (B, L, D); fused: by `models.position_swiglu`."""

    def __init__(self, length: int, hidden_size: int, expansion: float):
        super().__init__(length, expansion)
        self.hidden_size = hidden_size

    def is_preferred(self) -> bool:
        return is_preferred_over_positions(self.hidden_size, *self.down_proj.weight.shape)

    def pack(self, dtype: torch.dtype) -> None:
        """Do nothing: the kernel reads the weights as they are."""

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return position_swiglu(x, *self.weights_as(x.dtype))
        return transposed(super().forward(transposed(x)))


class Block(nn.Module):
    """One transformer block: mix positions (by attention, or an MLP over them), then channels.

    mixer_size: P + S if an MLP mixes positions; None for attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int,
        expansion: float,
        norm_type: Literal["post", "pre"],
        rms_norm_eps: float,
        mixer_size: int | None = None,
    ):
        super().__init__()
        self.norm_type, self.eps = norm_type, rms_norm_eps
        self.mixes_by_mlp = mixer_size is not None
        if mixer_size is not None:
            self.mlp_t = PositionSwiGLU(mixer_size, hidden_size, expansion)
        else:
            self.self_attn = Attention(hidden_size, num_heads, num_key_value_heads)
        self.mlp = SwiGLU(hidden_size, expansion)

    def norm(self, x: Tensor) -> Tensor:
        """Normalise x (..., D), before or after each branch, according to `norm_type`."""
        return rms_norm(x, self.eps)

    def forward(self, x: Tensor, info: SequenceInfo) -> Tensor:
        """Mix positions, then channels. x: (B, L, D). Returns (B, L, D)."""
        if self.norm_type == "pre":
            x = x + self._mix(self.norm(x), info)
            return x + self.mlp(self.norm(x))
        if self.mixes_by_mlp:  # TRM normalises this sum over positions, not over channels
            x = transposed(self.norm(transposed(x + self.mlp_t(x))))
        else:
            x = self.norm(x + self.self_attn(x, info))
        return self.norm(x + self.mlp(x))

    def _mix(self, x: Tensor, info: SequenceInfo) -> Tensor:
        if self.mixes_by_mlp:
            return self.mlp_t(x)
        return self.self_attn(x, info)
