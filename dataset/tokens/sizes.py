"""Tokens as builders carry them: ids alone, or ids with the bytes of text that they stand for.

Where the ids tell the bytes, an array of tokens holds ids. Where they do not, each element also
holds its bytes, so that these go wherever the token goes: packed, cut, spooled, saved.
"""

import numpy as np


def sized_dtype(ids: np.dtype) -> np.dtype:
    """Return the dtype of tokens that carry their bytes: `id`; `bytes`, those of the text from
    where the token begins to where the next one does; and `lost`, those of them in no token."""
    return np.dtype([("id", ids), ("bytes", np.uint32), ("lost", np.uint32)])


def ids_of(tokens: np.ndarray) -> np.ndarray:
    """Return the ids of tokens of either kind: a view of the same shape."""
    return tokens["id"] if tokens.dtype.names else tokens


def bytes_of(tokens: np.ndarray, byte_lengths: np.ndarray) -> np.ndarray:
    """Return the bytes of tokens of either kind, of the same shape.

    Args:
        byte_lengths: (V,) bytes by id, for ids alone; an id beyond the end counts as the last.
    """
    return tokens["bytes"] if tokens.dtype.names else byte_lengths.take(tokens, mode="clip")


def byte_places(text: str) -> np.ndarray:
    """Return where in its UTF-8 each character of a text begins, and where the text ends, (n + 1,)
    int64."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)])


def divide(tokens: np.ndarray, starts: np.ndarray, spans: np.ndarray, size: int) -> None:
    """Set `bytes` and `lost` of the tokens of one text, (n,).

    A token has the text from its start to that of the next, and the first one also what is before
    it. Of tokens that begin at the same character, as its bytes do, the last one has it.

    Args:
        starts: (n,) byte at which each token begins.
        spans: (m, 2) bytes at which the parts of the text that are in tokens begin and end.
        size: bytes of the text.
    """
    borders = np.append(np.maximum.accumulate(starts), size)
    borders[0] = 0
    depth = np.zeros(size + 1, np.int64)  # tokens that each byte is in, as differences
    np.add.at(depth, spans[:, 0], 1)
    np.add.at(depth, spans[:, 1], -1)
    uncovered = np.append(0, np.cumsum(np.cumsum(depth)[:-1] == 0))
    tokens["bytes"] = np.diff(borders)
    tokens["lost"] = np.diff(uncovered[borders])
