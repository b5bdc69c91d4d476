"""Quality filters based on the published rules of Gopher.

Thresholds follow Rae et al. 2021 (arXiv 2112.11446, appendix A.1 and table A1). The paper leaves
some terms undefined; here

- words are separated by white space, so the rules do not apply to scripts without spaces;
- blank lines and paragraphs are ignored; all but the first of equal ones are duplicates;
- an n-gram is a sequence of n words. All but the first of equal n-grams are duplicates, characters
  covered by several of them count once, and an n-gram that occurs once is not a repetition;
- characters in n-grams are a share of the characters of all words, excluding white space.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count

import numpy as np

from utils.core.errors import UserError
from utils.core.functions import suggest

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "‣", "◦", "▪", "●", "-", "*")
ELLIPSES = ("...", "…")
LETTER = re.compile(r"[^\W\d_]")
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
NOT_IN_A_WORD = ".,;:!?\"'()[]{}*_-–—“”‘’«»…"


class _Document:
    """Lazily computed views of one text that the rules need."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.split()
        self._first: dict[str, int] = {}

    @cached_property
    def word_ids(self) -> np.ndarray:
        """Position of each word's first occurrence, (words,) int64."""
        numbered = map(self._first.setdefault, self.words, count())
        return np.fromiter(numbered, np.int64, len(self.words))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of each distinct word."""
        assert len(self.word_ids) == len(self.words)  # numbering fills the vocabulary
        return self._first

    @cached_property
    def word_counts(self) -> np.ndarray:
        """Number of occurrences of each word, by id, (words,) int64."""
        return np.bincount(self.word_ids, minlength=len(self.words))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Number of characters before each word, (words + 1,) int64; the last entry is the
        total.
        """
        offsets = np.zeros(len(self.words) + 1, np.int64)
        lengths = np.fromiter(map(len, self.words), np.int64, len(self.words))
        np.cumsum(lengths, out=offsets[1:])
        return offsets

    @cached_property
    def lines(self) -> list[str]:
        return [line for raw in self.text.splitlines() if (line := raw.strip())]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part for raw in PARAGRAPH_BREAK.split(self.text) if (part := raw.strip())]

    @cached_property
    def _levels(self) -> list[tuple[np.ndarray, np.ndarray]]:
        starts = np.flatnonzero(self.word_counts[self.word_ids] > 1)
        return [(starts, self.word_ids[starts])]

    def find_repeated_grams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the start words (n,), ascending, and ids (n,) of n-grams that occur repeatedly.

        Built up from shorter n-grams: an n-gram can only repeat if it repeats without its last word
        and without its first word, so little is left to sort beyond 2-grams.
        """
        while len(self._levels) < size:
            self._levels.append(self._extend_grams(*self._levels[-1], len(self._levels)))
        return self._levels[size - 1]

    def _extend_grams(
        self, starts: np.ndarray, ids: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        if not len(starts):
            return starts, ids
        repeated = np.zeros(len(self.words) + 1, bool)
        repeated[starts] = True
        candidates = repeated[starts + 1]
        starts = starts[candidates]
        pairs = ids[candidates] * len(self.words) + self.word_ids[starts + size]
        _, ids, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        kept = counts[ids] > 1
        return starts[kept], ids[kept]

    def compute_coverage(self, starts: np.ndarray, size: int) -> float:
        """Return the share of characters in n-grams that start at `starts` (n,), ascending."""
        if not len(starts):
            return 0.0
        ends = np.minimum(starts + size, np.append(starts[1:], len(self.words)))
        return int((self.offsets[ends] - self.offsets[starts]).sum()) / int(self.offsets[-1])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _share_of_lines(document: _Document, meets: Callable[[str], bool]) -> float:
    return _share(sum(map(meets, document.lines)), len(document.lines))


def _symbol_ratio(document: _Document) -> float:
    ellipses = sum(map(document.text.count, ELLIPSES))
    return _share(max(document.text.count("#"), ellipses), len(document.words))


def _alphabetic_words(document: _Document) -> float:
    without = [
        index
        for word, index in document.vocabulary.items()
        if not (word[0].isalpha() or LETTER.search(word))
    ]
    words = len(document.words)
    return _share(words - int(document.word_counts[without].sum()), words)


def _stop_words(document: _Document) -> float:
    found = sum(word in document.vocabulary for word in STOP_WORDS)
    if found >= 2:  # nearly always, so that stripping is rarely needed
        return found
    bare = {word.strip(NOT_IN_A_WORD).lower() for word in document.vocabulary}
    return sum(word in bare for word in STOP_WORDS)


def _duplicate_share(parts: list[str]) -> float:
    return _share(len(parts) - len(set(parts)), len(parts))


def _duplicate_character_share(parts: list[str]) -> float:
    characters = sum(map(len, parts))
    return _share(characters - sum(map(len, set(parts))), characters)


def _top_gram(document: _Document, size: int) -> float:
    """Measure the most frequent n-gram; the longest wins ties."""
    starts, ids = document.find_repeated_grams(size)
    if not len(starts):
        return 0.0
    counts = np.bincount(ids)[ids]
    lengths = document.offsets[starts + size] - document.offsets[starts]
    top = ids[np.where(counts == counts.max(), lengths, 0).argmax()]
    return document.compute_coverage(starts[ids == top], size)


def _duplicate_grams(document: _Document, size: int) -> float:
    starts, ids = document.find_repeated_grams(size)
    if not len(starts):
        return 0.0
    first = np.empty(ids.max() + 1, np.int64)
    first[ids[::-1]] = starts[::-1]  # the last of several assignments wins
    return document.compute_coverage(starts[starts > first[ids]], size)


@dataclass(frozen=True)
class _Rule:
    """A text passes if low <= measure <= high."""

    meaning: str
    measure: Callable[[_Document], float]
    low: float = 0
    high: float = float("inf")

    @property
    def description(self) -> str:
        if self.high == float("inf"):
            return f"{self.meaning}: at least {self.low:g}"
        low = f"at least {self.low:g}, " if self.low else ""
        return f"{self.meaning}: {low}at most {self.high:,g}"


_QUALITY = {
    "word_count": _Rule("words", lambda d: len(d.words), 50, 100_000),
    "mean_word_length": _Rule(
        "mean word length in characters (English)",
        lambda d: _share(int(d.offsets[-1]), len(d.words)),
        low=3,
        high=10,
    ),
    "symbol_ratio": _Rule("number of # signs or ellipses per word", _symbol_ratio, high=0.1),
    "bullet_lines": _Rule(
        "share of lines that start with a bullet",
        lambda d: _share_of_lines(d, lambda line: line.startswith(BULLETS)),
        high=0.9,
    ),
    "ellipsis_lines": _Rule(
        "share of lines that end with an ellipsis",
        lambda d: _share_of_lines(d, lambda line: line.endswith(ELLIPSES)),
        high=0.3,
    ),
    "alphabetic_words": _Rule("share of words with a letter", _alphabetic_words, low=0.8),
    "stop_words": _Rule(
        f"distinct words among {' '.join(STOP_WORDS)} (English)", _stop_words, low=2
    ),
}
_REPETITION = {
    "duplicate_lines": _Rule(
        "share of duplicate lines", lambda d: _duplicate_share(d.lines), high=0.3
    ),
    "duplicate_paragraphs": _Rule(
        "share of duplicate paragraphs", lambda d: _duplicate_share(d.paragraphs), high=0.3
    ),
    "duplicate_line_characters": _Rule(
        "share of characters in duplicate lines",
        lambda d: _duplicate_character_share(d.lines),
        high=0.2,
    ),
    "duplicate_paragraph_characters": _Rule(
        "share of characters in duplicate paragraphs",
        lambda d: _duplicate_character_share(d.paragraphs),
        high=0.2,
    ),
    **{
        f"top_{size}_gram": _Rule(
            f"share of characters in the most frequent word {size}-gram",
            partial(_top_gram, size=size),
            high=high,
        )
        for size, high in ((2, 0.2), (3, 0.18), (4, 0.16))
    },
    **{
        f"duplicate_{size}_grams": _Rule(
            f"share of characters in duplicate word {size}-grams",
            partial(_duplicate_grams, size=size),
            high=high,
        )
        for size, high in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    },
}
_RULES = {**_QUALITY, **_REPETITION}

RULES: dict[str, str] = {name: rule.description for name, rule in _RULES.items()}
"""Description of each rule, with its bounds, in the order in which rules are applied."""

PRESETS: dict[str, tuple[str, ...]] = {
    "gopher": tuple(_RULES),
    "gopher_quality": tuple(_QUALITY),
    "gopher_repetition": tuple(_REPETITION),
}
EXCLUDE_PREFIX = "no_"
"""Prefix of a rule or preset to exclude."""


def select_rules(names: Sequence[str]) -> tuple[str, ...]:
    """Return the rules selected by names of rules and presets, in the order of `RULES`.

    Names that start with `no_` exclude rules.
    """
    wanted: set[str] = set()
    excluded: set[str] = set()
    for name in names:
        plain = name.removeprefix(EXCLUDE_PREFIX)
        rules = PRESETS.get(plain, (plain,))
        if not RULES.keys() >= set(rules):
            raise UserError(f"unknown quality rule {name!r}; {suggest(plain, [*PRESETS, *RULES])}")
        (wanted if name == plain else excluded).update(rules)
    if idle := [rule for rule in RULES if rule in excluded and rule not in wanted]:
        raise UserError(
            f"{EXCLUDE_PREFIX}{idle[0]} excludes a quality rule that is not enabled; combine it "
            f"with a preset, as in: gopher {EXCLUDE_PREFIX}{idle[0]}."
        )
    if names and not wanted - excluded:
        raise UserError(
            f"quality rules {' '.join(names)} exclude every rule; omit the option instead."
        )
    return tuple(rule for rule in RULES if rule in wanted - excluded)


class QualityFilter:
    """Finds the first rule that a text breaks, and counts texts per rule.

    `names` are rules and presets; `no_<name>` excludes one. Without names all texts pass.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.enabled = select_rules(names)
        """Names of the enabled rules, in the order in which they are applied."""
        self.counts = dict.fromkeys(self.enabled, 0)
        """Number of rejected texts by the first rule they broke."""

    def find_broken_rule(self, text: str) -> str | None:
        """Return and count the first rule that the text breaks; None if it passes."""
        if not self.enabled:
            return None
        document = _Document(text)
        for name in self.enabled:
            rule = _RULES[name]
            if not rule.low <= rule.measure(document) <= rule.high:
                self.counts[name] += 1
                return name
        return None
