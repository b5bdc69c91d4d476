"""Two libraries, the same ids: held to the plainest encoding there is, on odd and random text."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from dataset.tokens import encoders
from dataset.tokens.encoders import (
    SELF_TEST,
    CheckedEncoder,
    GigatokenEncoder,
    HuggingFaceEncoder,
    has_new_letters,
)
from dataset.tokens.tokenization import TextTokenizer
from dataset.train_tokenizer import train_tokenizer
from tests.dataset.conftest import file_bytes, random_text, write_jsonl
from utils.core.errors import UserError

pytest.importorskip("gigatoken")

ALPHABETS = (
    "abcdefghij ETAOIN",
    " \t\n\r\x0b\x0c\x1c\u00a0\u2003\u3000\u200b",
    "'sdmtlrve ",
    "0123456789٣½²,.",
    "!?.…-—#@$%&*()[]{}<>|/\\\"'",
    "äöüßéÅfiſİ\u0301\u0302",
    "日本語中文한국어עבריתالعربيةไทย",
    "🙂👩\u200d👧🇩🇪\U0001f3fd\ufeff",
    "\x00\x01\x7f\x85\u2028\ue000\U0010ffff",
)


def odd_text(rng: random.Random, length: int) -> str:
    text = ""
    while len(text) < length:
        alphabet = rng.choice(ALPHABETS)
        text += "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 12)))
    return text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    rng = random.Random(1)
    texts = [odd_text(rng, 300) for _ in range(300)] + [random_text(rng, 50) for _ in range(200)]
    path = tmp_path_factory.mktemp("tokenizer") / "tok.json"
    train_tokenizer(iter(texts), 2000).save(str(path))
    return TextTokenizer(path)


def test_both_libraries_give_the_ids_of_plain_encoding(tokenizer, rng, monkeypatch):
    monkeypatch.setattr(encoders, "PIECE_CHARS", 200)
    texts = [odd_text(rng, rng.randrange(1, 900)) for _ in range(150)]
    texts += [rng.choice(SELF_TEST) + odd_text(rng, 9) for _ in range(20)]
    texts += [f"a {token} b{token}" for token in ("<|eos|>", "<|pad|>", "<|endoftext|>")]
    tokenizer.tokenizer.encode_special_tokens = True
    wanted = [tokenizer.tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    description = json.loads(tokenizer.tokenizer.to_str())
    for encoder in (
        tokenizer.encoder,
        GigatokenEncoder(description, workers=1),
        GigatokenEncoder(description, workers=2),
        CheckedEncoder(GigatokenEncoder(description, 1), tokenizer.encoder),
    ):
        ids, counts = encoder.encode([text.encode() for text in texts])
        assert [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] == wanted


def test_corpora_of_both_libraries_are_the_same_files(tokenizer, tmp_path, rng):
    from dataset import build_corpus_dataset

    path = write_jsonl(tmp_path / "a.jsonl", [odd_text(rng, 400) + str(n) for n in range(60)])
    for library in ("huggingface", "gigatoken"):
        build_corpus_dataset.main(
            [
                *("--tokenizer-json", str(tokenizer.path), "--input-files", str(path)),
                *("--output-dir", str(tmp_path / library), "--tokenizer-library", library),
                *"--seq-len 64 --train-ratio 0.8".split(),
            ]
        )
    assert file_bytes(tmp_path / "huggingface") == file_bytes(tmp_path / "gigatoken")


def test_letters_that_are_new_to_one_library(tokenizer, rng):
    """A library knows them as letters or not, depending on its age; the reference decides."""
    description = json.loads(tokenizer.tokenizer.to_str())
    fast = GigatokenEncoder(description, 1)
    reference = HuggingFaceEncoder(tokenizer.tokenizer, description)
    places = [*range(0xD800), *range(0xE000, 0x34000), *range(0xE0000, 0xE0200)]
    new = [place for place in places if has_new_letters(chr(place).encode())]
    assert 10_000 < len(new) < 20_000
    filler = odd_text(rng, rng.randrange(3000))
    assert not has_new_letters(filler.encode())
    assert has_new_letters((filler + chr(rng.choice(new)) + "क"[: rng.randrange(2)]).encode())
    texts = [f"a {c}'ll {c}a1 {c} {c}".encode() for c in map(chr, new)]
    texts += [f"a {c}'ll {c}a1 {c} {c}".encode() for c in map(chr, rng.sample(places, 20_000))]
    wanted = reference.encode(texts)
    found = CheckedEncoder(fast, reference).encode(texts)
    assert all(map(np.array_equal, found, wanted))


def test_words_that_were_seen_do_not_fill_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(encoders, "_WORDS_MEMORY", 16 << 20)
    description = json.loads(tokenizer.tokenizer.to_str())
    fast, before = GigatokenEncoder(description, 1), encoders.resident_memory()
    if not before:
        pytest.skip("the system does not tell how much memory a process has")
    for start in range(0, 1_000_000, 10_000):
        fast.encode([f"{n} x{n}y".encode() for n in range(start, start + 10_000)])
    assert encoders.resident_memory() - before < 64 << 20  # 150 MB without
    reference = HuggingFaceEncoder(tokenizer.tokenizer, description)
    assert all(map(np.array_equal, fast.encode([b"a word"]), reference.encode([b"a word"])))


class _Wrong(GigatokenEncoder):
    """Another library's mistake: two tokens change places in texts that hold a word."""

    word = b"zebra"

    def encode(self, texts):
        ids, counts = super().encode(texts)
        ids = ids.copy()
        for number, end in enumerate(np.cumsum(counts)):
            if self.word in texts[number]:
                ids[[end - 1, end - 2]] = ids[[end - 2, end - 1]]
        return ids, counts


