"""The parts shared by all architectures: embeddings, blocks, output head, and their options.

Shape letters: B rows, S tokens, P prefix positions, L = P + S, D hidden, V vocabulary.
"""

import inspect
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.block_attention import Spans
from models.flex import Kernel, attention_kernel, failure
from models.layers import (
    Block,
    CastedEmbedding,
    CastedLinear,
    RotaryEmbedding,
    SequenceInfo,
    at_least_float32,
    visible,
)
from models.sparse_embedding import CastedSparseEmbedding

Batch = dict[str, Tensor]


class BackboneConfig(BaseModel):
    """Options of the blocks and embeddings, and the four sizes determined by the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(ge=1, description="rows in a forward pass")
    seq_len: int = Field(ge=1, description="tokens in a row (S)")
    vocab_size: int = Field(ge=1, description="highest token id + 1 (V)")
    num_puzzle_identifiers: int = Field(1, ge=1, description="rows of the identifier embedding")

    hidden_size: int = Field(ge=1, description="width (D)")
    num_heads: int = Field(ge=1, description="query heads (N)")
    num_key_value_heads: int | None = Field(
        None, ge=1, description="key/value heads; null: num_heads // 2"
    )
    expansion: float = Field(
        4.0, gt=0, description="the feed-forward width is 2/3 of expansion times D"
    )
    causal: bool = Field(True, description="position t sees only positions up to t")
    document_mask: bool = Field(True, description="attention stays inside a packed document")
    norm_type: Literal["post", "pre"] = Field(
        "post", description="RMS norm after or before each branch"
    )
    pos_encodings: Literal["rope", "learned", "none"] = Field("rope", description="positions")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary wave lengths")
    rms_norm_eps: float = Field(1e-5, gt=0, description="added to the mean square")
    puzzle_emb_ndim: int = Field(0, ge=0, description="width of the identifier embedding; 0: none")
    puzzle_emb_len: int = Field(
        0,
        ge=0,
        description="prefix positions that it takes; 0: ceil(ndim / hidden_size)",
        json_schema_extra={"on_resume": "fixed"},  # rows in progress have this many positions
    )
    forward_dtype: Literal["bfloat16", "float32", "float64"] = Field(
        "bfloat16", description="dtype of activations"
    )
    use_gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    tie_embeddings: bool = Field(False, description="the output head is the token embedding")

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.forward_dtype)

    @property
    def param_dtype(self) -> torch.dtype:
        """Return the dtype of the master weights: float64 for float64 activations, else float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or max(1, self.num_heads // 2)

    @property
    def prefix_len(self) -> int:
        """Return P, the number of positions that the identifier embedding takes before the
        tokens.
        """
        if self.puzzle_emb_ndim == 0:
            return 0
        return self.puzzle_emb_len or math.ceil(self.puzzle_emb_ndim / self.hidden_size)

    @model_validator(mode="after")
    def _heads_fit(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; "
                "change one of them so that every head gets the same width"
            )
        head_size = self.hidden_size // self.num_heads
        if self.pos_encodings == "rope" and head_size % 2:
            raise ValueError(
                f"rotary positions need an even head size, but hidden_size={self.hidden_size} / "
                f"num_heads={self.num_heads} is {head_size}"
            )
        if self.num_heads % self.key_value_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.key_value_heads}; every key head must serve "
                "the same number of query heads"
            )
        if self.prefix_len * self.hidden_size < self.puzzle_emb_ndim:
            raise ValueError(
                f"puzzle_emb_len={self.puzzle_emb_len} positions of hidden_size="
                f"{self.hidden_size} cannot hold puzzle_emb_ndim={self.puzzle_emb_ndim}; increase "
                "puzzle_emb_len, or set it to 0 to compute it"
            )
        return self


