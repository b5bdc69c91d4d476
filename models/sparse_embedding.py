"""The identifier embedding and its sign-SGD.

A step uses few of its rows, so it is a buffer, not a parameter: clipping, EMA and the main
optimizer ignore it. Each training forward pass stores a pair (ids, looked-up rows); after the
backward passes the optimizer sums the gradients by id over micro-batches and ranks, takes their
sign, and updates the rows used. Because the sign amplifies differences in the last bit, the sum
over ranks is computed once, by a collective, instead of by each rank separately.
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
        """Return the rows of ids (B,), (B, embedding_dim) in `dtype`."""
        rows = self.weights[ids]
        if self.training and torch.is_grad_enabled():
            rows = rows.detach().requires_grad_()
            self.used.append((ids, rows))
        return rows.to(self.dtype)


class SparseEmbeddingSignSGD(Optimizer):
    """Sign-SGD with decoupled weight decay on the rows used since the last step.

    w ← w·(1 − lr·wd) − lr·sign(Σ gradients of w). A row whose gradient is 0 everywhere was used
    only by ignored rows and is not changed. `all_gather` concatenates a tensor over ranks (first
    axis), `all_reduce` sums it and gives all ranks the same bits; every rank must have the same
    number of rows.
    """

    def __init__(
        self,
        embedding: CastedSparseEmbedding,
        lr: float,
        weight_decay: float,
        all_gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ):
        super().__init__([embedding.weights], dict(lr=lr, weight_decay=weight_decay))
        self.embedding, self.all_gather, self.all_reduce = embedding, all_gather, all_reduce

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.embedding.used.clear()

    @torch.no_grad()
    def finite(self) -> Tensor:
        """Return whether all gradients of this rank are finite, () bool. Check this before `step`,
        where a non-finite gradient would affect every row used.
        """
        found = torch.ones((), dtype=torch.bool, device=self.embedding.weights.device)
        for _, rows in self.embedding.used:
            found = found & _gradient(rows).isfinite().all()
        return found

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        used = self.embedding.used
        if not used:
            return
        own = torch.cat([ids for ids, _ in used])
        ids = self.all_gather(own)
        grads = torch.cat([_gradient(rows) for _, rows in used])
        total = self.all_reduce(_sums_by_id(ids, own, grads))
        group = self.param_groups[0]
        old = self.embedding.weights[ids]
        new = old * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * total.sign()
        # equal ids have equal sums, so the order of the writes does not matter
        self.embedding.weights[ids] = torch.where(total.ne(0).any(1, keepdim=True), new, old)


_MATRIX_ELEMENTS = 1 << 24


def _sums_by_id(wanted: Tensor, ids: Tensor, grads: Tensor) -> Tensor:
    """Return the sum of the gradients (N, D) of each of the `wanted` ids (M,), as (M, D).

    The number of distinct ids depends on the data: determining it would make the host wait for the
    device and XLA compile another program. Multiplying by the matrix of equal pairs has a fixed
    shape and, unlike scattered additions on a GPU, a fixed order of additions.
    """
    rows = max(1, _MATRIX_ELEMENTS // len(ids))
    parts = [(part.unsqueeze(1) == ids).to(grads.dtype) @ grads for part in wanted.split(rows)]
    return torch.cat(parts)


def _gradient(rows: Tensor) -> Tensor:
    return torch.zeros_like(rows) if rows.grad is None else rows.grad


def sparse_embeddings(model: nn.Module) -> Iterable[CastedSparseEmbedding]:
    return (module for module in model.modules() if isinstance(module, CastedSparseEmbedding))
