"""Documentation and source are plain English: phrases and names that readers stumble over stay out
of them."""

import ast
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


NAMES = frozenset(
    "settled resolved examined adopted beside grown ticking prefetched placed prefixed spread "
    "as_trained moved_ahead told tell say leave ending perhaps_any taking_turns".split()
)


def pages() -> list[Path]:
    """Return the files that users read."""
    names = ("README.md", "TPU_SETUP.md", "CHANGELOG.md")
    return [*(ROOT / name for name in names), *sorted((ROOT / "docs").glob("*.md"))]


def sources() -> list[Path]:
    """Return the product's source, presets and scripts."""
    folders = ("config", "dataset", "evaluators", "models", "scripts", "utils")
    found = [path for name in folders for path in (ROOT / name).rglob("*")]
    found += [ROOT / "pretrain.py", ROOT / "sequence_dataset.py", ROOT / "Makefile"]
    return sorted(path for path in found if path.suffix in (".py", ".yaml", ".sh", ""))


def avoidable(text: str) -> list[str]:
    """Return the phrases of PHRASES in `text`, each with its line and what to write instead."""
    found = []
    for phrase, better in PHRASES.items():
        pattern = rf"\b{phrase}\b".replace(" ", r"\s+")
        for match in re.finditer(pattern, text, re.I):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{line}: {' '.join(match[0].split())!r}; better: {better}")
    return found


def test_source_is_plain_english():
    found = {
        str(path.relative_to(ROOT)): faults
        for path in sources()
        if path.is_file() and (faults := avoidable(path.read_text("utf-8")))
    }
    assert not found


def test_functions_are_verbs():
    """These names are participles, or say nothing of what the function does."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sources()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name in NAMES
    ]
    assert not found


# How a docstring begins that says what a function is, and not what it does.
NOUNS = frozenset(
    "A The An What Whether Of As How All Each One Every In Where Which Who Not Only If For To That "
    "On By From It No Its Like This Those Several Two Called With Without When At".split()
)


def test_docstrings_of_functions_begin_with_a_verb():
    found = []
    for path in sources():
        tree = ast.parse(path.read_text("utf-8") if path.suffix == ".py" else "")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or is_property(node):
                continue
            word = (ast.get_docstring(node) or "Do").split()[0].strip(".,:;`'(")
            if word in NOUNS or not word[:1].isupper():
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {word}")
    assert not found


def is_property(function: ast.FunctionDef) -> bool:
    names = {getattr(d, "id", getattr(d, "attr", "")) for d in function.decorator_list}
    return bool(names & {"property", "cached_property"})


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
