"""Quality rules: which documents are worth learning from, by the published rules of Gopher.

The thresholds are those of Rae et al. 2021 (arXiv 2112.11446, appendix A.1 and table A1). The paper
leaves some terms open; here

- a word is what white space separates, so the rules mean nothing for scripts without spaces;
- blank lines and paragraphs do not count, and of equal ones all but the first are duplicates;
- an n-gram is a run of n words. Of equal n-grams all but the first are duplicates, characters
  below several of them count once, and one that occurs only once is no repetition;
- characters in n-grams are a share of the characters of all words, white space left out.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from typing import Any

import numpy as np

from utils.core.errors import UserError

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "‣", "◦", "▪", "●", "-", "*")
ELLIPSES = ("...", "…")
LETTER = re.compile(r"[^\W\d_]")
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
NOT_IN_A_WORD = ".,;:!?\"'()[]{}*_-–—“”‘’«»…"


class _Document:
    """One text as the rules look at it; each view is made when the first rule asks for it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = text.split()
        self._first: dict[str, int] = {}

    @cached_property
    def word_ids(self) -> np.ndarray:
        """(words,) int64: place of each word's first occurrence."""
        numbered = map(self._first.setdefault, self.words, count())
        return np.fromiter(numbered, np.int64, len(self.words))

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of each distinct word."""
        assert len(self.word_ids) == len(self.words)  # numbering fills the vocabulary
        return self._first

    @cached_property
    def word_counts(self) -> np.ndarray:
        """(words,) int64: occurrences of the word with this id."""
        return np.bincount(self.word_ids, minlength=len(self.words))

    @cached_property
    def offsets(self) -> np.ndarray:
        """(words + 1,) int64: characters before each word and, last, of all words."""
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

    def repeated_grams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """First words (n,), ascending, of the n-grams that occur more than once; ids (n,) of these.

        Built up from shorter ones: an n-gram can only be repeated where both the n-gram without its
        last word and the one without its first are, so that little is left to sort after 2-grams.
        """
        while len(self._levels) < size:
            self._levels.append(self._one_word_longer(*self._levels[-1], len(self._levels)))
        return self._levels[size - 1]

    def _one_word_longer(
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

    def covered_share(self, starts: np.ndarray, size: int) -> float:
        """Share of the words' characters below n-grams that start at `starts` (n,), ascending."""
        if not len(starts):
            return 0.0
        ends = np.minimum(starts + size, np.append(starts[1:], len(self.words)))
        return int((self.offsets[ends] - self.offsets[starts]).sum()) / int(self.offsets[-1])


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _word_count(document: _Document) -> float:
    return len(document.words)


def _mean_word_length(document: _Document) -> float:
    return _share(int(document.offsets[-1]), len(document.words))


def _symbol_ratio(document: _Document) -> float:
    ellipses = sum(map(document.text.count, ELLIPSES))
    return _share(max(document.text.count("#"), ellipses), len(document.words))


def _bullet_lines(document: _Document) -> float:
    return _share(sum(line.startswith(BULLETS) for line in document.lines), len(document.lines))


def _ellipsis_lines(document: _Document) -> float:
    return _share(sum(line.endswith(ELLIPSES) for line in document.lines), len(document.lines))


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
    if found >= 2:  # nearly always, and then nothing has to be stripped
        return found
    bare = {word.strip(NOT_IN_A_WORD).lower() for word in document.vocabulary}
    return sum(word in bare for word in STOP_WORDS)


def _duplicate_share(parts: list[str]) -> float:
    return _share(len(parts) - len(set(parts)), len(parts))


def _duplicate_character_share(parts: list[str]) -> float:
    characters = sum(map(len, parts))
    return _share(characters - sum(map(len, set(parts))), characters)


def _top_gram(document: _Document, size: int) -> float:
    """Of several n-grams that are equally frequent, the one of the most characters counts."""
    starts, ids = document.repeated_grams(size)
    if not len(starts):
        return 0.0
    counts = np.bincount(ids)[ids]
    lengths = document.offsets[starts + size] - document.offsets[starts]
    top = ids[np.where(counts == counts.max(), lengths, 0).argmax()]
    return document.covered_share(starts[ids == top], size)


def _duplicate_grams(document: _Document, size: int) -> float:
    starts, ids = document.repeated_grams(size)
    if not len(starts):
        return 0.0
    first = np.empty(ids.max() + 1, np.int64)
    first[ids[::-1]] = starts[::-1]  # of several assignments the last one stays
    return document.covered_share(starts[starts > first[ids]], size)


