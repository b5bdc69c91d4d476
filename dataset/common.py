"""Constants, metadata and checks of a corpus that every part of Athena shares.

A leaf module: it imports nothing from the project except the error type, so that builders, the data
stream, models and scripts can all use it.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from utils.core.errors import UserError

IGNORE_LABEL_ID = -100
"""Label that the loss ignores; the reader maps a corpus' own `ignore_label_id` to this."""


FORMAT_VERSION = 1
"""Format version that the builders write; 0 stands for TRM's and older corpora."""

METADATA_NAME = "dataset.json"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_FAST = "xxh3_128:"
BLANK_IDENTIFIER = "<blank>"

T = TypeVar("T")


def _aliased_field(name: str, old_name: str, **options: Any) -> Any:
    return Field(validation_alias=AliasChoices(name, old_name), **options)


class DatasetMetadata(BaseModel):
    """The `dataset.json` of one split, as Athena, TRM or older builders write it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pad_id: int
    eos_id: int | None = None
    ignore_label_id: int | None
    """Label that marks ignored positions, as stored; None if every label counts."""
    blank_identifier_id: int = 0
    vocab_size: int = Field(gt=0)
    """Highest token id + 1."""
    seq_len: int = Field(gt=0)
    num_puzzle_identifiers: int = _aliased_field(
        "num_puzzle_identifiers", "num_sequence_identifiers"
    )
    total_groups: int = Field(ge=0)
    mean_puzzle_examples: float = _aliased_field("mean_puzzle_examples", "mean_examples_per_group")
    total_puzzles: int = _aliased_field("total_puzzles", "total_sequences", ge=0)
    sets: list[str] = ["all"]
    layout: str = "npy"
    """npy: one array entry per position; stream: one token array whose rows are views of it."""
    min_iterations: int | None = None
    max_iterations: int | None = None
    domains: list[str] = []
    """Domain names, indexed by `domain_ids`."""
    domain_weights: dict[str, float] = {}
    """Weights by domain name, as given to the builder; empty: none."""
    format_version: int = 0
    tokens: int | None = None
    """Tokens in `inputs`, not counting padding."""
    documents: int | None = None
    scored_bytes: int | None = None
    """Bytes of text covered by the labels that are not ignored."""
    checksums: dict[str, str] = {}
    """Checksum of each array file, by file name: `xxh3_128:` plus hex, or plain SHA-256 hex."""
    relabel_ids: tuple[int, int] | None = None
    """Half-open range of token ids that training may permute freely, such as sudoku digits."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned dtype for `vocab_size` ids plus one ignored label."""
    if vocab_size < 1:
        raise UserError(f"vocab_size is {vocab_size}, but it must be at least 1.")
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        if vocab_size <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise UserError(f"vocab_size is {vocab_size}, which is too large for any integer type.")


