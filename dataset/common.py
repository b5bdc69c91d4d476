"""What every part of Athena may know about a corpus: its constants, metadata and errors.

A leaf: it imports numpy, pydantic, xxhash and (only where a tokenizer is read) tokenizers, and
nothing else of the project, so that builders, the stream, the model and the scripts can share it.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from utils.core.errors import UserError

IGNORE_LABEL_ID = -100
"""What the loss ignores; the reader turns a corpus' own `ignore_label_id` into this."""


FORMAT_VERSION = 1
"""Version of the folders that today's builders write; 0 stands for TRM's and older ones."""

ARRAY_NAMES = (
    "inputs",
    "labels",
    "puzzle_identifiers",
    "puzzle_indices",
    "group_indices",
    "iteration_targets",
    "domain_ids",
)

METADATA_NAME = "dataset.json"
_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_FAST = "xxh3_128:"
BLANK_IDENTIFIER = "<blank>"

T = TypeVar("T")


def _renamed(name: str, older: str, **options: Any) -> Any:
    return Field(validation_alias=AliasChoices(name, older), **options)


class DatasetMetadata(BaseModel):
    """One split's `dataset.json`: Athena's, TRM's, or an older corpus with the older names."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pad_id: int
    eos_id: int | None = None
    ignore_label_id: int | None
    """Label that marks an ignored position, as stored; None where every label counts."""
    blank_identifier_id: int = 0
    vocab_size: int = Field(gt=0)
    """Highest token id + 1."""
    seq_len: int = Field(gt=0)
    num_puzzle_identifiers: int = _renamed("num_puzzle_identifiers", "num_sequence_identifiers")
    total_groups: int = Field(ge=0)
    mean_puzzle_examples: float = _renamed("mean_puzzle_examples", "mean_examples_per_group")
    total_puzzles: int = _renamed("total_puzzles", "total_sequences", ge=0)
    sets: list[str] = ["all"]
    layout: str = "npy"
    """npy: one array entry for every position; stream: one token array and views of it as rows."""
    min_iterations: int | None = None
    max_iterations: int | None = None
    domains: list[str] = []
    """Names; `domain_ids` index this list."""
    domain_weights: dict[str, float] = {}
    """Weights by domain name that the builder was asked to record; empty: none."""
    format_version: int = 0
    tokens: int | None = None
    """Real tokens in `inputs`: padding does not count."""
    documents: int | None = None
    scored_bytes: int | None = None
    """Bytes of text that the labels which are not ignored stand for."""
    checksums: dict[str, str] = {}
    """Checksum of each array file, by file name: `xxh3_128:` and hex, or SHA-256 in hex alone."""
    relabel_ids: tuple[int, int] | None = None
    """Half-open range of token ids that training may permute freely: a sudoku's digits."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest unsigned dtype that holds `vocab_size` ids and, above them, one ignored label."""
    if vocab_size < 1:
        raise UserError(f"vocab_size is {vocab_size}; it must be at least 1.")
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        if vocab_size <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise UserError(f"vocab_size is {vocab_size}, which no integer type can hold.")


def iteration_target(unique_ratio: float, min_iterations: int, max_iterations: int) -> int:
    """ACT-step budget of a row whose share of distinct tokens is `unique_ratio` (0..1)."""
    return math.floor(min_iterations + unique_ratio * (max_iterations - min_iterations))


def find_split(path: str | Path, split: str) -> Path:
    """Folder that holds `dataset.json` of a split: `<path>/<split>/all` or, in TRM's layout,
    `<path>/<split>`."""
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; name a corpus that a dataset builder wrote.")
    for folder in (root / split / "all", root / split):
        if (folder / METADATA_NAME).is_file():
            return folder
    if root.name in ("train", "test", "all"):
        raise UserError(f"{root} is a part of a corpus; name the folder that holds train/.")
    raise UserError(
        f"{root} has no split {split!r}: neither {split}/all/{METADATA_NAME} nor "
        f"{split}/{METADATA_NAME} is there; build the corpus again or name another folder."
    )


def array_path(split_dir: str | Path, name: str, set_name: str = "all") -> Path:
    """File of one array beside `dataset.json` (it may be absent), in whichever layout is there."""
    folder = Path(split_dir)
    layouts = (
        folder / f"{name}.npy",
        folder / f"{set_name}__{name}.npy",
        folder / set_name / f"{name}.npy",
    )
    return next((path for path in layouts if path.is_file()), layouts[0])


