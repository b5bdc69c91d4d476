"""Sign-SGD of the identifier embedding: against a naive loop, and on ranks that round otherwise."""

import pytest
import torch
from training_tools import finish, start

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
    """The collectives that are passed in bring in another rank's ids and its part of the sums."""
    embedding = CastedSparseEmbedding(4, 2, init_std=1.0, dtype=torch.float32).train()
    start = embedding.weights.clone()
    optimizer = SparseEmbeddingSignSGD(
        embedding,
        0.1,
        0.0,
        all_gather=lambda ids: torch.cat([ids, torch.tensor([3])]),
        all_reduce=lambda total: total + torch.tensor([[0.0, 0.0], [5.0, 5.0]]),
    )
    embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    moved = (embedding.weights != start).any(1)
    assert moved.tolist() == [False, True, False, True]


ANOTHER_ORDER = """
import sys
from pathlib import Path
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from models.sparse_embedding import CastedSparseEmbedding, SparseEmbeddingSignSGD
from utils.backend.cpu import CPUBackend

torch.manual_seed(int(sys.argv[1]))
aten = torch.ops.aten

class AnotherOrder(TorchDispatchMode):
    # adds in an order drawn each time, as atomic additions on a GPU do

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is aten.index_add_.default:
            out, dim, index, source = args[:4]
            order = torch.randperm(len(index))
            return op(out, dim, index[order], source.index_select(dim, order), **(kwargs or {}))
        if op is aten.mm.default:
            order = torch.randperm(args[0].shape[1])
            return op(args[0][:, order], args[1][order])
        return op(*args, **(kwargs or {}))

def table(backend):
    embedding = CastedSparseEmbedding(4, 64, init_std=1.0, dtype=torch.float32).train()
    optimizer = SparseEmbeddingSignSGD(embedding, 0.01, 0.0, backend.all_gather, backend.sum)
    for step in range(20):
        # pairs of opposite gradients: what is left of their sum is how it was rounded
        pull = torch.randn(16, 64) * 10.0 ** torch.randint(-3, 4, (16, 64))
        pull = torch.stack((pull, -pull), dim=1).view(32, 64)
        own = slice(16 * backend.rank, 16 * (backend.rank + 1))
        (embedding(torch.arange(32)[own] // 2 % 4) * pull[own]).sum().backward()
        if backend.rank == 1:
            with AnotherOrder():
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    tables = backend.gather_objects(embedding.weights)
    if backend.is_main:
        Path(sys.argv[2]).write_text(str((tables[0] != tables[1]).sum().item()))

CPUBackend().launch(table)
"""


@pytest.mark.slow
def test_ranks_that_round_differently_keep_equal_tables(seed, tmp_path):
    script, answer = tmp_path / "ranks.py", tmp_path / "unequal"
    script.write_text(ANOTHER_ORDER, "utf-8")
    code, out, err = finish(start(str(seed), str(answer), ranks=2, script=str(script)))
    assert code == 0, out + err
    assert answer.read_text("utf-8") == "0"