def find_split(path: str | Path, split: str) -> Path:
    """Return the directory of a split's `dataset.json`.

    That is `<path>/<split>/all` or, in TRM's layout, `<path>/<split>`.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(
            f"{root} is not an existing directory; pass a corpus written by a dataset builder."
        )
    for folder in (root / split / "all", root / split):
        if (folder / METADATA_NAME).is_file():
            return folder
    if root.name in ("train", "test", "all"):
        raise UserError(
            f"{root} is part of a corpus; pass the directory that contains train/ instead."
        )
    raise UserError(
        f"{root} has no split {split!r}: neither {split}/all/{METADATA_NAME} nor "
        f"{split}/{METADATA_NAME} exists; rebuild the corpus or pass another directory."
    )


def array_path(split_dir: str | Path, name: str, set_name: str = "all") -> Path:
    """Return the path of one array next to `dataset.json`, in any layout; it may not exist."""
    folder = Path(split_dir)
    layouts = (
        folder / f"{name}.npy",
        folder / f"{set_name}__{name}.npy",
        folder / set_name / f"{name}.npy",
    )
    return next((path for path in layouts if path.is_file()), layouts[0])


def load_metadata(split_dir: str | Path) -> DatasetMetadata:
    """Read and validate `dataset.json` in a directory returned by `find_split`."""
    path = Path(split_dir) / METADATA_NAME
    try:
        return DatasetMetadata.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'top level'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise UserError(f"{path} is not valid corpus metadata ({faults}).") from error
    except ValueError as error:  # JSON syntax or encoding
        raise UserError(f"{path} is not valid JSON ({error}); rebuild the corpus.") from error


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_file(path: str | Path) -> str:
    """Return the checksum of a file as stored in the metadata.

    A fast hash, because arrays are large; it detects corruption, not tampering.
    """
    with open(path, "rb") as file:
        return _FAST + hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def verify_arrays(split_dir: str | Path, metadata: DatasetMetadata) -> None:
    """Check every array file against its checksum in the metadata; reads every byte."""
    for name, expected in metadata.checksums.items():
        verify_array(Path(split_dir) / name, expected)


def verify_array(path: Path, expected: str) -> None:
    """Check one array file against its checksum in the metadata."""
    if not path.is_file():
        raise UserError(f"{path} is missing, although the metadata lists it; rebuild the corpus.")
    if (checksum_file if expected.startswith(_FAST) else sha256_file)(path) != expected:
        raise UserError(
            f"{path} does not match its checksum in {METADATA_NAME}: it is damaged or was "
            "modified; copy the corpus again or rebuild it."
        )


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's byte alphabet, a dict from printable character to byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


def is_byte_token(token: str) -> bool:
    """Return whether a token is spelled like a byte-fallback token, such as <0x0A>."""
    return _BYTE_TOKEN.fullmatch(token) is not None


def token_byte_lengths(tokenizer_json_path: str | Path) -> np.ndarray:
    """Return the number of text bytes of each token id: (V,) int32, V = highest id + 1.

    Special tokens and unused ids count as 0. Exact for byte-level BPE and byte-fallback tokens;
    for other tokenizers, the number of bytes a token adds when decoded after a letter.
    """
    return byte_lengths(*read_tokenizer(tokenizer_json_path))


def read_tokenizer(
    path: str | Path,
    change: Callable[[dict[str, Any]], None] | None = None,
    name: str = "the tokenizer",
    advice: str = "",
) -> tuple[Any, dict[str, Any]]:
    """Read a tokenizer.json.

    Args:
        change: Edits the parsed file before the tokenizer is built from it.
        name: The option that names the file, for errors.
        advice: How to fix the problem, for errors.

    Returns:
        The `tokenizers.Tokenizer` and its parsed file.

    Raises:
        UserError: The file cannot be read or is not a tokenizer.json.
    """
    from tokenizers import Tokenizer

    content = b""
    try:
        content = Path(path).read_bytes()
        description = json.loads(content)
        if change is None:
            return Tokenizer.from_buffer(content), description
        change(description)
        return Tokenizer.from_str(json.dumps(description, ensure_ascii=False)), description
    except UserError as error:
        raise UserError(f"{name} {path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {name} {path}: {error.strerror or error}{advice}") from error
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        fault = _tokenizer_fault(content, error)
        raise UserError(f"{name} {path} is not a valid tokenizer.json: {fault}{advice}") from error


def _tokenizer_fault(content: bytes, error: Exception) -> str:
    """Describe, as a clause, what a file contains instead of a tokenizer.json."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # invalid JSON or UTF-8
        return "it is not JSON"
    if not isinstance(value, dict):
        return f"it contains a {type(value).__name__}"
    if value and all(isinstance(number, int) for number in value.values()):
        return (
            "it only maps tokens to ids, like a vocab.json; pass the matching tokenizer.json "
            "instead"
        )
    return str(error) if "model" in value else "it has no key 'model'"


def byte_lengths(tokenizer: Any, description: dict[str, Any]) -> np.ndarray:
    """Compute `token_byte_lengths` for a loaded tokenizer and its parsed tokenizer.json."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    lengths = np.zeros(ids.max() + 1, dtype=np.int32)
    stages = flatten_stages(description.get("decoder"))
    stages += flatten_stages(description.get("pre_tokenizer"))
    if all(stage["type"] != "ByteLevel" for stage in stages):
        each = map(_make_decoded_length(tokenizer), vocabulary, vocabulary.values())
    elif _ALPHABET.keys() >= set().union(*vocabulary):  # one character per byte in all tokens
        each = map(len, vocabulary)
    else:
        each = map(_byte_level_length, vocabulary)
    lengths[ids] = np.fromiter(each, np.int32, len(vocabulary))
    for index, token in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = 0 if token.special else len(token.content.encode())
    return lengths


def flatten_stages(stage: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the single stages of a normalizer, pre-tokenizer or decoder, in order."""
    if stage is None:
        return []
    if stage["type"] != "Sequence":
        return [stage]
    inner = stage.get("normalizers") or stage.get("pretokenizers") or stage.get("decoders") or []
    return [part for each in inner for part in flatten_stages(each)]


_ALPHABET = byte_alphabet()


def _byte_level_length(token: str) -> int:
    return sum(1 if char in _ALPHABET else len(char.encode()) for char in token)


def _make_decoded_length(tokenizer: Any) -> Callable[[str, int], int]:
    """Return a function that measures tokens by decoding them.

    It decodes each token after a letter, because decoders strip leading spaces.
    """
    prefix = tokenizer.encode("a", add_special_tokens=False).ids
    before = len(tokenizer.decode(prefix, skip_special_tokens=False).encode())

    def length(token: str, index: int) -> int:
        if is_byte_token(token):
            return 1  # on its own it decodes to a replacement character
        return len(tokenizer.decode([*prefix, index], skip_special_tokens=False).encode()) - before

    return length