class _Lossy(GigatokenEncoder):
    """Another mistake: the end of each long text is lost."""

    def encode(self, texts):
        return super().encode([text[:1500] for text in texts])


def test_a_difference_ends_the_build(tokenizer, rng, monkeypatch):
    description = json.loads(tokenizer.tokenizer.to_str())
    reference = HuggingFaceEncoder(tokenizer.tokenizer, description)
    checked = CheckedEncoder(_Wrong(description, 1), reference)
    checked.encode([b"a horse", b"an ass"])
    with pytest.raises(
        UserError, match=r"gigatoken .*different token ids.*use --tokenizer-library"
    ):
        checked.encode([b"the striped zebra"] * 3)
    lossy = CheckedEncoder(_Lossy(description, 1), reference)
    with pytest.raises(UserError, match="different token ids"):
        lossy.encode([random_text(rng, 2000).encode()])
    monkeypatch.setattr(_Wrong, "word", b"end")
    with pytest.raises(UserError, match="its self-test"):
        CheckedEncoder(_Wrong(description, 1), reference)


@pytest.mark.parametrize("kind", ["normalizer", "no regex", "prefix space", "wordpiece", "added"])
def test_other_kinds_of_tokenizers_are_not_trusted(tmp_path, kind):
    tokenizer = Tokenizer(
        models.WordPiece(unk_token="[UNK]") if kind == "wordpiece" else models.BPE()
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=kind == "prefix space", use_regex=kind != "no regex"
    )
    if kind == "normalizer":
        tokenizer.normalizer = normalizers.NFKC()
    trainer = trainers.WordPieceTrainer if kind == "wordpiece" else trainers.BpeTrainer
    special = ["[UNK]", "<|eos|>"]
    tokenizer.train_from_iterator(["one two three"] * 3, trainer(special_tokens=special))
    if kind == "added":
        tokenizer.add_tokens(["one two"])
    tokenizer.save(str(tmp_path / "tok.json"))
    TextTokenizer(tmp_path / "tok.json")
    with pytest.raises(UserError, match=r"byte-level BPE.*--tokenizer-library huggingface"):
        TextTokenizer(tmp_path / "tok.json", library="gigatoken")
