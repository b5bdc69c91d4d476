"""Tokenizers of every kind that people bring, small, with `<pad>`, `</s>` and most with `<unk>`."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tests.dataset.conftest import WORDS

CASES = Path(__file__).parent / "cases"
SPECIAL = ["<pad>", "</s>", "<unk>"]
TEXTS = [" ".join(WORDS[n:] + WORDS[:n]) for n in range(len(WORDS))] * 3


def byte_level(normalizer=None, stages=(), added=(), **options) -> Tokenizer:
    """GPT-2's kind, trained; `stages` go before the byte level."""
    tokenizer = Tokenizer(models.BPE())
    options = {"add_prefix_space": False} | options
    last = pre_tokenizers.ByteLevel(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*stages, last]) if stages else last
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    tokenizer.add_tokens(list(added))
    return tokenizer


def changed(tokenizer: Tokenizer, change: Callable[[dict], object]) -> Tokenizer:
    """A tokenizer with a change made to its tokenizer.json."""
    description = json.loads(tokenizer.to_str())
    change(description)
    return Tokenizer.from_str(json.dumps(description))


def model(tokenizer: Tokenizer, **values) -> Tokenizer:
    return changed(tokenizer, lambda d: d["model"].update(values))


def special(tokenizer: Tokenizer, *tokens: str) -> Tokenizer:
    tokenizer.add_special_tokens(list(tokens))
    return tokenizer


def without(tokenizer: Tokenizer, *pieces: str) -> Tokenizer:
    """A BPE tokenizer with entries of the vocabulary, and merges with them, given up."""

    def change(d: dict) -> None:
        vocabulary, gone = d["model"]["vocab"], set(pieces)
        d["model"]["merges"] = [
            (a, b) for a, b in d["model"]["merges"] if not gone & {*a, *b, a, b, a + b}
        ]
        kept = [t for t in vocabulary if t not in gone and not gone & set(t)]
        d["model"]["vocab"] = {token: index for index, token in enumerate(kept)}

    return changed(tokenizer, change)


def case(name: str) -> Tokenizer:
    return Tokenizer.from_file(str(CASES / f"{name}.json"))


def llama() -> Tokenizer:
    return case("llama")


def gemma(added=()) -> Tokenizer:
    """Byte fallback whose spaces are replaced, without one put before the text."""
    tokenizer = llama()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_tokens(list(added))
    return tokenizer


def metaspace(tokenizer: Tokenizer, **options) -> Tokenizer:
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(**options), decoders.Fuse()]
    )
    return tokenizer


def unigram(byte_fallback: bool = False, unk_id: int | None = 2, **options) -> Tokenizer:
    """Trained on text with special tokens, so that they are pieces, too."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**options)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fallback = [[f"<0x{byte:02X}>", -12.0] for byte in range(256)] if byte_fallback else []

    def change(d: dict) -> None:
        d["model"]["vocab"] += fallback
        d["model"] |= {"byte_fallback": byte_fallback, "unk_id": unk_id}

    tokenizer = changed(tokenizer, change)
    if byte_fallback:
        return metaspace(tokenizer, **options)
    tokenizer.decoder = decoders.Metaspace(**options)
    return tokenizer


def words(pre_tokenizer, *, unk: bool = True, kind=models.WordLevel) -> Tokenizer:
    entries = [*SPECIAL, *WORDS, *"abcdefghijklmnopqrstuvwxyz<>/", *(f"##{c}" for c in "aeiou/s>")]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(entries))}
    unk_token = "<unk>" if unk else "<none>"
    tokenizer = Tokenizer(kind(vocabulary, unk_token=unk_token))
    tokenizer.pre_tokenizer = pre_tokenizer
    return special(tokenizer, *SPECIAL)


def characters(**options) -> Tokenizer:
    """BPE over characters, without bytes."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    suffix = options.get("end_of_word_suffix")
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=90, special_tokens=SPECIAL, show_progress=False,
        **({"end_of_word_suffix": suffix} if suffix else {})))  # fmt: skip
    return tokenizer


digits_apart = pre_tokenizers.Split(Regex(r"\d|\p{L}+"), "isolated")

