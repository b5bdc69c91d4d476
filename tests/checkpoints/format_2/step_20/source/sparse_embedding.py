"""The identifier embedding and its sign-SGD.

Few of its rows are used in a step, so it is a buffer, not a parameter: clipping, EMA and the
main optimizer do not see it. Each training forward leaves a pair (ids, looked-up rows); after the
backward passes the optimizer sums the gradients by id over micro-batches and ranks, takes their
sign, and updates the rows used.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models.common import trunc_normal_init_


class CastedSparseEmbedding(nn.Module):
    """weights: (num_embeddings, embedding_dim), in the precision of the model's parameters."""

    weights: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, init_std: float, dtype: torch.dtype
    ):
        super().__init__()
        self.dtype = dtype
        table = trunc_normal_init_(torch.empty(num_embeddings, embedding_dim), std=init_std)
        self.register_buffer("weights", table, persistent=True)
        self.used: list[tuple[Tensor, Tensor]] = []

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B,) integers. Returns (B, embedding_dim) in `dtype`."""
        rows = self.weights[ids]
        if self.training and torch.is_grad_enabled():
            rows = rows.detach().requires_grad_()
            self.used.append((ids, rows))
        return rows.to(self.dtype)


class SparseEmbeddingSignSGD(Optimizer):
    """Sign-SGD with decoupled weight decay on the rows used since the last step.

    w ← w·(1 − lr·wd) − lr·sign(Σ gradients of w). A row whose gradient is all 0 was used by
    ignored rows only and stays as it is. `all_gather` concatenates a tensor over ranks
    (first axis); every rank must hold equally many rows.
    """

    def __init__(
        self,
        embedding: CastedSparseEmbedding,
        lr: float,
        weight_decay: float,
        all_gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        super().__init__([embedding.weights], dict(lr=lr, weight_decay=weight_decay))
        self.embedding, self.all_gather = embedding, all_gather

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.embedding.used.clear()

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        used = self.embedding.used
        if not used:
            return
        ids = self.all_gather(torch.cat([ids for ids, _ in used]))
        grads = self.all_gather(torch.cat([_gradient(rows) for _, rows in used]))
        rows, total = _sums_by_id(ids, grads)
        group = self.param_groups[0]
        old = self.embedding.weights[rows]
        new = old * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * total.sign()
        self.embedding.weights[rows] = torch.where(total.ne(0).any(1, keepdim=True), new, old)


def _sums_by_id(ids: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers (M,) and the sum of each one's gradients (M, D); from ids (N,), grads (N, D).

    How many ids differ depends on the data, and to XLA another number is another program. So there
    M is N: each occurrence gets the whole sum, and all occurrences write the same value.
    """
    if ids.device.type == "xla":
        same = ids.unsqueeze(1) == ids  # N x N, a row of it for each occurrence
        return ids, same.to(grads.dtype) @ grads
    unique, inverse = ids.unique(return_inverse=True)
    return unique, grads.new_zeros(len(unique), grads.shape[1]).index_add_(0, inverse, grads)


def _gradient(rows: Tensor) -> Tensor:
    return torch.zeros_like(rows) if rows.grad is None else rows.grad


def sparse_embeddings(model: nn.Module) -> Iterable[CastedSparseEmbedding]:
    return (module for module in model.modules() if isinstance(module, CastedSparseEmbedding))
