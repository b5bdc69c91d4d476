"""Near-duplicates: found as often as the formula says, whatever the batches, crashes and memory."""

import math
from pathlib import Path

import numpy as np
import pytest
from seeds import draw_rng

from dataset.filters import near_duplicates
from dataset.filters.near_duplicates import BANDS, ROWS, SHINGLE, BandKeys, NearDuplicates
from utils.core.errors import UserError


def found(folder: Path, seed: int, *batches: list[np.ndarray]) -> np.ndarray:
    near = NearDuplicates(folder, seed)
    for documents in batches:
        near.add(documents)
    return near.find_duplicates()


def file_bytes(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def jaccard(*pair: np.ndarray) -> float:
    first, second = (
        {tuple(tokens[at : at + SHINGLE]) for at in range(len(tokens) - SHINGLE + 1)}
        for tokens in (pair[0].tolist(), pair[1].tolist())
    )
    return len(first & second) / len(first | second)


def similar_pair(
    generator: np.random.Generator, tokens: int, target: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two documents that begin alike for as long as it takes to be so similar."""
    shingles = tokens - SHINGLE + 1
    alike = round(2 * shingles * target / (1 + target)) + SHINGLE - 1
    first, second = generator.integers(0, 50_000, (2, tokens))
    second[:alike] = first[:alike]
    return first, second


def counting_pair(
    generator: np.random.Generator, tokens: int, target: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two documents that count, the second from a little further on: as regular as can be."""
    shift = round((tokens - SHINGLE + 1) * (1 - target) / (1 + target))
    first = np.arange(tokens) + generator.integers(2**40)
    return first, first + shift


def mixed_documents(generator: np.random.Generator, count: int) -> list[np.ndarray]:
    """Documents of all lengths; about every second is an earlier one with a new end, or none."""
    documents: list[np.ndarray] = []
    for _ in range(count):
        document = generator.integers(0, 999, int(10 ** generator.uniform(0, 2.7)))
        if documents and generator.random() < 0.5:
            document = documents[generator.integers(len(documents))].copy()
            changed = int(len(document) * generator.uniform(0, 0.2))
            document[len(document) - changed :] = generator.integers(0, 999, changed)
        documents.append(document.astype(generator.choice([np.uint16, np.int32, np.uint64])))
    return documents


@pytest.mark.parametrize(
    ("pair", "tokens"),
    [(similar_pair, 15), (similar_pair, 60), (similar_pair, 300), (counting_pair, 60)],
)
@pytest.mark.parametrize("target", [0.35, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_pairs_are_found_as_often_as_the_formula_says(pair, tokens, target, tmp_path):
    generator = draw_rng()
    hits, expected, pairs = 0, [], 125
    for seed in range(16):
        firsts, seconds = zip(*(pair(generator, tokens, target) for _ in range(pairs)), strict=True)
        answer = found(tmp_path / str(seed), seed, [*firsts], [*seconds])
        assert not answer[:pairs].any()
        hits += int(answer[pairs:].sum())
        similarities = map(jaccard, firsts, seconds)
        expected += [1 - (1 - similarity**ROWS) ** BANDS for similarity in similarities]
    rate, formula = hits / len(expected), math.fsum(expected) / len(expected)
    # Five standard errors, and what short documents, whose bins borrow, are known to differ by.
    tolerance = 5 * math.sqrt(formula * (1 - formula) / len(expected)) + 0.02
    assert abs(rate - formula) < tolerance, (rate, formula)


@pytest.mark.parametrize("tokens", [0, 1, 4, 5, 6, 40, 3000, 70_000])
def test_identical_documents_are_always_found(tokens, tmp_path):
    generator = draw_rng()
    document = generator.integers(0, 2**16, tokens).astype(np.uint16)
    other = generator.integers(0, 2**16, 50)
    answer = found(
        tmp_path, 3, [other, document], [document.astype(np.int64)], [other, document.copy()]
    )
    assert answer.tolist() == [False, False, True, True, True]
    # All of the same 5-gram, at whatever length.
    answer = found(tmp_path / "same", 3, [np.full(tokens + 5, 7), np.full(9, 7), np.full(9, 8)])
    assert answer.tolist() == [False, True, False]


def test_unrelated_documents_are_never_found(tmp_path):
    # A false find needs two equal keys of 64 bits: 14 * 3000^2 / 2 / 2^64 < 10^-11 in all.
    generator = draw_rng()
    documents = [generator.integers(0, 2**40, n) for n in generator.integers(2, 300, 3000)]
    assert not found(tmp_path, 0, documents).any()


def test_documents_shorter_than_an_n_gram_differ_by_every_token(tmp_path):
    texts = [[], [0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert not found(tmp_path, 0, [np.array(text, np.int64) for text in texts]).any()


def test_order_of_tokens_matters(tmp_path):
    document = draw_rng().permutation(200)
    assert found(tmp_path, 0, [document, document[::-1]]).tolist() == [False, False]


def test_batches_and_block_sizes_do_not_matter(tmp_path, monkeypatch):
    generator = draw_rng()
    documents = mixed_documents(generator, 80)
    documents[40] = generator.integers(0, 9, 80_000)
    expected = found(tmp_path / "whole", 5, documents)
    assert 10 < expected.sum() < 70
    for tokens, count in ((7, 3), (1000, 50)):
        monkeypatch.setattr(near_duplicates, "BLOCK_TOKENS", tokens)
        monkeypatch.setattr(near_duplicates, "BLOCK_DOCUMENTS", count)
        parts = np.sort(generator.integers(0, 80, 9))
        batches = [documents[a:b] for a, b in zip([0, *parts], [*parts, 80], strict=True)]
        folder = tmp_path / str(tokens)
        assert (found(folder, 5, *batches) == expected).all()
        assert file_bytes(folder) == file_bytes(tmp_path / "whole")
    assert (BandKeys(5).compute(documents) != BandKeys(6).compute(documents)).all()


def test_going_on_after_a_crash_equals_never_having_stopped(tmp_path):
    documents = mixed_documents(draw_rng(), 60)
    expected = found(tmp_path / "whole", 5, documents)

    near = NearDuplicates(tmp_path / "crashed", 5)
    near.add(documents[:20])
    near.flush()
    near.add(documents[30:])  # what the crash was in the middle of: other documents, half written
    paths = sorted((tmp_path / "crashed").iterdir())
    for torn in paths[:3]:
        torn.write_bytes(torn.read_bytes()[:-13])

    near = NearDuplicates(tmp_path / "crashed", 5)
    assert 20 <= near.documents < 50
    near.truncate(20)
    assert near.documents == NearDuplicates(tmp_path / "crashed", 5).documents == 20
    near.add(documents[20:])
    assert (near.find_duplicates() == expected).all()
    assert file_bytes(tmp_path / "crashed") == file_bytes(tmp_path / "whole")


def test_what_is_torn_is_written_anew(tmp_path):
    documents = mixed_documents(draw_rng(), 60)
    expected = found(tmp_path / "whole", 5, documents)
    NearDuplicates(tmp_path / "torn", 5).add(documents[:30])
    for path, lost in zip(sorted((tmp_path / "torn").iterdir()), (3, 0, 17), strict=False):
        path.write_bytes(path.read_bytes()[: path.stat().st_size - lost])
    near = NearDuplicates(tmp_path / "torn", 5)
    assert near.documents == 27
    assert (near.find_duplicates() == expected[:27]).all()
    near.add(documents[27:])
    assert (near.find_duplicates() == expected).all()


def test_a_crash_before_the_first_document(tmp_path):
    NearDuplicates(tmp_path, 5)
    paths = sorted(tmp_path.iterdir())
    paths[0].write_bytes(paths[0].read_bytes()[:3])
    paths[1].unlink()
    near = NearDuplicates(tmp_path, 5)
    assert near.documents == 0 and near.find_duplicates().shape == (0,)
    near.add([np.arange(9), np.arange(9)])
    assert NearDuplicates(tmp_path, 5).find_duplicates().tolist() == [False, True]


@pytest.mark.parametrize("sort_keys", [5, 64, 199, 200])
def test_little_memory_gives_the_same_answer(sort_keys, tmp_path, monkeypatch):
    documents = mixed_documents(draw_rng(), 200)
    documents[50:110] = [documents[3]] * 60  # one key in more documents than are sorted at once
    keys = BandKeys(1).compute(documents)
    seen: set[tuple[int, int]] = set()
    expected = []
    for row in keys.tolist():
        expected.append(any(key in seen for key in enumerate(row)))
        seen.update(enumerate(row))
    monkeypatch.setattr(near_duplicates, "SORT_KEYS", sort_keys)
    assert found(tmp_path, 1, documents).tolist() == expected
    assert len(list(tmp_path.iterdir())) == BANDS  # nothing is left behind


def test_lost_keys_are_refused(tmp_path):
    near = NearDuplicates(tmp_path, 5)
    near.add([np.arange(9)])
    with pytest.raises(UserError, match="keys of 1 documents instead of 2"):
        near.truncate(2)
