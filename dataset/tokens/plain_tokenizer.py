"""Tokenizers that treat all input as plain text and never produce special tokens from it.

`encode_special_tokens` stops the library from matching special tokens in text, but not the model
from assembling one: to a Unigram or WordLevel model, `</s>` is a piece like any other. Therefore
the special tokens are renamed to strings that no text contains.
"""

import uuid
from typing import Any

import numpy as np
import orjson
from tokenizers import Tokenizer

from dataset.common import byte_alphabet, flatten_stages

DROPPED = -1
"""Placeholder id of text without any token, not even an unknown one; never stored."""
SPACE = "▁"
"""SentencePiece's replacement for a space."""

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Splits text that spells a byte piece after its first character, so that no byte piece matches.
_CUT_BYTE_PIECES = {
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
    "behavior": "Isolated",
    "invert": False,
}


class PlainTokenizer:
    """A tokenizer for plain text, and the mapping of its ids to those of the original.

    Attributes:
        tokenizer: encodes text.
        description: its tokenizer.json.
        original_ids: (n,) int64, the original id, or DROPPED, of each id; None if all are equal.
        unknown_id: original id of text that the vocabulary cannot represent; None without one.
        lossless: whether the ids of any text determine its number of bytes, counting the space
            that some tokenizers prepend. Derived from the definition; False if in doubt.
        lossless_without_mark: whether they do for text without `SPACE`.

    Args:
        tokenizer: the original tokenizer, with all its special tokens.
        description: the tokenizer.json it was loaded from.
        added: special tokens added to it since.
        byte_lengths: (V,) bytes of text assumed for each id.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        description: dict[str, Any],
        added: set[str],
        byte_lengths: np.ndarray,
    ) -> None:
        self.tokenizer, self.description = tokenizer, description
        self.original_ids: np.ndarray | None = None
        special = _special_tokens(description) | added
        keeps_size = _is_lossless(description, special, byte_lengths)
        marks_spaces = _marks_spaces(description)
        if not keeps_size or marks_spaces or _may_spell(description, special):
            self.description = orjson.loads(tokenizer.to_str())
            self.description["post_processor"] = None  # it may trim token offsets
            original_names = self._rename_special_tokens()
            self.tokenizer = _load(self.description)
            self._map_ids(tokenizer, original_names)
            special = _special_tokens(self.description)
            # If lossless, all text is encoded and nothing is DROPPED.
            keeps_size = not self._moves_ids() and _is_lossless(
                self.description, special, byte_lengths
            )
        self.lossless = keeps_size and not marks_spaces
        self.lossless_without_mark = keeps_size
        self.tokenizer.encode_special_tokens = True
        name = _unknown_token(self.description["model"])
        unknown = None if name is None else self.tokenizer.token_to_id(name)
        if unknown is not None and self.original_ids is not None:
            unknown = int(self.original_ids[unknown])
        self.unknown_id = None if unknown == DROPPED else unknown

    def _rename_special_tokens(self) -> dict[str, str]:
        """Rename the special tokens of the description; return the original name of each."""
        model, special = self.description["model"], _special_tokens(self.description)
        prefix = f"{uuid.uuid4().hex}:"  # cannot occur in any existing text
        new_names = {token: f"{prefix}{token}" for token in special}
        for token in self.description["added_tokens"]:
            token["content"] = new_names.get(token["content"], token["content"])
        if model["type"] == "Unigram":
            model["vocab"] = [(new_names.get(t, t), score) for t, score in model["vocab"]]
            if model["unk_id"] is None:
                # Reuse a score, because the score of unknown text depends on the lowest one.
                model["vocab"].append((prefix, model["vocab"][0][1]))
                model["unk_id"] = len(model["vocab"]) - 1
        else:
            model["vocab"] = {new_names.get(t, t): index for t, index in model["vocab"].items()}
            if model["unk_token"] is not None:  # None: BPE drops unknown characters
                model["unk_token"] = new_names[model["unk_token"]]
                after = max(model["vocab"].values(), default=-1) + 1
                model["vocab"].setdefault(model["unk_token"], after)
        if model["type"] == "BPE":
            hidden = special.union(BYTE_PIECES if model["byte_fallback"] else ())
            model["merges"] = [pair for pair in model["merges"] if hidden.isdisjoint(
                _merge_pair(model, pair))]  # fmt: skip
        if model.get("byte_fallback") and (model["type"] == "Unigram" or model["ignore_merges"]):
            stages = [self.description["pre_tokenizer"], _CUT_BYTE_PIECES]
            self.description["pre_tokenizer"] = {
                "type": "Sequence", "pretokenizers": [stage for stage in stages if stage]
            }  # fmt: skip
        return {new: old for old, new in new_names.items()}

    def _map_ids(self, original: Tokenizer, original_names: dict[str, str]) -> None:
        """Set `original_ids`; adding an unknown token shifts the ids of added tokens."""
        known = original.get_vocab(with_added_tokens=True)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        ids = np.full(max(vocabulary.values(), default=-1) + 1, DROPPED)
        for token, index in vocabulary.items():
            ids[index] = known.get(original_names.get(token, token), DROPPED)
        if not np.array_equal(ids, np.arange(len(ids))):
            self.original_ids = ids

    def _moves_ids(self) -> bool:
        ids = self.original_ids
        return ids is not None and bool(((ids != np.arange(len(ids))) & (ids != DROPPED)).any())

    def drops_characters(self) -> bool:
        """Return whether characters without a token are dropped before merging."""
        model = self.description["model"]
        return (
            model["type"] == "BPE"
            and model.get("unk_token") is None
            and not _has_byte_pieces(model)
            and not _has_byte_level(self.description)
        )

    def load_symbols(self) -> tuple[Tokenizer, int]:
        """Load a tokenizer that only splits text into the initial symbols of the BPE merges.

        Returns:
            The tokenizer, and the id of characters that this tokenizer drops.
        """
        model = self.description["model"]
        name, dropped = uuid.uuid4().hex, max(model["vocab"].values(), default=-1) + 1
        vocabulary = {**model["vocab"], name: dropped}
        symbols = {**model, "vocab": vocabulary, "merges": [], "unk_token": name,
                   "fuse_unk": False, "ignore_merges": False}  # fmt: skip
        tokenizer = _load({**self.description, "model": symbols})
        tokenizer.encode_special_tokens = True
        return tokenizer, dropped


def _is_lossless(description: dict[str, Any], special: set[str], byte_lengths: np.ndarray) -> bool:
    """Return whether a tokenizer preserves all bytes of a text.

    True for byte-level BPE and byte fallback with all 256 bytes, if no stage changes or drops text
    other than by writing `SPACE` for spaces.
    """
    model = description["model"]
    if model.get("type") not in ("BPE", "Unigram"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    text = [t for t in description.get("added_tokens") or [] if not t["special"]]
    if any(token["lstrip"] or token["rstrip"] for token in text):
        return False
    normalizers = flatten_stages(description.get("normalizer"))
    stages = flatten_stages(description.get("pre_tokenizer"))
    stages = [stage for stage in stages if stage != _CUT_BYTE_PIECES]
    if not all(_keeps_text(stage) for stage in stages):
        return False
    if _has_byte_level(description):
        # A space is prepended to each piece of the text, if there are several.
        spaced = stages[-1].get("add_prefix_space") and (len(stages) > 1 or text)
        spelled = {token["content"] for token in text} & model["vocab"].keys()
        return not (normalizers or spaced) and all(map(str.isascii, spelled))
    if not _has_byte_pieces(model) or any(stage["type"] == "ByteLevel" for stage in stages):
        return False
    if any(stage["type"] == "Metaspace" for stage in stages):
        if normalizers or len(stages) > 1 or stages[0]["replacement"] != SPACE:
            return False
        normalizers = [_PREPEND, _REPLACE]
    pieces = {t: index for t, index in _pieces(model).items() if t not in special}
    return _spells_spaces(normalizers, bool(text), pieces, byte_lengths)


def _may_spell(description: dict[str, Any], special: set[str]) -> bool:
    """Return whether any text might be encoded as one of these tokens, or fail to be encoded."""
    model = description["model"]
    if model.get("type") != "BPE":
        return True
    text = [t["content"] for t in description.get("added_tokens") or [] if not t["special"]]
    if any(_overlap(token, other) for token in special for other in text):
        return True  # the library would match the one instead of the other
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    if unknown is not None and unknown not in vocabulary:
        return True
    if model.get("byte_fallback"):
        special = special.union(BYTE_PIECES)
    if any(token in vocabulary and (model.get("ignore_merges") or len(token) == 1)
           for token in special):  # fmt: skip
        return True
    return not all(special.isdisjoint(_merge_pair(model, pair)) for pair in model["merges"])


def _overlap(one: str, other: str) -> bool:
    if one in other or other in one:
        return True
    sizes = range(1, min(len(one), len(other)))
    return any(one[:n] == other[-n:] or one[-n:] == other[:n] for n in sizes)


def _merge_pair(model: dict[str, Any], pair: Any) -> tuple[str, str, str]:
    """Return both parts of a merge and its result."""
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    prefix = model.get("continuing_subword_prefix") or ""
    return first, second, first + second[len(prefix) :]


def _special_tokens(description: dict[str, Any]) -> set[str]:
    tokens = {t["content"] for t in description.get("added_tokens") or [] if t["special"]}
    unknown = _unknown_token(description["model"])
    return tokens if unknown is None else tokens | {unknown}


def _unknown_token(model: dict[str, Any]) -> str | None:
    if "unk_id" in model:
        return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _pieces(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: index for index, (token, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _has_byte_pieces(model: dict[str, Any]) -> bool:
    return bool(model.get("byte_fallback")) and _pieces(model).keys() >= set(BYTE_PIECES)


def _has_byte_level(description: dict[str, Any]) -> bool:
    """Return whether a BPE model gets GPT-2's byte characters as input and has all of them."""
    model, stages = description["model"], flatten_stages(description.get("pre_tokenizer"))
    return (
        model["type"] == "BPE"
        and [stage["type"] for stage in stages].count("ByteLevel") == 1
        and stages[-1]["type"] == "ByteLevel"
        and model["vocab"].keys() >= byte_alphabet().keys()
    )


