"""Text is text to every kind of tokenizer, and its bytes are those of the text."""

import json
import random
from itertools import pairwise, product

import pytest
from tokenizers import Tokenizer

from dataset.tokens.sizes import ids_of
from dataset.tokens.tokenization import TextTokenizer
from tests.dataset.conftest import WORDS, random_text
from tests.dataset.tokenizer_variants import CASES, LOSSLESS, LOSSY, MARKED, case
from tests.dataset.tokens.test_encoders import odd_text

ALL = LOSSLESS | MARKED | LOSSY
# Beside special tokens: what a normalizer turns into them, and what spells the piece of a byte.
SPELLED = ["</s>", "<pad>", "<unk>", "</S>", "＜/s＞", "<0x0A>", "<0xE6>", "the", "e", "\n"]


@pytest.fixture
def load(tmp_path):
    def load(name: str) -> TextTokenizer:
        ALL[name]().save(str(tmp_path / "tok.json"))
        return TextTokenizer(tmp_path / "tok.json")

    return load


def spelling_texts(rng: random.Random) -> list[str]:
    """Special tokens at the ends of a text, side by side, in each other, within words."""
    texts = [*SPELLED, *(a + b for a, b in product(SPELLED[:6], repeat=2))]
    for token in SPELLED:
        texts += [f"{token} a", f"a {token}", f"fox{token}fox", f"  {token}  ", f"▁{token}▁"]
    texts += ["<<pad>pad>", "</</s>s>", "<pad</s>>", "</s></s", "</s>!", "fox</s>! quick fox"]
    return texts + ["".join(rng.choices([*SPELLED, *WORDS, " "], k=30)) for _ in range(30)]


def special_ids(tokenizer: TextTokenizer) -> set[int]:
    added = json.loads(tokenizer.tokenizer.to_str())["added_tokens"]
    return {token["id"] for token in added if token["special"]} - {tokenizer.unknown_id}


@pytest.mark.parametrize("name", ALL)
def test_no_text_becomes_a_special_token(load, name, rng):
    tokenizer = load(name)
    texts = spelling_texts(rng)
    found = [set(ids.tolist()) for ids in tokenizer.encode(texts)]
    special = special_ids(tokenizer)
    assert {tokenizer.eos_id, tokenizer.pad_id} <= special
    for text, ids in zip(texts, found, strict=True):
        assert not ids & special, text
        assert max(ids, default=0) < tokenizer.vocab_size


@pytest.mark.parametrize("name", ALL)
def test_other_text_has_the_ids_that_the_library_gives(load, name, rng):
    tokenizer = load(name)
    reference = Tokenizer.from_file(str(tokenizer.path))
    reference.encode_special_tokens = True
    texts = [random_text(rng, rng.randrange(1, 40)) for _ in range(20)]
    texts += [odd_text(rng, rng.randrange(1, 200)) for _ in range(60)]
    special = [token.content for token in reference.get_added_tokens_decoder().values()]
    special += ["\n"] if "Ċ" in special else []
    texts = [t for t in texts if not any(token in t for token in [*SPELLED[:7], *special])]
    compared = 0
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        try:
            wanted = reference.encode(text, add_special_tokens=False).ids
        except Exception:  # it cannot encode a text with unknown parts, and the builders can
            continue
        assert ids.tolist() == wanted, text
        compared += 1
    assert compared or "no unk" in name


@pytest.mark.parametrize("name", LOSSLESS | MARKED)
def test_lossless_means_that_ids_tell_the_bytes(load, name, rng):
    tokenizer = load(name)
    assert tokenizer.lossless == (name in LOSSLESS)
    if tokenizer.lossless:
        assert tokenizer.encode_tokens(["a"])[0].dtype == tokenizer.dtype
    texts = [odd_text(rng, rng.randrange(1, 300)) for _ in range(60)] + spelling_texts(rng)
    texts = [text.replace("▁", "_") for text in texts]  # SentencePiece takes it for a space
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        extra = int(tokenizer.byte_lengths[ids].sum()) - len(text.encode())
        assert extra == 0 or (extra == 1 and "prefix" in name), text
        decoded = tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert decoded.lstrip(" ") == text.lstrip(" ")  # `<0x0A>` is no line feed


