"""Quality rules: each threshold from both sides, n-grams against counting them one by one."""

import random
import string
from collections import Counter

import pytest

from dataset.filters.quality import _RULES, PRESETS, RULES, QualityFilter, _Document
from utils.core.errors import UserError


def copies(kept: int, repeated: int, separator: str) -> str:
    """`kept` different words, of which the first is repeated."""
    return separator.join([*string.ascii_letters[:kept], *["a"] * repeated])


def copied_characters(others: int, separator: str) -> str:
    """20 characters, the same again, and others."""
    return separator.join(["a" * 20, "a" * 20, "b" * others])


def filler(characters: int) -> list[str]:
    """Different words, none of which a repeated n-gram has."""
    words = [f"{index:04}" for index in range(characters // 4)]
    return [*words, "+" * (characters % 4)] if characters % 4 else words


def copied_gram(size: int, share: int, characters: int) -> str:
    """A text of so many characters in which an n-gram of `share` characters occurs twice."""
    longer = share % size
    gram = [
        letter * (share // size + (index < longer))
        for index, letter in enumerate(string.ascii_letters[:size])
    ]
    return " ".join([*gram, *filler(characters - 2 * share), *gram])


BOUNDS = [
    ("word_count", "a " * 50, "a " * 49),
    ("word_count", "a " * 100_000, "a " * 100_001),
    ("mean_word_length", "abc " * 99, "abc " * 99 + "ab"),
    ("mean_word_length", "abcde-ghi. " * 10, "abcde-ghi. " * 9 + "abcde-ghijk"),
    ("symbol_ratio", "#a" + " a" * 9, "#a" + " a" * 8),
    ("symbol_ratio", "a..." + " a" * 9, "a..." + " a" * 8),
    ("symbol_ratio", "a… #" + " a" * 18 + "...", "a… #" + " a" * 17 + "..."),
    ("bullet_lines", "\n".join(["• a"] * 9 + ["a - b"]), "\n".join(["  - a"] * 10 + ["a"])),
    ("ellipsis_lines", "\n\n".join(["a... "] * 3 + ["a"] * 7), "\n".join(["a…"] * 4 + ["a"] * 9)),
    ("alphabetic_words", "42 -- " + "犬 4é x " * 2 + "a b", "42 -- " + "犬 4é x " * 2 + "a"),
    ("stop_words", "“The cat”,\nout (of)", "the cat the dog offers without andante"),
    ("duplicate_lines", copies(7, 3, "\n \n"), copies(9, 4, "\n\t")),
    ("duplicate_paragraphs", copies(7, 3, "\n\n"), copies(9, 4, "\n \n")),
    ("duplicate_line_characters", copied_characters(60, "\n"), copied_characters(59, "\n")),
    (
        "duplicate_paragraph_characters",
        copied_characters(60, "\n\n"),
        copied_characters(59, "\r\n\r\n"),
    ),
    *(
        (f"top_{size}_gram", copied_gram(size, share, 100), copied_gram(size, share, 99))
        for size, share in ((2, 10), (3, 9), (4, 8))
    ),
    *(
        (f"duplicate_{size}_grams", copied_gram(size, share, 100), copied_gram(size, share, 99))
        for size, share in ((5, 15), (6, 14), (7, 13), (8, 12), (9, 11), (10, 10))
    ),
]


@pytest.mark.parametrize(("rule", "good", "bad"), BOUNDS)
def test_each_bound_from_both_sides(rule, good, bad):
    quality = QualityFilter([rule])
    assert quality.find_broken_rule(good) is None
    assert quality.find_broken_rule(bad) == rule
    assert quality.counts == {rule: 1}


def test_every_rule_has_its_bounds_tested():
    assert {rule for rule, _, _ in BOUNDS} == set(RULES) == set(PRESETS["gopher"])
    assert RULES["word_count"] == "words: at least 50, at most 100,000"
    assert RULES["alphabetic_words"].endswith("at least 0.8")


def covered_share(words: list[str], starts: list[int], size: int) -> float:
    below = {place for start in starts for place in range(start, start + size)}
    return sum(len(words[place]) for place in below) / sum(map(len, words))


def naive_top_gram(words: list[str], size: int) -> float:
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    repeated = [(count, len("".join(gram)), gram) for gram, count in Counter(grams).items()]
    repeated = [entry for entry in repeated if entry[0] > 1]
    if not repeated:
        return 0.0
    # `max` takes the first of equals, and `Counter` has them in the order of the text.
    top = max(repeated, key=lambda entry: entry[:2])[2]
    return covered_share(words, [at for at, gram in enumerate(grams) if gram == top], size)


def naive_duplicate_grams(words: list[str], size: int) -> float:
    seen, starts = set(), []
    for start in range(len(words) - size + 1):
        gram = tuple(words[start : start + size])
        if gram in seen:
            starts.append(start)
        seen.add(gram)
    return covered_share(words, starts, size)


def test_n_grams_against_counting_them_one_by_one(rng):
    for _ in range(300):
        vocabulary = [letter * rng.randint(1, 4) for letter in string.ascii_letters]
        words = rng.choices(vocabulary[: rng.choice((1, 2, 3, 8, 52))], k=rng.randint(1, 60))
        for _ in range(rng.randrange(3)):  # passages that are repeated as a whole
            start = rng.randrange(len(words))
            words[rng.randrange(len(words)) :] += words[start : start + rng.randint(2, 30)]
        text = " ".join(words)
        document = _Document(text)  # one for all rules, as the filter has it
        for size in (4, 2, 3):
            assert _RULES[f"top_{size}_gram"].measure(document) == naive_top_gram(words, size)
        for size in (7, 5, 10, 6, 8, 9):
            measured = _RULES[f"duplicate_{size}_grams"].measure(document)
            assert measured == naive_duplicate_grams(words, size), (size, text)


def test_the_first_broken_rule_is_counted_whatever_the_order_of_names():
    quality = QualityFilter(["stop_words", "gopher_repetition", "word_count"])
    assert quality.enabled == ("word_count", "stop_words", *PRESETS["gopher_repetition"])
    assert quality.find_broken_rule("word " * 49) == "word_count"  # it is repetitive, too
    assert quality.find_broken_rule("word " * 50) == "stop_words"
    assert quality.find_broken_rule("word to be " * 50) == "top_2_gram"
    assert quality.find_broken_rule("") == "word_count"
    assert {name: n for name, n in quality.counts.items() if n} == {
        "word_count": 2, "stop_words": 1, "top_2_gram": 1,
    }  # fmt: skip


def test_no_rule_lets_everything_pass_and_blank_texts_break_none_by_accident():
    quality = QualityFilter([])
    assert not quality.enabled and quality.find_broken_rule("") is None
    for rule in RULES:
        broken = QualityFilter([rule]).find_broken_rule(" \n")
        assert (broken == rule) == (
            rule in ("word_count", "mean_word_length", "alphabetic_words", "stop_words")
        )


def test_rules_can_be_left_out_of_a_preset():
    names = QualityFilter(["no_stop_words", "gopher"]).enabled
    assert names == tuple(rule for rule in RULES if rule != "stop_words")
    assert QualityFilter(["gopher", "no_gopher_repetition"]).enabled == PRESETS["gopher_quality"]
    assert QualityFilter(["bullet_lines", "bullet_lines"]).enabled == ("bullet_lines",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gopher", "stop_word"], "quality rule 'stop_word'; did you mean 'stop_words'"),
        (["gopher", "no_stopwords"], "quality rule 'no_stopwords'; did you mean 'stop_words'"),
        (["c4"], "quality rule 'c4'; .* gopher, gopher_quality,"),
        ([""], "quality rule ''; .*gopher"),
        (["gopher_repetition", "no_stop_words"], "no_stop_words .* gopher no_stop_words"),
        (["stop_words", "no_stop_words"], "stop_words no_stop_words"),
    ],
)
def test_names_that_make_no_sense(names, message):
    with pytest.raises(UserError, match=message):
        QualityFilter(names)


def test_ordinary_prose_passes_and_a_menu_does_not():
    prose = (
        "It was the best of times, it was the worst of times, and nobody in the village had any "
        "idea which of them would have to be endured with more patience. The baker swore that his "
        "oven had never burned so badly; the priest rang one bell too many, as he did in all hard "
        "years. Only the children, who knew nothing of either, ran down to the river with a loaf."
    )
    quality = QualityFilter(["gopher"])
    assert quality.find_broken_rule(prose) is None
    menu = "\n".join(random.Random(0).choices(["Home", "Shop with us", "Contact to be"], k=60))
    assert quality.find_broken_rule(menu) == "duplicate_lines"
