"""Encode text to token ids with Hugging Face `tokenizers` or a faster, equivalent library.

The faster library is used only for known kinds of tokenizers, must pass a self-test when loaded,
and is checked against Hugging Face on samples of the real text: a wrongly tokenized corpus would
go unnoticed until a model had been trained on it.
"""

import array
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
from tokenizers import Encoding, Tokenizer

from dataset.common import byte_alphabet
from utils.core.errors import UserError

PIECE_CHARS = 1 << 12
"""Long texts are cut into pieces of about this size, which the library encodes 25% faster than
whole chapters and distributes evenly over its threads."""
PART_CHARS = 1 << 21
"""Maximum text encoded at once, which bounds memory for documents of any size."""
# A single space or line feed between words, where GPT-2's pre-tokenizer always starts a token.
_SAFE_CUT = re.compile(r"(?<=\S)[ \n](?=\S)")

_WORDS_MEMORY = 72 << 20
"""Memory growth of the process after which gigatoken's word cache is dropped."""

Encoded = tuple[np.ndarray, np.ndarray]
"""Concatenated tokens of all texts (n,), and the count of each text (texts,). Tokens are ids or,
from `SizedEncoder`, ids with the bytes they stand for."""


class Encoder(Protocol):
    """Encodes texts to token ids, treating spelled-out special tokens as plain text."""

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        """Encode texts given as UTF-8."""
        ...


def set_threads(workers: int) -> None:
    """Set the number of threads of both libraries; must be called before they are first used."""
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"


def encode_batch(encode: Callable[..., list[Encoding]], texts: Sequence[str]) -> list[Encoding]:
    """Encode texts by a method of a `Tokenizer`, without adding special tokens."""
    try:
        return encode(texts, add_special_tokens=False)
    except Exception as error:  # tokenizers raises bare Exception, e.g. for a missing unk
        raise UserError(f"the tokenizer cannot encode the text ({error}).") from error


class HuggingFaceEncoder:
    """The reference encoder, using `tokenizers`."""

    def __init__(self, tokenizer: Tokenizer, description: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._cuttable = is_gpt2_kind(description)

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        pieces: list[str] = []
        sizes = []
        for text in texts:
            cut = self._cut(text.decode())
            pieces += cut
            sizes.append(len(cut))
        ids = array.array("I")  # extends from lists of integers twice as fast as numpy
        counts = []
        for some in _group_parts(pieces):  # encodings take 40 times the memory of the text
            for encoding in encode_batch(self._tokenizer.encode_batch_fast, some):
                ids.extend(piece := encoding.ids)
                counts.append(len(piece))
        per_piece = np.array(counts, np.int64)
        if len(pieces) != len(texts):
            per_piece = np.add.reduceat(per_piece, np.cumsum([0, *sizes[:-1]]))
        return np.frombuffer(ids, np.uint32), per_piece

    def _cut(self, text: str) -> list[str]:
        """Cut a long text into pieces, to use all threads and limit memory."""
        if not self._cuttable or len(text) <= PIECE_CHARS:
            return [text]
        pieces, start = [], 0
        while cut := _SAFE_CUT.search(text, start + PIECE_CHARS):
            pieces.append(text[start : cut.start()])
            start = cut.start()
        return [*pieces, text[start:]]


def _group_parts(texts: list[str]) -> Iterator[list[str]]:
    """Yield the texts in order, in groups of about PART_CHARS."""
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text)
        if size >= PART_CHARS:
            yield part
            part, size = [], 0
    if part:
        yield part