class Backbone(nn.Module):
    """Token and identifier embeddings, positions and output head, with TRM's parameter names.

    masked_attention: the attention kernel; None: chosen by `visible`. block_type: the class that
    `make_block` instantiates.
    """

    masked_attention: Kernel | None = None
    block_type: type[Block] = Block

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.embed_scale = math.sqrt(config.hidden_size)
        std = 1 / self.embed_scale
        width, prefix = config.hidden_size, config.prefix_len
        self.embed_tokens = CastedEmbedding(config.vocab_size, width, std, config.dtype)
        if not config.tie_embeddings:
            self.lm_head = CastedLinear(width, config.vocab_size)
        if config.puzzle_emb_ndim > 0:
            self.puzzle_emb = CastedSparseEmbedding(
                config.num_puzzle_identifiers, config.puzzle_emb_ndim, 0.0, config.dtype
            )
        positions = prefix + config.seq_len
        if config.pos_encodings == "rope":
            self.rotary_emb = self.make_rotary()
        elif config.pos_encodings == "learned":
            self.embed_pos = CastedEmbedding(positions, width, std, config.dtype)

    def make_rotary(self) -> RotaryEmbedding:
        """Return the rotary factors of all positions of a row."""
        config = self.config
        return RotaryEmbedding(
            config.head_size,
            config.prefix_len + config.seq_len,
            config.rope_theta,
            config.param_dtype,
        )

    def make_block(self, mixer_size: int | None = None) -> Block:
        """Return a new block of `block_type` with the sizes of the config.

        mixer_size: P + S where an MLP mixes positions; None for attention.
        """
        config = self.config
        sizes: dict[str, Any] = {
            "hidden_size": config.hidden_size,
            "num_heads": config.num_heads,
            "num_key_value_heads": config.key_value_heads,
            "expansion": config.expansion,
            "norm_type": config.norm_type,
            "rms_norm_eps": config.rms_norm_eps,
            "mixer_size": mixer_size,
        }
        try:
            inspect.signature(self.block_type).bind(**sizes)
        except TypeError:  # a subclass that takes them by position, as *sizes
            return self.block_type(*sizes.values())
        return self.block_type(**sizes)

    def answer(self, x: Tensor, info: SequenceInfo, depth: int) -> Tensor:
        """Return the input of the output head, (B, L, D), after `depth` ACT steps (or loops if
        there is one step) from the start, without halting. x: embedded positions (B, L, D).
        """
        raise NotImplementedError

    def choose_attention(
        self, backend: Any, *, trial: bool = True, blocks: bool = True
    ) -> str | None:
        """Choose an attention kernel that works on `backend`.

        trial: run flex attention once before choosing it. blocks: whether `block_attention` may be
        chosen.
        Returns the reason if the device has flex attention but it was not chosen; otherwise None.
        """
        config = self.config
        self.masked_attention, reason = attention_kernel(
            backend.device.type,
            config.dtype,
            config.head_size,
            capability=backend.capability,
            cannot_compile=backend.cannot_compile(),
        )
        if self.masked_attention == "blocks" and not blocks:
            self.masked_attention = "dense"
        if not config.document_mask:
            return None
        if trial and self.masked_attention == "flex":
            sizes = (config.num_heads, config.key_value_heads, config.head_size)
            if (reason := failure(backend.device, config.dtype, *sizes)) is not None:
                self.masked_attention = "dense"
        return reason

    def positions(self, data: Batch) -> Tensor:
        """Return the position of each prefix and token, (B or 1, P+S); documents restart at P."""
        prefix, length = self.config.prefix_len, data["inputs"].shape[1]
        plain = torch.arange(prefix + length, device=data["inputs"].device).unsqueeze(0)
        if not self.masks_documents(data):
            return plain
        # padding "starts" after the row; nothing attends to it, so any position is fine
        starts = F.pad(data["document_starts"], (prefix, 0))
        return torch.where(plain < prefix, plain, (plain - starts).clamp_min(prefix))

    def masks_documents(self, data: Batch) -> bool:
        """Return whether attention stays within the documents of packed rows."""
        return self.config.document_mask and "document_starts" in data

    def sequence_info(self, data: Batch) -> SequenceInfo:
        """Return the rotary factors and the attention mask of a batch."""
        cos, sin = self.rotation(self.positions(data))
        prefix, causal, kernel = self.config.prefix_len, self.config.causal, self.masked_attention
        starts = data["document_starts"] if self.masks_documents(data) else None
        mask = None if starts is None else visible(starts, prefix, causal, kernel)
        spans = Spans.of_documents(starts, prefix) if kernel == "blocks" else None
        return SequenceInfo(cos, sin, mask, causal, spans=spans)

    def rotation(self, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the rotary factors of positions (B or 1, L); (None, None) without rotary
        positions.
        """
        if self.config.pos_encodings != "rope":
            return None, None
        return self.rotary_emb(positions)

    def embed(self, data: Batch) -> Tensor:
        """Return sqrt(D) times the embedding, (B, P+S, D).

        data: inputs (B, S) and, if P > 0, puzzle_identifiers (B,).
        """
        embedding = self.embed_tokens(data["inputs"])
        if self.config.prefix_len > 0:
            embedding = self.add_prefix(embedding, data["puzzle_identifiers"])
        return self.add_positions(embedding, self.positions(data))

    def add_prefix(self, embedding: Tensor, identifiers: Tensor) -> Tensor:
        """Prepend embedded identifiers (B,) to embedded tokens (B, S, D). Returns (B, P+S, D)."""
        prefix, width = self.config.prefix_len, self.config.hidden_size
        identifier = self.puzzle_emb(identifiers)
        identifier = F.pad(identifier, (0, prefix * width - identifier.shape[-1]))
        return torch.cat((identifier.view(-1, prefix, width), embedding), dim=1)

    def add_positions(self, embedding: Tensor, positions: Tensor) -> Tensor:
        """Scale embeddings (B, L, D), after adding learned positions (B or 1, L) if configured."""
        if self.config.pos_encodings == "learned":
            # so that the sum of two embeddings has the variance of one
            embedding = math.sqrt(0.5) * (embedding + self.embed_pos(positions))
        return self.embed_scale * embedding

    def logits(self, z: Tensor) -> Tensor:
        """Apply the output head to tokens only. z: (B, P+S, D). Returns (B, S, V)."""
        return self.predict(z[:, self.config.prefix_len :])

    @property
    def output_weight(self) -> Tensor | None:
        """Return the matrix of the output head, (V, D); None if a subclass has another head."""
        if type(self).predict is not Backbone.predict:
            return None
        if self.config.tie_embeddings:
            return self.embed_tokens.embedding_weight
        plain = type(self.lm_head) is CastedLinear and self.lm_head.bias is None
        return self.lm_head.weight if plain else None

    def predict(self, z: Tensor) -> Tensor:
        """Apply the output head. z: (..., D). Returns (..., V)."""
        if self.config.tie_embeddings:
            return F.linear(z, self.embed_tokens.embedding_weight.to(z.dtype))
        return self.lm_head(z)


def real_tokens(data: Batch) -> Tensor | None:
    """Return (B, S) bool, False on padding; None if the batch does not mark padding.

    Padding has a document start after the end of the row. A batch of single texts has `lengths`
    (B,) instead: padding follows the text, so a causal model needs no mask.
    """
    if "lengths" in data:
        places = torch.arange(data["inputs"].shape[1], device=data["inputs"].device)
        return places < data["lengths"].unsqueeze(1)
    starts = data.get("document_starts")
    return None if starts is None else starts < starts.shape[1]


def mean_over(z: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of z (B, S, D) where mask (B, S) is true, (B, D), in at least float32."""
    wide = at_least_float32(z)
    if mask is None:
        return wide.mean(1)
    weights = mask.to(wide.dtype).unsqueeze(-1)
    return (wide * weights).sum(1) / weights.sum(1).clamp_min(1)
