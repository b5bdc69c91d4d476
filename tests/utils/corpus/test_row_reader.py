"""Rows on their way into a batch: budgets, relabelling, documents."""

import warnings
from collections import Counter

import numpy as np
import pytest
from seeds import draw_rng

from dataset.common import IGNORE_LABEL_ID
from sequence_dataset import EvalStream
from tests.stream_tools import run, stream_of, write_corpus
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora
from utils.corpus.permutation import hash64
from utils.corpus.row_reader import document_starts, relabel


@pytest.fixture
def corpus(tmp_path):
    write_corpus(tmp_path / "c", 97, names=("x", "y"), domains=("p", "q", "r"))
    return Corpora([str(tmp_path / "c")])


def test_budgets_are_lifted_and_capped_with_one_warning(corpus, tmp_path):
    targets = np.load(tmp_path / "c/train/all/iteration_targets.npy").astype(np.int32)
    with pytest.warns(UserWarning, match="12") as caught:
        stream = stream_of(corpus, global_batch_size=97, min_iterations=8, max_iterations=12)
        batch = stream.next(0, np.ones(97, bool))[0]
    assert len(caught) == 1
    assert Counter(batch["iteration_targets"].tolist()) == Counter(targets.clip(8, 12).tolist())
    with pytest.raises(UserError, match=r"\(9\).*\(8\)"):
        stream_of(corpus, min_iterations=9, max_iterations=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream_of(corpus, max_iterations=19)
        stream_of(corpus, max_iterations=1, min_iterations=4)  # a model of one step has no budgets


def test_relabelling_is_a_bijection_applied_to_inputs_and_labels_alike():
    rng = draw_rng()
    inputs = rng.integers(0, 20, (50, 200)).astype(np.int32)
    labels = np.where(rng.random(inputs.shape) < 0.5, inputs, IGNORE_LABEL_ID).astype(np.int32)
    new_inputs, new_labels = inputs.copy(), labels.copy()
    relabel(new_inputs, new_labels, 5, 15, hash64(np.arange(50)))
    maps = set()
    for old, new, old_label, new_label in zip(inputs, new_inputs, labels, new_labels, strict=True):
        pairs = set(zip(old.tolist(), new.tolist(), strict=True))
        table = dict(pairs)
        assert len(pairs) == len(table) == len(set(table.values()))
        assert all(table[i] == i for i in table if not 5 <= i < 15)
        assert all(5 <= table[i] < 15 for i in table if 5 <= i < 15)
        table[IGNORE_LABEL_ID] = IGNORE_LABEL_ID
        assert [table[i] for i in old_label.tolist()] == new_label.tolist()
        maps.add(tuple(sorted(table.items())))
    assert len(maps) > 40


def test_training_relabels_afresh_each_epoch_and_evaluation_never(tmp_path):
    inputs = write_corpus(tmp_path / "c", 40, relabel_ids=(2, 60), names=("x",))
    write_corpus(tmp_path / "c", 40, split="test", relabel_ids=(2, 60), names=("x",))
    corpora = Corpora([tmp_path / "c"])
    batches = run([stream_of(corpora, epochs=2, global_batch_size=40)], lambda s: np.ones(40, bool))
    original = {tuple(row) for row in inputs.astype(np.int32).tolist()}
    first, second = ({tuple(row) for row in b["inputs"].tolist()} for b in batches)
    assert not first & original and not first & second
    shapes = [np.unique(row, return_inverse=True)[1] for row in inputs]
    kept = {tuple(_pattern(row)) for row in inputs}
    assert len(shapes) == 40 and {tuple(_pattern(row)) for row in batches[0]["inputs"]} == kept
    for batch in batches:  # labels are the inputs shifted, before and after
        np.testing.assert_array_equal(batch["labels"][:, :-1], batch["inputs"][:, 1:])
    test = Corpora([tmp_path / "c"], "test")
    ((_, batch, _),) = EvalStream(test, global_batch_size=40)
    assert {tuple(row) for row in batch["inputs"].tolist()} == original


def _pattern(row: np.ndarray) -> list[int]:
    seen: dict[int, int] = {}
    return [seen.setdefault(int(token), len(seen)) for token in row]


def naive_starts(inputs, labels, eos, pad):
    out = []
    for tokens, targets in zip(inputs.tolist(), labels.tolist(), strict=True):
        end = len(tokens)
        while end and tokens[end - 1] == pad and targets[end - 1] == IGNORE_LABEL_ID:
            end -= 1
        if pad == eos and 0 < end < len(tokens):
            end += 1  # this one ends its document
        start, row = 0, []
        for position, token in enumerate(tokens):
            if position >= end:
                row.append(len(tokens))
                continue
            row.append(start)
            if token == eos:
                start = position + 1
        out.append(row)
    return out


@pytest.mark.parametrize("eos, pad", [(1, 0), (0, 0), (2, 3)])
def test_document_starts_equal_a_plain_loop(eos, pad):
    rng = draw_rng()
    inputs = rng.integers(0, 5, (300, 10))
    labels = np.where(rng.random((300, 10)) < 0.3, IGNORE_LABEL_ID, 4)
    for row, length in enumerate(rng.integers(0, 11, 300)):
        inputs[row, length:], labels[row, length:] = pad, IGNORE_LABEL_ID
    starts = document_starts(inputs, labels, eos, pad)
    assert starts.dtype == np.int32 and (starts == 10).any()
    assert starts.tolist() == naive_starts(inputs, labels, eos, pad)


def test_document_starts_where_pad_is_eos():
    eos = 9
    inputs = np.array([[5, 6, 9, 7, 9, 9, 9], [9, 9, 9, 9, 9, 9, 9], [5, 9, 5, 6, 7, 8, 9]])
    labels = np.where(inputs == eos, IGNORE_LABEL_ID, 1)
    assert document_starts(inputs, labels, eos, eos).tolist() == [
        [0, 0, 0, 3, 3, 7, 7],
        [7] * 7,
        [0, 0, 2, 2, 2, 2, 2],
    ]