class GigatokenEncoder:
    """Encodes with `gigatoken`: the same ids, about 20 times faster. Optional."""

    def __init__(self, description: dict[str, Any], workers: int) -> None:
        try:
            import gigatoken
        except ImportError:
            raise UserError(
                "--tokenizer-library gigatoken requires the package: pip install gigatoken"
            ) from None
        if not is_gpt2_kind(description):
            raise UserError(
                "--tokenizer-library gigatoken supports only byte-level BPE in the style of GPT-2, "
                "which this tokenizer is not; use --tokenizer-library huggingface."
            )
        if missing := len(byte_alphabet().keys() - description["model"]["vocab"].keys()):
            raise UserError(
                f"--tokenizer-library gigatoken requires a token for each byte, but this tokenizer "
                f"lacks {missing} of them; use --tokenizer-library huggingface."
            )
        # Without special tokens, it cannot match them in text that spells them out.
        plain = orjson.dumps({**description, "added_tokens": []})
        self._load = lambda: gigatoken.Tokenizer.from_json(plain)
        self._parallel = workers > 1
        self._reload()

    def _reload(self) -> None:
        """Reload the tokenizer to drop its cache of all words seen, which grows without bound."""
        self._tokenizer: Any = None  # frees the cache
        self._tokenizer = self._load()
        self._memory = resident_memory()

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        if resident_memory() > self._memory + _WORDS_MEMORY:
            self._reload()
        rows = self._tokenizer.encode_batch(list(texts), parallel=self._parallel).layout
        offsets = np.asarray(rows.offsets.data)
        ids = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
        return ids, np.diff(offsets)

    def decode(self, ids: np.ndarray) -> bytes:
        return self._tokenizer.decode(ids.astype(np.uint32))


class CheckedEncoder:
    """A fast encoder that is compared with the reference on samples of every batch."""

    def __init__(self, fast: GigatokenEncoder, reference: Encoder) -> None:
        self._fast = fast
        self._reference = reference
        self._random = random.Random(0)  # selects the samples; does not affect the result
        self._compare([text.encode() for text in SELF_TEST], "its self-test")
        self._unchecked = FIRST_SAMPLE_BYTES

    def encode(self, texts: Sequence[bytes]) -> Encoded:
        """See `Encoder`; raise UserError if the libraries differ."""
        ids, counts = self._fast.encode(texts)
        number = self._random.randrange(len(texts))
        start = int(counts[:number].sum())
        if self._fast.decode(ids[start : start + counts[number]]) != texts[number]:
            raise self._fault(texts[number], "a document")
        sample = _slice(texts[number], self._unchecked, self._random)
        if not has_new_letters(sample):
            self._compare([sample], "a sample")
            self._unchecked = SAMPLE_BYTES
        if new := [n for n, text in enumerate(texts) if has_new_letters(text)]:
            return self._replace(ids, counts, texts, new)
        return ids, counts

    def _replace(
        self, ids: np.ndarray, counts: np.ndarray, texts: Sequence[bytes], numbers: list[int]
    ) -> Encoded:
        """Replace the ids of the texts with these indices by those of the reference."""
        parts = np.split(ids, np.cumsum(counts)[:-1])
        for number in numbers:
            parts[number] = self._reference.encode([texts[number]])[0]
        return np.concatenate(parts), np.array([len(part) for part in parts])

    def _compare(self, texts: Sequence[bytes], what: str) -> None:
        ids, counts = self._fast.encode(texts)
        wanted, wanted_counts = self._reference.encode(texts)
        if np.array_equal(counts, wanted_counts) and np.array_equal(ids, wanted):
            return
        for text in texts:
            if not np.array_equal(self._fast.encode([text])[0], self._reference.encode([text])[0]):
                raise self._fault(text, what)

    def _fault(self, text: bytes, what: str) -> UserError:
        return UserError(
            f"gigatoken and Hugging Face tokenizers produce different token ids for {what} "
            f"({text[:60].decode(errors='replace')!r}…); use --tokenizer-library huggingface."
        )


FIRST_SAMPLE_BYTES = 1 << 14
SAMPLE_BYTES = 1 << 10