LOSSLESS: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, prefix": lambda: byte_level(add_prefix_space=True),
    "byte level, split before": lambda: byte_level(stages=[digits_apart], use_regex=False),
    "byte level, whole words": lambda: model(
        byte_level(stages=[digits_apart], use_regex=False), ignore_merges=True
    ),
    "byte level, no regex, whole": lambda: model(byte_level(use_regex=False), ignore_merges=True),
    "byte level, added text": lambda: byte_level(added=["quick fox", "</s>!", "<think>"]),
    "byte level, a common word is special": lambda: special(byte_level(), "the", "fox"),
}

# Lossless but for text that holds U+2581, which they take for a space.
MARKED: dict[str, Callable[[], Tokenizer]] = {
    "byte fallback, prefix": llama,
    "byte fallback, spaces replaced": gemma,
    "byte fallback, metaspace, prefix": lambda: metaspace(llama()),
    "byte fallback, metaspace alone": lambda: metaspace(llama(), prepend_scheme="never"),
    "unigram, byte fallback, prefix": lambda: unigram(byte_fallback=True),
    "unigram, byte fallback, prefix, no unk": lambda: unigram(byte_fallback=True, unk_id=None),
}

nfkc_lower = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])

LOSSY: dict[str, Callable[[], Tokenizer]] = {
    "byte level, NFC": lambda: byte_level(normalizers.NFC()),
    "byte level, lower case": lambda: byte_level(nfkc_lower),
    "byte level, stripped": lambda: byte_level(normalizers.Strip()),
    "byte level, no accents": lambda: byte_level(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "byte level, bytes missing": lambda: without(byte_level(), "z", "Ł", "Ġ"),
    "byte level, a byte is special": lambda: special(byte_level(), "Ċ", "e"),
    "byte level, words": lambda: byte_level(stages=[pre_tokenizers.WhitespaceSplit()]),
    "byte level, spaces before words": lambda: byte_level(
        stages=[digits_apart], add_prefix_space=True
    ),
    "byte level, added text with spaces": lambda: byte_level(
        added=[AddedToken("fox", lstrip=True, rstrip=True)]
    ),
    "byte fallback, NFKC": lambda: changed(
        llama(), lambda d: d["normalizer"]["normalizers"].insert(0, {"type": "NFKC"})
    ),
    "byte fallback, a byte missing": lambda: without(llama(), "<0xE6>"),
    "byte fallback, a byte missing, dropped": lambda: model(
        without(llama(), "<0xE6>"), unk_token=None
    ),
    "byte fallback, added text": lambda: changed(
        llama(),
        lambda d: d["added_tokens"].append(
            d["added_tokens"][2] | {"id": 800, "content": "fox", "special": False}
        ),
    ),
    "byte fallback, added spaces": lambda: gemma(["▁▁"]),
    "unigram": lambda: case("unigram"),
    "unigram, trained": unigram,
    "unigram, no unk": lambda: unigram(unk_id=None),
    "words": lambda: words(pre_tokenizers.Whitespace()),
    "words, by spaces": lambda: words(pre_tokenizers.WhitespaceSplit()),
    "words, no unk": lambda: words(pre_tokenizers.WhitespaceSplit(), unk=False),
    "word pieces": lambda: words(pre_tokenizers.WhitespaceSplit(), kind=models.WordPiece),
    "word pieces, no unk": lambda: words(
        pre_tokenizers.WhitespaceSplit(), kind=models.WordPiece, unk=False
    ),
    "characters": lambda: characters(unk_token="<unk>"),
    "characters, fused": lambda: characters(unk_token="<unk>", fuse_unk=True),
    "characters, dropped": characters,
    "characters, dropped, no words": lambda: changed(
        characters(), lambda d: d.update(pre_tokenizer=None)
    ),
    "characters, dropped, ends of words": lambda: characters(end_of_word_suffix="</w>"),
    "characters, unk missing": lambda: model(characters(), unk_token="<none>"),
    "characters, whole words": lambda: model(characters(unk_token="<unk>"), ignore_merges=True),
    "no unk": lambda: case("nounk"),
}
