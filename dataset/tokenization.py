"""The builders' view of a tokenizer.json: plain text in, token ids out, its eos and pad known.

Text is only ever text here: a document that spells `<|eos|>` becomes the tokens of those
characters, never the special token.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from dataset.common import UserError, byte_lengths, token_dtype, tokenizer_fault
from dataset.encoders import (
    CheckedEncoder,
    Encoder,
    GigatokenEncoder,
    HuggingFaceEncoder,
    use_threads,
)

EOS_TOKENS = ("<|eos|>", "<|endoftext|>", "</s>")
PAD_TOKENS = ("<|pad|>", "<pad>")


def add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    """The options that every builder with a tokenizer shares."""
    parser.add_argument("--tokenizer-json", required=True, type=Path, metavar="FILE")
    parser.add_argument("--eos-token", help=f"default: the first of {' '.join(EOS_TOKENS)}")
    parser.add_argument("--pad-token", help=f"default: the first of {' '.join(PAD_TOKENS)}")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="tokenizer threads, of no influence on the result (default: all cores)",
    )
    parser.add_argument(
        "--tokenizer-library",
        choices=("huggingface", "gigatoken"),
        default="huggingface",
        help="gigatoken gives the same ids some twenty times faster, for tokenizers of GPT-2's "
        "kind (default: huggingface)",
    )


class TextTokenizer:
    """A tokenizer.json made ready for building; `eos_id`, `pad_id`, `vocab_size`, `dtype`, and
    `byte_lengths` (V,) int32, the bytes of text that each token id stands for.

    `vocab_size` is the highest id + 1, `dtype` the smallest that also holds `ignore_label_id`, its
    maximum.
    """

    def __init__(
        self,
        path: Path,
        eos_token: str | None = None,
        pad_token: str | None = None,
        workers: int | None = None,
        library: str = "huggingface",
    ) -> None:
        workers = _usable_cores() if workers is None else workers
        if workers < 1:
            raise UserError(f"--workers is {workers}; it must be at least 1.")
        workers = min(workers, _usable_cores())  # more would only wait for each other
        use_threads(workers)
        self.path = path
        self.tokenizer, description = _load(path)
        # A token that is named for the one is no candidate for the other.
        eos_usual = tuple(token for token in EOS_TOKENS if token != pad_token)
        pad_usual = tuple(token for token in PAD_TOKENS if token != eos_token)
        self.eos_token = self._special_token(eos_token, eos_usual, "--eos-token")
        self.pad_token = self._special_token(pad_token, pad_usual, "--pad-token")
        if self.eos_token == self.pad_token:
            raise UserError(
                f"{self.eos_token!r} is named both --eos-token and --pad-token; padding must "
                "differ from the end of a document."
            )
        self.tokenizer.encode_special_tokens = True
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.eos_id, self.pad_id = vocabulary[self.eos_token], vocabulary[self.pad_token]
        self.byte_lengths = byte_lengths(self.tokenizer, vocabulary, description)
        self.vocab_size = len(self.byte_lengths)
        self.dtype = token_dtype(self.vocab_size)
        self.ignore_label_id = int(np.iinfo(self.dtype).max)
        self.encoder: Encoder = HuggingFaceEncoder(self.tokenizer, description)
        if library == "gigatoken":
            fast = GigatokenEncoder(description, workers)
            self.encoder = CheckedEncoder(fast, self.encoder)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, without special tokens: arrays (n,) of `dtype`."""
        ids, counts = self.encoder.encode([text.encode() for text in texts])
        return np.split(ids.astype(self.dtype), np.cumsum(counts)[:-1])

    def save(self, path: Path) -> None:
        """Write the tokenizer with its eos and pad."""
        try:
            self.tokenizer.save(str(path))
        except Exception as error:  # tokenizers raises bare Exception, for a full disk too
            raise OSError(f"cannot write {path}: {error}") from error

    def _special_token(self, named: str | None, usual: tuple[str, ...], option: str) -> str:
        token = named or next((t for t in usual if self.tokenizer.token_to_id(t) is not None), None)
        if token is not None and self.tokenizer.token_to_id(token) is None:
            raise UserError(
                f"{option} {token!r} is not in the vocabulary of {self.path}; name one of its "
                f"tokens, or leave {option} out to have {usual[0]} added."
            )
        token = token or usual[0]
        self.tokenizer.add_special_tokens([token])  # also marks a token that is there as special
        return token


def _usable_cores() -> int:
    """Cores that this process may use, which a container or a batch system may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer.json and what it says, without what would change or shorten a document's
    tokens."""
    if path.is_dir():
        inside = path / "tokenizer.json"
        advice = f"name {inside}" if inside.is_file() else "name a file"
        raise UserError(f"--tokenizer-json {path} is a folder; {advice}.")
    content = b""
    try:
        content = path.read_bytes()
        description = orjson.loads(content)
        description["truncation"] = None
        description["padding"] = None
        if description["model"].get("dropout") is not None:
            description["model"]["dropout"] = None  # training noise; a corpus is built once
        return Tokenizer.from_str(orjson.dumps(description).decode()), description
    except OSError as error:
        raise UserError(
            f"cannot read --tokenizer-json {path}: {error.strerror or error}; "
            "dataset.train_tokenizer makes one."
        ) from error
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        fault = tokenizer_fault(content, error)
        raise UserError(
            f"--tokenizer-json {path} is not a tokenizer.json: {fault}; dataset.train_tokenizer "
            "makes one."
        ) from error
