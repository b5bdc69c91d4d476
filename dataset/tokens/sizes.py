"""Token arrays of the builders: plain ids, or ids with their number of text bytes.

If the ids determine the bytes, an array of tokens contains ids. Otherwise each element also carries
its bytes, so that they stay with the token when it is packed, cut, spooled or saved.
"""

import numpy as np


def sized_dtype(ids: np.dtype) -> np.dtype:
    """Return the dtype of tokens that carry their bytes.

    `id`; `bytes`, the bytes of text from the start of the token to the start of the next; and
    `lost`, how many of these are not covered by any token.
    """
    return np.dtype([("id", ids), ("bytes", np.uint32), ("lost", np.uint32)])


def ids_of(tokens: np.ndarray) -> np.ndarray:
    """Return the ids of tokens of either kind, as a view of the same shape."""
    return tokens["id"] if tokens.dtype.names else tokens


def bytes_of(tokens: np.ndarray, byte_lengths: np.ndarray) -> np.ndarray:
    """Return the bytes of tokens of either kind, with the shape of `tokens`.

    Args:
        byte_lengths: (V,) bytes per id, used for plain ids; ids past the end count as the last.
    """
    return tokens["bytes"] if tokens.dtype.names else byte_lengths.take(tokens, mode="clip")


def byte_places(text: str) -> np.ndarray:
    """Return the UTF-8 byte offset of each character of a text and of its end, (n + 1,) int64."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    return np.concatenate([[0], np.cumsum(widths)])


def assign_bytes(tokens: np.ndarray, starts: np.ndarray, spans: np.ndarray, size: int) -> None:
    """Set `bytes` and `lost` of the tokens of one text, (n,).

    A token owns the text from its start to the start of the next; the first one also owns the text
    before it. If several tokens start at the same character, such as its bytes, the last owns it.

    Args:
        starts: (n,) byte offset of each token.
        spans: (m, 2) byte offsets of the parts of the text that are covered by tokens.
        size: bytes of the text.
    """
    borders = np.append(np.maximum.accumulate(starts), size)
    borders[0] = 0
    depth = np.zeros(size + 1, np.int64)  # number of tokens covering each byte, as differences
    np.add.at(depth, spans[:, 0], 1)
    np.add.at(depth, spans[:, 1], -1)
    uncovered = np.append(0, np.cumsum(np.cumsum(depth)[:-1] == 0))
    tokens["bytes"] = np.diff(borders)
    tokens["lost"] = np.diff(uncovered[borders])