@pytest.mark.parametrize("name", MARKED | LOSSY)
def test_tokens_of_lossy_tokenizers_share_the_bytes_of_the_text(load, name, rng):
    tokenizer = load(name)
    assert not tokenizer.lossless
    texts = [odd_text(rng, rng.randrange(1, 300)) for _ in range(60)] + spelling_texts(rng)
    for text, tokens in zip(texts, tokenizer.encode_tokens(texts), strict=True):
        assert len(tokens) == 0 or tokens["bytes"].sum() == len(text.encode()), text
        assert (tokens["lost"] <= tokens["bytes"]).all()


@pytest.mark.parametrize("name", MARKED)
def test_a_literal_mark_of_a_space_has_its_bytes(load, name):
    """U+2581 is what these tokenizers write for a space: one id, three bytes or one."""
    tokenizer = load(name)
    texts = ["fox▁fox", "fox fox", "▁", "", " fox", "the ▁▁ fox"]
    found = tokenizer.encode_tokens(texts)
    assert [tokens["bytes"].sum() for tokens in found] == [9, 7, 3, 0, 4, 14]
    assert ids_of(found[0]).tolist() == ids_of(found[1]).tolist()
    assert not any(tokens["lost"].any() for tokens in found)


def test_each_token_has_the_text_up_to_the_next(rng):
    """By a plain loop over the library's own offsets."""
    path = CASES / "unigram.json"
    tokenizer, reference = TextTokenizer(path), Tokenizer.from_file(str(path))
    texts = [" ".join(odd_text(rng, 9) for _ in range(20)) for _ in range(30)]
    texts = [text for text in texts if "<" not in text]
    for text, tokens in zip(texts, tokenizer.encode_tokens(texts), strict=True):
        encoding = reference.encode(text, add_special_tokens=False)
        starts = [0, *(start for start, _ in encoding.offsets[1:]), len(text)]
        wanted = [len(text[begin:end].encode()) for begin, end in pairwise(starts)]
        assert ids_of(tokens).tolist() == encoding.ids
        assert tokens["bytes"].tolist() == wanted


def test_dropped_characters_belong_to_the_token_before():
    """The library counts on without them: `foo` of `helzfoo` would begin at its z."""
    tokenizer = TextTokenizer(CASES / "nounk.json")
    cases = {
        "helzfoo bar": (["hel", "foo", "bar"], [4, 4, 3], 2),
        "zzhello zz world": (["hello", "world"], [11, 5], 6),
        "犬hello, wor犬ld!": (["hello", "world"], [10, 9], 9),
        "zz !": ([], [], 0),
    }
    for text, (names, sizes, lost) in cases.items():
        tokens = tokenizer.encode_tokens([text])[0]
        assert [tokenizer.tokenizer.id_to_token(i) for i in tokens["id"].tolist()] == names
        assert (tokens["bytes"].tolist(), tokens["lost"].sum()) == (sizes, lost)


def test_what_has_no_other_spelling_is_unknown():
    """`<` and `/` are in the vocabulary of one, and in no token of the other."""
    tokenizer = TextTokenizer(CASES / "unigram.json")
    tokens = tokenizer.encode_tokens(["a </s>"])[0]
    names = [tokenizer.tokenizer.id_to_token(i) for i in tokens["id"].tolist()]
    assert names == ["▁a", "▁", "<unk>", "s", "<unk>"]
    assert tokens["bytes"].tolist() == [1, 1, 2, 1, 1]


def test_the_saved_tokenizer_is_the_original(tmp_path):
    TextTokenizer(CASES / "unigram.json").save(tmp_path / "tok.json")
    assert json.loads((tmp_path / "tok.json").read_text("utf-8")) == json.loads(
        case("unigram").to_str()
    )
