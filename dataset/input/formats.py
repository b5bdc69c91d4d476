"""The text formats, by file extension or `--format`.

A user-defined format is a class in one file, given as `--format module@Class`, with the directory
of the file in `--plugins`; `TextFormat` is its interface.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from utils.core.errors import UserError
from utils.core.functions import load_class, nearest

if TYPE_CHECKING:
    from dataset.input.text_sources import Source

FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
NAMES = tuple(dict.fromkeys(FORMATS.values()))


class TextFormat(Protocol):
    """A user-defined format, constructed without arguments.

    extensions: file extensions of its files (`.srt`), without that of the compression.
    """

    extensions: Sequence[str]

    def documents(
        self, source: "Source", progress: Callable[[int], Any]
    ) -> Iterator[str | ValueError]:
        """Yield the documents of a file in order, the same ones in every call.

        An unusable record is yielded as a ValueError whose message describes the problem in a
        clause; `--max-bad-lines` decides whether it is skipped. Call `progress` with the number of
        bytes read since the last call; `read_lines(source, progress)` does so, and decompresses.
        """
        ...


def load_format(name: str) -> type[TextFormat]:
    """Return the class that `module@Class` names. Raises UserError if it is not a format."""
    found: Any = load_class(name, "dataset.input.")
    for attribute in ("extensions", "documents"):
        if not hasattr(found, attribute):
            raise UserError(
                f"--format {name}: the class has no '{attribute}', so it is not a format."
            )
    if isinstance(found.extensions, str) or not all(e.startswith(".") for e in found.extensions):
        raise UserError(
            f"--format {name}: extensions is {found.extensions!r}; write a list such as ['.srt']."
        )
    return found


def extensions_with(given: str | None) -> dict[str, str]:
    """Return the format of each file extension, including those of the given `--format`.

    Raises UserError if `given` is neither a known format nor the name of a class.
    """
    if given is None or given in NAMES:
        return FORMATS
    if "@" not in given:
        near = nearest(given, list(NAMES))
        advice = f"did you mean '{near}'?" if near else f"choose {', '.join(NAMES)}"
        raise UserError(f"--format {given} is unknown: {advice}, or module@Class with --plugins.")
    return FORMATS | dict.fromkeys((e.lower() for e in load_format(given).extensions), given)
