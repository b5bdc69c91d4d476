"""Sign-SGD of the identifier embedding against a naive loop."""

import torch

from models.sparse_embedding import CastedSparseEmbedding, SparseEmbeddingSignSGD


def test_gradients_are_summed_by_id_over_micro_batches_and_then_signed():
    embedding = CastedSparseEmbedding(6, 3, init_std=1.0, dtype=torch.float32).train()
    start, lr, decay = embedding.weights.clone(), 0.1, 0.5
    optimizer = SparseEmbeddingSignSGD(embedding, lr=lr, weight_decay=decay)
    total = torch.zeros(6, 3)
    used = set()
    for ids in (torch.tensor([1, 4, 1]), torch.tensor([4, 5, 1])):
        pull = torch.randn(3, 3)
        (embedding(ids) * pull).sum().backward()
        for i, gradient in zip(ids.tolist(), pull, strict=True):
            total[i] += gradient
            used.add(i)
    optimizer.step()
    optimizer.zero_grad()
    expected = start.clone()
    for i in used:
        expected[i] = start[i] * (1 - lr * decay) - lr * total[i].sign()
    torch.testing.assert_close(embedding.weights, expected)
    assert not embedding.used


def test_evaluation_leaves_no_trace():
    embedding = CastedSparseEmbedding(4, 2, init_std=1.0, dtype=torch.float32)
    embedding.eval()(torch.tensor([1]))
    with torch.no_grad():
        embedding.train()(torch.tensor([1]))
    assert not embedding.used


def test_other_ranks_rows_count():
    """The collective that is passed in brings in another rank's rows; their ids are updated too."""
    embedding = CastedSparseEmbedding(4, 2, init_std=1.0, dtype=torch.float32).train()
    start = embedding.weights.clone()
    other = {torch.int64: torch.tensor([3]), torch.float32: torch.full((1, 2), 5.0)}
    optimizer = SparseEmbeddingSignSGD(
        embedding, 0.1, 0.0, all_gather=lambda t: torch.cat([t, other[t.dtype]])
    )
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    moved = (embedding.weights != start).any(1)
    assert moved.tolist() == [False, True, False, True]