def load_metadata(split_dir: str | Path) -> DatasetMetadata:
    """Read and check `dataset.json` in the folder that `find_split` gives."""
    path = Path(split_dir) / METADATA_NAME
    try:
        return DatasetMetadata.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the whole file'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise UserError(f"{path} is not the metadata of a corpus ({faults}).") from error
    except ValueError as error:  # JSON syntax or encoding
        raise UserError(f"{path} is not valid JSON ({error}); build the corpus again.") from error


def sha256_file(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_file(path: str | Path) -> str:
    """Checksum of a file's bytes as metadata holds it: fast, because arrays are large, and against
    damage alone."""
    with open(path, "rb") as file:
        return _FAST + hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def verify_arrays(split_dir: str | Path, metadata: DatasetMetadata) -> None:
    """Compare each array file with its checksum in the metadata; reads every byte."""
    for name, expected in metadata.checksums.items():
        path = Path(split_dir) / name
        if not path.is_file():
            raise UserError(f"{path} is missing, though the metadata lists it; build it again.")
        if (checksum_file if expected.startswith(_FAST) else sha256_file)(path) != expected:
            raise UserError(
                f"{path} differs from its checksum in {METADATA_NAME}: it is damaged or was "
                "changed; copy or build the corpus again."
            )


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte value, as character -> byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


def is_byte_token(token: str) -> bool:
    """Return whether a token is spelled as byte fallback spells a byte, such as <0x0A>."""
    return _BYTE_TOKEN.fullmatch(token) is not None


def token_byte_lengths(tokenizer_json_path: str | Path) -> np.ndarray:
    """Bytes of text that each token id stands for: (V,) int32, V = highest id + 1.

    Special tokens and ids without a token count 0. Exact for byte-level BPE and for byte-fallback
    tokens; for other tokenizers, what a token adds when it is decoded after a letter.
    """
    from tokenizers import Tokenizer

    path = Path(tokenizer_json_path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror or error}.") from error
    try:
        tokenizer = Tokenizer.from_buffer(content)
        description = json.loads(content)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        fault = tokenizer_fault(content, error)
        raise UserError(f"{path} is not a tokenizer.json: {fault}.") from error

    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return byte_lengths(tokenizer, vocabulary, description)


def tokenizer_fault(content: bytes, error: Exception) -> str:
    """Return in a clause what a file holds instead of a tokenizer.json."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # of JSON or of UTF-8
        return "it is not JSON"
    if not isinstance(value, dict):
        return f"it holds a {type(value).__name__}"
    if value and all(isinstance(number, int) for number in value.values()):
        return (
            "it maps tokens to ids, as a vocab.json does, and lacks all else that a tokenizer "
            "needs; give the tokenizer.json that belongs to it"
        )
    return str(error) if "model" in value else "it has no key 'model'"


def byte_lengths(
    tokenizer: Any, vocabulary: dict[str, int], description: dict[str, Any]
) -> np.ndarray:
    """`token_byte_lengths` of a loaded tokenizer, with the tokenizer.json it was made from."""
    ids = np.fromiter(vocabulary.values(), np.int64, len(vocabulary))
    lengths = np.zeros(ids.max() + 1, dtype=np.int32)
    if not _is_byte_level(description):
        each = map(_decoded_length(tokenizer), vocabulary, vocabulary.values())
    elif _ALPHABET.keys() >= set().union(*vocabulary):  # a character a byte, in all tokens
        each = map(len, vocabulary)
    else:
        each = map(_byte_level_length, vocabulary)
    lengths[ids] = np.fromiter(each, np.int32, len(vocabulary))
    for index, token in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = 0 if token.special else len(token.content.encode())
    return lengths


def _is_byte_level(description: dict[str, Any]) -> bool:
    """Whether tokens are spelled in GPT-2's byte alphabet, as any part of it may say."""

    def parts(node: Any) -> list[Any]:
        if not isinstance(node, dict):
            return []
        children = node.get("decoders") or node.get("pretokenizers") or []
        return [node.get("type"), *(kind for child in children for kind in parts(child))]

    return "ByteLevel" in parts(description.get("decoder")) + parts(
        description.get("pre_tokenizer")
    )


_ALPHABET = byte_alphabet()


def _byte_level_length(token: str) -> int:
    return sum(1 if char in _ALPHABET else len(char.encode()) for char in token)


def _decoded_length(tokenizer: Any) -> Callable[[str, int], int]:
    """Length by decoding; a letter goes first, because decoders strip a text's leading space."""
    prefix = tokenizer.encode("a", add_special_tokens=False).ids
    before = len(tokenizer.decode(prefix, skip_special_tokens=False).encode())

    def length(token: str, index: int) -> int:
        if is_byte_token(token):
            return 1  # alone it would decode to a replacement character
        return len(tokenizer.decode([*prefix, index], skip_special_tokens=False).encode()) - before

    return length
