"""Keys and values that are kept change nothing, rows do not see each other, draws are right."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from seeds import draw_rng
from tokenizers import Tokenizer, decoders, models

from models.inference.generation import Decoder, Writer, draw, write
from models.inference.key_value_cache import cache_bytes
from models.inference.sampling import Sampling
from models.losses import ACTLossHead
from models.recursive_reasoning.athena_trm import AthenaTRM
from models.recursive_reasoning.transformer import Transformer
from utils.core.errors import UserError

S, V = 17, 29
ATHENA = dict(
    hidden_size=32, num_heads=4, expansion=2, H_cycles=2, L_cycles=2, L_layers=2,
    halt_max_steps=3, halt_exploration_prob=0.0,
)  # fmt: skip
VARIANTS = {
    "post": ATHENA,
    "pre": ATHENA | dict(norm_type="pre", L_layers=1),
    "identifiers": ATHENA | dict(puzzle_emb_ndim=40, num_key_value_heads=4),
    "learned positions, tied": ATHENA | dict(pos_encodings="learned", tie_embeddings=True),
    "refined": ATHENA | dict(post_refinement_steps=2, H_cycles=1),
    "unmasked": ATHENA | dict(document_mask=False, pos_encodings="none"),
    "transformer": dict(hidden_size=32, num_heads=4, expansion=2, num_layers=3, norm_type="pre"),
}


def make(options: dict, dtype: str = "float32") -> ACTLossHead:
    sizes = dict(batch_size=1, seq_len=S, vocab_size=V, num_puzzle_identifiers=4)
    kind = Transformer if "num_layers" in options else AthenaTRM
    model = kind(sizes | options | {"forward_dtype": dtype})
    if model.config.puzzle_emb_ndim:
        model.inner.puzzle_emb.weights.normal_()
    return ACTLossHead(model, "stablemax_cross_entropy").eval()


def steps_of(head: ACTLossHead) -> int:
    return head.model.eval_depth()


@torch.no_grad()
def whole_logits(head: ACTLossHead, text: list[int], identifier: int) -> torch.Tensor:
    """By the forward pass that training and evaluation use, on this text alone."""
    batch = {"inputs": torch.tensor([text]), "puzzle_identifiers": torch.tensor([identifier])}
    carry = head.model.initial_carry(batch)
    for _ in range(steps_of(head)):
        carry, outputs = head.model(carry, batch)
    return head.loss_type.softmax_logits(outputs["logits"][0, -1])


def random_text(length: int) -> list[int]:
    return torch.randint(2, V, (length,)).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype, bar", [("float32", 1e-5), ("float64", 1e-12)])
def test_kept_keys_and_values_change_nothing(variant, dtype, bar):
    """Prompts of different lengths in one batch, token by token to the end of the window.

    Weights at random blow up rounding now and then: to the bar comes five times what float32
    without a cache is itself away from float64, at the worst of these places.
    """
    head, precise = make(VARIANTS[variant], dtype), make(VARIANTS[variant], "float64")
    precise.load_state_dict(head.state_dict())
    texts, identifiers = [random_text(n) for n in (1, 4, 7)], torch.tensor([1, 3, 2])
    decoder = Decoder(head, identifiers, steps_of(head))
    found, apart, noise = decoder.begin(texts), [], []
    while True:
        for text, identifier, logits in zip(texts, identifiers, found, strict=True):
            expected = whole_logits(head, text, int(identifier))
            apart.append(float((logits - expected).abs().max()))
            truth = whole_logits(precise, text, int(identifier))
            noise.append(float((expected - truth).abs().max()))
        if len(texts[-1]) == S:
            break
        new = random_text(3)
        texts = [[*text, token] for text, token in zip(texts, new, strict=True)]
        found = decoder.extend(new)
    assert max(apart) < bar + 5 * max(noise)


@pytest.mark.parametrize("cached", [True, False])
def test_a_text_longer_than_the_window_goes_on_from_half_of_it(cached):
    head = make(VARIANTS["identifiers"], "float64")
    text = random_text(S)
    decoder = Decoder(head, torch.tensor([2]), 3, cached=cached)
    decoder.begin([text])
    for length in (S // 2, S // 2 + 1):  # of the window after the text has outgrown it
        text.append(int(random_text(1)[0]))
        found = decoder.extend([text[-1]])
        assert torch.allclose(found[0], whole_logits(head, text[-length:], 2), atol=1e-12)
    assert torch.allclose(
        Decoder(head, torch.tensor([2]), 3, cached=cached).begin([text])[0],
        whole_logits(head, text[-S:], 2),
        atol=1e-12,
    )


def test_a_shared_cache_is_an_approximation_and_as_large_as_said():
    head = make(ATHENA)
    exact, shared = (Decoder(head, torch.zeros(1).long(), 3, cache_cycles=c) for c in (None, 1))
    text = random_text(6)
    assert torch.equal(exact.begin([text]), shared.begin([text]))  # a prompt attends to itself
    assert not torch.allclose(exact.extend([5]), shared.extend([5]), atol=1e-5)
    assert len(exact.cache.slots) == 3 * 2 * 3 * 2 and len(shared.cache.slots) == 3 * 2
    all_cycles = Decoder(head, torch.zeros(1).long(), 3, cache_cycles=6)
    assert torch.equal(exact.begin([text]), all_cycles.begin([text]))
    for cycles in (None, 1, 2):
        decoder = Decoder(head, torch.zeros(2).long(), 3, cache_cycles=cycles)
        decoder.begin([text, text])
        taken = sum(part.nbytes for slot in decoder.cache.slots.values() for part in slot)
        positions = head.model.config.prefix_len + head.model.config.seq_len
        assert cache_bytes(head.model.inner, 2, positions, 3, cycles) == taken


# --- drawing -----------------------------------------------------------------------------------


def frequencies(logits, n=4000, **how) -> np.ndarray:
    generator, how = torch.Generator().manual_seed(0), Sampling(**how)
    drawn = [draw(torch.tensor(logits), generator, how) for _ in range(n)]
    return np.bincount(drawn, minlength=len(logits)) / n


def test_frequencies_follow_temperature_top_k_and_top_p():
    logits = [0.0, 1.0, 2.0, 3.0]
    p = torch.softmax(torch.tensor(logits) / 0.5, 0).numpy()
    for how, kept in (({}, [0, 1, 2, 3]), ({"top_k": 2}, [2, 3]), ({"top_p": 0.9}, [2, 3]),
                      ({"top_p": 0.1}, [3]), ({"top_p": 1.0}, [0, 1, 2, 3])):  # fmt: skip
        expected = np.where(np.isin(np.arange(4), kept), p, 0)
        found = frequencies(logits, temperature=0.5, **how)
        assert np.abs(found - expected / expected.sum()).max() < 0.03
        assert found[expected == 0].sum() == 0


def test_repetition_penalty_divides_what_is_likely_and_multiplies_what_is_not():
    how, generator = Sampling(temperature=0, repetition_penalty=2.0), torch.Generator()
    assert draw(torch.tensor([3.0, 2.0, -1.0]), generator, how, text=[0, 0]) == 1
    assert draw(torch.tensor([-1.0, -1.9]), generator, how, text=[0]) == 1
    assert draw(torch.tensor([-1.0, -2.1]), generator, how, text=[0]) == 0


@pytest.mark.parametrize(
    "how, drawn",
    [
        ({"temperature": 1e-45}, {1}),
        ({"temperature": 5e-324}, {1}),
        ({"temperature": 1e308}, {0, 1, 2, 3}),
        ({"temperature": 1.0, "top_p": 5e-324}, {1}),
        ({"temperature": 1.0, "repetition_penalty": 5e-324}, {0}),
        ({"temperature": 1.0, "repetition_penalty": 1e308}, {0, 1, 2}),
        ({"temperature": 0.0, "repetition_penalty": 5e-324}, {0}),
    ],
)
def test_extreme_values_draw_what_their_limits_would(how, drawn):
    logits, generator = torch.tensor([1.0, 3.0, 0.0, -2.0, 9.0]), torch.Generator().manual_seed(0)
    how = Sampling(**how)
    found = {draw(logits, generator, how, text=[0, 3], never=[4]) for _ in range(200)}
    assert found == drawn


def test_logits_that_are_not_finite_are_a_sentence():
    for value in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="not finite"):
            draw(torch.tensor([0.0, value]), torch.Generator(), Sampling())


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_that_is_accepted_works(seed):
    how = Sampling(seed=seed, max_new_tokens=1)
    assert len(write(CountsUp(), [[65], [66]], letters(), how, eos_id=None)) == 2
    for wrong in (-1, 2**64):
        with pytest.raises(ValidationError, match="seed"):
            Sampling(seed=wrong)


def test_forbidden_ids_are_never_drawn():
    logits, generator = torch.tensor([9.0, 0.0, 9.0, 0.1]), torch.Generator().manual_seed(0)
    for how in (dict(temperature=0), dict(temperature=2.0), dict(top_k=2), dict(top_p=0.5)):
        drawn = {draw(logits, generator, Sampling(**how), never=[0, 2]) for _ in range(50)}
        assert drawn <= {1, 3}


# --- texts -------------------------------------------------------------------------------------


def letters() -> Tokenizer:
    """A token a byte, spelled as byte-level tokenizers spell them; id 0 is padding, 1 is eos."""
    from dataset.common import byte_alphabet

    vocabulary = {"<pad>": 0, "<eos>": 1} | {c: 2 + b for c, b in byte_alphabet().items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def ids_of(text: str) -> list[int]:
    return [2 + byte for byte in text.encode()]


@pytest.mark.parametrize("stop, text", [([], "naïve → ünïcode."), (["STOP", "S!"], "a S a ST. b")])
def test_pieces_make_the_text_and_never_half_a_character(stop, text):
    writer, shown = Writer(letters(), ids_of("Ab"), stop), ""
    for token in ids_of(text):
        piece = writer.add(token)
        assert "\ufffd" not in piece
        shown += piece
        assert not any(shown.endswith(s[:1]) for s in stop)  # it may be one, so it waits
    assert shown + writer.finish() == text and not writer.ended


def test_a_stop_string_ends_the_text_before_it_wherever_tokens_part():
    writer, shown = Writer(letters(), ids_of("x"), ["\n\nQ", "END"]), ""
    for token in ids_of("one\n\ntwo\n\nQ: three END"):
        shown += writer.add(token)
        if writer.ended:
            break
    assert shown == writer.text == "one\n\ntwo"


BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def with_byte_fallback(strip: int = 1) -> Tokenizer:
    """Build a tokenizer of Llama 2's kind (strip=0: Gemma's); id N is byte N."""
    vocabulary = BYTES | {"▁": 256, "▁a": 257, "b": 258, "日": 259, "▁▁": 260, "\ufffd": 261}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="b"))
    stripped = [decoders.Strip(" ", strip, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer


def with_words(decoder=None) -> Tokenizer:
    words = ["a", "##b", "▁c", "▁", "日本", "d</w>", "▁▁", ".", "é"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


KINDS = {
    "byte level": (letters, 2),
    "byte fallback, Llama's": (with_byte_fallback, 0),
    "byte fallback, Gemma's": (lambda: with_byte_fallback(0), 0),
    "metaspace": (lambda: with_words(decoders.Metaspace()), None),
    "word pieces": (lambda: with_words(decoders.WordPiece()), None),
    "end of word": (lambda: with_words(decoders.BPEDecoder()), None),
    "words": (with_words, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_what_decoding_all_ids_at_once_gives(kind):
    """Random ids, among them bytes that form no character or only begin one."""
    make_tokenizer, first_byte = KINDS[kind]
    tokenizer, rng = make_tokenizer(), draw_rng()
    size = tokenizer.get_vocab_size()

    def random_ids(most: int) -> list[int]:
        ids: list[int] = []
        for _ in range(rng.integers(most + 1)):
            if first_byte is not None and rng.random() < 0.5:  # a character, perhaps cut
                data = str(rng.choice(list("é日🎉\n\ufffd "))).encode()
                ids += [first_byte + byte for byte in data[: rng.integers(1, 5)]]
            else:
                ids.append(int(rng.integers(size)))
        return ids

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    exact = 0
    for _ in range(400):
        ids, cut = random_ids(12), int(rng.integers(6))
        prompt, ids = ids[:cut], ids[cut:]
        writer, before, whole = Writer(tokenizer, prompt), decode(prompt), decode([*prompt, *ids])
        shown = "".join([writer.add(token) for token in ids]) + writer.finish()
        assert shown == writer.text and writer.ids == ids and not writer.ended
        assert whole.endswith(shown)
        if whole.startswith(before):  # no character of the prompt is completed or broken by it
            exact += 1
            assert before + shown == whole
    assert exact > 100


def test_bytes_of_a_character_are_held_back_and_shown_as_replaced_at_the_end():
    tokenizer = with_byte_fallback()
    prompt = list("日は".encode())
    writer = Writer(tokenizer, prompt)
    assert [writer.add(token) for token in (*"今".encode(), 257)] == ["", "", "", "今 a"]
    assert [writer.add(token) for token in "今".encode()[:2]] == ["", ""]
    assert writer.finish() == "\ufffd\ufffd" and writer.text == "今 a\ufffd\ufffd"
    # what the model adds to the prompt's last bytes costs the prompt nothing
    writer = Writer(tokenizer, prompt)
    assert [writer.add(0xE4), writer.add(258)] == ["", "\ufffdb"]
    # a character that the prompt began belongs to the text
    writer = Writer(letters(), ids_of("x🎉")[:-2])
    assert "".join(map(writer.add, ids_of("🎉y")[2:])) == "🎉y"


@pytest.mark.parametrize("make_tokenizer, first", [(with_byte_fallback, 0), (letters, 2)])
def test_a_stop_string_in_bytes_ends_the_text_at_once(make_tokenizer, first):
    writer, shown, taken = Writer(make_tokenizer(), [first + 65], ["\n\n", "本"]), "", 0
    for byte in "今\n日本\n\n".encode():
        shown += writer.add(first + byte)
        taken += 1
        if writer.ended:
            break
    assert shown + writer.finish() == writer.text == "今\n日" and taken == 10


class CountsUp:
    """Stands for a decoder whose model always says the next number."""

    def begin(self, texts):
        self.last = [text[-1] for text in texts]
        return self.logits()

    def extend(self, tokens):
        self.last = list(tokens)
        return self.logits()

    def logits(self):
        found = torch.full((len(self.last), 300), -50.0)
        for row, last in enumerate(self.last):
            found[row, last + 1] = 50.0
        return found


def test_eos_ends_a_row_and_is_not_part_of_it():
    rows = write(CountsUp(), [ids_of("a"), ids_of("e"), ids_of("q")], letters(),
                 Sampling(max_new_tokens=5), eos_id=ids_of("d")[0])  # fmt: skip
    assert [(row.text, row.ended) for row in rows] == [("bc", True), ("fghij", False),
                                                       ("rstuv", False)]  # fmt: skip


def test_bytes_that_form_no_character_cost_the_other_texts_nothing():
    """The first row goes on from the last byte of its prompt with bytes that can follow none."""
    prompts = [list("今日は".encode()), [ord("a")], list("é".encode())]
    rows = write(CountsUp(), prompts, with_byte_fallback(), Sampling(max_new_tokens=3), eos_id=None)
    assert [row.text for row in rows] == ["\ufffd" * 3, "bcd", "\ufffd" * 3]


@torch.no_grad()
def test_a_row_is_the_same_alone_and_among_others():
    head = make(VARIANTS["identifiers"], "float64")
    prompts, how = [random_text(n) for n in (3, 9, 5, 1)], Sampling(max_new_tokens=30, seed=7)

    def texts(rows: list[int]) -> list[list[int]]:
        decoder = Decoder(head, torch.zeros(len(rows)).long(), 3)
        chosen = [prompts[row] for row in rows]
        return [w.ids for w in write(decoder, chosen, letters(), how, eos_id=None, rows=rows)]

    together = texts([0, 1, 2, 3])
    assert texts([2]) == together[2:3] and texts([3, 1]) == [together[3], together[1]]
    assert len({tuple(ids) for ids in together}) == 4
