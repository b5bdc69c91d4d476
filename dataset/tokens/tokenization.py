"""Load a tokenizer.json for building corpora: plain text in, token ids out, with eos and pad.

Input is always treated as plain text: a document that spells `<|eos|>` becomes the tokens of those
characters, never the special token, for every kind of tokenizer.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from dataset.common import byte_lengths, read_tokenizer, token_dtype
from dataset.tokens.encoders import (
    CheckedEncoder,
    Encoder,
    GigatokenEncoder,
    HuggingFaceEncoder,
    set_threads,
)
from dataset.tokens.plain_tokenizer import PlainTokenizer
from dataset.tokens.sized_encoder import MarkEncoder, SizedEncoder
from dataset.tokens.sizes import ids_of, sized_dtype
from utils.core.errors import UserError

EOS_TOKENS = ("<|eos|>", "<|endoftext|>", "</s>")
PAD_TOKENS = ("<|pad|>", "<pad>")


def add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    """Add the tokenizer options that all text builders share."""
    parser.add_argument("--tokenizer-json", required=True, type=Path, metavar="FILE")
    parser.add_argument(
        "--eos-token", help=f"default: the first of {' '.join(EOS_TOKENS)} in the vocabulary"
    )
    parser.add_argument(
        "--pad-token", help=f"default: the first of {' '.join(PAD_TOKENS)} in the vocabulary"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="tokenizer threads; does not affect the result (default: all cores)",
    )
    parser.add_argument(
        "--tokenizer-library",
        choices=("huggingface", "gigatoken"),
        default="huggingface",
        help="gigatoken produces the same ids about 20 times faster, for GPT-2-style tokenizers "
        "only (default: huggingface)",
    )


class TextTokenizer:
    """A tokenizer.json prepared for building corpora.

    Attributes:
        eos_id, pad_id: ids of the end-of-document and padding tokens.
        vocab_size: highest id + 1.
        dtype: smallest dtype that also holds `ignore_label_id`, its maximum.
        byte_lengths: (V,) int32, bytes of text per token id.
        lossless: whether ids determine the bytes of text. If not, tokens carry them; see
            `dataset.tokens.sizes`.
        unknown_id: id of text that the vocabulary cannot represent; None without such a token.
    """

    def __init__(
        self,
        path: Path,
        eos_token: str | None = None,
        pad_token: str | None = None,
        workers: int | None = None,
        library: str = "huggingface",
    ) -> None:
        workers = _count_usable_cores() if workers is None else workers
        if workers < 1:
            raise UserError(f"--workers is {workers}; it must be at least 1.")
        workers = min(workers, _count_usable_cores())  # more would only contend
        set_threads(workers)
        self.path = path
        self.tokenizer, self._description = _load(path)
        # A token given for one role is not a candidate for the other.
        eos_usual = tuple(token for token in EOS_TOKENS if token != pad_token)
        pad_usual = tuple(token for token in PAD_TOKENS if token != eos_token)
        self.eos_token = self._add_special_token(eos_token, eos_usual, "--eos-token")
        self.pad_token = self._add_special_token(pad_token, pad_usual, "--pad-token")
        if self.eos_token == self.pad_token:
            raise UserError(
                f"--eos-token and --pad-token are both {self.eos_token!r}; they must differ."
            )
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.eos_id, self.pad_id = vocabulary[self.eos_token], vocabulary[self.pad_token]
        self.byte_lengths = byte_lengths(self.tokenizer, self._description)
        self.vocab_size = len(self.byte_lengths)
        self.dtype = token_dtype(self.vocab_size)
        self.ignore_label_id = int(np.iinfo(self.dtype).max)
        special = {self.eos_token, self.pad_token}
        plain = PlainTokenizer(self.tokenizer, self._description, special, self.byte_lengths)
        self.lossless, self.unknown_id = plain.lossless, plain.unknown_id
        self.token_dtype = self.dtype if self.lossless else sized_dtype(self.dtype)
        self.encoder: Encoder
        if self.lossless:
            self.encoder = HuggingFaceEncoder(plain.tokenizer, plain.description)
        elif plain.lossless_without_mark:
            self.encoder = MarkEncoder(plain, self.byte_lengths)
        else:
            self.encoder = SizedEncoder(plain)
        if library == "gigatoken":
            fast = GigatokenEncoder(plain.description, workers)
            self.encoder = CheckedEncoder(fast, self.encoder)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text without special tokens: id arrays (n,) of `dtype`."""
        return [ids_of(tokens) for tokens in self.encode_tokens(texts)]

    def encode_tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encode each text without special tokens: token arrays (n,) of `token_dtype`."""
        tokens, counts = self.encoder.encode([text.encode() for text in texts])
        return np.split(tokens.astype(self.token_dtype), np.cumsum(counts)[:-1])

    def append_eos(self, tokens: np.ndarray, counts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the tokens of documents with eos after each: tokens (n,), counts (documents,)."""
        eos = np.zeros(1, self.token_dtype)
        ids_of(eos)[0] = self.eos_id
        return np.insert(tokens.astype(self.token_dtype), np.cumsum(counts), eos)

    def save(self, path: Path) -> None:
        """Write the tokenizer, including its eos and pad."""
        # Not with tokenizers' own function, which assumes that file names are UTF-8.
        path.write_bytes(self.tokenizer.to_str(pretty=True).encode())

    def _add_special_token(self, named: str | None, usual: tuple[str, ...], option: str) -> str:
        token = named or next((t for t in usual if self.tokenizer.token_to_id(t) is not None), None)
        if token is not None and self.tokenizer.token_to_id(token) is None:
            raise UserError(
                f"{option} {token!r} is not in the vocabulary of {self.path}; pass one of its "
                f"tokens, or omit {option} to add {usual[0]}."
            )
        token = token or usual[0]
        if self.tokenizer.token_to_id(token) is None and _has_id_gaps(self._description["model"]):
            highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
            self._description["model"]["vocab"][token] = highest + 1
            self.tokenizer = Tokenizer.from_str(orjson.dumps(self._description).decode())
        self.tokenizer.add_special_tokens([token])  # also marks an existing token as special
        return token