@dataclass(frozen=True)
class _Rule:
    """A text passes where low <= measure <= high."""

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
    "word_count": _Rule("words", _word_count, 50, 100_000),
    "mean_word_length": _Rule("mean characters of a word (English)", _mean_word_length, 3, 10),
    "symbol_ratio": _Rule("# signs, or ellipses, per word", _symbol_ratio, high=0.1),
    "bullet_lines": _Rule("share of lines that start with a bullet", _bullet_lines, high=0.9),
    "ellipsis_lines": _Rule("share of lines that end with an ellipsis", _ellipsis_lines, high=0.3),
    "alphabetic_words": _Rule("share of words with a letter", _alphabetic_words, low=0.8),
    "stop_words": _Rule(f"different words of {' '.join(STOP_WORDS)} (English)", _stop_words, low=2),
}
_REPETITION = {
    "duplicate_lines": _Rule(
        "share of lines that came before", lambda d: _duplicate_share(d.lines), high=0.3
    ),
    "duplicate_paragraphs": _Rule(
        "share of paragraphs that came before", lambda d: _duplicate_share(d.paragraphs), high=0.3
    ),
    "duplicate_line_characters": _Rule(
        "share of characters in lines that came before",
        lambda d: _duplicate_character_share(d.lines),
        high=0.2,
    ),
    "duplicate_paragraph_characters": _Rule(
        "share of characters in paragraphs that came before",
        lambda d: _duplicate_character_share(d.paragraphs),
        high=0.2,
    ),
    **{
        f"top_{size}_gram": _Rule(
            f"share of characters in the most frequent {size}-gram of words",
            partial(_top_gram, size=size),
            high=high,
        )
        for size, high in ((2, 0.2), (3, 0.18), (4, 0.16))
    },
    **{
        f"duplicate_{size}_grams": _Rule(
            f"share of characters in {size}-grams of words that came before",
            partial(_duplicate_grams, size=size),
            high=high,
        )
        for size, high in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    },
}
_RULES = {**_QUALITY, **_REPETITION}

RULES: dict[str, str] = {name: rule.description for name, rule in _RULES.items()}
"""What each rule measures and the bounds it sets, in the order in which rules are tried."""

PRESETS: dict[str, tuple[str, ...]] = {
    "gopher": tuple(_RULES),
    "gopher_quality": tuple(_QUALITY),
    "gopher_repetition": tuple(_REPETITION),
}
LEAVE_OUT = "no_"
"""In front of a name: leave that rule, or that preset's rules, out of the others."""


def _way_out(name: str) -> str:
    known = [*PRESETS, *RULES]
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {near[0]}?"
    return f"name any of {', '.join(known)}, or one after {LEAVE_OUT} to leave it out."


def select_rules(names: Sequence[str]) -> tuple[str, ...]:
    """Rules that names of rules and presets ask for, less those after `no_`, in the fixed order."""
    wanted: set[str] = set()
    left_out: set[str] = set()
    for name in names:
        plain = name.removeprefix(LEAVE_OUT)
        rules = PRESETS.get(plain, (plain,))
        if not RULES.keys() >= set(rules):
            raise UserError(f"there is no quality rule {name!r}; {_way_out(plain)}")
        (wanted if name == plain else left_out).update(rules)
    if idle := [rule for rule in RULES if rule in left_out and rule not in wanted]:
        raise UserError(
            f"{LEAVE_OUT}{idle[0]} leaves out a quality rule that no other name puts in; name a "
            f"preset beside it, as in: gopher {LEAVE_OUT}{idle[0]}."
        )
    if names and not wanted - left_out:
        raise UserError(f"quality rules {' '.join(names)} leave no rule; name none at all instead.")
    return tuple(rule for rule in RULES if rule in wanted - left_out)


class QualityFilter:
    """Finds the first rule that a text breaks, and counts texts per rule.

    `names` are those of rules and presets; `no_<name>` leaves one out. No names: all texts pass.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.enabled = select_rules(names)
        """Names of the rules in the order in which they are tried; empty: none is."""
        self.counts = dict.fromkeys(self.enabled, 0)
        """Texts by the first rule that they broke."""

    def broken_rule(self, text: str) -> str | None:
        """Name of the first rule that the text breaks, which is counted; None if it passes."""
        if not self.enabled:
            return None
        document = _Document(text)
        for name in self.enabled:
            rule = _RULES[name]
            if not rule.low <= rule.measure(document) <= rule.high:
                self.counts[name] += 1
                return name
        return None

    def state_dict(self) -> dict[str, Any]:
        """The counts so far, for JSON."""
        return {"counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a state; `UserError` if it was made under other rules."""
        if state["counts"].keys() != self.counts.keys():
            raise UserError(
                f"the saved state counts the quality rules {', '.join(state['counts']) or 'none'}, "
                f"but {', '.join(self.enabled) or 'none'} are asked for; use the former, or begin "
                "again."
            )
        self.counts = {name: int(state["counts"][name]) for name in self.enabled}
