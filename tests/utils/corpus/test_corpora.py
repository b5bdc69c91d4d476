"""Opening corpora: both layouts, names across corpora, and damage named with its file."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from seeds import draw_rng

from dataset.common import IGNORE_LABEL_ID
from sequence_dataset import EvalStream
from tests.stream_tools import (
    halting,
    ids_of,
    putting,
    run,
    saved,
    stream_of,
    write_corpus,
    write_trm,
)
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora


def test_trm_labels_and_sets(tmp_path):
    arrays = write_trm(tmp_path / "t", [[2, 1], [3]], split="test", sets=("a", "b"))
    corpora = Corpora([tmp_path / "t"], split="test")
    assert corpora.num_rows == 12 and corpora.num_groups == 4
    rows = corpora.rows(np.arange(12))
    expected = np.where(arrays["labels"] == 0, IGNORE_LABEL_ID, arrays["labels"])
    np.testing.assert_array_equal(rows["labels"], np.concatenate([expected] * 2))
    np.testing.assert_array_equal(rows["puzzle_identifiers"], [1, 1, 2, 3, 3, 3] * 2)
    seen = [(name, count) for name, _, count in EvalStream(corpora, global_batch_size=4)]
    assert seen == [("a", 4), ("a", 2), ("b", 4), ("b", 2)]


def test_trm_identifiers_are_by_puzzle_even_where_counts_agree(tmp_path):
    write_trm(tmp_path / "t", [[2, 0], [1]])
    rows = Corpora([tmp_path / "t"]).rows(np.arange(3))
    np.testing.assert_array_equal(rows["puzzle_identifiers"], [1, 1, 3])


def test_as_many_groups_as_rows_are_not_yet_a_row_a_group(tmp_path):
    write_trm(tmp_path / "t", [[2], [0], [1]])
    first, size = Corpora([tmp_path / "t"]).puzzles(np.arange(3), np.zeros(3, np.uint64))
    assert first.tolist() == [0, 2, 2] and size.tolist() == [2, 0, 1]


def test_identifiers_and_domains_join_by_name(tmp_path):
    first = write_corpus(tmp_path / "a", 30, seed=1, names=("x", "y"), domains=("p", "q"))
    second = write_corpus(tmp_path / "b", 20, seed=2, names=("z", "x"), domains=("q", "s"))
    corpora = Corpora([str(tmp_path / "a"), str(tmp_path / "b")])
    assert corpora.identifiers == ["<blank>", "x", "y", "z"]
    assert corpora.domains == corpora.metadata.domains == ["p", "q", "s"]
    assert corpora.metadata.num_puzzle_identifiers == 4
    assert corpora.metadata.total_groups == corpora.num_groups == 50
    order = draw_rng().permutation(50)
    rows = corpora.rows(order)
    np.testing.assert_array_equal(rows["inputs"], np.concatenate([first, second])[order])
    for key, name, stored, joined_names in (
        ("puzzle_identifiers", "puzzle_identifiers", [["<blank>", "x", "y"], ["<blank>", "z", "x"]],
         corpora.identifiers),
        ("domain_ids", "domain_ids", [["p", "q"], ["q", "s"]], corpora.domains),
    ):  # fmt: skip
        arrays = [np.load(tmp_path / f"{c}/train/all/{name}.npy") for c in "ab"]
        expected = [own[i] for own, array in zip(stored, arrays, strict=True) for i in array]
        assert [joined_names[i] for i in rows[key]] == [expected[i] for i in order]
    batches = run([stream_of(corpora, epochs=1)], halting(1, 8))
    assert ids_of(batches, np.concatenate([first, second])) == Counter(range(50))


def test_other_test_folder_keeps_the_numbering_of_training(tmp_path):
    write_corpus(tmp_path / "a", 30, names=("x", "y"), domains=("p", "q"))
    write_corpus(tmp_path / "b", 20, split="test", names=("new", "y"), domains=("q", "s"))
    train = Corpora([tmp_path / "a"])
    with pytest.warns(UserWarning, match="never trained"):
        test = Corpora([tmp_path / "b"], "test", like=train)
    assert test.identifiers == train.identifiers and test.domains == ["p", "q", "s"]
    stored = np.load(tmp_path / "b/test/all/puzzle_identifiers.npy")
    ids = test.rows(np.arange(20))["puzzle_identifiers"]
    np.testing.assert_array_equal(ids, np.array([0, 0, 2])[stored])


def test_corpus_without_targets_or_domains_joins_one_with(tmp_path):
    write_corpus(tmp_path / "a", 10)
    bare = {"iteration_targets": None, "domain_ids": None}
    write_corpus(tmp_path / "b", 10, seed=9, domains=(), arrays=bare)
    corpora = Corpora([tmp_path / "a", tmp_path / "b"])
    assert corpora.domains == ["d", "<none>"]
    for limit, expected in ((24, 24), (None, 2**31 - 1)):
        stream = stream_of(corpora, global_batch_size=20, max_iterations=limit)
        batch = stream.next(0, np.ones(20, bool))[0]
        targets = batch["iteration_targets"]
        assert (targets[batch["domain_ids"] == 1] == expected).all()
        assert (targets[batch["domain_ids"] == 0] < 20).all()


def _truncate(root: Path) -> None:
    path = root / "train/all/inputs.npy"
    path.write_bytes(path.read_bytes()[:-7])


def _checksum(root: Path) -> None:
    folder = root / "train/all"
    meta = json.loads((folder / "dataset.json").read_text("utf-8"))
    data = (folder / "labels.npy").read_bytes()
    meta["checksums"] = {"labels.npy": hashlib.sha256(data).hexdigest()}
    (folder / "dataset.json").write_text(json.dumps(meta), "utf-8")
    (folder / "labels.npy").write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda root: (root / "train/all/labels.npy").unlink(), r"labels\.npy is missing"),
        (_truncate, r"inputs\.npy is truncated"),
        (lambda root: (root / "train/all/inputs.npy").write_bytes(b""), r"inputs\.npy is trunc"),
        (saved("inputs", lambda a: a.astype(np.float32)), r"inputs\.npy .*float32"),
        (saved("inputs", lambda a: a[:, :-1]), r"inputs\.npy has shape .*seq_len 12"),
        (saved("labels", lambda a: a[:-1]), r"labels\.npy has shape"),
        (saved("inputs", putting(60)), r"inputs\.npy .*token id 60.*60"),
        (saved("labels", putting(254)), r"labels\.npy .*token id 254"),
        (saved("puzzle_indices", putting(9)), r"puzzle_indices\.npy goes from 9 to 4"),
        (saved("group_indices", lambda a: a[:-1]), r"group_indices\.npy ends at 19, but .* 20 puz"),
        (saved("puzzle_identifiers", putting(2)), r"puzzle_identifiers\.npy .* 2, .* 2 names"),
        (saved("domain_ids", lambda a: a[:-1]), r"domain_ids\.npy has shape"),
        (_checksum, r"labels\.npy.*checksum"),
        (
            lambda root: (root / "identifiers.json").write_text('["<blank>"]', "utf-8"),
            "must list 2 names",
        ),
    ],
)
def test_damage_is_named_with_its_file(tmp_path, damage, message):
    write_corpus(tmp_path / "c", 20)
    Corpora([tmp_path / "c"])
    damage(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        Corpora([tmp_path / "c"])


def test_wrong_folder_names_the_nearest(tmp_path):
    write_corpus(tmp_path / "athena_base", 20)
    with pytest.raises(UserError, match="did you mean 'athena_base'"):
        Corpora([tmp_path / "athena_bse"])
    with pytest.raises(UserError, match="no split 'test'"):
        Corpora([tmp_path / "athena_base"], "test")
    with pytest.raises(UserError, match="data_paths"):
        Corpora([])


def test_files_of_another_corpus_are_refused(tmp_path):
    write_corpus(tmp_path / "c", 20, total_groups=19)
    with pytest.raises(UserError, match=r"20 groups.* 19"):
        Corpora([tmp_path / "c"])


def test_a_large_corpus_is_hashed_on_request_only(tmp_path, monkeypatch):
    inputs = write_corpus(tmp_path / "c", 20)
    _checksum(tmp_path / "c")
    monkeypatch.setattr("utils.corpus.corpora.LARGE_CORPUS", 0)
    monkeypatch.setattr("utils.corpus.part.LARGE_CORPUS", 0)
    corpora = Corpora([tmp_path / "c"])
    np.testing.assert_array_equal(corpora.rows(np.array([4, 2]))["inputs"], inputs[[4, 2]])
    with pytest.raises(UserError, match="checksum"):
        Corpora([tmp_path / "c"], verify=True)


def test_reasoning_labels_are_read_where_a_corpus_has_them(tmp_path):
    stored = draw_rng().integers(0, 9, (10, 3)).astype(np.uint8)
    stored[4] = 255
    write_corpus(tmp_path / "a", 10)
    write_corpus(tmp_path / "b", 10)
    np.save(tmp_path / "b/train/all/reasoning_labels.npy", stored)
    corpora = Corpora([tmp_path / "a", tmp_path / "b"])
    labels = corpora.rows(np.arange(20))["reasoning_labels"]
    assert (labels[:10] == IGNORE_LABEL_ID).all() and (labels[14] == IGNORE_LABEL_ID).all()
    np.testing.assert_array_equal(np.delete(labels[10:], 4, 0), np.delete(stored, 4, 0))
    assert "reasoning_labels" not in Corpora([tmp_path / "a"]).rows(np.arange(2))


def test_empty_train_split_is_an_error(tmp_path):
    write_corpus(tmp_path / "c", 0)
    with pytest.raises(UserError, match="no rows"):
        Corpora([tmp_path / "c"])


@pytest.mark.parametrize("change", [{"vocab_size": 61}, {"eos_id": 5}, {"pad_id": 2}])
def test_corpora_that_do_not_fit_are_named_with_both_values(tmp_path, change):
    write_corpus(tmp_path / "a", 20)
    write_corpus(tmp_path / "b", 20, **change)
    (name,) = change
    with pytest.raises(UserError, match=name) as error:
        Corpora([tmp_path / "a", tmp_path / "b"])
    text = str(error.value)
    assert "/a/train" in text and "/b/train" in text and f" {change[name]} " in text