def _keeps_text(stage: dict[str, Any]) -> bool:
    """Return whether a pre-tokenizer keeps all text, except for replacing spaces."""
    if stage["type"] in ("Split", "Punctuation"):
        return stage["behavior"] != "Removed"
    return stage["type"] in ("ByteLevel", "Digits", "Metaspace")


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


def _spells_spaces(
    normalizers: list[dict[str, Any]],
    has_added_tokens: bool,
    pieces: dict[str, int],
    byte_lengths: np.ndarray,
) -> bool:
    """Return whether text reaches the model with spaces intact, consistent with the byte lengths.

    Spaces may be replaced by `SPACE`, with at most one prepended to the text.
    """
    if not normalizers:
        shown = SPACE
    elif normalizers in ([_REPLACE], [_REPLACE, _PREPEND], [_PREPEND, _REPLACE]):
        shown = " "
        # The library also prepends one after each added token.
        if SPACE not in pieces or (_PREPEND in normalizers and has_added_tokens):
            return False
    else:
        return False
    sizes = dict.fromkeys(BYTE_PIECES, 1)
    return all(
        byte_lengths[index] == sizes.get(token, len(token.replace(SPACE, shown).encode()))
        for token, index in pieces.items()
    )


def _marks_spaces(description: dict[str, Any]) -> bool:
    """Return whether spaces are replaced by `SPACE`, so that ids do not distinguish the two."""
    stages = flatten_stages(description.get("pre_tokenizer"))
    return any(stage["type"] == "Metaspace" for stage in stages) or _REPLACE in flatten_stages(
        description.get("normalizer")
    )


def _load(description: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(orjson.dumps(description).decode())
