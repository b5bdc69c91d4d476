"""A plain implementation of TRM, as a reference for the speed of a training step.

Every use of a weight casts it, every norm and rotation is a chain of operations, the logits of the
whole batch are materialised, and the loss is stablemax in float64 (Jolicoeur-Martineau 2025, arXiv
2510.04871).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    """Attention and SwiGLU, each followed by an RMS norm of the residual sum."""

    def __init__(self, width: int, heads: int, key_heads: int, inner: int):
        super().__init__()
        self.heads, self.key_heads, self.size = heads, key_heads, width // heads
        self.qkv = nn.Parameter(torch.randn((heads + 2 * key_heads) * self.size, width) * 0.02)
        self.out = nn.Parameter(torch.randn(width, width) * 0.02)
        self.gate_up = nn.Parameter(torch.randn(2 * inner, width) * 0.02)
        self.down = nn.Parameter(torch.randn(width, inner) * 0.02)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = norm(x + self.attend(x, cos, sin))
        gate, up = F.linear(x, self.gate_up.to(x.dtype)).chunk(2, dim=-1)
        return norm(x + F.linear(F.silu(gate) * up, self.down.to(x.dtype)))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = F.linear(x, self.qkv.to(x.dtype)).unflatten(-1, (-1, self.size))
        query = rotate(heads[:, :, : self.heads], cos, sin)
        key = rotate(heads[:, :, self.heads : self.heads + self.key_heads], cos, sin)
        value = heads[:, :, self.heads + self.key_heads :]
        found = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
            is_causal=True, enable_gqa=True,
        )  # fmt: skip
        return F.linear(found.transpose(1, 2).flatten(2), self.out.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(cos.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def stablemax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of logits (..., V) at labels (...) in float64, (...)."""
    wide = logits.double()
    s = torch.where(wide < 0, 1 / (1 - wide + 1e-30), wide + 1)
    log_p = torch.log(s / s.sum(-1, keepdim=True))
    return -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class PlainTRM(nn.Module):
    """One ACT step of the recursion, with gradient through its last outer cycle."""

    def __init__(
        self, vocabulary: int, width: int, heads: int, key_heads: int, inner: int, layers: int,
        H_cycles: int, L_cycles: int, length: int, dtype: torch.dtype,
    ):  # fmt: skip
        super().__init__()
        self.H_cycles, self.L_cycles, self.dtype, self.scale = H_cycles, L_cycles, dtype, width**0.5
        self.embedding = nn.Parameter(torch.randn(vocabulary, width) / width**0.5)
        self.head = nn.Parameter(torch.randn(vocabulary, width) / width**0.5)
        self.blocks = nn.ModuleList(
            PlainBlock(width, heads, key_heads, inner) for _ in range(layers)
        )
        size = width // heads
        angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, size, 2) / size))
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def run(self, z: Tensor, injection: Tensor) -> Tensor:
        z = z + injection
        for block in self.blocks:
            z = block(z, self.cos, self.sin)
        return z

    def cycle(self, z_H: Tensor, z_L: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(self.L_cycles):
            z_L = self.run(z_L, z_H + x)
        return self.run(z_H, z_L), z_L

    def forward(self, z_H: Tensor, z_L: Tensor, inputs: Tensor, labels: Tensor):
        """Return the new latents (B, S, D), the loss and the share of correct predictions."""
        x = self.scale * F.embedding(inputs, self.embedding.to(self.dtype))
        with torch.no_grad():
            for _ in range(self.H_cycles - 1):
                z_H, z_L = self.cycle(z_H, z_L, x)
        z_H, z_L = self.cycle(z_H, z_L, x)
        logits = F.linear(z_H, self.head.to(self.dtype))
        return z_H.detach(), z_L.detach(), *self.score(logits, labels)

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the share of correct predictions."""
        with torch.no_grad():
            right = (logits.argmax(-1) == labels).float().mean()
        return stablemax_loss(logits, labels).mean(-1).sum(), right
