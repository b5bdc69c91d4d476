"""Windows: nothing lost, nothing scored twice, whatever the pieces a stream comes in."""

from types import SimpleNamespace

import numpy as np
import pytest
from seeds import draw_rng

from dataset.packing.windows import PackOptions, WindowPacker, iteration_targets
from tests.dataset.conftest import iteration_target

EOS, PAD, IGNORE = 1, 0, 255


def random_stream(generator: np.random.Generator, tokens: int) -> np.ndarray:
    """Documents of one token or more, each ended with eos."""
    stream = generator.integers(2, 250, tokens).astype(np.uint8)
    stream[-1] = EOS
    for place in range(1, tokens - 2):
        if generator.random() < 0.3 and stream[place - 1] != EOS:
            stream[place] = EOS
    return stream


def pack(stream, seq_len, stride, score_once, pieces=1) -> SimpleNamespace:
    """All rows: inputs, labels and `lengths` of real inputs."""
    packer = WindowPacker(PackOptions(seq_len, stride, EOS, PAD, IGNORE, score_once))
    blocks = []
    for piece in np.array_split(stream, pieces):
        blocks += packer.add(piece, np.flatnonzero(piece == EOS) + 1)
    blocks += packer.finish()
    shape = (0, seq_len)
    return SimpleNamespace(
        inputs=np.concatenate([np.empty(shape, np.uint8)] + [rows.inputs for rows in blocks]),
        labels=np.concatenate([np.empty(shape, np.uint8)] + [rows.labels for rows in blocks]),
        lengths=np.concatenate([np.empty(0, int)] + [rows.input_lengths for rows in blocks]),
    )


@pytest.mark.parametrize("seq_len", [1, 4, 7])
def test_windows_hold_the_stream_and_labels_are_shifted(seq_len):
    generator = draw_rng()
    for length in range(2, 40):
        stream = random_stream(generator, length)
        rows = pack(stream, seq_len, seq_len, score_once=False)
        stored = np.concatenate([row[:n] for row, n in zip(rows.inputs, rows.lengths, strict=True)])
        expected = stream[:-1].copy()
        labels = np.where(expected == EOS, IGNORE, stream[1:])
        # A last token that is only a label is not an input; a last window may have no label.
        real = rows.labels[np.arange(seq_len) < rows.lengths[:, None]]
        if seq_len > 1:
            assert stored.tolist() in (stream.tolist(), stream[:-1].tolist())
            assert real[: len(labels)].tolist() == labels.tolist()
            assert set(real[len(labels) :]) <= {IGNORE}
        else:  # rows of one token, of which those after an eos score nothing
            assert stored.tolist() == expected[expected != EOS].tolist()
        padding = np.arange(seq_len) >= rows.lengths[:, None]
        assert (rows.inputs[padding] == PAD).all() and (rows.labels[padding] == IGNORE).all()


def test_overlapping_test_windows_score_each_token_once():
    generator = draw_rng()
    for seq_len in (1, 2, 5, 8):
        for stride in range(1, seq_len + 1):
            for length in (2, 3, 9, 17, 31):
                stream = random_stream(generator, length)
                rows = pack(stream, seq_len, stride, score_once=True)
                scored = rows.labels[rows.labels != IGNORE]
                wanted = stream[1:][stream[:-1] != EOS]
                assert scored.tolist() == wanted.tolist()
                assert (rows.labels != IGNORE).any(axis=1).all()


def test_training_windows_keep_overlapping_labels():
    stream = np.arange(2, 14, dtype=np.uint8)
    rows = pack(stream, 6, 2, score_once=False)
    assert rows.inputs[:, 0].tolist() == [2, 4, 6, 8]
    assert rows.labels[0].tolist() == [3, 4, 5, 6, 7, 8]
    assert rows.labels[1].tolist() == [5, 6, 7, 8, 9, 10]
    assert rows.inputs[-1].tolist() == [8, 9, 10, 11, 12, 13]
    assert rows.labels[-1].tolist() == [9, 10, 11, 12, 13, IGNORE]
    # One token less, and the third window ends the stream: a fourth would hold nothing new.
    assert pack(stream[:-1], 6, 2, score_once=False).inputs[:, 0].tolist() == [2, 4, 6]


def test_pieces_do_not_matter(monkeypatch):
    stream = random_stream(draw_rng(), 500)
    for stride in (3, 8):
        whole = pack(stream, 8, stride, score_once=True)
        for pieces in (2, 37, 500):
            monkeypatch.setattr("dataset.packing.windows.BLOCK_TOKENS", 9 * pieces)
            parts = pack(stream, 8, stride, score_once=True, pieces=pieces)
            assert (parts.inputs == whole.inputs).all() and (parts.labels == whole.labels).all()
            assert (parts.lengths == whole.lengths).all()


def test_iteration_targets_match_unique_row_by_row():
    generator = draw_rng()
    lengths = generator.integers(1, 33, 200)
    inputs = generator.integers(0, 20, (200, 32)).astype(np.uint16)
    inputs[np.arange(32) >= lengths[:, None]] = 7  # padding may equal a real token
    expected = [
        iteration_target(len(np.unique(row[:n])) / n, 4, 48)
        for row, n in zip(inputs, lengths, strict=True)
    ]
    assert iteration_targets(inputs, lengths, 4, 48).tolist() == expected
