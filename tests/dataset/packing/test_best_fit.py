"""Best-fit packing: documents whole where they fit, every token and label there, little padding."""

from itertools import pairwise

import numpy as np
import pytest
from seeds import draw_rng

from dataset.packing import best_fit
from dataset.packing.best_fit import BestFitPacker
from dataset.packing.windows import PackOptions

EOS, PAD, IGNORE = 1, 0, 65535


def documents_of(lengths: list[int], generator: np.random.Generator) -> list[np.ndarray]:
    """Documents of that many tokens, eos included, each told apart by its tokens."""
    return [np.append(generator.integers(2, 60_000, n - 1), EOS).astype(np.uint16) for n in lengths]


def pack(documents: list[np.ndarray], seq_len: int, pieces: int = 1) -> list:
    packer = BestFitPacker(PackOptions(seq_len, seq_len, EOS, PAD, IGNORE, False))
    blocks = []
    bounds = np.linspace(0, len(documents), pieces + 1).astype(int)
    for low, high in pairwise(bounds):
        if part := documents[low:high]:
            blocks += packer.add(np.concatenate(part), np.cumsum([len(d) for d in part]))
        state = packer.state_dict()  # as a build that is killed here and goes on
        packer = BestFitPacker(packer.options)
        packer.load_state_dict(state)
    return blocks + list(packer.finish())


def windows(blocks: list) -> list[np.ndarray]:
    """Tokens of each row, the one that is only a label included."""
    return [
        rows.stream[start : start + length]
        for rows in blocks
        for start, length in zip(rows.starts, rows.lengths, strict=True)
    ]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(best_fit, "_BUFFER_ROWS", 16)
    monkeypatch.setattr(best_fit, "_OPEN_ROWS", 8)
    monkeypatch.setattr(best_fit, "BLOCK_TOKENS", 100)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 32])
def test_documents_that_fit_stay_whole_and_all_labels_are_there(seq_len):
    generator = draw_rng()
    lengths = generator.integers(2, 4 * seq_len + 3, 200).tolist()
    documents = documents_of(lengths, generator)
    blocks = pack(documents, seq_len)
    whole = {document.tobytes() for document in documents if len(document) <= seq_len + 1}
    pairs, found = [], set()
    for window in windows(blocks):
        assert 2 <= len(window) <= seq_len + 1
        for part in np.split(window, np.flatnonzero(window == EOS) + 1):
            pairs += zip(part[:-1].tolist(), part[1:].tolist(), strict=True)
            found.add(part.tobytes())
    assert whole <= found
    wanted = [p for d in documents for p in zip(d[:-1].tolist(), d[1:].tolist(), strict=True)]
    assert sorted(pairs) == sorted(wanted)  # each token but a document's first is a label, once
    labels = np.concatenate([rows.labels.ravel() for rows in blocks])
    assert sorted(labels[labels != IGNORE].tolist()) == sorted(label for _, label in wanted)


def test_how_the_stream_is_handed_in_does_not_matter():
    generator = draw_rng()
    documents = documents_of(generator.integers(2, 90, 300).tolist(), generator)
    whole = [window.tolist() for window in windows(pack(documents, 32))]
    for pieces in (2, 7, 300):
        assert [window.tolist() for window in windows(pack(documents, 32, pieces))] == whole


def test_padding_is_small(monkeypatch):
    monkeypatch.undo()
    generator = draw_rng()
    lengths = np.clip(generator.lognormal(5.5, 1.2, 6000), 2, 20_000).astype(int).tolist()
    blocks = pack(documents_of(lengths, generator), 512)
    rows = sum(len(block.inputs) for block in blocks)
    padding = 1 - sum(int(block.input_lengths.sum()) for block in blocks) / (rows * 512)
    assert padding <= 0.001
