"""The documentation is plain English: phrases that readers stumble over stay out of it.

To hold other text to the list, add its files to `pages`.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What to avoid, as a pattern, and what to write instead. Lines may break within a phrase.
PHRASES = {
    r"anew": "again, from scratch",
    r"mend(s|ed|ing)?": "fix, repair",
    r"(go(es|ing)?|gone|went) on with": "resume, continue",
    r"so many": "this many, or the number",
    r"without a word": "silently",
    r"(?<!there\s)is no (folder|file|directory|number|tokenizer)": "is not a file, does not exist",
    r"in the days of": "during, while",
    r"tell(s|ing)? of": "report, describe",
    r"told of": "reported",
}


def pages() -> list[Path]:
    """Return the files that users read."""
    names = ("README.md", "TPU_SETUP.md", "CHANGELOG.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").glob("*.md"))]


def avoidable(text: str) -> list[str]:
    """Return the phrases of PHRASES in `text`, each with its line and what to write instead."""
    found = []
    for phrase, better in PHRASES.items():
        pattern = rf"\b{phrase}\b".replace(" ", r"\s+")
        for match in re.finditer(pattern, text, re.I):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{line}: {' '.join(match[0].split())!r}; better: {better}")
    return found


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_documents_are_plain_english(page):
    found = avoidable(page.read_text("utf-8"))
    assert not found, f"{page.name}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "Trained anew.",
        "once that is mended",
        "the same command goes on\nwith it",
        "after so many steps",
        "stops without\n  a word",
        "x is no directory",
        "In the days of a run",
        "It tells of faults",
        "a job is told of",
    ],
)
def test_each_phrase_is_found(text):
    assert avoidable(text)


def test_other_words_are_left_alone():
    assert not avoidable("It recommends renewed amendments; there is no file, and many so.")