# fmt: off
SELF_TEST = (
    "Hello, world! It's 1984 (or isn't it?)\r\n\r\n\tTabs  and   spaces ",
    "\u00a0 \u2003end \n \n x ",
    "I'M he'LL we've 'tis ''s can't'd 12345 3.14159e-10 0x1F ½ ² ٣٤ ",
    " 10,000.00 €5 $7 #tag @me",
    "naïve façade Ångström Ａｆｕｌｌ ﬁne ſtraße İstanbul e\u0301 क्षि ไทย",
    "日本語、中文。한국어 עברית العربية",
    "🙂\U0001f469\u200d\U0001f469\u200d\U0001f467🇩🇪 \U0001f469\U0001f3fd \u200b\u200d\ufeff\u00ad",
    " \u2028\u2029\x85 \x00\x01\x7f\x1c ",
    "<|endoftext|> <|eos|> <|pad|></s><s> <pad> [CLS] <0x0A> <|im_start|>user\n",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x**2}  # done\n\n\n\nclass A: pass\n",
    "=" * 200,
    "a" * 300 + " " * 300 + "\n" * 50 + "_" * 70 + "!?" * 40 + "ab" * 200 + " é" * 50,
    "https://example.org/?q=a%20b&c=d;e http://x.y e.g. i.e. U.S.A. O'Neil–Smith—“quoted” ‘x’ …",
)
# fmt: on


def resident_memory() -> int:
    """Return the resident memory of this process in bytes; 0 if the system does not report it."""
    try:
        pages = Path("/proc/self/statm").read_text("utf-8").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def _slice(text: bytes, size: int, chooser: random.Random) -> bytes:
    """Return about `size` bytes from a random position of a text, cut between characters."""
    if len(text) <= size:
        return text
    start = chooser.randrange(len(text) - size)
    return text[start : start + size].decode(errors="ignore").encode()


# Letters and digits added in Unicode 15 to 17, in ranges that may include other rare ones. Whether
# they count as letters depends on a library's Unicode version, so the reference decides.
_NEW_LETTERS = re.compile(
    "[\u088f\u0c5c\u0cdc\u1c89-\u1c8a\ua7cb-\ua7f1\U000105c0-\U000105f3\U00010940-\U00010959"
    "\U00010d40-\U00010d85\U00010ec2-\U00010ec7\U0001123f-\U00011240\U00011380-\U000113d3"
    "\U000116d0-\U000116e3\U00011bc0-\U00011bf9\U00011db0-\U00011de9\U00011f02-\U00011f59"
    "\U0001342f-\U000143fa\U00016100-\U00016139\U00016d40-\U00016d79\U00016ea0-\U00016ff6"
    "\U000187f8-\U000187ff\U00018cff-\U00018df2\U0001b132-\U0001b155\U0001ccf0-\U0001ccf9"
    "\U0001d2c0-\U0001d2d3\U0001df25-\U0001df2a\U0001e030-\U0001e06d\U0001e4d0-\U0001e6ff"
    "\U0002b739-\U0002b73f\U0002cea2-\U0002cead\U0002ebf0-\U0002ee5d\U00031350-\U00033479]"
)
# Characters whose UTF-8 begins like that of these letters; most texts have few.
_CANDIDATES = re.compile(rb"[\xe0\xe1\xea\xf0][\x80-\xbf]+")


def has_new_letters(text: bytes) -> bool:
    """Return whether a text has letters too recent for every library to know."""
    if text.isascii():
        return False
    candidates = b"".join(_CANDIDATES.findall(text))
    return _NEW_LETTERS.search(candidates.decode()) is not None


def is_gpt2_kind(description: dict[str, Any]) -> bool:
    """Return whether a tokenizer is byte-level BPE with GPT-2's pre-tokenizer and nothing else."""
    model, pre_tokenizer = description["model"], description.get("pre_tokenizer") or {}
    return (
        model["type"] == "BPE"
        and not any(
            model.get(name)
            for name in (
                "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                "fuse_unk", "byte_fallback", "ignore_merges",
            )
        )
        and description.get("normalizer") is None
        and pre_tokenizer.get("type") == "ByteLevel"
        and pre_tokenizer.get("use_regex", True)
        and not pre_tokenizer.get("add_prefix_space")
        and all(token["special"] for token in description.get("added_tokens", []))
    )  # fmt: skip
