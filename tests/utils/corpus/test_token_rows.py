"""Both layouts of a corpus: the same rows and batches, damage named, and no more read than rows."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from seeds import draw_rng

from dataset.common import IGNORE_LABEL_ID
from sequence_dataset import TrainStream
from tests.stream_tools import (
    EOS,
    PAD,
    VOCAB,
    S,
    Windows,
    assert_same,
    halting,
    putting,
    random_windows,
    rows_of,
    run,
    saved,
    write_corpus,
    write_split,
    write_windows,
)
from tests.utils.corpus.test_row_reader import naive_starts
from utils.core.errors import UserError
from utils.corpus.corpora import Corpora

LAYOUTS = ("npy", "stream")


@pytest.mark.parametrize("pad, eos", [(PAD, EOS), (EOS, EOS), (7, EOS)])
@pytest.mark.parametrize("feed", ["present", "consume"])
def test_both_layouts_give_the_same_rows_and_batches(tmp_path, pad, eos, feed):
    windows = random_windows(draw_rng(), 150, eos=eos)
    inputs, labels = rows_of(windows, pad=pad, eos=eos)
    batches, weights = {}, {"p": 2, "q": 1}
    for layout in LAYOUTS:
        write_windows(
            tmp_path / layout, windows, layout, pad=pad, eos=eos, domains=("p", "q"), names=("x",)
        )
        corpora = Corpora([tmp_path / layout])
        order = draw_rng().permutation(150)
        rows = corpora.rows(order)
        np.testing.assert_array_equal(rows["inputs"], inputs[order])
        np.testing.assert_array_equal(rows["labels"], labels[order])
        assert rows["inputs"].dtype == rows["labels"].dtype == np.int32
        stream = TrainStream(
            corpora, global_batch_size=8, seed=3, epochs=2, feed=feed, domain_weights=weights
        )
        batches[layout] = run([stream], halting(1, 8))
    assert_same(*batches.values())
    for batch in batches["stream"]:
        starts = naive_starts(batch["inputs"], batch["labels"], eos, pad)
        held = (batch["inputs"] == pad).all(1) & (batch["labels"] == IGNORE_LABEL_ID).all(1)
        np.testing.assert_array_equal(batch["document_starts"][~held], np.array(starts)[~held])
        assert (batch["document_starts"][held] == S).all()


def test_label_starts_may_be_absent(tmp_path):
    windows = random_windows(draw_rng(), 30)
    windows = windows._replace(label_starts=np.zeros(30, int))
    write_windows(tmp_path / "c", windows, "stream", arrays={"label_starts": None})
    rows = Corpora([tmp_path / "c"]).rows(np.arange(30))
    np.testing.assert_array_equal(rows["labels"], rows_of(windows, pad=PAD, eos=EOS)[1])


def test_uint16_serves_a_vocabulary_of_65536(tmp_path):
    tokens = np.array([65535, 3, 65535, 65534, 1], np.uint16)
    windows = Windows(tokens, np.array([0, 1]), np.array([5, 4], np.uint16), np.zeros(2, int))
    changes = {"pad": 0, "eos": 1, "vocab_size": 65536}
    write_windows(tmp_path / "c", windows, "stream", **changes)
    rows = Corpora([tmp_path / "c"]).rows(np.arange(2))
    assert rows["inputs"][:, :5].tolist() == [[65535, 3, 65535, 65534, 1], [3, 65535, 65534, 1, 0]]
    assert rows["labels"][0, :5].tolist() == [3, 65535, 65534, 1, IGNORE_LABEL_ID]


def test_layouts_join(tmp_path):
    rng, parts = draw_rng(), []
    for number, layout in enumerate(("stream", "npy", "stream")):
        windows = random_windows(rng, 20 + number)
        write_windows(tmp_path / str(number), windows, layout, seed=number)
        parts.append(rows_of(windows, pad=PAD, eos=EOS))
    corpora = Corpora([tmp_path / str(number) for number in range(3)])
    order = rng.permutation(63)
    rows = corpora.rows(order)
    for name, expected in zip(("inputs", "labels"), zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(rows[name], np.concatenate(expected)[order])
    assert corpora.one_row_a_group and corpora.num_groups == 63


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda root: (root / "train/all/tokens.npy").unlink(), r"tokens\.npy is missing"),
        (
            lambda root: (root / "train/all/row_lengths.npy").unlink(),
            r"row_lengths\.npy is missing",
        ),
        (lambda root: (root / "train/all/tokens.npy").write_bytes(b""), r"tokens\.npy is truncat"),
        (saved("tokens", lambda a: a.astype(np.float32)), r"tokens\.npy .*float32"),
        (saved("tokens", lambda a: a[:, None]), r"tokens\.npy has shape .*one dimension"),
        (saved("tokens", lambda a: a[:-9]), r"row_starts\.npy .* row .*tokens\.npy"),
        (saved("tokens", lambda a: np.full_like(a, 60)), r"tokens\.npy .*token id 60.*60"),
        (saved("row_starts", lambda a: a[:, None]), r"row_starts\.npy has shape"),
        (saved("row_starts", putting(-1)), r"row_starts\.npy .*row 3 .*token -1"),
        (saved("row_starts", putting(2**63 - 5)), r"row_starts\.npy .*row 3 .*token 922"),
        (saved("row_lengths", putting(1)), r"row_lengths\.npy .* 1 at row 3, not 2 to 13"),
        (saved("row_lengths", putting(14)), r"row_lengths\.npy .* 14 at row 3, not 2 to 13"),
        (saved("row_lengths", lambda a: a[:-1]), r"row_lengths\.npy has shape .* 20 rows"),
        (saved("label_starts", lambda a: a[:-1]), r"label_starts\.npy has shape .* 20 rows"),
        (saved("label_starts", putting(13)), r"label_starts\.npy .* 13 at row 3, not 0 to 12"),
        (saved("label_starts", putting(-1)), r"label_starts\.npy .* -1 at row 3"),
        (saved("domain_ids", lambda a: a[:-1]), r"domain_ids\.npy has shape"),
        (saved("puzzle_identifiers", putting(2)), r"puzzle_identifiers\.npy .* 2, .* 2 names"),
    ],
)
def test_damage_to_a_stream_is_named_with_its_file(tmp_path, damage, message):
    windows = random_windows(np.random.default_rng(0), 20)
    write_windows(tmp_path / "c", windows, "stream")
    Corpora([tmp_path / "c"])
    damage(tmp_path / "c")
    with pytest.raises(UserError, match=message):
        Corpora([tmp_path / "c"])


def test_damage_behind_the_first_chunk_of_rows_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.corpus.token_rows.CHUNK", 7)
    windows = random_windows(np.random.default_rng(0), 20)
    windows.lengths[18] = 14
    write_windows(tmp_path / "c", windows, "stream")
    with pytest.raises(UserError, match=r"row_lengths\.npy .* 14 at row 18"):
        Corpora([tmp_path / "c"])


def test_an_unknown_layout_is_named(tmp_path):
    write_corpus(tmp_path / "c", 20, layout="parquet")
    with pytest.raises(UserError, match=r"layout 'parquet'.*'npy'.*'stream'"):
        Corpora([tmp_path / "c"])


def test_another_row_or_token_is_another_fingerprint(tmp_path):
    windows = random_windows(np.random.default_rng(0), 20)
    write_windows(tmp_path / "c", windows, "stream")
    before = Corpora([tmp_path / "c"]).fingerprint
    assert Corpora([tmp_path / "c"]).fingerprint == before
    tokens = windows.tokens.copy()
    tokens[windows.starts[5]] ^= 1
    lengths = windows.lengths.copy()
    lengths[4] = 2 if lengths[4] > 2 else 3
    for changed in (windows._replace(tokens=tokens), windows._replace(lengths=lengths)):
        write_windows(tmp_path / "c", changed, "stream")
        assert Corpora([tmp_path / "c"]).fingerprint != before
    for other in ({"pad": PAD + 1}, {"eos": EOS + 1}):  # they decide what a row holds
        write_windows(tmp_path / "c", windows, "stream", **other)
        assert Corpora([tmp_path / "c"]).fingerprint != before


@pytest.mark.parametrize("layout, name", [("npy", "labels"), ("stream", "tokens")])
def test_a_file_cut_off_under_a_run_is_named(tmp_path, layout, name):
    windows = random_windows(np.random.default_rng(0), 20)
    write_windows(tmp_path / "c", windows, layout)
    corpora, path = Corpora([tmp_path / "c"]), tmp_path / f"c/train/all/{name}.npy"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"{name}\.npy ends at byte \d+: it was truncated"):
        corpora.rows(np.arange(20))


@pytest.mark.parametrize("change", [lambda a: a.astype(">u2"), np.asfortranarray])
def test_other_byte_and_memory_orders_are_read_alike(tmp_path, change):
    windows = random_windows(draw_rng(), 30)
    expected = rows_of(windows, pad=PAD, eos=EOS)
    for layout, names in (("npy", ("inputs", "labels")), ("stream", ("tokens",))):
        write_windows(tmp_path / layout, windows, layout)
        for name in names:
            saved(name, change)(tmp_path / layout)
        rows = Corpora([tmp_path / layout]).rows(np.arange(30)[::-1])
        np.testing.assert_array_equal(rows["inputs"], expected[0][::-1])
        np.testing.assert_array_equal(rows["labels"], expected[1][::-1])


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="a system without such reads")
@pytest.mark.parametrize("supported", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_are_in_memory_wholly_partly_or_not_are_read_alike(
    tmp_path, monkeypatch, layout, supported
):
    windows = random_windows(draw_rng(), 40)
    expected = rows_of(windows, pad=PAD, eos=EOS)
    write_windows(tmp_path / "c", windows, layout)
    corpora, rng, preadv = Corpora([tmp_path / "c"]), draw_rng(), os.preadv
    waited = 0

    def partly(file, buffers, offset, flags=0):
        nonlocal waited
        if not flags:
            waited += 1
            return preadv(file, buffers, offset)
        if not supported:
            raise OSError(errno.EOPNOTSUPP, "not supported")
        if (count := int(rng.integers(0, len(buffers[0]) + 1))) == 0:
            raise BlockingIOError(errno.EAGAIN, "not in memory")
        return preadv(file, [buffers[0][:count]], offset)

    monkeypatch.setattr(os, "preadv", partly)
    order = rng.permutation(40)
    rows = corpora.rows(order)
    np.testing.assert_array_equal(rows["inputs"], expected[0][order])
    np.testing.assert_array_equal(rows["labels"], expected[1][order])
    assert waited


def _cold(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _bytes_from_disk() -> int:
    text = Path("/proc/self/io").read_text("utf-8")
    return int(text.partition("\nread_bytes:")[2].split()[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_costs_its_own_bytes_on_a_cold_disk(tmp_path, layout):
    """Through a memory map every row would drag its neighbours along."""
    if not Path("/proc/self/io").is_file():
        pytest.skip("the system does not count what is read from disk")
    rows, width, rng = 4096, 1024, np.random.default_rng(0)
    tokens = rng.integers(2, VOCAB, rows * width + 1).astype(np.uint16)
    arrays = {"puzzle_identifiers": np.zeros(rows, np.uint8)}
    if layout == "npy":
        arrays |= {"inputs": tokens[:-1].reshape(rows, width)}
        arrays |= {"labels": tokens[1:].reshape(rows, width)}
        arrays |= {name: np.arange(rows + 1) for name in ("puzzle_indices", "group_indices")}
    else:
        lengths = np.full(rows, width + 1, np.uint16)
        arrays |= {"tokens": tokens, "row_starts": np.arange(rows) * width, "row_lengths": lengths}
    write_split(
        tmp_path / "train/all", arrays, layout=layout, pad_id=PAD, ignore_label_id=-100,
        vocab_size=VOCAB, seq_len=width, num_puzzle_identifiers=1, total_groups=rows,
        total_puzzles=rows, mean_puzzle_examples=1.0,
    )  # fmt: skip
    corpora, wanted = Corpora([tmp_path]), rng.choice(rows, 16, replace=False)
    large = [path for path in (tmp_path / "train/all").glob("*.npy") if path.stat().st_size > 2**20]
    for path in large:
        _cold(path)
    before = _bytes_from_disk()
    mapped = np.load(large[0], mmap_mode="r")
    int(mapped[np.arange(0, len(mapped), len(mapped) // 16)].sum())
    through_map = _bytes_from_disk() - before
    del mapped
    if through_map < 16 * 32 * 1024:
        pytest.skip("this file system reads nothing ahead, or from no disk")
    own = 16 * 2 * width * (2 if layout == "npy" else 1)
    for together in ([wanted], np.split(wanted, 16)):
        for path in large:
            _cold(path)
        before = _bytes_from_disk()
        for some in together:
            corpora.rows(some)
        assert 0 < _bytes_from_disk() - before <= 4 * own  # two pages for half of one