def _count_usable_cores() -> int:
    """Return the cores available to this process, which containers and schedulers may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Load a tokenizer.json without the settings that would alter or truncate documents.

    Returns:
        The tokenizer and its parsed definition.
    """
    if path.is_dir():
        inside = path / "tokenizer.json"
        advice = f"pass {inside}" if inside.is_file() else "pass a file"
        raise UserError(f"--tokenizer-json {path} is a directory; {advice}.")
    return read_tokenizer(
        path, _normalize, "--tokenizer-json", "; create one with dataset.train_tokenizer."
    )


def _normalize(description: dict[str, Any]) -> None:
    """Remove settings that would alter or truncate documents."""
    description["truncation"] = None
    description["padding"] = None
    if description["model"].get("dropout") is not None:
        description["model"]["dropout"] = None  # random; corpora must be reproducible
    if isinstance(description["model"]["vocab"], dict):  # Unigram models have a list
        _keep_ids(description)


def _has_id_gaps(model: dict[str, Any]) -> bool:
    """Return whether some ids below the model's highest are unused.

    The library numbers added tokens from the size of the vocabulary, which is then already in use.
    """
    vocabulary = model["vocab"]
    return isinstance(vocabulary, dict) and max(vocabulary.values(), default=-1) >= len(vocabulary)


def _keep_ids(description: dict[str, Any]) -> None:
    """Ensure that each token keeps a distinct id.

    If there are gaps, the added tokens are entered into the model's vocabulary with their ids from
    the file.
    """
    model = description["model"]
    if _has_id_gaps(model):
        for token in description.get("added_tokens") or []:
            model["vocab"].setdefault(token["content"], token["id"])
    tokens = model["vocab"]
    if len(set(tokens.values())) == len(tokens):
        return
    owners: dict[int, str] = {}
    for token, index in tokens.items():
        if (other := owners.setdefault(index, token)) != token:
            raise UserError(
                f"{other!r} and {token!r} both have id {index}; give each token a distinct id"
            )
