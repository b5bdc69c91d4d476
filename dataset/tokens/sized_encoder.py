"""Encode text to ids with byte counts, for tokenizers whose ids do not determine them."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Encoding

from dataset.tokens.encoders import Encoded, HuggingFaceEncoder, encode_batch
from dataset.tokens.plain_tokenizer import BYTE_PIECES, DROPPED, SPACE, PlainTokenizer
from dataset.tokens.sizes import assign_bytes, byte_places, sized_dtype


class SizedEncoder:
    """An `Encoder` that returns tokens of `sized_dtype`.

    The bytes of a token are those of the original text, regardless of normalization, because the
    library tracks each token's offset in it.
    """

    def __init__(self, plain: PlainTokenizer) -> None:
        self._plain = plain
        self._dtype = sized_dtype(np.dtype(np.uint32))
        self._symbols = _Symbols(plain) if plain.drops_characters() else None

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        strings = [text.decode() for text in texts]
        encodings = encode_batch(self._plain.tokenizer.encode_batch, strings)
        symbols: Sequence[Encoding | None] = [None] * len(strings)
        if self._symbols:
            symbols = encode_batch(self._symbols.tokenizer.encode_batch, strings)
        parts = [self._make_tokens(*each) for each in zip(strings, encodings, symbols, strict=True)]
        none = np.zeros(0, self._dtype)
        return np.concatenate([none, *parts]), np.array([len(part) for part in parts], np.int64)

    def _make_tokens(self, text: str, encoding: Encoding, symbols: Encoding | None) -> np.ndarray:
        ids = np.array(encoding.ids, np.int64)
        places = byte_places(text)
        spans = _spans(encoding, places)
        starts = spans[:, 0]
        if self._symbols is not None and symbols is not None:
            starts, spans = self._symbols.place(ids, spans, _spans(symbols, places), symbols)
        elif self._plain.original_ids is not None:
            ids = self._plain.original_ids[ids]
            known = ids != DROPPED
            ids, starts, spans = ids[known], starts[known], spans[known]
        tokens = np.zeros(len(ids), self._dtype)
        tokens["id"] = ids
        if len(tokens):
            assign_bytes(tokens, starts, spans, int(places[-1]))
        return tokens


class MarkEncoder:
    """A faster `SizedEncoder` for tokenizers that are lossless except for replacing spaces.

    Token offsets, which are slow to compute, are only needed for texts that contain `SPACE`.

    Args:
        byte_lengths: (V,) bytes per id in text without `SPACE`.
    """

    def __init__(self, plain: PlainTokenizer, byte_lengths: np.ndarray) -> None:
        self._fast = HuggingFaceEncoder(plain.tokenizer, plain.description)
        self._exact = SizedEncoder(plain)
        self._byte_lengths = byte_lengths

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        ids, counts = self._fast.encode(texts)
        tokens = np.zeros(len(ids), sized_dtype(ids.dtype))
        tokens["id"], tokens["bytes"] = ids, self._byte_lengths[ids]
        # The tokenizer may prepend a space to a text, which must not count for the first token.
        ends = np.append(0, np.cumsum(counts))
        sizes = np.append(0, np.cumsum(tokens["bytes"], dtype=np.int64))
        added = np.diff(sizes[ends]) - np.fromiter(map(len, texts), np.int64, len(texts))
        first = ends[:-1][counts > 0]
        marked = np.array([_MARK in text for text in texts], bool)
        tokens["bytes"][first] -= np.where(marked, 0, added)[counts > 0].astype(np.uint32)
        if marked.any():
            exact, _ = self._exact.encode([text for text in texts if _MARK in text])
            tokens[np.repeat(marked, counts)] = exact
        return tokens, counts


_MARK = SPACE.encode()


class _Symbols:
    """Computes token offsets for models that drop characters.

    The library does not count dropped characters, so its offsets for later tokens of the same word
    are too low.
    """

    def __init__(self, plain: PlainTokenizer) -> None:
        self.tokenizer, self._dropped = plain.load_symbols()
        model = plain.description["model"]
        vocabulary = plain.tokenizer.get_vocab(with_added_tokens=True)
        self._sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
        prefix = model.get("continuing_subword_prefix") or ""
        suffix = model.get("end_of_word_suffix") or ""
        single = set(BYTE_PIECES) if model.get("byte_fallback") else set()
        for token, index in vocabulary.items():
            symbols = token.removeprefix(prefix).removesuffix(suffix) or token
            self._sizes[index] = 1 if token in single else len(symbols)
        self._sizes[list(plain.tokenizer.get_added_tokens_decoder())] = 1

    def place(
        self,
        ids: np.ndarray,
        spans: np.ndarray,
        symbol_spans: np.ndarray,
        symbols: Encoding,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the starts of tokens (n,) and the spans of text covered by tokens (m, 2)."""
        symbol_spans = symbol_spans[np.array(symbols.ids, np.int64) != self._dropped]
        ends = np.cumsum(self._sizes[ids])
        if len(ids) == 0 or ends[-1] != len(symbol_spans):
            return spans[:, 0], spans  # a token is not made of symbols; use the library's offsets
        return symbol_spans[ends - self._sizes[ids], 0], symbol_spans


def _spans(encoding: Encoding, places: np.ndarray) -> np.ndarray:
    """Return the byte offsets at which tokens begin and end, (n, 2) int64."""
    return places[np.array(encoding.offsets, np.int64).reshape(-1, 2)]
