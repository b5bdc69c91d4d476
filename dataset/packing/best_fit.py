"""Best-fit packing: keep documents whole if they fit into a row.

Uses best-fit decreasing over a buffer of documents (Ding et al. 2024, arXiv 2404.10830): longest
first, each into the row with the least sufficient room. Rows that are not full stay open for the
next buffers, so padding stays small without holding the corpus in memory. At the end, open rows
are filled with the tails of documents that had to be cut anyway.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dataset.packing.windows import BLOCK_TOKENS, PackOptions, Rows, make_rows

_BUFFER_ROWS = 2048
_OPEN_ROWS = 1024


@dataclass(frozen=True, eq=False)
class _Piece:
    """A whole document, or the tail of one longer than a row, which may be cut again."""

    tokens: np.ndarray
    cuttable: bool

    def __len__(self) -> int:
        return len(self.tokens)


_Row = list[_Piece]


class BestFitPacker:
    """Packs one stream of documents; see `Packer`.

    A document longer than a row is cut into full rows, each starting with the last token of the
    previous one, so that no label is lost; the remainder is packed like a document.
    """

    def __init__(self, options: PackOptions) -> None:
        self.options = options
        self._width = options.seq_len + 1
        self._origin = 0
        self._whole: list[np.ndarray] = []
        self._pieces: list[_Piece] = []
        self._piece_tokens = 0
        self._open: list[_Row] = []

    def add(self, stream: np.ndarray, ends: np.ndarray) -> Iterator[Rows]:
        block = BLOCK_TOKENS // self._width + 1
        start = 0
        for end in ends.tolist():
            cuttable = end - start > self._width
            while end - start > self._width:
                self._whole.append(stream[start : start + self._width].copy())
                start += self.options.seq_len
                yield from self._emit(minimum=block)
            self._pieces.append(_Piece(stream[start:end].copy(), cuttable))
            self._piece_tokens += end - start
            start = end
            if self._piece_tokens >= _BUFFER_ROWS * self._width:
                self._fit()
                yield from self._emit(minimum=1)

    def finish(self) -> Iterator[Rows]:
        self._fit()
        self._close(fill_up(self._open, self._width))
        self._open = []
        yield from self._emit(minimum=1)

    def _fit(self) -> None:
        """Put all pieces into rows; finish full rows and keep the emptiest others open."""
        rooms = _Rooms(self._width)
        for number, row in enumerate(self._open):
            rooms.put(number, self._width - _tokens(row))
        for piece in sorted(self._pieces, key=len, reverse=True):
            number, room = rooms.take(len(piece))
            if number < 0:
                number, room = len(self._open), self._width
                self._open.append([])
            self._open[number].append(piece)
            rooms.put(number, room - len(piece))
        self._pieces, self._piece_tokens = [], 0
        # Room for one token is useless: the shortest document is one token and eos.
        unfilled = [row for row in self._open if _tokens(row) < self._width - 1]
        self._close([row for row in self._open if _tokens(row) >= self._width - 1])
        unfilled.sort(key=_tokens)
        self._close(unfilled[_OPEN_ROWS:])
        self._open = unfilled[:_OPEN_ROWS]

    def _close(self, rows: list[_Row]) -> None:
        self._whole += [np.concatenate([piece.tokens for piece in row]) for row in rows]

    def _emit(self, minimum: int) -> Iterator[Rows]:
        """Yield the finished rows in blocks while there are at least `minimum` of them."""
        block = BLOCK_TOKENS // self._width + 1
        while len(self._whole) >= minimum:
            windows, self._whole = self._whole[:block], self._whole[block:]
            lengths = np.array([len(window) for window in windows])
            starts = np.cumsum(lengths) - lengths
            stream = np.concatenate(windows)
            label_starts = np.zeros_like(starts)
            rows = make_rows(self.options, stream, self._origin, starts, lengths, label_starts)
            self._origin += len(stream)
            if len(rows.inputs):
                yield rows

    def state_dict(self) -> dict[str, Any]:
        pieces = [*self._pieces, *(piece for row in self._open for piece in row)]
        whole = [_Piece(tokens, False) for tokens in self._whole]
        return {
            "origin": self._origin,
            "waiting": len(self._pieces),
            "open": [len(row) for row in self._open],
            "pieces": _join(pieces),
            "whole": _join(whole),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._origin = state["origin"]
        self._whole = [piece.tokens for piece in _split(state["whole"])]
        pieces = _split(state["pieces"])
        self._pieces = pieces[: state["waiting"]]
        self._piece_tokens = _tokens(self._pieces)
        rest = iter(pieces[state["waiting"] :])
        self._open = [[next(rest) for _ in range(size)] for size in state["open"]]


def fill_up(rows: list[_Row], width: int) -> list[_Row]:
    """Merge rows into fewer rows of up to `width` tokens.

    Fills the fullest rows with pieces cut from the emptiest. The second part of a cut piece starts
    with the last token of the first, so that no label is lost.
    """
    rows = sorted((list(row) for row in rows), key=_tokens, reverse=True)
    taker, giver = 0, len(rows) - 1
    while taker < giver:
        room = width - _tokens(rows[taker])
        source = next((piece for piece in rows[giver] if piece.cuttable), None)
        if room < 2:
            taker += 1
        elif source is None:
            giver -= 1
        elif len(source) <= room:
            rows[giver].remove(source)
            rows[taker].append(source)
        else:
            rows[taker].append(_Piece(source.tokens[:room], True))
            rows[giver][rows[giver].index(source)] = _Piece(source.tokens[room - 1 :], True)
    return [row for row in rows if row]


class _Rooms:
    """An index of open rows by free space; a bit operation finds the tightest fit."""

    def __init__(self, largest: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(largest + 1)]
        self._filled = 0  # bit r is set where rows with room r exist

    def put(self, row: int, room: int) -> None:
        self._rows[room].append(row)
        self._filled |= 1 << room

    def take(self, least: int) -> tuple[int, int]:
        """Remove the row with the least free space >= `least`; return it and its space, or (-1,
        0).
        """
        fitting = self._filled >> least
        if not fitting:
            return -1, 0
        room = least + (fitting & -fitting).bit_length() - 1
        row = self._rows[room].pop()
        if not self._rows[room]:
            self._filled &= ~(1 << room)
        return row, room


def _tokens(pieces: list[_Piece]) -> int:
    return sum(map(len, pieces))


def _join(pieces: list[_Piece]) -> dict[str, Any]:
    return {
        "lengths": [len(piece) for piece in pieces],
        "cuttable": [piece.cuttable for piece in pieces],
        "tokens": np.concatenate([piece.tokens for piece in pieces]) if pieces else None,
    }


def _split(state: dict[str, Any]) -> list[_Piece]:
    if state["tokens"] is None:
        return []
    parts = np.split(state["tokens"], np.cumsum(state["lengths"])[:-1])
    return [_Piece(tokens, cut) for tokens, cut in zip(parts, state["cuttable"], strict=True)]
